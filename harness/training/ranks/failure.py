"""The root cause of a failure, where people and torchrun look for it.

Each rank writes its traceback to events/, and the one line to the file that torchrun names in
TORCHELASTIC_ERROR_FILE, from which torchrun prints the first failure last on the screen.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import closing
from pathlib import Path

from harness.errors import (
    EnvironmentFault,
    HarnessError,
    Interrupted,
    PeerLost,
    TrainingFailed,
    is_storage,
    storage_fault,
)
from harness.format.layout import RunFolder
from harness.terminal import tell
from harness.training.telemetry.metrics import Events

_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "Socket Timeout",
)


def is_lost_peer(error: Exception) -> bool:
    """Whether ``error`` is what a collective raises when another rank is gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER)


def explain(error: Exception | SystemExit, run_dir: Path) -> HarnessError:
    """An unexpected ``error`` of the run in ``run_dir`` as one line; its cause keeps the traceback."""
    rank = int(os.environ.get("RANK", "0"))
    text = " ".join(str(error).split())
    explained: HarnessError
    if type(error).__name__ == "OutOfMemoryError":
        remedy = "lower train.micro_batch (the global batch stays), or train.activation_checkpointing=true"
        explained = EnvironmentFault(f"out of GPU memory: {text[:200]}", where=f"rank {rank}", remedy=remedy)
    elif isinstance(error, Exception) and is_lost_peer(error):
        explained = EnvironmentFault(
            f"rank {rank} lost its peers",
            where=text[:120],
            remedy="another rank failed or was killed first: its line is above, its traceback in events/",
        )
    elif isinstance(error, OSError) and (is_storage(error) or _lies_in(run_dir, error)):
        explained = storage_fault(error, "using the run folder", run_dir)
    else:
        remedy = "the traceback is in the run folder's events/; resume with the same command once fixed"
        explained = TrainingFailed(f"{type(error).__name__}: {text}", where=f"rank {rank}", remedy=remedy)
    explained.__cause__ = error
    return explained


def _lies_in(folder: Path, error: OSError) -> bool:
    """Whether ``error`` is about a file of ``folder``: missing, unreadable, a folder in its place."""
    named = isinstance(error.filename, str | os.PathLike)
    return named and Path(error.filename).absolute().is_relative_to(folder.absolute())


def report(error: HarnessError, run_dir: Path) -> None:
    """Write ``error`` to this rank's events and, under torchrun, to its error file.

    A disk that takes neither does not hide what nobody foresaw: its traceback then goes to stderr.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        if run_dir.is_dir():
            with closing(Events(RunFolder(run_dir).events(rank))) as events:
                events.failure(error)
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path and (not isinstance(error, Interrupted) or isinstance(error, PeerLost)):
            _write_error_file(Path(path), error)
    except OSError as unwritten:
        if not isinstance(error, TrainingFailed):
            return  # its line says it all
        said = "".join(traceback.format_exception(error))
        tell(f"{said}harness: not written to events/ ({unwritten.strerror}): the traceback above", sys.stderr)


def _write_error_file(path: Path, error: HarnessError) -> None:
    """The shape that torch.distributed.elastic.multiprocessing.errors reads, as its ErrorHandler writes."""
    # torchrun prints the call stack in place of the message, so the stack stays in events/ alone.
    extra = {"py_callstack": str(error), "timestamp": str(int(time.time()))}
    message = {"message": {"message": str(error), "extraInfo": extra}, "errorCode": error.exit_code}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(message))
