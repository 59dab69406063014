"""Executes steps of a run again, on every rank, and writes down what `harness replay` compares.

`harness replay` starts this as a launch of its own, as the run was launched: ``python -m
harness.training.replay.execution ORDER`` or the same under torchrun. ORDER is a JSON file (`Order`); the
answer is a file of JSON lines beside it. The run folder is only read: a checkpoint is known by its id, and
every byte is verified while it is loaded.

The steps are those of `harness.training.loop`, with nothing that records, evaluates or saves around them. An
evaluation leaves the generators of python, numpy and torch as they were; a task with generators of its own
that draws from them while it evaluates cannot be replayed across an evaluation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from harness import config, signals
from harness.checkpoint import restore, rng
from harness.determinism import settings as determinism
from harness.determinism.bit_sums import FORMAT
from harness.determinism.ledger import Ledger
from harness.errors import EvidenceIncomplete, HarnessError, PeerLost, TrainingFailed
from harness.format import chain
from harness.settings import Settings
from harness.tasks.task import Batch, Task
from harness.training import startup
from harness.training.beginning import resume
from harness.training.elastic import mode as elastic
from harness.training.ranks import distributed, launch
from harness.training.ranks.watchdog import Watchdog
from harness.training.replay import localise
from harness.training.statement.facts import facts_of
from harness.training.statement.record import RunFacts, Segment, in_words
from harness.training.step import building, position
from harness.training.step.digests import StepDigests
from harness.training.step.position import wanted_files
from harness.training.step.readback import NonFinite, Readback, Values
from harness.training.step.session import Session
from harness.workers import Workers

REPEATS = 4
"""How often a step is executed from the same state, to see whether this machine repeats its own bits."""


@dataclass(frozen=True)
class Order:
    """What to execute again."""

    config: str
    """Text of the resolved config, as signed."""
    base: str
    """Folder at which relative paths of the config start."""
    signed: Mapping[str, Any]
    """The predicate to compare this launch with."""
    world_size: int
    checkpoint: tuple[str, str] | None
    """Folder and id of the checkpoint to start from; None for the beginning of the run."""
    last: int
    gradients: Sequence[int]
    """Steps whose gradients have a digest."""
    state: Sequence[int]
    """Steps whose state has one."""
    differences: bool
    """Whether another stack or world size is accepted."""
    repeat: bool
    """Whether step ``last`` is executed several times from the same state, each tensor told apart, and the
    operator looked for."""
    answer: str
    """File of JSON lines, written by rank 0."""


class Answer:
    """The lines for `harness replay`, each flushed at once."""

    def __init__(self, path: Path, workers: Workers) -> None:
        self._stream = open(path, "a") if workers.first else None  # noqa: SIM115

    def write(self, **fields: Any) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(fields) + "\n")
            self._stream.flush()


@dataclass(frozen=True)
class Place:
    """Where steps can be executed again: the signed launch, as far as this machine has it."""

    settings: Settings
    base: Path
    workers: Workers
    prepare: Accelerator
    answer: Answer

    def task(self) -> Task:
        """The signed task, with generators as at the beginning of a run."""
        return startup.build_task(self.workers, self.settings, self.base)


@contextmanager
def launched(order: Order) -> Iterator[tuple[Place, Task]]:
    """The place and a task for ``order``. Raises `EvidenceIncomplete` when this is not what was signed."""
    settings = config.parse(order.config, "the signed config")
    with ExitStack() as stack:
        signals.follow_launcher()
        started = launch.detect(order.world_size)
        determinism.apply(settings.determinism.mode)
        elastic.pin_threads(settings)
        distributed.connect(started)
        prepare = building.accelerator(settings)
        workers = distributed.join(started, prepare)
        stack.callback(distributed.leave)
        stack.enter_context(
            Watchdog(
                workers,
                signals.StopRequest(),
                peer_timeout=settings.train.peer_timeout,
                deadline=None,
                report=partial(_tell, order),
            )
        )
        answer = Answer(Path(order.answer), workers)
        place = Place(settings, Path(order.base), workers, prepare, answer)
        task = place.task()
        loaded = config.Loaded(settings, {}, (Path(order.base) / "run.yaml",))
        # Under which policy it was made has no part in what is executed.
        policy, this = order.signed.get("policy"), Segment(0, "genesis")
        facts = facts_of(loaded, started, workers, task, "0" * 32, None, policy, this)
        workers.first_only(partial(_compare, order, facts, answer))
        yield place, task


def _compare(order: Order, facts: RunFacts, answer: Answer) -> None:
    """Write how this launch differs from the signed one. Raises `EvidenceIncomplete` for what matters."""
    changes = list(resume.changes(order.signed, facts))
    answer.write(kind="launch", differences=[{"kind": kind, **asdict(each)} for kind, each in changes])
    _refuse(changes, order.differences)
    _refuse_other_digests(order)


def execute(order: Order) -> None:
    """Carry ``order`` out. Raises `EvidenceIncomplete` when this is not what the statement says."""
    with launched(order) as (place, task):
        current = building.build(place.settings, task, place.workers, place.prepare)
        try:
            _steps(order, current, place.answer)
        finally:
            current.batches.close()


def _steps(order: Order, current: Session, answer: Answer) -> None:
    first, stream = begin(current, order)
    runner = _Runner(current, stream)
    for step in range(first + 1, order.last + 1):
        if order.repeat and step == order.last:
            answer.write(kind="repeat", step=step, **runner.repeat())
            return
        try:
            line = runner.step(step, step in order.gradients, step in order.state)
        except NonFinite as broken:
            answer.write(kind="nonfinite", step=step, reason=str(broken))
            return
        for each in line:
            answer.write(kind="step", **each)
    for each in runner.rest():
        answer.write(kind="step", **each)


def _refuse(changes: Sequence[tuple[str, Any]], accepted: bool) -> None:
    refused = [each for kind, each in changes if kind in resume.ACCEPTABLE]
    if refused:
        resume.require_readable_code(refused)
        raise EvidenceIncomplete(
            f"this is not what the statement says: {in_words(refused)}",
            where="replay",
            remedy="replay with the signed code, corpus and tokenizer (--folder DIR: where the config lay)",
        )
    if changes and not accepted:
        raise EvidenceIncomplete(
            f"this stack is not the signed one: {in_words([each for _, each in changes])}",
            where="replay",
            remedy="use the signed stack, or go on with --stack-differs and expect other bits",
        )


def _refuse_other_digests(order: Order) -> None:
    signed = order.signed["determinism"]["settings"].get(chain.DEFINITION)
    if (order.gradients or order.state) and signed != FORMAT:
        raise EvidenceIncomplete(
            f"the steps were digested as `{signed}`, and this version digests as `{FORMAT}`",
            where="replay",
            remedy="replay with the version of harness that the run was trained with",
        )


def begin(current: Session, order: Order) -> tuple[int, Iterator[Batch]]:
    """The step that the state is of, and the micro-batches that follow."""
    if order.checkpoint is None:
        return 0, position.begin(current, None)
    folder, identity = order.checkpoint
    workers = current.workers
    wanted = partial(wanted_files, workers.rank)
    loaded = workers.together(lambda: restore.load(workers, Path(folder), identity, wanted))
    return int(loaded.trainer["step"]), position.resume(current, loaded)


class _Runner:
    """The steps of the loop, and nothing else."""

    def __init__(self, current: Session, stream: Iterator[Batch]) -> None:
        self._current = current
        self._stream = stream
        workers = current.workers
        self._ledger = Ledger("off", 1, workers.rank, workers.device)
        scaled = current.state.scaler is not None
        self._readback = Readback(workers.device, current.state.optimizer, scaled=scaled)
        self._exchange = current.exchange(digests=True)
        self._digests = StepDigests(workers, current.state)
        self._noted: dict[int, tuple[bytes, bytes]] = {}

    def step(self, step: int, gradients: bool, state: bool) -> list[dict[str, Any]]:
        """Take ``step``; returns the facts of the steps whose numbers are on the host by now."""
        current, digests = self._current, list[bytes]()
        rate = current.schedule(step)
        loss = current.forward_backward(self._stream, self._ledger, digests)
        norm = current.clip_gradients()
        self._exchange.begin(0, digests, current.rng_digest())
        self._readback.push(step, loss, norm, self._digests.gradients() if gradients else None)
        current.update(rate)
        told = self._exchange.end()
        self._noted[step] = (told.batch, told.rng)
        if state:
            self._readback.push_state(self._digests.state())
        return [self._facts(each) for each in self._readback.collect()]

    def rest(self) -> list[dict[str, Any]]:
        """The facts of the steps whose numbers were still on their way."""
        return [self._facts(each) for each in self._readback.drain()]

    def _facts(self, values: Values) -> dict[str, Any]:
        batch, generators = self._noted.pop(values.step)
        facts = {
            "step": values.step,
            "loss": values.loss,
            "grad_norm": values.norm,
            "batch": batch.hex(),
            "rng": generators.hex(),
        }
        taken = {"gradients": values.gradients, "state": values.state}
        return facts | {name: digest.hex() for name, digest in taken.items() if digest is not None}

    def repeat(self) -> dict[str, Any]:
        """The gradients of the next update, `REPEATS` times from the same state; a sum for every tensor."""
        current = self._current
        batches = [next(self._stream) for _ in range(current.accumulation)]
        generators = rng.capture(current.task.generators())
        buffers = {name: buffer.clone() for name, buffer in current.model.named_buffers()}
        each = StepDigests(current.workers, current.state, large=0)
        sums: list[list[int]] = []
        names: list[str] = []
        for _ in range(REPEATS):
            _put_back(current, generators, buffers)
            # Without clipping, which would carry a difference of one tensor into all.
            current.forward_backward(iter(batches), self._ledger, [])
            found = each.gradients()
            names, sums = found.plan.names, [*sums, found.vector.tolist()]
            current.state.optimizer.zero_grad(set_to_none=True)
        varying = [name for name, *values in zip(names, *sums, strict=True) if len(set(values)) > 1]
        _put_back(current, generators, buffers)
        places = localise.located(current, batches) if varying else []
        return {"repeats": REPEATS, "tensors": len(names), "varying": varying, "places": places}


def _put_back(current: Session, generators: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    rng.restore(dict(generators), current.task.generators())
    with torch.no_grad():
        for name, buffer in current.model.named_buffers():
            buffer.copy_(buffers[name])


def main(carry_out: Callable[[Order, Mapping[str, Any]], None] = lambda order, _: execute(order)) -> int:
    """Read the order, carry it out; the exit code of a `HarnessError` is its own.

    ``carry_out`` gets the order and what the file holds besides, under ``more``.
    """
    fields = json.loads(Path(sys.argv[1]).read_text())
    checkpoint, more = fields.pop("checkpoint"), fields.pop("more", {})
    order = Order(checkpoint=None if checkpoint is None else (checkpoint[0], checkpoint[1]), **fields)
    try:
        carry_out(order, more)
    except HarnessError as error:
        return _failed(order, error)
    except Exception as error:
        return _failed(order, TrainingFailed(f"{type(error).__name__}: {error}", where="replay"))
    return 0


def _failed(order: Order, error: HarnessError) -> int:
    if not error.silent:
        _tell(order, error)
    return error.exit_code


def _tell(order: Order, error: HarnessError) -> None:
    """Write ``error`` where `harness replay` looks for it."""
    remedy = "start the replay again" if isinstance(error, PeerLost) else error.remedy
    line = {"kind": "error", "what": error.what, "where": error.where, "remedy": remedy}
    with open(order.answer, "a") as stream:
        stream.write(json.dumps({**line, "exit_code": error.exit_code}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
