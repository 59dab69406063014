"""When micro-steps of a run are executed twice, so that looking stays within ``determinism.budget``.

The first double execution comes at the third step of a launch, when compiling and the first census are over,
whatever it costs; it sees every operator. A second one, soon after, sees loss and gradients, and such a pair
follows a recompilation, `MOST_PAIRS` times at most, since a model may compile for ever new shapes: these come
if the steps of the launch, all of them, can pay for them. From then on the next one comes when all that was
spent, and what it will cost itself, is at most the budget's share of the time of the steps so far. They take
turns in what they see. The first census of a launch, and that after a recompilation, are taken in any case,
the others by the same rule.

All looking is paid for: double executions, censuses, reading generated code, and the digests of steps. These
come at the steps that the config says, so the rest has what they leave of the budget, and waits where they
leave nothing. The ledger says of what was spent how much they were.

The ranks agree on the step: a rank that looked alone would keep the others waiting, and FSDP2's passes need
every rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

from torch import Tensor, nn

from harness.checkpoint.rng import Generator
from harness.determinism.double import Checked, Double
from harness.determinism.ledger import Ledger
from harness.format.budget import Budget
from harness.workers import Workers

FIRST, SECOND = 3, 8
"""Steps of a launch, from 1, at which a micro-step is executed twice: in any case, and if it can be paid."""
AGAIN = (1, 1 + SECOND - FIRST)
"""The same after a recompilation, if it can be paid."""
MOST_PAIRS = 4
_NEVER = 1 << 62
_MILLION = 1_000_000
_NUMBER = 8
"""Bytes of a number that the ranks tell each other."""


@dataclass(frozen=True)
class _Account:
    """What looking has cost on one rank, or the most on any, in nanoseconds."""

    looks: int
    digests: int
    first: int
    """Of ``digests``, those of the first step, which make ready for the others."""
    cost: int
    """Of the look in question."""
    elapsed: int
    """Of the steps after the first, with all that looking has cost."""


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
        steps: int,
        budget: float,
        digest_ns: Callable[[], int] = int,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        """``start``: updates before this launch, which makes ``steps``. ``budget``: share of their time, not
        0. ``digest_ns``: what step digests have cost so far."""
        self._ledger = ledger
        self._workers = workers
        self._double = Double(model, wrapped, generators, holders, self._any)
        self._start = start
        self._steps = steps
        self._budget = budget
        self._digest_ns = digest_ns
        self._clock = clock
        self._began: int | None = None
        self._first_digests = 0
        self._cost = 0
        """Of the last double execution."""
        self._dense = [start + FIRST, start + SECOND]
        """Steps at which it comes if the whole launch can pay for it."""
        self._next = start + FIRST
        self._pairs = 0
        self._fine = True
        ledger.affords = self._affords_census

    def execute(self, step: int, execute: Callable[[], Tensor]) -> Tensor:
        """The run's own pass of the first micro-batch of update ``step``, made once more if it is time to.

        ``execute`` makes a forward and a backward pass and returns the detached loss. Gradients are None
        before it, and those that it leaves are this rank's own.
        """
        if not self._due(step):
            return execute()
        own = self._double.own(execute, fine=self._fine)
        with self._ledger.aside():
            checked = self._double.check(execute, fine=self._fine, own=own)
        self._done(step, checked)
        return own.loss

    def look(self, step: int, execute: Callable[[], Tensor]) -> None:
        """In update ``step``, before its first micro-batch: execute it twice if it is time to."""
        if self._due(step):
            with self._ledger.aside():
                checked = self._double.check(execute, fine=self._fine)
            self._done(step, checked)

    def look_again(self, step: int) -> None:
        """Something was compiled anew in update ``step``: execute one twice soon, seeing every operator."""
        if self._next == _NEVER or self._pairs == MOST_PAIRS:
            return
        self._pairs += 1
        self._dense = sorted({*self._dense, *(step + each for each in AGAIN)})
        self._next, self._fine = min(self._next, self._dense[0]), True

    def settle(self, step: int) -> None:
        """Write down what looking has cost by the end of update ``step``."""
        self._ledger.budgeted(self.spent(step))

    def spent(self, step: int) -> Budget:
        """What looking has cost by the end of update ``step``."""
        elapsed = self._elapsed()
        costs = (self._spent(), self._digest_ns() - self._first_digests)
        spent, digests = (_MILLION * each // elapsed if elapsed > 0 else 0 for each in costs)
        return Budget(round(self._budget * _MILLION), spent, step - self._start, digests)

    def _due(self, step: int) -> bool:
        if self._began is None and step > self._start + 1:
            self._began = self._clock() - self._spent()  # the first step compiles
            self._first_digests = self._digest_ns()
        if step < self._next:
            return False
        if step > self._start + FIRST:
            self._next = self._paid(step, self._agreed(self._account(self._cost)), dense=step in self._dense)
        self._dense = [each for each in self._dense if each > step]
        return self._next <= step

    def _done(self, step: int, checked: Checked) -> None:
        self._ledger.doubled(step, checked)
        self._fine = not self._fine
        self._cost = checked.nanoseconds
        if checked.refused:
            self._next = _NEVER
        else:
            paid = self._paid(step, self._agreed(self._account(self._cost)), dense=False)
            self._next = min([max(paid, step + 1), *self._dense])

    def _affords_census(self, step: int) -> bool:
        if self._began is None:
            return False
        return self._paid(step, self._account(self._ledger.census_ns), dense=False) <= step

    def _paid(self, step: int, account: _Account, *, dense: bool) -> int:
        """The step, ``step`` or a later one, by which all looking and one more look are within the budget.

        It is ``step`` if that is ``dense`` and the steps of the launch can pay. Where the digests leave
        nothing, it is the one at which to ask again.
        """
        steps = max(1, step - self._start - 2)
        plain = max(1, account.elapsed - account.looks - account.digests)
        left = (self._budget * plain - (account.digests - account.first)) / steps
        if left <= 0:
            return step + steps
        wanted = math.ceil((account.looks + account.first + account.cost) / left)
        return step if dense and wanted <= self._steps else max(step, self._start + 1 + wanted)

    def _account(self, cost: int) -> _Account:
        return _Account(self._ledger.spent_ns, self._digest_ns(), self._first_digests, cost, self._elapsed())

    def _spent(self) -> int:
        return self._ledger.spent_ns + self._digest_ns()

    def _elapsed(self) -> int:
        """Nanoseconds of this launch's steps, its first one left out."""
        return 0 if self._began is None else self._clock() - self._began

    def _any(self, differs: bool) -> bool:
        if self._workers.world_size == 1:
            return differs
        return any(data == b"1" for data in self._workers.gather_bytes(b"1" if differs else b"0"))

    def _agreed(self, account: _Account) -> _Account:
        """The largest of each number over the ranks."""
        if self._workers.world_size == 1:
            return account
        data = b"".join(each.to_bytes(_NUMBER, "little") for each in astuple(account))
        columns = zip(*(_parsed(data) for data in self._workers.gather_bytes(data)), strict=True)
        return _Account(*(max(column) for column in columns))


def _parsed(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + _NUMBER], "little") for at in range(0, len(data), _NUMBER)]
