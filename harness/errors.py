"""Every error that a user can meet, each one line: what, where, what to do next.

    HarnessError
    ├── UsageError          exit 2   a command or a config that cannot be understood
    │   └── ConfigError     exit 2   the same, with file and line
    ├── EnvironmentFault    exit 3   the machine, the launcher, a missing package, no space
    ├── ResumeRefused       exit 2   the folder holds another run
    ├── VerificationFailed  exit 1   evidence that is present and wrong
    ├── EvidenceIncomplete  exit 4   evidence that is not there: cannot tell
    ├── TrainingFailed      exit 1   the run itself went wrong (non-finite loss, state not restorable)
    └── Interrupted         exit 75  stopped by a signal, saved, to be requeued
        └── PeerLost        exit 75  another rank was killed or its host is lost

Example::

    >>> str(HarnessError("no such file", where="run.yaml", remedy="check the path"))
    'no such file: run.yaml; check the path'
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_WRONG_PATH = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENXIO, errno.ESPIPE),  # a socket, and a pipe with a name
)
_REMEDIES = (
    (_NO_SPACE, "free space"),
    ((errno.EACCES, errno.EPERM, errno.EROFS), "get access to it or name another place"),
    ((*_WRONG_PATH, errno.EEXIST), "check the path"),
)
_STORAGE = (*_NO_SPACE, errno.EFBIG, errno.EINTR, errno.EIO, errno.EROFS, errno.ESTALE)


def visible(text: str) -> str:
    """``text`` with escapes for what a terminal would obey or cannot show; names come from strangers."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


class HarnessError(Exception):
    """Root of the tree. ``what`` went wrong, ``where``, and the ``remedy``."""

    exit_code = 1
    silent = False
    """Whether somebody else prints it."""
    usual_remedy: str | None = None
    """What the command line says to do next when whoever raised it does not know better."""

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(what)

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.what}: {self.where}"
        text = text if self.remedy is None else f"{text}; {self.remedy}"
        return visible(" ".join(text.split()))


class UsageError(HarnessError):
    """The command cannot be understood."""

    exit_code = 2


class ConfigError(UsageError):
    """The config cannot be understood; ``where`` is ``file:line`` or the override."""

    usual_remedy = "correct it, then run the same command again"


class ResumeRefused(HarnessError):
    """The run folder holds another run than the one that was asked for."""

    exit_code = 2


class EnvironmentFault(HarnessError):
    """The machine or the installation does not allow it."""

    exit_code = 3


class VerificationFailed(HarnessError):
    """Evidence is present and wrong."""

    exit_code = 1
    usual_remedy = "do not rely on it; harness verify tells what else is wrong"


class EvidenceIncomplete(HarnessError):
    """Evidence is missing, so the question cannot be answered."""

    exit_code = 4
    usual_remedy = "get the whole folder from its maker"


class TrainingFailed(HarnessError):
    """The run went wrong: a non-finite loss, or a state that cannot be restored."""

    exit_code = 1


class Interrupted(HarnessError):
    """Stopped by a signal after saving; restart with the same command."""

    exit_code = 75


class PeerLost(Interrupted):
    """A rank is gone without a word; restart with the same command."""


def storage_fault(error: OSError, doing: str, folder: Path | str) -> EnvironmentFault:
    """``error`` of the file system while ``doing`` ("writing a checkpoint") in ``folder``, as one line."""
    where = str(error.filename or folder)
    remedy = next((each for numbers, each in _REMEDIES if error.errno in numbers), "check the disk")
    remedy = f"{remedy}, then run the same command again"
    if error.errno in _NO_SPACE:
        return EnvironmentFault(f"no space left while {doing}", where=where, remedy=remedy)
    return EnvironmentFault(f"{doing} failed: {error.strerror or error}", where=where, remedy=remedy)


def open_given(path: Path | str) -> BinaryIO:
    """The file ``path``, which a command, a config or a policy names, open for reading.

    A pipe is read where a shell has made it (``<(command)``, standard input), but one with a name never: it
    may lie in a stranger's folder, and whoever opens it would wait for somebody who writes. Raises `OSError`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            if not os.path.realpath(path).startswith(("/dev/", "/proc/")):
                raise OSError(errno.ESPIPE, "it is a pipe", str(path))
            os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def unreadable_input(error: OSError, what: str, path: Path, remedy: str | None = None) -> HarnessError:
    """``error`` on reading ``what`` ("the policy"), which a command or a config names as ``path``: that path
    is wrong (exit code 2), or the machine does not let it be read (3)."""
    kind = UsageError if error.errno in _WRONG_PATH else EnvironmentFault
    return kind(f"{what} cannot be read: {error.strerror or error}", where=str(path), remedy=remedy)


def is_storage(error: BaseException) -> bool:
    """Whether the disk, not the program, is the reason: full, over a limit, read-only, broken, gone."""
    return isinstance(error, OSError) and error.errno in _STORAGE
