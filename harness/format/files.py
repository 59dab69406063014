"""Files that survive a crash, and reading what somebody else may have prepared.

The order of a durable write: bytes, fsync of the file, rename, fsync of its folder. Without the last one, a
power cut may bring the old name back (7 s after save() had returned, three peers' checkpoints were empty
files).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path

from harness.errors import EnvironmentFault, EvidenceIncomplete, UsageError, VerificationFailed

NESTED = 64
"""Folders in folders that are looked into."""
_REPLACED = 100
"""Times that a file may be replaced between opening it and looking at it."""
Stamp = tuple[int, int, int]
"""Size in bytes, and the nanoseconds of the last change of contents and of status."""


def write_durable(path: Path, data: bytes, *, temporary: Path | None = None) -> None:
    """Replace ``path`` by ``data``: at any crash the old or the new content is there, whole.

    ``temporary`` is written first; by default a name in the same folder, which a crash may leave behind, and
    a disk that refuses does not.
    """
    make_folder(path.parent)
    _replace({path: (temporary or path.with_name(f".tmp-{path.name}"), data)})
    fsync_folder(path.parent)


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Replace the files of ``folder`` that ``contents`` names, each as by `write_durable`, and none of them
    before a disk has taken all."""
    new = not os.path.lexists(folder)
    make_folder(folder)
    try:
        _replace({folder / name: (folder / f".tmp-{name}", data) for name, data in contents.items()})
    except (OSError, KeyboardInterrupt):
        if new:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise
    fsync_folder(folder)


def _replace(contents: Mapping[Path, tuple[Path, bytes]]) -> None:
    """Give the bytes that are first written under a temporary name each its path."""
    try:
        for path, (temporary, data) in contents.items():
            with _named(path):
                _write_synced(temporary, data)
        for path, (temporary, _) in contents.items():
            with _named(path):
                os.replace(temporary, path)
    except (OSError, KeyboardInterrupt):
        for temporary, _ in contents.values():
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error in the block names ``path``: write(2) and fsync(2) know none, and users no temporary one."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold ``folder`` against other writers that do the same; the lock goes with the process.

    Made for read, change, write: two that append to one log would lose one of their records. Without
    ``wait`` raises `EnvironmentFault` when somebody holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise EnvironmentFault(
                "another job is at work in this folder", where=str(folder), remedy="wait for it or stop it"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[bool]:
    """A new, empty ``folder`` to build something in, held against others and removed at the end, unless it
    has another name by then.

    Yields whether one was removed first that a process had left which was killed: its lock is gone with it.
    Raises `EnvironmentFault` when a process is at work there.
    """
    make_folder(folder.parent)
    left = folder.is_dir()
    if left:
        with locked(folder, wait=False):
            shutil.rmtree(folder)
    folder.mkdir()
    with locked(folder, wait=False):
        try:
            yield left
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make ``path`` and what is missing above it, each name on disk when this returns.

    A power cut may take back a folder whose parent was not synced, with every synced file in it.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Put the names in a folder on disk."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def publish(temporary: Path, final: Path) -> None:
    """Put everything in the folder ``temporary`` on disk, then rename it to ``final`` in the same parent.

    Raises `UsageError` when ``final`` exists: nothing is ever overwritten.
    """
    rename_synced(temporary, final)
    fsync_folder(final.parent)


def rename_synced(temporary: Path, final: Path) -> None:
    """`publish` without the last step: others see ``final``, which is on disk after a sync of its parent."""
    for folder, _, names in os.walk(temporary, topdown=False):
        for name in names:
            _fsync(Path(folder, name), os.O_RDONLY)
        fsync_folder(Path(folder))
    if os.path.lexists(final):
        raise UsageError("exists already", where=str(final), remedy="move it away")
    os.rename(temporary, final)


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` of a stranger's folder, top down: nothing is left out because it cannot be listed.

    Raises `VerificationFailed` for folders that are nested deeper than `NESTED`, which neither a path nor a
    recursion could follow without an end, and `EnvironmentFault` for one that cannot be listed.
    """
    top = str(root).count(os.sep)
    for here, folders, names in os.walk(root, onerror=_unlisted):
        if folders and here.count(os.sep) - top >= NESTED:
            raise VerificationFailed(f"holds folders that are nested deeper than {NESTED}", where=str(root))
        yield Path(here), folders, names


def _unlisted(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a job has renamed it meanwhile
        raise unreadable(error, str(error.filename)) from error


def read_limited(path: Path | str, limit: int) -> bytes:
    """The bytes of a regular file with one link and at most ``limit`` bytes. Raises as `open_regular`."""
    descriptor, status = _open_regular(path)
    try:
        wanted = min(status.st_size, limit) + 1
        data = os.read(descriptor, wanted)
        # One byte more was asked for than there were, so having all of them is to have come to the end.
        while len(data) != status.st_size and len(data) <= limit and (part := os.read(descriptor, 1 << 20)):
            data += part
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise VerificationFailed(f"is larger than {limit} bytes", where=str(path))
    return data


def read_given(path: Path, what: str, limit: int, remedy: str) -> bytes:
    """The bytes of a file that the user names, ``what`` for messages; it is theirs, so it may be a link.

    Raises `UsageError` for a wrong path and for more than ``limit`` bytes, since nothing that was signed is
    wrong or missing; `EnvironmentFault` when the machine does not let it be read.
    """
    try:
        return read_limited(real(path), limit)
    except (EvidenceIncomplete, VerificationFailed) as error:
        raise UsageError(f"{what} {error.what}", where=str(path), remedy=remedy) from error


def real(path: Path) -> Path:
    """Where the links of ``path`` lead. Of a loop of links the name: whoever opens it is told."""
    return Path(os.path.realpath(path))  # Path.resolve raises RuntimeError there, up to Python 3.12


def open_regular(path: Path) -> BufferedReader:
    """A regular file with one link, open for reading.

    Raises `EvidenceIncomplete` when it is not there and `VerificationFailed` when it is anything else: a
    symlink, a folder, a device, a second name of another file.
    """
    return os.fdopen(_open_regular(path)[0], "rb")


def _open_regular(path: Path | str) -> tuple[int, os.stat_result]:
    """The file that has the name ``path`` once it is open: one without a link was replaced meanwhile, as a
    durable write does, and is no second name of anything."""
    for _ in range(_REPLACED):
        descriptor, status = _opened(path)
        if status.st_nlink:
            break
        os.close(descriptor)
    else:
        raise VerificationFailed("is replaced over and over while it is read", where=str(path))
    try:
        check_regular(status, str(path))
        return descriptor, status
    except BaseException:
        os.close(descriptor)
        raise


def _opened(path: Path | str) -> tuple[int, os.stat_result]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise EvidenceIncomplete("is missing", where=str(path)) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise VerificationFailed("is a symbolic link", where=str(path)) from error
        if error.errno == errno.ENOTDIR:
            raise VerificationFailed("lies in what is no folder", where=str(path)) from error
        if error.errno == errno.ENXIO:  # a socket
            raise VerificationFailed("is not a regular file", where=str(path)) from error
        raise unreadable(error, str(path)) from error
    try:
        return descriptor, os.fstat(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def unreadable(error: OSError, where: str) -> EnvironmentFault:
    """``error`` of the file system as one line, with what helps."""
    many = error.errno in (errno.EMFILE, errno.ENFILE)
    remedy = "raise the limit of open files (ulimit -n)" if many else "check the disk and the permissions"
    return EnvironmentFault(f"cannot be read: {error.strerror or error}", where=where, remedy=remedy)


def stamp(status: os.stat_result) -> Stamp:
    """What is another one once the contents of a file were changed or another file has taken its name."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check_regular(status: os.stat_result, where: str) -> None:
    """Raise `VerificationFailed` unless ``status`` is of a regular file with one link."""
    odd = oddity(status)
    if odd is not None:
        raise VerificationFailed(odd, where=where)


def oddity(status: os.stat_result) -> str | None:
    """What ``status`` is instead of that of a regular file with one link; None when it is one."""
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    return None if status.st_nlink == 1 else f"has {status.st_nlink} hard links"


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
