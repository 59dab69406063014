"""AdamW whose elements get the same bits wherever they lie in a tensor.

torch's fused CPU kernel computes a tensor in vector registers and its last elements, those that fill no
register, one by one; the compiler fuses a multiplication and an addition in one of the two and not in the
other. Cutting a parameter among ranks makes last elements of others: measured, a bias of 16 elements on 4
ranks had other second moments after 6 steps. Here the last elements of all parameters are put into registers
together.

A GPU's fused kernel, whose threads all run the same instructions, is left alone; not tried on one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.errors import TrainingFailed
from harness.training.optimizer import EagerAdamW, local

_LANES = 64
"""Elements, a multiple of those in any vector register: 16 of fp32 in AVX-512."""


class WholeLanes(EagerAdamW):
    """`torch.optim.AdamW` with ``fused=True`` on a CPU; every parameter gets a gradient at every step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update. ``closure`` is not called."""
        # Set by GradScaler, as for every optimizer that knows how to skip an overflow.
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            columns: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
            self._init_group(group, *columns)  # type: ignore[no-untyped-call]
            steps = columns[5]
            if not steps:
                continue
            # Rows: parameter, gradient, first and second moment.
            rows = [[_flat(local(each)) for each in column] for column in columns[:4]]
            cuts = [len(each) - len(each) % _LANES for each in rows[0]]
            bodies = [[each[:cut] for each, cut in zip(row, cuts, strict=True)] for row in rows]
            tails = [[each[cut:] for each, cut in zip(row, cuts, strict=True)] for row in rows]
            together = [_padded(row) for row in tails]
            torch._foreach_add_(steps, 1)
            parameters, gradients, averages, squares = (
                [*row, each] for row, each in zip(bodies, together, strict=True)
            )
            torch._fused_adamw_(
                parameters,
                gradients,
                averages,
                squares,
                [],
                [*steps, steps[0]],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=overflow,
            )
            if overflow is not None:
                torch._foreach_sub_(steps, [overflow] * len(steps))
            for row, each in zip(tails, together, strict=True):
                torch._foreach_copy_(row, list(each[: sum(map(len, row))].split([len(tail) for tail in row])))


def _flat(tensor: Tensor) -> Tensor:
    """``tensor`` as a vector over the same memory."""
    if not tensor.is_contiguous():
        raise TrainingFailed(
            f"a parameter or gradient of shape {tuple(tensor.shape)} is not contiguous in memory",
            where="determinism.elastic",
            remedy="use torch.contiguous_format, or set determinism.elastic=false",
        )
    return tensor.view(-1)


def _padded(tails: list[Tensor]) -> Tensor:
    """All ``tails``, one after the other, filled up with zeros to whole registers."""
    length = sum(len(tail) for tail in tails)
    return torch.cat([*tails, tails[0].new_zeros(-length % _LANES)])
