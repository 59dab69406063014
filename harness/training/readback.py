"""Loss and gradient norm on the host, without making a GPU wait.

On a CPU they are there at once, so a non-finite one is seen before the optimizer acts on it. On a GPU the
host reads them one step late, from pinned memory behind an event; until then a flag on the device keeps the
fused optimizer from stepping (the same flag that torch's loss scaler uses), so the state stays that of the
last good step.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor


class NonFinite(Exception):
    """The loss or the gradient norm of ``step`` is NaN or infinite."""

    def __init__(self, step: int, loss: float, norm: float | None) -> None:
        self.step, self.loss, self.norm = step, loss, norm
        what = "loss" if not math.isfinite(loss) else "gradient norm"
        super().__init__(f"the {what} of step {step} is {loss if what == 'loss' else norm}")


@dataclass(frozen=True)
class Values:
    """One step's numbers."""

    step: int
    loss: float
    norm: float | None


class Readback:
    """The values of each step in order, as early as the device allows."""

    def __init__(self, device: torch.device, optimizer: torch.optim.Optimizer, *, scaled: bool) -> None:
        """``scaled``: a loss scaler skips steps with infinite gradients itself, so only the loss counts."""
        self._device = device
        self._optimizer = optimizer
        self._scaled = scaled
        self._pending: deque[tuple[int, bool, Tensor, torch.cuda.Event]] = deque()
        self._broken = torch.zeros((), device=device) if device.type == "cuda" else None
        self._ready: Values | None = None

    def push(self, step: int, loss: Tensor, norm: Tensor | None) -> None:
        """The scalars of ``step``, before its optimizer step. Raises `NonFinite` on a CPU."""
        if self._broken is None:
            value = loss.item()
            self._ready = self._checked(step, value, None if norm is None else norm.item())
        else:
            self._push_late(self._broken, step, loss, norm)

    def collect(self) -> list[Values]:
        """The values that can be had without waiting for the running step. Raises `NonFinite`."""
        if self._broken is None:
            values, self._ready = self._ready, None
            return [values] if values is not None else []
        return self._collect_late(keep=1)

    def drain(self) -> list[Values]:
        """All outstanding values, waiting for the device. Raises `NonFinite`."""
        return self.collect() if self._broken is None else self._collect_late(keep=0)

    def _push_late(self, broken: Tensor, step: int, loss: Tensor, norm: Tensor | None) -> None:
        both = torch.stack((loss.float(), loss.float() if norm is None else norm.float()))
        if not self._scaled:
            broken.logical_or_(~torch.isfinite(both).all())
            self._optimizer.found_inf = broken  # type: ignore[attr-defined]
        host = torch.empty(2, dtype=torch.float32, pin_memory=True)
        host.copy_(both, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, norm is not None, host, event))

    def _collect_late(self, keep: int) -> list[Values]:
        values = []
        while len(self._pending) > keep:
            step, has_norm, host, event = self._pending.popleft()
            event.synchronize()
            loss, norm = host.tolist()
            values.append(self._checked(step, loss, norm if has_norm else None))
        return values

    def _checked(self, step: int, loss: float, norm: float | None) -> Values:
        if not math.isfinite(loss):
            raise NonFinite(step, loss, norm)
        if norm is not None and not math.isfinite(norm):
            if not self._scaled:
                raise NonFinite(step, loss, norm)
            norm = None
        return Values(step, loss, norm)
