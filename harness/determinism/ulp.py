"""How far two tensors in memory are apart, in units in the last place (ULP), the steps between neighbours.

    >>> one = torch.tensor([1.0, 2.0])
    >>> distance(one, torch.nextafter(one, torch.tensor(9.0)))
    1

`harness.audit.diff.ulp` says the same of the bytes of checkpoints, without torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def largest_distance(versions: Sequence[Tensor]) -> int | None:
    """Largest `distance` between the first of ``versions`` and any other; None when all are equal."""
    found = [distance(versions[0], each) for each in versions[1:]]
    return max((each for each in found if each is not None), default=None)


def distance(one: Tensor, other: Tensor) -> int | None:
    """Largest distance of two elements in ULP; None for equal bits, or when no difference is finite.

    Neighbouring floats are 1 apart, +0 and -0 are 0 apart. Integers are as far apart as their values.
    """
    if one.shape != other.shape or torch.equal(_bits(one), _bits(other)):
        return None
    return _distance(one, other)


_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return flat.contiguous().view(_WIDTHS[flat.element_size()])


def _distance(one: Tensor, other: Tensor) -> int | None:
    if not one.is_floating_point() and not one.is_complex():
        return int((one.to(torch.float64) - other.to(torch.float64)).abs().max().item())
    flat = [torch.view_as_real(each) if each.is_complex() else each for each in (one, other)]
    finite = torch.isfinite(flat[0].detach().reshape(-1)) & torch.isfinite(flat[1].detach().reshape(-1))
    if not bool(finite.any()):
        return None
    ranks = [_rank(_bits(each)[finite]) for each in (one, other)]
    # As doubles: the distance of two float64 of different sign does not fit 64 bits.
    return int((ranks[0].to(torch.float64) - ranks[1].to(torch.float64)).abs().max().item())


def _rank(bits: Tensor) -> Tensor:
    """Position of floats in their order, from their bits as sign and magnitude."""
    wide = bits.to(torch.int64)
    smallest = torch.iinfo(bits.dtype).min
    return torch.where(wide < 0, smallest - wide, wide)
