"""Where a log's hashes and records lie: C2SP tlog-tiles (c2sp.org/tlog-tiles), read and laid out.

tile/0/000, …/000.p/5             256 leaf hashes, or the newest partial tile
tile/1/000.p/1                    the roots of full tiles of the level below, and so on
tile/entries/000, …/000.p/5       the records, each after its length as two big-endian bytes
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

from harness.errors import VerificationFailed
from harness.format import files
from harness.provenance.transparency.merkle import leaf_hash, node_hash, root_hash

WIDTH = 256
"""Hashes of a full tile."""
FILE_LIMIT = 32 << 20
HASH = 32
"""Bytes of a hash."""


def row(size: int) -> Iterator[tuple[int, int]]:
    """(index, width) of each tile of a row of ``size``; only the last can be partial.

    One after the other: a head that nobody has signed may claim any size.
    """
    yield from ((index, WIDTH) for index in range(size // WIDTH))
    if size % WIDTH:
        yield size // WIDTH, size % WIDTH


def newest(size: int) -> tuple[int, int]:
    """The last tile of a row that is not empty."""
    return (size // WIDTH, size % WIDTH) if size % WIDTH else (size // WIDTH - 1, WIDTH)


def entries_path(index: int, width: int) -> str:
    """The file of records ``index`` · 256 and following, relative to the log."""
    return f"tile/entries/{_name(index, width)}"


def hash_path(level: int, index: int, width: int) -> str:
    """The file of hashes ``index`` · 256 and following of a level, relative to the log."""
    return f"tile/{level}/{_name(index, width)}"


def entries(records: Sequence[bytes]) -> bytes:
    """The contents of a file of ``records``."""
    return b"".join(struct.pack(">H", len(each)) + each for each in records)


def paths(size: int) -> Iterator[str]:
    """The files of a log of ``size`` records besides its head, relative to its folder."""
    yield from (entries_path(*tile) for tile in row(size))
    for level, width in enumerate(_levels(size)):
        yield from (hash_path(level, *tile) for tile in row(width))


def is_partial(path: str) -> bool:
    """Whether ``path`` is that of a tile that a longer log does not need."""
    return ".p/" in path


def hash_tiles(leaves: Sequence[bytes]) -> dict[str, bytes]:
    """Path → contents of every hash tile of a tree of ``leaves``."""
    found: dict[str, bytes] = {}
    hashes, level = list(leaves), 0
    while hashes:
        for index, width in row(len(hashes)):
            found[hash_path(level, index, width)] = b"".join(hashes[index * WIDTH : index * WIDTH + width])
        full = len(hashes) // WIDTH
        hashes = [root_hash(hashes[start * WIDTH : (start + 1) * WIDTH]) for start in range(full)]
        level += 1
    return found


def parse_entries(data: bytes, width: int, where: str) -> list[bytes]:
    """The ``width`` records of a file. Raises `VerificationFailed` for more or fewer."""
    records = []
    offset = 0
    for _ in range(width):
        if offset + 2 > len(data):
            raise VerificationFailed(f"has fewer than {width} records", where=where)
        (length,) = struct.unpack_from(">H", data, offset)
        records.append(data[offset + 2 : offset + 2 + length])
        offset += 2 + length
    if offset != len(data):
        raise VerificationFailed("has bytes before or after its records", where=where)
    return records


@dataclass
class Edge:
    """The newest tile of each level: all that an append changes, and enough for the root."""

    size: int = 0
    records: list[bytes] = field(default_factory=list)
    """Those of the newest entries file."""
    levels: list[list[bytes]] = field(default_factory=list)
    """Hashes of the newest tile of each level, leaves first."""

    @property
    def last_record(self) -> bytes | None:
        """The newest record; None in an empty log."""
        return self.records[-1] if self.records else None

    def add(self, record: bytes) -> None:
        """One more record."""
        if len(self.records) == WIDTH:
            self.records = []
        self.records.append(record)
        self.size += 1
        node, level = leaf_hash(record), 0
        while True:
            if level == len(self.levels):
                self.levels.append([])
            tile = self.levels[level] if len(self.levels[level]) < WIDTH else []
            self.levels[level] = [*tile, node]
            if len(self.levels[level]) < WIDTH:
                return
            node, level = root_hash(self.levels[level]), level + 1

    def root(self) -> bytes:
        """The root of the whole tree: complete subtrees, merged from the right."""
        nodes: list[bytes] = []  # from left to right
        for width, tile in zip(reversed(_levels(self.size)), reversed(self.levels), strict=True):
            rest = tile[: width % WIDTH]
            while rest:
                taken = 1 << len(rest).bit_length() - 1
                nodes.append(root_hash(rest[:taken]))
                rest = rest[taken:]
        if not nodes:
            return root_hash([])
        return reduce(lambda right, left: node_hash(left, right), reversed(nodes))

    def files(self) -> dict[str, bytes]:
        """Path → contents of the newest tiles."""
        if not self.size:
            return {}
        found = {entries_path(*newest(self.size)): entries(self.records)}
        for level, width in enumerate(_levels(self.size)):
            found[hash_path(level, *newest(width))] = b"".join(self.levels[level])
        return found


def read_edge(folder: Path, size: int) -> Edge:
    """The newest tiles of the log in ``folder``; whether they are what its head signs, `Edge.root` tells.

    Raises `EvidenceIncomplete` for a tile that is not there, `VerificationFailed` when they disagree.
    """
    edge = Edge(size)
    for level, width in enumerate(_levels(size)):
        index, count = newest(width)
        path = folder / hash_path(level, index, count)
        data = files.read_limited(path, FILE_LIMIT)
        if len(data) != count * HASH:
            raise VerificationFailed(f"does not hold {count} hashes", where=str(path))
        edge.levels.append([data[start : start + HASH] for start in range(0, len(data), HASH)])
    for below, above in zip(edge.levels, edge.levels[1:], strict=False):
        if len(below) == WIDTH and root_hash(below) != above[-1]:
            raise VerificationFailed("the newest tiles disagree", where=str(folder))
    if size:
        index, count = newest(size)
        path = folder / entries_path(index, count)
        edge.records = parse_entries(files.read_limited(path, FILE_LIMIT), count, str(path))
        if [leaf_hash(record) for record in edge.records] != edge.levels[0]:
            raise VerificationFailed(
                "the newest tile does not hold the hashes of the records", where=str(path)
            )
    return edge


def _levels(size: int) -> list[int]:
    """How many hashes each level of a tree of ``size`` leaves has."""
    widths = []
    while size:
        widths.append(size)
        size //= WIDTH
    return widths


def _name(index: int, width: int) -> str:
    """``x001/234`` for 1234, with ``.p/W`` when partial (c2sp.org/tlog-tiles, "Merkle Tree")."""
    name = f"{index % 1000:03d}"
    while index >= 1000:
        index //= 1000
        name = f"x{index % 1000:03d}/{name}"
    return name if width == WIDTH else f"{name}.p/{width}"
