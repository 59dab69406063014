"""Which tensor goes to which file, and which rank writes it: a pure function of sizes and world size.

Tensors are never cut: each lies whole, under its own name, in one file, so the weights are an ordinary
Hugging Face folder at every world size and under every way of sharding. Files are filled greedily, the
largest tensor first into the emptiest file, then files are dealt to the ranks in the same way (longest
processing time first: Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17, 1969).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from harness.format import strict_json

Group = Literal["model", "optimizer"]
T = TypeVar("T")

INDEX = "model.safetensors.index.json"
"""Which file holds which weight; written when there is more than one (Hugging Face convention)."""
FILE_BYTES = 512 << 20
"""Default of checkpoint.file_bytes: one thread hashes a file of this size in well under a second."""
_SHARE = 16
"""A rank gets a file of its own when it would be at least this fraction of the largest file."""


@dataclass(frozen=True)
class Item:
    """A tensor to be placed."""

    name: str
    size: int
    """Bytes."""
    anywhere: bool = True
    """Whether every rank can supply it; otherwise rank 0 writes it."""


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint."""

    path: str
    group: Group
    names: tuple[str, ...]
    size: int
    """Bytes of its tensors."""
    rank: int
    """Who writes it."""


def divide(
    model: Sequence[Item], optimizer: Sequence[Item], world_size: int, file_bytes: int = FILE_BYTES
) -> tuple[Part, ...]:
    """The files of a checkpoint and their writers; the same on every rank that has the same items.

    A group is split when it exceeds ``file_bytes``, or so that every rank writes a part of it when the parts
    are worth a file.
    """
    files: list[tuple[Group, str, list[Item]]] = []
    for group, items in (("model", model), ("optimizer", optimizer)):
        bins = _filled(items, _count(sum(item.size for item in items), world_size, file_bytes))
        for number, content in enumerate(bins, start=1):
            files.append((_group(group), _path(_group(group), number, len(bins)), content))
    sizes = [sum(item.size for item in content) for _, _, content in files]
    fixed = {
        position: 0
        for position, (_, _, content) in enumerate(files)
        if not all(item.anywhere for item in content)
    }
    ranks = deal(sizes, world_size, fixed)
    return tuple(
        Part(path, group, tuple(item.name for item in content), size, rank)
        for (group, path, content), size, rank in zip(files, sizes, ranks, strict=True)
    )


def deal(sizes: Sequence[int], hands: int, fixed: dict[int, int] | None = None) -> list[int]:
    """For each of ``sizes`` one of ``hands``, so that the loads are even: largest first, to the least loaded.

    ``fixed`` gives the hand of some positions beforehand.
    """
    chosen = dict(fixed or {})
    loads = [0] * hands
    for position, hand in chosen.items():
        loads[hand] += sizes[position]
    for position in sorted(range(len(sizes)), key=lambda position: (-sizes[position], position)):
        if position not in chosen:
            hand = loads.index(min(loads))
            chosen[position] = hand
            loads[hand] += sizes[position]
    return [chosen[position] for position in range(len(sizes))]


def index(parts: Sequence[Part]) -> dict[str, bytes]:
    """The index of the weights by file name, when they lie in several files."""
    weights = [part for part in parts if part.group == "model"]
    if len(weights) < 2:
        return {}
    places = {name: part.path for part in weights for name in part.names}
    document = {
        "metadata": {"total_size": sum(part.size for part in weights)},
        "weight_map": dict(sorted(places.items())),
    }
    return {INDEX: strict_json.dumps(document)}


def _count(total: int, world_size: int, file_bytes: int) -> int:
    needed = -(-total // file_bytes)
    worthwhile = total // max(1, file_bytes // _SHARE)
    return max(1, needed, min(world_size, worthwhile))


def _filled(items: Sequence[Item], count: int) -> list[list[Item]]:
    """``items`` in at most ``count`` files, none empty; what only rank 0 has is in the first."""
    if not items:
        return []
    ordered = sorted(items, key=lambda item: (item.anywhere, -item.size, item.name))
    fixed = {position: 0 for position, item in enumerate(ordered) if not item.anywhere}
    bins: list[list[Item]] = [[] for _ in range(count)]
    for item, number in zip(ordered, deal([item.size for item in ordered], count, fixed), strict=True):
        bins[number].append(item)
    return [content for content in bins if content]


def _path(group: Group, number: int, count: int) -> str:
    if group == "model" and count == 1:
        return "model.safetensors"
    return f"{group}-{number:05d}-of-{count:05d}.safetensors"


def _group(name: str) -> Group:
    return "model" if name == "model" else "optimizer"
