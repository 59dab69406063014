"""Large files: the bytes that were meant, whatever the file system grants or refuses."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint import disk
from harness.checkpoint.memory import HostMemory

SIZES = [0, 1, 4095, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (1 << 20) + 4096, (3 << 20) + 777]


def memory_of(size: int) -> memoryview:
    """``size`` random bytes that start on a page."""
    memory = HostMemory(size)
    memory.view[:size] = os.urandom(size)
    return memory.view[:size]


def proceed() -> None:
    """Nothing stands in the way."""


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_what_was_in_memory(tmp_path: Path, size: int) -> None:
    """Oracle: the bytes, read back by Python."""
    data = memory_of(size)
    disk.write(tmp_path / "file", data, aligned=True, proceed=proceed)
    assert (tmp_path / "file").read_bytes() == bytes(data)


def test_a_large_aligned_file_goes_around_the_page_cache(tmp_path: Path) -> None:
    """Oracle: the flags of the call that creates it; unaligned memory and small files take the other way."""
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("this system has no O_DIRECT")
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of the temporary folder refuses O_DIRECT")
    data = memory_of(2 << 20)
    assert disk.write(tmp_path / "a", data, aligned=True, proceed=proceed)
    assert not disk.write(tmp_path / "b", data, aligned=False, proceed=proceed)
    assert not disk.write(tmp_path / "c", data[:4096], aligned=True, proceed=proceed)


@pytest.mark.parametrize("where", ["open", "pwrite", "posix_fallocate"])
def test_a_file_system_that_refuses_gets_buffered_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Oracle: the bytes; only a refusal of preallocation leaves the way around the page cache open."""
    original: Callable[..., Any] = getattr(os, where)

    def refusing(first: Any, second: Any, *rest: Any) -> Any:
        direct = getattr(os, "O_DIRECT", 0)
        wants = second & direct if where == "open" else where == "posix_fallocate" or disk._is_direct(first)
        if wants:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(first, second, *rest)

    data = memory_of((2 << 20) + 5)
    monkeypatch.setattr(os, where, refusing)
    went_directly = disk.write(tmp_path / "file", data, aligned=True, proceed=proceed)
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == bytes(data)
    assert not went_directly or where == "posix_fallocate"


@pytest.mark.parametrize("most", [1, 4096, 100_000, 1 << 20])
def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Oracle: the bytes; the system may take less than it is given, as before a full disk."""
    original = os.pwrite
    size = (1 << 20) + 3 if most > 1 else 3000
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: original(fd, data[:most], offset))
    data = memory_of(size)
    disk.write(tmp_path / "file", data, aligned=True, proceed=proceed)
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == bytes(data)


def test_an_error_of_the_disk_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the error number; no retry turns it into success."""

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.write(tmp_path / "file", memory_of(10), aligned=True, proceed=proceed)


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """Oracle: its bytes."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        disk.write(tmp_path / "file", memory_of(2 << 20), aligned=True, proceed=proceed)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_write_can_be_given_up(tmp_path: Path) -> None:
    """Oracle: the reason that `proceed` raises."""

    def stop() -> None:
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        disk.write(tmp_path / "file", memory_of(2 << 20), aligned=True, proceed=stop)
