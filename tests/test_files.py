"""`harness.format.files`: durable writes, and reading files that somebody else has prepared."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from harness.errors import EnvironmentFault, EvidenceIncomplete, UsageError, VerificationFailed
from harness.format import files


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The system calls that decide about durability, in order, with the file's name."""
    seen: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record_fsync(descriptor: int) -> None:
        seen.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        seen.append(("rename", os.path.basename(target)))
        rename(source, target)

    def record_replace(source: Path, target: Path) -> None:
        seen.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "replace", record_replace)
    return seen


def test_a_durable_write_syncs_file_then_name_then_folder(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    """Oracle: the order that survives a power cut: new folder, bytes, rename, folder (fsync(2))."""
    files.write_durable(tmp_path / "folder" / "file", b"new")
    names = [("fsync", tmp_path.name), ("fsync", ".tmp-file"), ("rename", "file"), ("fsync", "folder")]
    assert calls == names
    assert (tmp_path / "folder" / "file").read_bytes() == b"new"


def test_a_durable_write_that_fails_leaves_the_old_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the folder after an fsync that fails is the folder before."""
    path = tmp_path / "file"
    files.write_durable(path, b"old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        files.write_durable(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("new", [True, False])
def test_files_that_are_written_together_are_all_there_or_none(
    new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the folder after a disk that is full at the second file is the folder before; the name told is
    that of the file."""
    folder = tmp_path / "out"
    if not new:
        files.write_together(folder, {"a": b"old", "b": b"old"})
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("b"):
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=f"No space.*{folder / 'b'}"):
        files.write_together(folder, {"a": b"new", "b": b"new"})
    assert {each.name: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()} == (
        {} if new else {"a": b"old", "b": b"old"}
    )
    assert folder.exists() != new


def test_a_folder_is_published_after_everything_in_it_is_on_disk(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    """Oracle: each file and folder is synced before the rename, the parent after it."""
    inside = tmp_path / ".tmp-a" / "inner"
    inside.mkdir(parents=True)
    (inside / "deep").write_bytes(b"x")
    (tmp_path / ".tmp-a" / "flat").write_bytes(b"y")
    files.publish(tmp_path / ".tmp-a", tmp_path / "a")
    turn = calls.index(("rename", "a"))
    assert {("fsync", name) for name in ("deep", "flat", "inner", ".tmp-a")} == set(calls[:turn])
    assert calls[turn + 1 :] == [("fsync", tmp_path.name)]
    assert (tmp_path / "a" / "inner" / "deep").read_bytes() == b"x"
    assert not (tmp_path / ".tmp-a").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_publishing_overwrites_nothing(kind: str, tmp_path: Path) -> None:
    """Oracle: whatever has the name stays as it is, an empty folder too, which rename(2) would replace."""
    (tmp_path / ".tmp-a").mkdir()
    final = tmp_path / "a"
    if kind == "folder":
        final.mkdir()
    elif kind == "file":
        final.touch()
    else:
        final.symlink_to("nowhere")
    before = os.lstat(final)
    with pytest.raises(UsageError, match="exists already"):
        files.publish(tmp_path / ".tmp-a", final)
    assert os.lstat(final).st_ino == before.st_ino
    assert (tmp_path / ".tmp-a").is_dir()


def test_a_workplace_is_emptied_when_nobody_holds_it_and_refused_when_somebody_does(tmp_path: Path) -> None:
    """Oracle: the folder itself, as a killed process, a process at work, a failure and a rename leave it."""
    place = tmp_path / "folder" / ".tmp-a"
    place.mkdir(parents=True)
    (place / "half").write_bytes(b"x")
    with files.workplace(place) as left:
        assert (left, list(place.iterdir())) == (True, [])
        with pytest.raises(EnvironmentFault, match="another job is at work"), files.workplace(place):
            pass
        assert place.is_dir()
        place.rename(tmp_path / "a")
    assert (tmp_path / "a").is_dir()
    with pytest.raises(FileNotFoundError), files.workplace(place):
        (place / "missing" / "half").write_bytes(b"x")
    assert not place.exists()


def test_a_plain_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    """Oracle: the limit is inclusive."""
    (tmp_path / "file").write_bytes(b"12345")
    assert files.read_limited(tmp_path / "file", 5) == b"12345"
    with pytest.raises(VerificationFailed, match="is larger than 4 bytes"):
        files.read_limited(tmp_path / "file", 4)


def test_an_endless_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    """Oracle: a sparse file of a terabyte is refused at once."""
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", 1 << 40)
    with pytest.raises(VerificationFailed, match="is larger than 10 bytes"):
        files.read_limited(tmp_path / "file", 10)


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    """Oracle: symlink, folder, FIFO, device, a second hard link and a file in place of the folder are wrong;
    a missing file is missing."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", ".", "/dev/null", "file/log"):
        with pytest.raises(VerificationFailed):
            files.read_limited(tmp_path / name, 10)
    os.link(tmp_path / "file", tmp_path / "twin")
    with pytest.raises(VerificationFailed, match="has 2 hard links"):
        files.read_limited(tmp_path / "file", 10)
    with pytest.raises(EvidenceIncomplete, match="is missing"):
        files.read_limited(tmp_path / "none", 10)


@pytest.mark.parametrize("times", [1, 1000])
def test_a_file_that_is_replaced_while_it_is_opened_is_the_new_one(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the name, which has one link at every moment; whoever replaces without end is told of."""
    path = tmp_path / "checkpoint"
    path.write_bytes(b"0")
    real, left = os.open, [times]

    def replacing(name: Path, flags: int, *words: int) -> int:
        descriptor = real(name, flags, *words)
        if name == path and left[0]:
            left[0] -= 1
            (tmp_path / "new").write_bytes(b"new")
            os.replace(tmp_path / "new", path)
        return descriptor

    monkeypatch.setattr(os, "open", replacing)
    if times == 1:
        assert files.read_limited(path, 10) == b"new"
    else:
        with pytest.raises(VerificationFailed, match="replaced over and over"):
            files.read_limited(path, 10)


def test_a_durable_file_may_be_read_by_others(tmp_path: Path) -> None:
    """Oracle: mode 0644 under the usual umask."""
    old = os.umask(0o022)
    try:
        files.write_durable(tmp_path / "file", b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
