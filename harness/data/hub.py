"""Files of a Hugging Face dataset at one commit, through `huggingface_hub`; needs a network once."""

from __future__ import annotations

import logging
from pathlib import Path

from harness.data.recipe import Source
from harness.errors import EnvironmentFault


def fetched(source: Source, *, quiet: bool = False) -> Path | None:
    """The folder that holds the files of ``source.hub``, downloaded where they were not; None without a hub.

    Raises `EnvironmentFault` when the library, the network or the dataset is missing.
    """
    if source.hub is None:
        return None
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise EnvironmentFault(
            "source.hub needs huggingface_hub", remedy="pip install huggingface_hub"
        ) from error
    name, _, commit = source.hub.partition("@")
    if quiet:
        disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each retry
    try:
        folder = snapshot_download(name, repo_type="dataset", revision=commit, allow_patterns=source.files)
    except Exception as error:  # its errors have no root of their own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentFault(
            f"the dataset cannot be downloaded: {first}",
            where=source.hub,
            remedy="check the network, or download the files and name them in source.files",
        ) from error
    return Path(folder)
