"""The changes that a program makes to a folder: recorded, rebuilt as of any crash, or made to fail.

`file_operations.c` is compiled when it is needed and put under a program with LD_PRELOAD. `read` turns its
log into `Operation`s on inodes, as a file system sees them: data and size of a file, entries of a folder, and
what is synced. `crashes` builds what a crash may leave after each of them:

- ``kill``: the process dies; all that it did is there.
- ``ext4``: the machine dies; names and sizes are there in order, data that was not synced may be missing.
- ``posix``: the machine dies; anything that was not synced may be missing, each operation alone, or all.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Model = Literal["kill", "ext4", "posix"]
MODELS: tuple[Model, ...] = ("kill", "ext4", "posix")
SHORT = -1
"""Instead of an errno for `Library.fail`: a write takes only half."""
ONCE, FULL, DEAD = 0, 1, 2
"""Which calls fail after the first: none, those that take space, all."""
_ROOT = 0
"""Inode of the folder that is watched."""


@dataclass(frozen=True)
class Operation:
    """One change, in terms of inodes."""

    kind: Literal["data", "size", "link", "unlink", "move", "sync", "mark"]
    inode: int = _ROOT
    """Of the file for data, size and sync; of what an entry names for link, unlink and move."""
    folder: int = _ROOT
    name: str = ""
    """The entry; the old one of a move. The text of a mark."""
    target: int = _ROOT
    target_name: str = ""
    is_folder: bool = False
    offset: int = 0
    """Of data; the size of a size."""
    data: bytes = b""

    @property
    def settled_by(self) -> frozenset[int]:
        """The inodes whose sync puts this on disk."""
        if self.kind in ("data", "size"):
            return frozenset({self.inode})
        return frozenset({self.target if self.kind == "move" else self.folder})


@dataclass
class Disk:
    """Files and folders by inode."""

    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {_ROOT: {}})

    def copy(self) -> Disk:
        """A disk of its own; contents are shared, nothing changes them in place."""
        return Disk(dict(self.files), {inode: dict(entries) for inode, entries in self.folders.items()})

    def apply(self, operation: Operation) -> None:
        """Change what ``operation`` changes."""
        inode = operation.inode
        if operation.kind == "data":
            data = self.files.get(inode, b"").ljust(operation.offset, b"\0")
            end = operation.offset + len(operation.data)
            self.files[inode] = data[: operation.offset] + operation.data + data[end:]
        elif operation.kind == "size":
            self.files[inode] = self.files.get(inode, b"")[: operation.offset].ljust(operation.offset, b"\0")
        elif operation.kind == "link":
            self.folders[operation.folder][operation.name] = inode
            if operation.is_folder:
                self.folders.setdefault(inode, {})
            else:
                self.files.setdefault(inode, b"")
        elif operation.kind == "unlink":
            self.folders[operation.folder].pop(operation.name, None)
        elif operation.kind == "move":
            self.folders[operation.folder].pop(operation.name, None)
            self.folders[operation.target][operation.target_name] = inode

    def find(self, path: str) -> tuple[int, str]:
        """The folder that holds the relative ``path``, and the last part of it."""
        *parents, name = path.split("/")
        inode = _ROOT
        for parent in parents:
            inode = self.folders[inode][parent]
        return inode, name

    def tree(self, inode: int = _ROOT, at: str = "") -> Iterator[tuple[str, bytes | None]]:
        """Every path with its contents, None for a folder, parents first."""
        for name, child in sorted(self.folders.get(inode, {}).items()):
            path = f"{at}{name}"
            if child in self.folders:
                yield path, None
                yield from self.tree(child, f"{path}/")
            else:
                yield path, self.files.get(child, b"")

    def digest(self, without: str = "\0") -> bytes:
        """Of paths and contents; not of what lies under ``without``."""
        whole = hashlib.sha256()
        for path, data in self.tree():
            if path.startswith(without):
                continue
            content = b"folder" if data is None else hashlib.sha256(data).digest()
            whole.update(path.encode() + b"\0" + content)
        return whole.digest()

    def write(self, folder: Path) -> None:
        """Make ``folder`` hold this and nothing else; it must be empty or missing."""
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in self.tree():
            if data is None:
                (folder / path).mkdir(exist_ok=True)
            else:
                (folder / path).write_bytes(data)


@dataclass(frozen=True)
class Crash:
    """What is on the disk after a crash."""

    model: Model
    after: int
    """Operations that the program had made."""
    lost: tuple[int, ...]
    """Numbers of those that the disk has lost."""
    disk: Disk


def compiled(folder: Path) -> Path:
    """The library, made by cc in ``folder``."""
    library = folder / "file_operations.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-o", library, source, "-ldl"], check=True
    )
    return library


class Library:
    """The library in this process, which must have been started with it in LD_PRELOAD."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.file_operations_failed.restype = ctypes.c_char_p
        self._library.file_operations_count.restype = ctypes.c_long

    def watch(self, root: Path, log: Path | None = None) -> None:
        """From now on see what changes below ``root``, and write it to ``log``."""
        self._library.file_operations_watch(os.fsencode(root), None if log is None else os.fsencode(log))

    def mark(self, text: str) -> None:
        """Put ``text`` into the log."""
        self._library.file_operations_mark(text.encode())

    def fail(self, number: int, how: int, lasts: int = ONCE) -> None:
        """Let the ``number``-th call from now on fail with errno ``how``, or be `SHORT`; 0: only count."""
        self._library.file_operations_fail(ctypes.c_long(number), ctypes.c_int(how), ctypes.c_int(lasts))

    def failed(self) -> str:
        """The call that was made to fail, and its path; nothing when there was none."""
        return str(self._library.file_operations_failed().decode())

    def count(self) -> int:
        """Calls that could have failed, since `fail`."""
        return int(self._library.file_operations_count())


def read(log: Path, root: Path) -> tuple[Operation, ...]:
    """The operations in ``log``, of a folder ``root`` that was empty before.

    Raises `ValueError` when they do not rebuild what ``root`` holds now: something went unseen.
    """
    disk, numbers, operations = Disk(), {}, []
    for operation in _parsed(log.read_bytes(), str(root), disk, numbers):
        operations.append(operation)
        disk.apply(operation)
    rebuilt = dict(disk.tree())
    actual = {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")
    }
    odd = sorted(path for path in {*rebuilt, *actual} if rebuilt.get(path, 0) != actual.get(path, 0))
    if odd:
        raise ValueError(f"the log does not explain {odd[:5]}")
    return tuple(operations)


def _parsed(data: bytes, root: str, disk: Disk, numbers: dict[int, int]) -> Iterator[Operation]:
    """``disk`` must have what was yielded applied to it; ``numbers``: the file system's inode → ours."""
    place, fresh = 0, _ROOT
    while place < len(data):
        end = data.index(b"\n", place)
        kind, *words = data[place:end].decode().split("\t")
        place = end + 1
        paths = [word[len(root) + 1 :] for word in words if word.startswith(root)]
        if kind == "mark":
            yield Operation("mark", name=words[0])
        elif kind in ("create", "mkdir"):
            fresh += 1
            if kind == "create":
                # The file system reuses numbers; here every file has one of its own.
                numbers[int(words[1])] = fresh
            if paths[0]:
                folder, name = disk.find(paths[0])
                yield Operation("link", fresh, folder, name, is_folder=kind == "mkdir")
        elif kind == "write":
            end = place + int(words[2])
            yield Operation("data", numbers[int(words[0])], offset=int(words[1]), data=data[place:end])
            place = end
        elif kind == "size":
            yield Operation("size", numbers[int(words[0])], offset=int(words[1]))
        elif kind == "sync":
            yield Operation("sync", _synced(words, paths, disk, numbers))
        elif kind in ("unlink", "rmdir"):
            folder, name = disk.find(paths[0])
            yield Operation("unlink", disk.folders[folder][name], folder, name)
        elif kind == "rename":
            (folder, name), (target, target_name) = (disk.find(path) for path in paths)
            yield Operation("move", disk.folders[folder][name], folder, name, target, target_name)
        else:
            raise ValueError(f"a log with a line {kind}")


def _synced(words: Sequence[str], paths: Sequence[str], disk: Disk, numbers: dict[int, int]) -> int:
    if not paths or not paths[0]:
        return _ROOT
    folder, name = disk.find(paths[0])
    inode = disk.folders[folder][name]
    return inode if inode in disk.folders else numbers[int(words[0])]


def crashes(operations: Sequence[Operation], models: Sequence[Model] = MODELS) -> Iterator[Crash]:
    """Every state that a crash may leave, each once for a model and a number of operations."""
    disks = [Disk()]
    for operation in operations:
        disks.append(disks[-1].copy())
        disks[-1].apply(operation)
    pending: list[int] = []
    for after in range(len(operations) + 1):
        if after:
            pending = _still_pending(pending, operations, after - 1)
        for model in models:
            seen = set()
            for lost in _losses(model, pending, operations):
                disk = _without(disks, operations, after, lost)
                if (digest := disk.digest()) not in seen:
                    seen.add(digest)
                    yield Crash(model, after, lost, disk)


def _still_pending(pending: list[int], operations: Sequence[Operation], newest: int) -> list[int]:
    """The numbers of operations that no sync has settled, after the ``newest`` one."""
    operation = operations[newest]
    if operation.kind == "sync":
        return [number for number in pending if operation.inode not in operations[number].settled_by]
    return pending if operation.kind == "mark" else [*pending, newest]


def _losses(
    model: Model, pending: Sequence[int], operations: Sequence[Operation]
) -> Iterator[tuple[int, ...]]:
    """Which of the ``pending`` operations may be lost together."""
    yield ()
    if model == "ext4":
        unsynced: dict[int, list[int]] = {}
        for number in pending:
            if operations[number].kind == "data":
                unsynced.setdefault(operations[number].inode, []).append(number)
        yield from map(tuple, unsynced.values())
        if len(unsynced) > 1:
            yield tuple(number for numbers in unsynced.values() for number in numbers)
    elif model == "posix":
        yield from ((number,) for number in pending)
        if len(pending) > 1:
            yield tuple(pending)


def _without(
    disks: Sequence[Disk], operations: Sequence[Operation], after: int, lost: tuple[int, ...]
) -> Disk:
    if not lost:
        return disks[after]
    disk = disks[lost[0]].copy()
    for number in range(lost[0], after):
        if number not in lost:
            _apply_or_skip(disk, operations[number])
    return disk


def _apply_or_skip(disk: Disk, operation: Operation) -> None:
    """Without what it needs, an operation leaves what it makes out of sight: a folder that has no name."""
    for folder in (operation.folder, operation.target):
        disk.folders.setdefault(folder, {})
    disk.apply(operation)
