"""The raw files of a recipe, digested: what a prepared corpus is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.cores import process_cpu_count
from harness.data.corpus import Files, WheelFiles, files_digest, files_of
from harness.data.recipe import Recipe
from harness.terminal import progress


@dataclass(frozen=True)
class Snapshot:
    """The raw files, digested."""

    digests: Mapping[str, str]
    sizes: Mapping[str, int]
    code: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Of all the files, and of the code that names them."""
        return files_digest({**self.digests, **self.code})


def take(recipe: Recipe, base: Path, quiet: bool) -> Snapshot:
    """Digest the raw files in the folder ``base``, in threads: hashing holds no lock.

    Raises `ConfigError` for a file that cannot be read, `VerificationFailed` for a wheel that differs from
    its RECORD.
    """
    source, code = files_of(recipe.data, base)
    names = list(source.names())
    digests, sizes, left = {}, {}, recipe.source.limit_bytes
    with (
        progress(len(names), "files", "digesting", quiet=quiet) as bar,
        ThreadPoolExecutor(recipe.workers or process_cpu_count()) as pool,
    ):
        for name, (digest, size) in zip(names, pool.map(partial(_digested, source), names), strict=True):
            digests[name], sizes[name] = digest, size
            bar.advance(1)
            left = None if left is None else left - size
            if left is not None and left <= 0:
                pool.shutdown(cancel_futures=True)
                break
    if isinstance(source, WheelFiles):
        source.check(digests)
    return Snapshot(digests, sizes, code)


def _digested(source: Files, name: str) -> tuple[str, int]:
    content = source.read(name)
    return hashlib.sha256(content).hexdigest(), len(content)
