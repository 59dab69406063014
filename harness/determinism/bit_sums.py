"""Digests of many tensors, made on their device, the same however the tensors are cut among ranks.

Every tensor is a row of integers, its raw bits, and its sum is taken with odd weights that depend on the
position in the whole tensor, wrapping at 2^64. Addition of integers has no order, so threads, kernels,
devices and shards cannot change it: a rank that holds elements ``begin`` to ``end`` weighs them as such, and
the sums of the ranks are added up. The digest is SHA-256 over names, dtypes, shapes and the vector of sums::

    >>> import torch
    >>> whole = {"weight": torch.arange(6.0)}
    >>> plan = Plan(whole)
    >>> halves = [Plan({"weight": Piece(part, 6, begin)}) for part, begin in
    ...           ((torch.arange(4.0), 0), (torch.arange(4.0, 6.0), 4))]
    >>> plan.digest(plan.sums()) == plan.digest(sum(half.sums() for half in halves))
    True

- A tensor of at least `LARGE` elements is summed as little-endian 64-bit words in rows of `ROW` words; the
  word at row r and column c has the weight ``row[r] * column[c]``. Two ops that read the tensor once; the
  second one works on a row.
- The smaller ones of a dtype are joined and summed as one, each element with a weight of its own.

A single changed bit always changes the sum, since odd weights have an inverse; swapped elements, a sign of
zero and a change of dtype do too, but for the chance of a collision, 2^-31 at worst. The sums are **not**
cryptographic: whoever can choose the tensors can find others with the same sums. What an adversary could
touch, the files, is covered by SHA-256 and BLAKE3.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROW = 1024
"""Words of a row: the partial sums of one stay in the processor's first cache (scripts/bench/digest.py)."""
LARGE = 16384
"""Elements from which on a tensor has a sum of its own; below, the calls would cost more than the sums."""
_WORD = 8
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FORMAT = "harness-bit-sums/1"

_tables: dict[tuple[str, torch.device], Tensor] = {}


@dataclass(frozen=True)
class Piece:
    """What this rank holds of a tensor."""

    local: Tensor
    """Its elements; any shape, read in row-major order."""
    numel: int
    """Elements of the whole tensor."""
    begin: int = 0
    """Position of the first local element in the whole tensor."""
    shape: tuple[int, ...] | None = None
    """Of the whole tensor; that of ``local`` when None."""
    owned: bool = True
    """Whether this rank counts: of a tensor that every rank holds, exactly one may."""


class Plan:
    """How a set of tensors is summed on this rank: made once, used at every step.

    ``large`` is the number of elements from which on a tensor has a slot of its own; 0 gives one to each, to
    name the tensors that differ.
    """

    def __init__(self, tensors: Mapping[str, Tensor | Piece], large: int = LARGE) -> None:
        pieces = {name: _piece(value) for name, value in tensors.items()}
        described = [[name, str(each.local.dtype), _shape(each)] for name, each in pieces.items()]
        self._header = hashlib.sha256(json.dumps([_FORMAT, described]).encode()).digest()
        self.names: list[str] = []
        """What each slot of the vector is the sum of."""
        self._large: list[tuple[int, Piece] | None] = []
        self._small: list[_Small] = []
        groups: dict[str, list[tuple[int, Piece]]] = {}
        for position, (name, piece) in enumerate(pieces.items()):
            if piece.numel >= large:
                self.names.append(name)
                self._large.append((position, piece) if piece.owned and piece.local.numel() else None)
            else:
                groups.setdefault(str(piece.local.dtype), []).append((position, piece))
        for dtype, members in groups.items():
            self.names.append(f"small tensors of {dtype}")
            self._small.append(_Small([(at, each) for at, each in members if each.owned]))
        self._tensors = [piece.local for piece in pieces.values()]
        self._device = self._tensors[0].device if self._tensors else torch.device("cpu")

    def sums(self, tensors: Sequence[Tensor] | None = None) -> Tensor:
        """This rank's vector of sums, int64, on the device of the first tensor. Waits for nothing.

        ``tensors`` takes the place of the ones that the plan was made from: the same local shapes and dtypes
        in the same order.
        """
        live = self._tensors if tensors is None else tensors
        zero = _table("zero", self._device, 1)
        parts = [
            zero[0] if each is None else weighted_sum(live[each[0]], each[1].begin).to(self._device)
            for each in self._large
        ]
        parts += [zero[0] if group.empty else group.sum(live).to(self._device) for group in self._small]
        return torch.stack(parts) if parts else zero[:0]

    def digest(self, sums: Tensor) -> bytes:
        """SHA-256 of what was summed and of ``sums``, the vector of all ranks together, in host memory."""
        return hashlib.sha256(self._header + sums.numpy().astype("<i8", copy=False).tobytes()).digest()


class _Small:
    """The tensors of one dtype that are too small for a sum of their own."""

    def __init__(self, members: Sequence[tuple[int, Piece]]) -> None:
        self._positions = [position for position, _ in members]
        weights = [
            _mixed(
                (position << 40) + each.begin * _parts(each.local), each.local.numel() * _parts(each.local)
            )
            for position, each in members
        ]
        self.empty = not sum(map(len, weights))
        if not self.empty:
            self._weights = torch.from_numpy(np.concatenate(weights)).to(members[0][1].local.device)

    def sum(self, tensors: Sequence[Tensor]) -> Tensor:
        joined = torch._C._nn.flatten_dense_tensors([tensors[each].detach() for each in self._positions])
        integers = _real(joined).view(_INTEGERS[joined.element_size() // _parts(joined)])
        return _dot(integers.to(torch.int64), self._weights)


def weighted_sum(tensor: Tensor, begin: int) -> Tensor:
    """The weighted sum of a part of a tensor that starts at element ``begin`` of the whole."""
    flat = _real(tensor.detach().reshape(-1))
    begin *= _parts(tensor)
    size = flat.element_size()
    if flat.storage_offset() * size % _WORD:
        flat = flat.clone()  # a view of other memory that does not start at a word
    ahead = begin * size % _WORD
    if ahead:
        # Zeros add nothing, so they may stand for what comes before in the same word.
        flat = torch.cat((flat.new_zeros(ahead // size), flat))
    whole = flat.numel() * size // _WORD * _WORD // size
    total = _words_sum(flat[:whole].view(torch.int64), begin * size // _WORD) if whole else None
    if whole == flat.numel() and total is not None:
        return total
    rest = torch.cat((flat[whole:], flat.new_zeros(_WORD // size - (flat.numel() - whole))))
    last = _words_sum(rest.view(torch.int64), (begin * size - ahead + whole * size) // _WORD)
    return last if total is None else total + last


def _words_sum(words: Tensor, start: int) -> Tensor:
    """The sum of words from ``start`` on: the rest of a row, whole rows, the beginning of a row."""
    count = words.numel()
    columns = _table("column", words.device, ROW)
    row_weights = _table("row", words.device, (start + count) // ROW + 1)
    row, column = divmod(start, ROW)
    parts: list[Tensor] = []
    position = 0
    if column:
        position = min(ROW - column, count)
        parts.append(_dot(words[:position], columns[column : column + position]) * row_weights[row])
        row += 1
    rows = (count - position) // ROW
    if rows:
        matrix = words[position : position + rows * ROW].view(rows, ROW)
        parts.append(_dot(_combined(matrix, row_weights[row : row + rows]), columns))
        position += rows * ROW
    if position < count:
        tail = words[position:]
        parts.append(_dot(tail, columns[: tail.numel()]) * row_weights[row + rows])
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _combined(matrix: Tensor, weights: Tensor) -> Tensor:
    """The rows of ``matrix``, each times its weight, added up."""
    if matrix.device.type == "cpu":
        return torch.mv(matrix.t(), weights)
    return (matrix * weights[:, None]).sum(0)  # CUDA has no product of integer matrices


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return torch.dot(left, right) if left.device.type == "cpu" else (left * right).sum()


def _parts(tensor: Tensor) -> int:
    return 2 if tensor.is_complex() else 1


def _real(flat: Tensor) -> Tensor:
    return torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat


def _table(kind: str, device: torch.device, count: int) -> Tensor:
    """At least ``count`` weights of a kind, kept on ``device``."""
    known = _tables.get((kind, device))
    if known is None or known.numel() < count:
        # Doubling: a table is made anew a few times in the life of a process.
        length = max(ROW, 1 << (count - 1).bit_length())
        start = {"zero": 0, "column": 1 << 61, "row": 1 << 62}[kind]
        values = np.zeros(length, dtype=np.int64) if kind == "zero" else _mixed(start, length)
        known = _tables[kind, device] = torch.from_numpy(values).to(device)
    return known


def _mixed(start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Odd weights of the numbers from ``start`` on: the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    words = np.arange(start, start + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((words ^ (words >> np.uint64(31))) | np.uint64(1)).view(np.int64)


def _piece(value: Tensor | Piece) -> Piece:
    return value if isinstance(value, Piece) else Piece(value, value.numel(), 0, tuple(value.shape))


def _shape(piece: Piece) -> list[int]:
    shape = tuple(piece.local.shape) if piece.shape is None else piece.shape
    return list(shape) if math.prod(shape) == piece.numel else [piece.numel]
