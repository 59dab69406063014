"""When micro-steps of a run are executed twice, so that looking stays within ``determinism.budget``.

The first double execution comes at the third step of a launch, when compiling and the first census are over;
it sees every operator, and a second one, soon after, only loss and gradients. They cost more than the budget
has by then. From then on the next one comes when all that was spent, and what it will cost itself, is at most
the budget's share of the time of the steps since the launch began. They take turns in what they see. Another
such pair follows a recompilation, whatever it costs; at most `MOST_PAIRS` in a launch, since a model may
compile for ever new shapes.

The digests of steps are looking, too. They come at the steps that the config says, so the rest has
what they leave of the budget, but at least `LEAST`.

The ranks agree on the step: a rank that looked alone would keep the others waiting, and FSDP2's passes need
every rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from harness.checkpoint.rng import Generator
from harness.determinism.double import Double
from harness.determinism.ledger import Ledger
from harness.format.ledger import Budget
from harness.workers import Workers

FIRST, SECOND = 3, 8
"""Steps of a launch, from 1, at which a micro-step is executed twice whatever it costs."""
AGAIN = (1, 1 + SECOND - FIRST)
"""The same after a recompilation."""
MOST_PAIRS = 4
LEAST = 0.1
"""Share of the budget that double executions and censuses have, however much the digests cost."""
_NEVER = 1 << 62
_MILLION = 1_000_000
_NUMBER = 8
"""Bytes of a number that the ranks tell each other."""


class Doubling:
    """Executes micro-steps of one launch twice, now and then."""

    def __init__(
        self,
        ledger: Ledger,
        workers: Workers,
        model: nn.Module,
        wrapped: nn.Module,
        generators: Mapping[str, Generator],
        holders: Sequence[object],
        *,
        start: int,
        budget: float,
        digest_ns: Callable[[], int] = int,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        """``start``: updates before this launch. ``budget``: share of the time of its steps, above 0.
        ``digest_ns``: what step digests have cost so far."""
        self._ledger = ledger
        self._workers = workers
        self._double = Double(model, wrapped, generators, holders, self._any)
        self._start = start
        self._budget = budget
        self._digest_ns = digest_ns
        self._clock = clock
        self._began: int | None = None
        self._unpaid = [start + FIRST, start + SECOND]
        """Steps at which it comes whatever it costs."""
        self._next = start + FIRST
        self._pairs = 0
        self._fine = True

    def look(self, step: int, execute: Callable[[], Tensor]) -> None:
        """In update ``step``, before its first micro-batch: execute it twice if it is time to.

        ``execute`` makes a forward and a backward pass and returns the detached loss.
        """
        if self._began is None and step > self._start + 1:
            self._began = self._clock() - self._spent()  # the first step compiles
        if step < self._next:
            return
        with self._ledger.aside():
            checked = self._double.check(execute, fine=self._fine)
        self._ledger.doubled(step, checked)
        self._fine = not self._fine
        self._unpaid = [each for each in self._unpaid if each > step]
        if checked.refused:
            self._next = _NEVER
            return
        paid = self._paid(step, checked.nanoseconds)
        self._next = self._unpaid[0] if self._unpaid else max(paid, step + 1)

    def look_again(self, step: int) -> None:
        """Something was compiled anew in update ``step``: execute one twice soon, seeing every operator."""
        if self._next == _NEVER or self._pairs == MOST_PAIRS:
            return
        self._pairs += 1
        self._unpaid = sorted({*self._unpaid, *(step + each for each in AGAIN)})
        self._next, self._fine = min(self._next, self._unpaid[0]), True

    def _paid(self, step: int, cost: int) -> int:
        """The step by which what was spent until ``step``, and ``cost`` more, is within the budget."""
        spent, digests, cost, elapsed = self._agreed(
            self._ledger.spent_ns, self._digest_ns(), cost, self._elapsed()
        )
        steps = max(1, step - self._start - 1)
        allowed = self._budget * max(1, elapsed - spent - digests) / steps
        left = max(allowed - digests / steps, LEAST * allowed)
        paid = self._start + 1 + math.ceil((spent + cost) / left)
        if spent > left * steps:
            self._ledger.put_off(paid)
        return paid

    def settle(self, step: int) -> None:
        """Write down what looking has cost by the end of update ``step``."""
        elapsed = self._elapsed()
        spent = _MILLION * self._spent() // elapsed if elapsed > 0 else 0
        self._ledger.budgeted(Budget(round(self._budget * _MILLION), spent, step - self._start))

    def _spent(self) -> int:
        return self._ledger.spent_ns + self._digest_ns()

    def _elapsed(self) -> int:
        """Nanoseconds of this launch's steps, its first one left out."""
        return 0 if self._began is None else self._clock() - self._began

    def _any(self, differs: bool) -> bool:
        if self._workers.world_size == 1:
            return differs
        return any(data == b"1" for data in self._workers.gather_bytes(b"1" if differs else b"0"))

    def _agreed(self, *numbers: int) -> list[int]:
        """The largest of each number over the ranks."""
        if self._workers.world_size == 1:
            return list(numbers)
        told = self._workers.gather_bytes(b"".join(each.to_bytes(_NUMBER, "little") for each in numbers))
        columns = zip(*(_parsed(data) for data in told), strict=True)
        return [max(column) for column in columns]


def _parsed(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + _NUMBER], "little") for at in range(0, len(data), _NUMBER)]
