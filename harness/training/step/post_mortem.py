"""What a run finds out before it ends at a loss or gradient that is not finite: where the value came from.

Each rank executes its micro-batches of the update again, from the same weights, samples and generators, in a
sandbox. The first of them whose loss or gradients are not finite there either is then executed

- twice (`harness.determinism.double`): whether it repeats its bits, and the operator that does not;
- once with every argument and result read (`harness.determinism.origin`): the first operator that returned
  what is not finite out of finite arguments.

When the value comes back on no rank, the micro-batch whose loss was not finite is executed twice, or the
first `MOST`: uninitialised memory is filled otherwise in each of two executions, so whoever reads it is named
and not just luckier this time. And where the second execution began as the run's own had, a finite number
after one that was not is a difference that was measured. What the run's own has moved on and nobody remembers
(counters, generators other than torch's) is named instead.

At most three updates and some twenty executions of a micro-batch. Ranks wait for each other only between the
two parts, unless their passes communicate, as those of FSDP2 do and those of models with collectives of their
own: then all execute alike (`harness.training.ranks.meeting`), until one of them raises.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint import rng
from harness.checkpoint.cut import is_sharded
from harness.determinism import trace as traces
from harness.determinism.double import UNINITIALISED, Checked, Difference, Double, local_values
from harness.determinism.ledger import Ledger
from harness.determinism.origin import Origin, first_origin, not_finite
from harness.determinism.sandbox import Sandbox
from harness.format.nonfinite import COMPILED, UNSEEN, NonFinite
from harness.training.ranks.meeting import Meeting, PartedError
from harness.training.step import readback
from harness.training.step.session import Session
from harness.words import listed

MOST = 4
"""Micro-batches that are executed twice when the value came back in none."""
_NAMED = 3


@dataclass
class _Again:
    """What a second execution of the update gave on one rank."""

    back: int | None = None
    """The first micro-batch with a loss or gradient that was not finite."""
    by_loss: bool = False
    """Whether it was its loss; a gradient may come from another rank."""
    lost: int | None = None
    """The first whose loss was not finite in the run's own execution and is now."""
    alike: bool = True
    """Whether all losses had the bits of the run's own."""
    large: str | None = None
    """The parameter with the largest gradient, when all are finite and the square of their norm is not."""
    moved: list[str] = field(default_factory=list)
    """What it did not begin from as the run's own had."""
    talks: bool = False
    """Whether its passes communicate."""
    refused: str | None = None
    """Why nothing was executed, or not to the end."""


@dataclass
class _Looked:
    """What was found in one of its micro-batches."""

    number: int | None = None
    differences: tuple[Difference, ...] = ()
    origin: Origin | None = None
    refused: str | None = None


def examine(current: Session, ledger: Ledger, broken: readback.NonFinite) -> list[NonFinite]:
    """What is found on each rank, in their order; this rank's is added to ``ledger``. All ranks call alike.

    Afterwards the generators are as they were before the update, as far as that is known. An exception of the
    model is why nothing was found.
    """
    examined = _PostMortem(current, ledger, broken)
    found = examined.found()
    ledger.ended(found)
    told = examined.meeting.ended(json.dumps(asdict(found)).encode())
    return [NonFinite(**json.loads(each)) for each in told]


class _PostMortem:
    """That of one rank; see `examine`."""

    def __init__(self, current: Session, ledger: Ledger, broken: readback.NonFinite) -> None:
        self._current = current
        self._ledger = ledger
        self._broken = broken
        self._update = broken.step - 1
        self.meeting = Meeting(current.workers)
        self._together = is_sharded(current.wrapped)
        task, model, wrapped = current.task, current.model, current.wrapped
        self._generators = task.generators()
        self._sandbox = partial(Sandbox, model, wrapped, self._generators, (task,))
        self._double = Double(model, wrapped, self._generators, (task,), self._any_rank)

    def found(self) -> NonFinite:
        """Execute again, hear what came back where, look there."""
        current, again = self._current, _Again()
        if current.doubling is None:
            again.refused = "determinism.mode is off, or determinism.budget is 0"
        else:
            again.refused = "; ".join(self._sandbox().obstacles()[:_NAMED]) or None
        everywhere = self._told(again)
        refused = [(rank, each.refused) for rank, each in enumerate(everywhere) if each.refused]
        if refused:
            everywhere[current.workers.rank].refused = (
                again.refused or f"rank {refused[0][0]}: {refused[0][1]}"
            )
            return self._record(everywhere, _Looked())
        before, unknown = current.remembered.generators(self._update, self._generators)
        if current.sums is not None:
            unknown = []  # every shard of an elastic run seeds them anew
        rng.restore(before, self._generators)
        self._drop_gradients()
        with self._sandbox() as sandbox:
            again = self._caught(partial(self._executed_again, sandbox), again)
            again.moved += [f"generator {name}" for name in unknown]
            again.talks = self.meeting.needed
            everywhere = self._told(again)
            self._together |= any(each.talks for each in everywhere)
            looked = self._caught(partial(self._look, sandbox, self._wanted(everywhere)), _Looked())
        self._drop_gradients()
        return self._record(everywhere, looked)

    def _executed_again(self, sandbox: Sandbox) -> _Again:
        made, norms = _Again(), []
        own = self._current.remembered.losses(self._update) or []
        for number, execute in enumerate(self._passes(sandbox)):
            loss = execute()
            if number == 0:
                made.moved = sandbox.moved()
            was = own[number] if number < len(own) else None
            made.alike &= was is not None and int(traces.digest(loss)) == int(traces.digest(was))
            if self._broken_in(loss):
                made.back = number if made.back is None else made.back
                made.by_loss |= not_finite(loss) is not None
            elif made.lost is None and was is not None and not_finite(was) is not None:
                made.lost = number
            norms.append(self._norms())
            self._drop_gradients()
        if made.back is None and made.lost is None and math.isfinite(self._broken.loss):
            total = sum(sum(each.values()) for each in norms) * self._current.workers.world_size
            if total > math.sqrt(torch.finfo(torch.float32).max):
                made.back = max(range(len(norms)), key=lambda number: max(norms[number].values()))
                made.large = max(norms[made.back], key=lambda name: norms[made.back or 0][name])
        return made

    def _look(self, sandbox: Sandbox, wanted: Collection[int]) -> _Looked:
        """Execute the ``wanted`` micro-batches twice, up to the first that differs; the only one is read."""
        looked = _Looked()
        for number, execute in enumerate(self._passes(sandbox)):
            if not wanted or number > max(wanted):
                break
            if number in wanted:
                with self._sandbox() as inner:
                    checked = self._double.check(execute, fine=True)
                    self._ledger.doubled(self._broken.step, checked)
                    looked = _Looked(number, checked.differences, refused="; ".join(checked.refused) or None)
                    if len(wanted) == 1:
                        looked.origin = self._origin(inner, execute)
                if self._any_rank(bool(checked.differences)):
                    break
            execute()
            self._drop_gradients()
        return looked

    def _origin(self, inner: Sandbox, execute: Callable[[], Tensor]) -> Origin | None:
        inner.rewind()
        found = first_origin(execute, self._current.model)
        compiled = "torch._dynamo" in sys.modules and (found is None or found.op == COMPILED)
        if self._any_rank(compiled):
            inner.rewind()
            eager = first_origin(execute, self._current.model, eager=True)
            if compiled and eager is not None:
                return replace(eager, source=f"{eager.source}, executed without compiled code")
        return found

    def _passes(self, sandbox: Sandbox) -> Iterator[Callable[[], Tensor]]:
        sandbox.rewind()
        return map(self.meeting.together, self._current.micro_steps(self._update, self._ledger))

    def _wanted(self, everywhere: list[_Again]) -> Collection[int]:
        """Micro-batches that this rank is to look at."""
        mine = everywhere[self._current.workers.rank]
        if self._together and any(each.refused for each in everywhere):
            return []
        back = [each.back for each in everywhere if each.back is not None]
        if self._together and back:
            return [min(back)]
        if back:
            return [] if mine.back is None else [mine.back]
        lost = [each.lost for each in everywhere if each.lost is not None]
        if not lost:
            return range(MOST)
        return [min(lost)] if self._together else [] if mine.lost is None else [mine.lost]

    def _record(self, everywhere: list[_Again], looked: _Looked) -> NonFinite:
        rank = self._current.workers.rank
        mine = everywhere[rank]
        found = partial(NonFinite, self._broken.step, str(self._broken), rank)
        if mine.refused is not None:
            return found("not executed", None, None, None, None, mine.refused)
        back = [number for number, each in enumerate(everywhere) if each.back is not None]
        if self._together and not mine.by_loss:
            back = [number for number in back if everywhere[number].by_loss] or back
        if back and rank not in back:
            return found("elsewhere", None, None, None, None, f"it began on rank {back[0]}")
        lost = [number for number, each in enumerate(everywhere) if each.lost is not None]
        if mine.back is None and mine.lost is None and lost:
            return found("elsewhere", None, None, None, None, f"it had begun on rank {lost[0]}")
        refused = [number for number, each in enumerate(everywhere) if each.refused is not None]
        if mine.back is None and mine.lost is None and refused:
            return found("elsewhere", None, None, None, None, f"rank {refused[0]} could not execute it again")
        difference = looked.differences[0] if looked.differences else None
        if mine.back is not None:
            return self._came_back(
                partial(found, "same bits" if mine.alike else "other bits", mine.back), mine, looked
            )
        moved = sorted({name for each in everywhere for name in each.moved})
        if difference is not None:
            place = (difference.op, difference.module, difference.call_site)
            return found("finite", looked.number, *place, difference.source)
        if looked.origin is not None:
            origin = looked.origin
            return found("finite", looked.number, origin.op, origin.module, origin.call_site, origin.source)
        if looked.refused is not None:
            return found("finite", looked.number, None, None, None, looked.refused)
        source = "nothing that was executed twice differed"
        if moved:
            source += f"; it did not begin as the first had: {listed(moved, _NAMED)}"
        elif mine.lost is not None or rank == 0:
            self._ledger.doubled(self._broken.step, self._measured())
        return found("finite", mine.lost, None, None, None, source)

    def _came_back(self, found: Callable[..., NonFinite], mine: _Again, looked: _Looked) -> NonFinite:
        difference, origin = next(iter(looked.differences), None), looked.origin
        # What follows from memory that nobody has written may begin at an operator with finite arguments.
        blank = difference is not None and difference.alternative == UNINITIALISED
        unseen = origin is None or origin.op in UNSEEN
        if difference is not None and (blank or unseen):
            return found(difference.op, difference.module, difference.call_site, difference.source)
        if origin is not None:
            return found(origin.op, origin.module, origin.call_site, origin.source)
        if mine.large is not None:
            return found("gradient", mine.large, None, "the largest of gradients whose squares add up to inf")
        return found(None, None, None, looked.refused or "no operator was seen to make it")

    def _measured(self) -> Checked:
        """The difference of the two executions, as the ledger wants it."""
        loss = not math.isfinite(self._broken.loss)
        difference = Difference(
            op="loss" if loss else "gradient norm",
            module=None,
            call_site=None,
            device=self._current.workers.device.type,
            dtype="float32",
            ulp=None,
            source=f"double execution: {self._broken}, and finite when it was executed again",
        )
        return Checked(False, (difference,), frozenset(), self._current.accumulation, 0)

    def _broken_in(self, loss: Tensor) -> bool:
        """Whether the loss, or a gradient that no loss scaler looks after, is not finite."""
        if self._current.state.scaler is not None:
            return not_finite(loss) is not None
        gradients = [each.grad for each in self._current.model.parameters() if each.grad is not None]
        return any(not_finite(each) is not None for each in (loss, *map(local_values, gradients)))

    def _norms(self) -> dict[str, float]:
        """2-norm of the gradient of each parameter, in double precision."""
        named = self._current.model.named_parameters()
        found = {name: local_values(each.grad) for name, each in named if each.grad is not None}
        return {
            name: float(torch.linalg.vector_norm(each, dtype=torch.float64)) for name, each in found.items()
        }

    def _drop_gradients(self) -> None:
        for each in self._current.model.parameters():
            each.grad = None

    def _caught(self, function: Callable[[], Any], otherwise: Any) -> Any:
        """What ``function`` returns, or ``otherwise`` with the reason why it could not."""
        try:
            return function()
        except PartedError as error:
            otherwise.refused = str(error)
        except Exception as error:
            otherwise.refused = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.meeting.left(otherwise.refused)
        return otherwise

    def _told(self, again: _Again) -> list[_Again]:
        """That of every rank."""
        return [_Again(**json.loads(each)) for each in self.meeting.ended(json.dumps(asdict(again)).encode())]

    def _any_rank(self, mine: bool) -> bool:
        """Whether this rank says so, or any of those that must execute alike."""
        return self.meeting.any(mine) if self._together else mine
