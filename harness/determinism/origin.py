"""Where a value that is not finite comes from: the operator that first returned one out of finite arguments.

    found = first_origin(execute, model)        # execute(): forward and backward, returns the loss
    found.op, found.module, found.call_site

For a run that is ending anyway: every argument is read before each call and every result after it, which
takes several times the micro-step. The pass leaves behind what any pass does: `harness.determinism.sandbox`.

- An infinity that a call was told to write is meant (``masked_fill(mask, float("-inf"))``, `torch.full`), and
  so is one that lies in the batch or in a buffer; a NaN that is made of it is not.
- A NaN that is made of an infinity which nobody meant comes from the operator that made the infinity: the
  overflow, not the subtraction after it.
- Inside of compiled regions only calls of libraries are seen. ``eager`` executes without compiled code.

Example::

    >>> weight = nn.Linear(2, 2)
    >>> def execute():
    ...     loss = (weight(torch.zeros(1, 2)) * 0).log().sum()
    ...     loss.backward()
    ...     return loss.detach()
    >>> first_origin(execute, weight).op
    'aten.log'
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.determinism import trace as traces
from harness.determinism.double import local_values
from harness.determinism.trace import Call, address_of
from harness.format.nonfinite import COLLECTIVE, COMPILED, UNSEEN

_UNWRITTEN = "uninitialised memory"


@dataclass(frozen=True)
class Origin:
    """An operator, or what was not finite before any operator ran."""

    op: str
    """`aten.log`; `parameter`, when it was not finite before; or one of `UNSEEN`."""
    module: str | None
    """Name of the module whose method called the operator, or of the parameter."""
    call_site: str | None
    source: str
    """How: ``2 of 64 elements are nan, out of finite arguments``."""


def not_finite(tensor: Tensor) -> str | None:
    """``nan`` or ``inf`` when ``tensor`` holds one, NaN before infinity; None when all of it is finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return None
    values = _readable(tensor)
    if bool(torch.isfinite(values).all()):
        return None
    return "nan" if bool(torch.isnan(values).any()) else "inf"


def _readable(tensor: Tensor) -> Tensor:
    """Torch has no `isfinite` of float8."""
    return tensor.detach().to(torch.float32) if tensor.element_size() == 1 else tensor.detach()


def first_origin(execute: Callable[[], Tensor], model: nn.Module, *, eager: bool = False) -> Origin | None:
    """Execute once, and tell where the first value of loss or gradients that is not finite began.

    None when all of them are finite. Gradients must be None before it.
    """
    onlooker = _Onlooker({address_of(local_values(each)): name for name, each in model.named_parameters()})
    with _stance(eager), traces.take_trace(modules=traces.modules_of(model), onlooker=onlooker) as trace:
        loss = execute()
    gradients = [local_values(each.grad) for each in model.parameters() if each.grad is not None]
    broken = [address_of(each) for each in (loss, *gradients) if not_finite(each) is not None]
    if not broken:
        return None
    begun = [onlooker.holds[address] for address in broken if address in onlooker.holds]
    if all(each.op in UNSEEN for each in begun):
        # A gradient that other ranks have reduced, or compiled code has passed on, may have begun here still.
        begun = [each for each in onlooker.found if each.op not in UNSEEN] or begun or onlooker.found
    first = min(begun, key=lambda each: each.number, default=None)
    if first is None:
        return Origin(COMPILED, None, None, "no operator outside of compiled code has made it")
    if first.call.uninitialised is not None and first.op == _UNWRITTEN:
        maker = trace.calls[first.call.uninitialised]
        source = f"{first.call.op} reads memory that {maker.op} left uninitialised"
        return Origin(maker.op, *traces.place_of(trace.calls, maker), source)
    module, site = traces.place_of(trace.calls, first.call)
    return Origin(first.op, first.name or module, site, first.source)


def _stance(eager: bool) -> AbstractContextManager[Any]:
    return torch.compiler.set_stance("force_eager") if eager else nullcontext()


@dataclass(frozen=True)
class _Beginning:
    """A call from which on there is a value that is not finite."""

    number: int
    call: Call
    op: str
    source: str
    name: str | None = None
    """Of the parameter that was not finite before."""


class _Onlooker(traces.Onlooker):
    """Follows values that are not finite from memory to memory."""

    def __init__(self, parameters: Mapping[int, str]) -> None:
        """``parameters``: address → name."""
        self.holds: dict[int, _Beginning] = {}
        """Address of memory that holds such a value → where that began."""
        self.found: list[_Beginning] = []
        self._parameters = parameters
        self._meant: set[int] = set()
        self._travelled: set[int] = set()
        self._given: list[tuple[int, str]] = []
        self._told = False
        self._calls = 0

    def given(self, call: Call, tensors: Sequence[Tensor], arguments: Sequence[Any]) -> None:
        """What the call was given that is not finite."""
        kinds = [(address_of(each), not_finite(each)) for each in tensors]
        self._given = [(address, kind) for address, kind in kinds if kind is not None]
        self._told = any(isinstance(each, float) and not math.isfinite(each) for each in arguments)
        self._calls += 1

    def made(self, call: Call, tensors: Sequence[Tensor]) -> None:
        """What the call has made of it."""
        for each in tensors:
            kind, address = not_finite(each), address_of(each)
            if kind is None:
                if each.numel() * each.element_size() == each.untyped_storage().nbytes():
                    self.holds.pop(address, None)
                    self._meant.discard(address)
                continue
            beginning = self._beginning(call, each, kind)
            if beginning is None:
                self._meant.add(address)
            else:
                self.holds[address] = beginning

    def travelling(self, tensors: Sequence[Tensor]) -> None:
        """What other ranks may write to."""
        self._travelled |= set(map(address_of, tensors))
        for address in map(address_of, tensors):
            self.holds.pop(address, None)

    def _beginning(self, call: Call, tensor: Tensor, kind: str) -> _Beginning | None:
        """Where the value in ``tensor`` began; None for an infinity that is meant."""
        nans = [address for address, each in self._given if each == "nan"]
        known = [self.holds[address] for address in nans if address in self.holds]
        known += [self.holds[address] for address, _ in self._given if address in self.holds]
        if known:
            return known[0]
        if call.uninitialised is not None and self._given:
            return self._begun(call, _UNWRITTEN, "")
        broken = next((self._parameters[at] for at, _ in self._given if at in self._parameters), None)
        if broken is not None:
            return self._begun(call, "parameter", "was not finite before", broken)
        if nans:
            if self._travelled.issuperset(nans):
                return self._begun(call, COLLECTIVE, f"{call.op} was given a nan that came from another rank")
            return self._begun(call, COMPILED, f"{call.op} was given a nan that no operator outside has made")
        if kind == "inf" and (self._told or self._given):
            return None
        out_of = "infinities that were meant" if self._given else "finite arguments"
        return self._begun(call, call.op, f"{_share(tensor)} {kind}, out of {out_of}")

    def _begun(self, call: Call, op: str, source: str, name: str | None = None) -> _Beginning:
        self.found.append(_Beginning(self._calls, call, op, source, name))
        return self.found[-1]


def _share(tensor: Tensor) -> str:
    if tensor.numel() == 1:
        return "its result is"
    return f"{int((~torch.isfinite(_readable(tensor))).sum())} of {tensor.numel()} elements are"
