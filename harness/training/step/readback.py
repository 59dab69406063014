"""Loss, gradient norm and the sums of digests on the host, without making a GPU wait.

On a CPU they are there at once, so a non-finite one is seen before the optimizer acts on it. On a GPU the
host reads them one step late, from pinned memory behind an event; until then a flag on the device keeps the
fused optimizer from stepping (the same flag that torch's loss scaler uses), so the state stays that of the
last good step.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from harness.training.step.digests import Sums


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
    gradients: bytes | None = None
    """Digest of the gradients, 32 bytes; None when it was not taken."""
    state: bytes | None = None
    """Digest of the state after the step."""


@dataclass
class _Pending:
    """A step whose numbers are on their way to the host."""

    step: int
    has_norm: bool
    numbers: Tensor
    sums: dict[str, tuple[Sums, Tensor]]
    """Field of `Values` → sums and their copy in pinned memory."""
    events: list[torch.cuda.Event] = field(default_factory=list)


class Readback:
    """The values of each step in order, as early as the device allows."""

    def __init__(self, device: torch.device, optimizer: torch.optim.Optimizer, *, scaled: bool) -> None:
        """``scaled``: a loss scaler skips steps with infinite gradients itself, so only the loss counts."""
        self._device = device
        self._optimizer = optimizer
        self._scaled = scaled
        self._pending: deque[_Pending] = deque()
        self._broken = torch.zeros((), device=device) if device.type == "cuda" else None
        self._ready: Values | None = None

    def push(self, step: int, loss: Tensor, norm: Tensor | None, gradients: Sums | None = None) -> None:
        """The numbers of ``step``, before its optimizer step. Raises `NonFinite` on a CPU."""
        if self._broken is None:
            value = self._checked(step, loss.item(), None if norm is None else norm.item())
            self._ready = value if gradients is None else replace(value, gradients=gradients.digest())
        else:
            self._push_late(self._broken, step, loss, norm, gradients)

    def push_state(self, state: Sums) -> None:
        """The state after the step that was pushed last."""
        if self._ready is not None:
            self._ready = replace(self._ready, state=state.digest())
        elif self._pending:
            pending = self._pending[-1]
            pending.sums["state"] = (state, _to_host(state.vector))
            pending.events.append(_recorded())

    def collect(self) -> list[Values]:
        """The values that can be had without waiting for the running step. Raises `NonFinite`."""
        if self._broken is None:
            values, self._ready = self._ready, None
            return [values] if values is not None else []
        return self._collect_late(keep=1)

    def drain(self) -> list[Values]:
        """All outstanding values, waiting for the device. Raises `NonFinite`."""
        return self.collect() if self._broken is None else self._collect_late(keep=0)

    def _push_late(
        self, broken: Tensor, step: int, loss: Tensor, norm: Tensor | None, gradients: Sums | None
    ) -> None:
        both = torch.stack((loss.float(), loss.float() if norm is None else norm.float()))
        if not self._scaled:
            broken.logical_or_(~torch.isfinite(both).all())
            self._optimizer.found_inf = broken  # type: ignore[attr-defined]
        sums = {} if gradients is None else {"gradients": (gradients, _to_host(gradients.vector))}
        self._pending.append(_Pending(step, norm is not None, _to_host(both), sums, [_recorded()]))

    def _collect_late(self, keep: int) -> list[Values]:
        values = []
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            for event in pending.events:
                event.synchronize()
            loss, norm = pending.numbers.tolist()
            value = self._checked(pending.step, loss, norm if pending.has_norm else None)
            digests = {name: sums.digest(host) for name, (sums, host) in pending.sums.items()}
            values.append(replace(value, gradients=digests.get("gradients"), state=digests.get("state")))
        return values

    def _checked(self, step: int, loss: float, norm: float | None) -> Values:
        if not math.isfinite(loss):
            raise NonFinite(step, loss, norm)
        if norm is not None and not math.isfinite(norm):
            if not self._scaled:
                raise NonFinite(step, loss, norm)
            norm = None
        return Values(step, loss, norm)


def _to_host(values: Tensor) -> Tensor:
    """A copy in pinned memory, on its way."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    return host


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event
