"""Digests of many tensors, made on their device, the same however the tensors are cut among ranks.

Every tensor is a row of bytes, and its sum is taken with odd weights that depend on the position in the whole
tensor, wrapping at 2^64. Addition of integers has no order, so threads, kernels, devices and shards cannot
change it: a rank that holds elements ``begin`` to ``end`` weighs them as such, and the sums of the ranks are
added up. The digest is SHA-256 over names, dtypes, shapes and the vector of sums::

    >>> import torch
    >>> whole = {"weight": torch.arange(6.0)}
    >>> plan = Plan(whole)
    >>> halves = [Plan({"weight": Piece(part, 6, begin)}) for part, begin in
    ...           ((torch.arange(4.0), 0), (torch.arange(4.0, 6.0), 4))]
    >>> plan.digest(plan.sums()) == plan.digest(sum(half.sums() for half in halves))
    True

- A tensor of at least `LARGE` elements is summed byte by byte, as numbers from -128 to 127, in rows of `ROW`
  bytes; byte c of row r has the weight ``row[r] * column[c]``. A column's weight has `DIGITS` digits in base
  128, each from -63 to 63, so that one product of small integers (bytes times digits) reads the tensor once,
  on all threads, and is exact: below 2^24. What is left are `DIGITS` numbers for `ROW` bytes.
- The smaller ones of a dtype are joined and summed as one, each element (of 8 bytes: each half) with a weight
  of its own.

A single changed byte always changes the sum, since odd weights have an inverse; so do any two of a row. Any
other change does (exchanged elements, signs, another order or dtype) but for the chance of a collision, about
2^-32 for elements of small tensors and 2^-56 for others. The weights are longer than what they weigh: if both
had 64 bits, the highest bit would be seen as odd or even only, and two changed signs not at all. The sums are
**not** cryptographic: whoever can choose the tensors can find others with the same sums. What an adversary
could touch, the files, is covered by SHA-256 and BLAKE3.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FORMAT = "harness-bit-sums/2"
"""Name of the definition, which every digest covers."""
ROW = 2048
"""Bytes of a row: ROW * 128 * 63 is below 2^24, so that even float32 adds the products exactly."""
DIGITS = 8
"""Of a column's weight: as many as make a matrix product that any device has."""
LARGE = 16384
"""Elements from which on a tensor has a sum of its own; below, the calls would cost more than the sums."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_BASE = 128
_LEAST_ROWS = 32
"""Of a product on a device: cuBLAS refuses to multiply 16 rows or fewer."""
_GROUP_ROWS = 65536
"""Rows whose products lie together: 128 MiB of tensors make 6 MiB."""
_FLOAT_ROWS = 2048
"""Rows that are converted to floats at a time where a device cannot multiply bytes: 4 MiB become 16."""

_tables: dict[tuple[str, torch.device], Tensor] = {}
_multiplies: dict[torch.device, bool] = {}


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
        self._header = hashlib.sha256(json.dumps([FORMAT, described]).encode()).digest()
        self.names: list[str] = []
        """What each slot of the vector is the sum of."""
        large_held: list[_Large] = []
        self._small: list[_Small] = []
        groups: dict[str, list[tuple[int, Piece]]] = {}
        for position, (name, piece) in enumerate(pieces.items()):
            if piece.numel >= large:
                if piece.owned and piece.local.numel():
                    large_held.append(_Large(len(self.names), position, piece))
                self.names.append(name)
            else:
                groups.setdefault(str(piece.local.dtype), []).append((position, piece))
        for dtype, members in groups.items():
            self.names.append(f"small tensors of {dtype}")
            self._small.append(_Small([(at, each) for at, each in members if each.owned]))
        self._groups = _grouped(large_held)
        self._tensors = [piece.local for piece in pieces.values()]
        self._device = self._tensors[0].device if self._tensors else torch.device("cpu")

    def sums(self, tensors: Sequence[Tensor] | None = None) -> Tensor:
        """This rank's vector of sums, int64, on the device of the first tensor. Waits for nothing.

        ``tensors`` takes the place of the ones that the plan was made from: the same local shapes and dtypes
        in the same order.
        """
        live = self._tensors if tensors is None else tensors
        zero = _table("zero", self._device, 1)
        parts = [zero[0]] * (len(self.names) - len(self._small))
        for group in self._groups:
            for slot, found in group.sums(live):
                parts[slot] = found.to(self._device)
        parts += [zero[0] if each.empty else each.sum(live).to(self._device) for each in self._small]
        return torch.stack(parts) if parts else zero[:0]

    def digest(self, sums: Tensor) -> bytes:
        """SHA-256 of what was summed and of ``sums``, the vector of all ranks together, in host memory."""
        return hashlib.sha256(self._header + sums.numpy().astype("<i8", copy=False).tobytes()).digest()


class _Large:
    """A tensor with a sum of its own, in strips: what it has of its first row, whole rows, the rest."""

    def __init__(self, slot: int, position: int, piece: Piece) -> None:
        self.slot, self.position, self.device = slot, position, piece.local.device
        size = piece.local.element_size()
        start, count = piece.begin * size, piece.local.numel() * size
        first, last = start // ROW, -(-(start + count) // ROW)
        self.rows = last - first
        self.weights = _table("row", self.device, last)[first:last].view(-1)
        self._column = start % ROW
        """Where in its row the tensor begins."""
        head = min(-start % ROW, count)
        whole = (count - head) // ROW
        strips = ((head, 1), (whole * ROW, whole), (count - head - whole * ROW, 1))
        self._strips = [each // size for each, _ in strips if each]
        """Elements of each."""
        self._rows = [rows for each, rows in strips if each]
        """Rows of each."""

    def multiply(self, tensor: Tensor, products: Tensor) -> None:
        """Put the products of the rows of ``tensor`` into ``products``."""
        flat = tensor.detach().reshape(-1)
        if len(self._strips) == 1:
            _multiply(_rows(flat, self._column), products)
            return
        column = self._column
        for strip, out in zip(flat.split(self._strips), products.split(self._rows), strict=True):
            _multiply(_rows(strip, column), out)
            column = 0


class _Group:
    """Large tensors whose products lie together: each call counts where the cache is full of gradients."""

    def __init__(self, members: Sequence[_Large], products: Tensor, wide: Tensor) -> None:
        """``products`` and ``wide`` are memory for the products of their rows, of 32 and of 64 bits."""
        rows = [each.rows for each in members]
        self._members = members
        self._products = products[: sum(rows)]
        self._wide = wide[: sum(rows)]
        self._parts = self._products.split(rows)
        self._wide_parts = [each.view(-1) for each in self._wide.split(rows)]

    def sums(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The slot and the sum of each."""
        for each, products in zip(self._members, self._parts, strict=True):
            each.multiply(tensors[each.position], products)
        self._wide.copy_(self._products)
        for each, products in zip(self._members, self._wide_parts, strict=True):
            yield each.slot, _dot(products, each.weights)


def _grouped(tensors: Sequence[_Large]) -> list[_Group]:
    """Those of each device together, some `_GROUP_ROWS` at a time, in memory that they share."""
    found: dict[torch.device, list[list[_Large]]] = {}
    for each in tensors:
        groups = found.setdefault(each.device, [[]])
        if groups[-1] and sum(other.rows for other in groups[-1]) + each.rows > _GROUP_ROWS:
            groups.append([])
        groups[-1].append(each)
    made = []
    for device, groups in found.items():
        most = max(sum(each.rows for each in group) for group in groups)
        products = torch.empty(most, DIGITS, dtype=torch.int32, device=device)
        wide = torch.empty(most, DIGITS, dtype=torch.int64, device=device)
        made += [_Group(group, products, wide) for group in groups]
    return made


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
        integers = _real(joined).view(_INTEGERS[joined.element_size() // _halves(joined)])
        return _dot(integers.to(torch.int64), self._weights)


def weighted_sum(tensor: Tensor, begin: int) -> Tensor:
    """The weighted sum of a part of a tensor that starts at element ``begin`` of the whole."""
    (group,) = _grouped([_Large(0, 0, Piece(tensor, tensor.numel(), begin))])
    ((_, found),) = group.sums([tensor])
    return found


def _rows(strip: Tensor, column: int) -> Tensor:
    """Whole rows as they are; a part of one, from ``column`` on, between zeros, which add nothing."""
    data = _real(strip).view(torch.int8)
    if not column and data.numel() >= ROW:
        return data.view(-1, ROW)
    row = data.new_zeros(1, ROW)
    row[0, column : column + data.numel()] = data
    return row


def _multiply(matrix: Tensor, out: Tensor) -> None:
    """Rows of bytes times the digits of the columns, into ``out``, (rows, `DIGITS`), exact."""
    digits = _table("digit", matrix.device, ROW)
    rows = matrix.shape[0]
    if not _multiplies_bytes(matrix.device):
        for part, products in zip(matrix.split(_FLOAT_ROWS), out.split(_FLOAT_ROWS), strict=True):
            products.copy_(part.float() @ digits.float())
    elif matrix.device.type == "cpu" or (rows >= _LEAST_ROWS and matrix.data_ptr() % 16 == 0):
        torch._int_mm(matrix, digits, out=out)
    else:  # more rows, and a copy of a view that starts where cuBLAS does not
        padded = torch.cat((matrix, matrix.new_zeros(max(0, _LEAST_ROWS - rows), ROW)))
        out.copy_(torch._int_mm(padded, digits)[:rows])


def _multiplies_bytes(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bytes, exactly, and on a CPU faster than it does floats."""
    known = _multiplies.get(device)
    if known is None:
        host = torch.tensor([-128, 127, 127, -128], dtype=torch.int8).repeat(_LEAST_ROWS, ROW // 4)
        expected = (host.double() @ _table("digit", host.device, ROW).double()).to(torch.int32)
        probe, digits = host.to(device), _table("digit", device, ROW)
        found = torch.empty(_LEAST_ROWS, DIGITS, dtype=torch.int32, device=device)
        try:
            torch._int_mm(probe, digits, out=found)
            known = torch.equal(found.cpu(), expected)
        except (AttributeError, RuntimeError):  # no such kernel on this device or in this build
            known = False
        if known and device.type == "cpu":
            known = _seconds(lambda: torch._int_mm(probe, digits)) < _seconds(
                lambda: probe.float() @ digits.float()
            )
        _multiplies[device] = known
    return known


def _seconds(function: Callable[[], object]) -> float:
    """The fastest of a few calls."""
    found = []
    for _ in range(5):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    # CUDA has no product of 64-bit integer vectors.
    return torch.dot(left, right) if left.device.type == "cpu" else (left * right).sum()


def _halves(tensor: Tensor) -> int:
    """Numbers of an element: real and imaginary part."""
    return 2 if tensor.is_complex() else 1


def _parts(tensor: Tensor) -> int:
    """Integers of an element of a small tensor: numbers of 8 bytes are cut in two."""
    return _halves(tensor) * (2 if tensor.element_size() // _halves(tensor) == 8 else 1)


def _real(flat: Tensor) -> Tensor:
    return torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat


def _table(kind: str, device: torch.device, count: int) -> Tensor:
    """At least ``count`` weights of a kind, kept on ``device``."""
    known = _tables.get((kind, device))
    if known is None or known.shape[0] < count:
        # Doubling: a table is made anew a few times in the life of a process.
        values = _MAKE[kind](max(1024, 1 << (count - 1).bit_length()))
        known = _tables[kind, device] = torch.from_numpy(values).to(device)
    return known


def _column_digits() -> np.ndarray[tuple[int, int], np.dtype[np.int8]]:
    """The digits of the columns' weights, lowest first, (`ROW`, `DIGITS`); the lowest is odd."""
    words = _mixed(1 << 61, ROW).view(np.uint64)[:, None] >> (7 * np.arange(1, DIGITS + 1, dtype=np.uint64))
    digits = (words % np.uint64(127)).astype(np.int8) - np.int8(63)
    digits[:, 0] |= 1
    return digits


_MAKE: Mapping[str, Callable[[int], np.ndarray[tuple[int, ...], np.dtype[np.integer]]]] = {
    "zero": lambda count: np.zeros(count, dtype=np.int64),
    "digit": lambda count: _column_digits(),
    # A row's weight at each place of a column's: 64 bytes for the 2,048 of a row.
    "row": lambda count: _mixed(1 << 62, count)[:, None] * _BASE ** np.arange(DIGITS, dtype=np.int64),
}


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
