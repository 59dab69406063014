"""Large files on disk, fast and for good: preallocated, written around the page cache, synced.

A buffered write copies every byte once more and makes the kernel write it back at a moment of its own choice;
written directly from aligned memory, the same bytes take less time and no core. A file system that cannot do
that (O_DIRECT is refused) gets buffered writes, and the caller is told.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from harness.checkpoint.memory import PAGE

_CHUNK = 64 << 20
"""Bytes of one write call; smaller ones wait for the disk more often."""
_SMALL = 1 << 20
"""Bytes below which the page cache is no slower."""
_DIRECT = getattr(os, "O_DIRECT", 0)
"""0 where the system has no such flag."""
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


def write(path: Path, data: memoryview, *, aligned: bool, proceed: Callable[[], None]) -> bool:
    """Create ``path`` with ``data`` and sync it; True when it went around the page cache.

    ``aligned``: ``data`` starts on a page. ``proceed`` is called between writes and may raise to end them.
    Raises `OSError` as the file system does, `FileExistsError` when ``path`` is there.
    """
    descriptor, direct = _create(path, wanted=aligned and len(data) >= _SMALL)
    try:
        _preallocate(descriptor, len(data))
        offset = 0
        if direct:
            offset = _write(descriptor, data[: len(data) // PAGE * PAGE], 0, proceed)
            direct = offset > 0
            _buffered(descriptor)
        _write(descriptor, data, offset, proceed)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return direct


def _create(path: Path, *, wanted: bool) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    if wanted and _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o644), True
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            # Linux creates the file before it finds that the flag cannot be had.
            path.unlink(missing_ok=True)
    return os.open(path, flags, 0o644), False


def _preallocate(descriptor: int, size: int) -> None:
    """Claim the space, so that a full disk shows before the first byte is written."""
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise


def _write(descriptor: int, data: memoryview, offset: int, proceed: Callable[[], None]) -> int:
    """Write ``data`` from ``offset`` on; returns where it ended: early when direct writes are refused."""
    while offset < len(data):
        proceed()
        try:
            count = os.pwrite(descriptor, data[offset : offset + _CHUNK], offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not _is_direct(descriptor):
                raise
            return offset
        if not count:
            raise OSError(errno.EIO, "nothing was written")
        offset += count
        if offset % PAGE and _is_direct(descriptor):
            # A short write that ends within a page, as before a full disk: the rest cannot go directly.
            return offset
    return offset


def _is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT)


def _buffered(descriptor: int) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
