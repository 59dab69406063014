"""What a run remembers of its newest updates, in case that their numbers turn out not to be finite.

It costs a step nothing that could be measured: the losses are kept that were made in any case, the state of
torch's generator that its digest had taken, and those of the task's torch generators, half a microsecond
each. Python's at each step would cost 9 µs, numpy's 33, all of them as a checkpoint has them 96.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from harness.checkpoint import rng
from harness.checkpoint.rng import Generator
from harness.determinism.digest import rng_digest

_UPDATES = 3
"""On a device, numbers are read one step late."""
_TORCHS = "torch.cpu"


class _Passed(NamedTuple):
    """Of an update."""

    update: int
    """How many came before it."""
    generator: Tensor | None
    """State of torch's CPU generator before it; None when no digest was made of it."""
    own: dict[str, Tensor]
    """States of the task's torch generators before it, by the names that `rng.capture` gives them."""
    losses: list[Tensor]


class Remembered:
    """See the module; one of each launch."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._at_first: dict[str, Tensor] = {}
        self._torchs: Tensor | None = None
        self._passed: deque[_Passed] = deque(maxlen=_UPDATES)

    def begin(self, update: int, generators: Callable[[], Mapping[str, Generator]]) -> list[Tensor]:
        """Before the passes of the update after ``update`` others; returns the list for their losses."""
        of_task = generators()
        if self._first is None:
            self._first, self._at_first = update, rng.capture(of_task)
        own = {
            f"generator.{name}": each.get_state()
            for name, each in of_task.items()
            if isinstance(each, torch.Generator) and each.device.type == "cpu"
        }
        losses: list[Tensor] = []
        self._passed.append(_Passed(update, self._torchs, own, losses))
        return losses

    def rng_digest(self) -> bytes:
        """Digest of torch's CPU generator after the passes of an update, 16 bytes."""
        self._torchs = torch.get_rng_state()
        return bytes.fromhex(rng_digest(self._torchs))

    def losses(self, update: int) -> list[Tensor] | None:
        """Those of the update after ``update`` others; None when it is not remembered."""
        return next((each.losses for each in self._passed if each.update == update), None)

    def generators(
        self, update: int, generators: Mapping[str, Generator]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Their states before that update, as `rng.capture` has them, and the kinds of those not known.

        These are as they are now. All are known before the first update of a launch, later on torch's on the
        CPU where its digest was taken, the task's torch generators on the CPU, and those that nobody has
        drawn from since.
        """
        if update == self._first:
            return self._at_first, []
        now = rng.capture(generators)
        known = {name: state for name, state in self._at_first.items() if _equal(state, now.get(name))}
        passed = next((each for each in self._passed if each.update == update), None)
        if passed is not None:
            known |= passed.own
            known |= {} if passed.generator is None else {_TORCHS: passed.generator}
        return {**now, **known}, sorted({_kind(name) for name in now.keys() - known.keys()})


def _equal(state: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(state, other)


def _kind(name: str) -> str:
    """``numpy`` of ``numpy.keys``; others go by their own names."""
    first, _, rest = name.partition(".")
    return first if first in ("python", "numpy") else rest if first == "generator" else name
