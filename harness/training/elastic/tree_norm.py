"""The global norm of the gradients, the same bits however they are cut among the ranks.

A rank that holds whole gradients and one that holds rows of them must round alike, so nothing here depends on
the shape that a rank happens to hold: squares are taken and added element by element, each row (one index of
the first dimension) in halves down to one number. Of cut gradients the rows' sums of all ranks are brought
together by an all-reduce, in which every sum meets only zeros, and then added in one tree.

Multiplications and additions are kernels of their own: one that does both may round once or twice, depending
on whether an element falls into a vector register or into the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from harness.checkpoint import mesh
from harness.determinism import tree

_GROUP_ELEMENTS = 1 << 22
"""So many squares are in memory at once, or those of one gradient."""


def gradient_norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """The global 2-norm of ``gradients``, by name, a scalar.

    All ranks hold the same gradients, or each its rows of them. Collective in the second case.
    """
    parts = {name: mesh.local_part(name, each) for name, each in gradients.items()}
    rows = {name: each.shape[0] if each.ndim else 1 for name, each in gradients.items()}
    total = sum(rows.values())
    first = next(iter(parts.values()))[0]
    squares = torch.zeros(1 << (total - 1).bit_length(), dtype=torch.float32, device=first.device)
    sums = row_squares({name: local for name, (local, _) in parts.items()})
    start = 0
    for name, whole in gradients.items():
        begin = start + parts[name][1] * rows[name] // max(1, whole.numel())
        squares[begin : begin + len(sums[name])] = sums[name]
        start += rows[name]
    if any(parts[name][0] is not whole for name, whole in gradients.items()):
        dist.all_reduce(squares)
    return tree.summed(squares).sqrt()


def row_squares(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum of squares of each row of each gradient, fp32 (rows,)."""
    sums: dict[str, Tensor] = {}
    for group in _groups(gradients):
        names = list(group)
        squares = [torch.mul(each, each) for each in group.values()]
        for name, each in zip(names, _folded(squares), strict=True):
            sums[name] = each
    return sums


def _groups(gradients: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Gradients as matrices of rows, a few at a time."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, each in gradients.items():
        if group and size + each.numel() > _GROUP_ELEMENTS:
            yield group
            group, size = {}, 0
        width = each[0].numel() if each.ndim and each.numel() else 1
        group[name] = each.reshape(-1, width).float()
        size += each.numel()
    yield group


def _folded(squares: list[Tensor]) -> list[Tensor]:
    """Each matrix (rows, width) summed to (rows,), the right half added to the left one until one is left."""
    widths = [each.shape[1] for each in squares]
    while True:
        open_ = [at for at, width in enumerate(widths) if width > 1]
        if not open_:
            return [each[:, 0].clone() for each in squares]
        odd = [at for at in open_ if widths[at] % 2]
        if odd:
            # The column without a partner.
            last = [squares[at][:, widths[at] - 1 : widths[at]] for at in odd]
            torch._foreach_add_([squares[at][:, :1] for at in odd], last)
        halves = [widths[at] // 2 for at in open_]
        left = [squares[at][:, :half] for at, half in zip(open_, halves, strict=True)]
        right = [squares[at][:, half : 2 * half] for at, half in zip(open_, halves, strict=True)]
        torch._foreach_add_(left, right)
        for at, half in zip(open_, halves, strict=True):
            widths[at] = half
