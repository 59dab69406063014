"""One run from start or resume to its last step: set-up, loop, finish, read from top to bottom.

Accelerate places the model and wraps it in DDP; everything else that decides a bit of the run is in the
modules that this file names. `harness.training.beginning.continuation` says what it continues from,
`harness.training.step.building` makes what a step needs, `harness.training.step.position` puts it where the
run begins or goes on, `harness.training.step.session` steps, `harness.training.recorder` writes down what
happened.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from harness import config, signals
from harness.checkpoint.snapshot import Arena
from harness.determinism import settings as determinism
from harness.determinism.ledger import Ledger
from harness.errors import Interrupted
from harness.format import chain, layout
from harness.training import startup, summary
from harness.training.beginning import continuation, remote
from harness.training.desk import newest_id, open_desk
from harness.training.elastic import mode as elastic
from harness.training.evaluation.held_out import evaluate
from harness.training.ranks import distributed, launch
from harness.training.ranks.exchange import FAILED
from harness.training.recorder import Recorder
from harness.training.step import building, position, session
from harness.training.step.readback import NonFinite, Readback
from harness.training.telemetry import energy
from harness.training.telemetry.metrics import Events
from harness.training.telemetry.screen import Screen


@dataclass(frozen=True)
class Result:
    """What a launch came to."""

    run: str
    """Folder of the run."""
    kind: str
    """Class of the launch: genesis, exact, same-data or accepted."""
    first_step: int
    last_step: int
    checkpoint: str | None
    """Id of the newest checkpoint."""
    loss: float | None
    """Of the last step; None when no step was left to run."""
    evaluation: Mapping[str, float]


def train(
    loaded: config.Loaded,
    *,
    accept: Sequence[str] = (),
    reason: str | None = None,
    quiet: bool = False,
    stop: signals.StopRequest | None = None,
) -> Result | None:
    """Start the run of ``loaded``, or continue it, up to its last step; rank 0 has the result for all.

    ``accept`` and ``reason`` answer a refused resume; ``quiet`` prints nothing; ``stop`` may have heard a
    signal already. Raises `Interrupted` after a stop signal (saved), `TrainingFailed` for a non-finite loss
    (saved aside), and the other errors of `harness.errors`, with the same exit code on every rank.
    """
    settings = loaded.settings
    with ExitStack() as stack:
        # Who takes part, and what this launch continues from.
        stop = stack.enter_context(signals.listening(stop))
        started = launch.detect(settings.train.world_size)
        if started.launcher != "bare":
            signals.follow_launcher()
        changes = [*determinism.apply(settings.determinism.mode), *elastic.pin_threads(settings)]
        distributed.connect(started)
        prepare = building.accelerator(settings)
        workers = distributed.join(started, prepare)
        at_launch = determinism.read_back()
        stack.callback(distributed.leave)
        watchdog = stack.enter_context(startup.watchdog(workers, settings, stop))
        screen = Screen(visible=workers.first and not quiet)
        store = remote.client(workers, settings)
        held, candidates = continuation.hold_run(workers, settings, store, screen)
        opened, found = continuation.open_run(workers, held, candidates, accept)
        task = startup.build_task(workers, settings, loaded.path.parent)
        events = Events(startup.events_path(settings, workers.rank))
        stack.callback(events.close)
        meter = energy.meter(workers.device, started.local_rank)
        stack.callback(meter.close, events)

        # The state of the run: build, warm up, then tensors, data cursor and generators of the checkpoint.
        # Tensors are verified while they are read, so only now can a checkpoint turn out to be damaged.
        while True:
            origin = continuation.open_start(workers, settings, held) if found is None else None
            launched = workers.first_only(
                partial(continuation.classify, opened, loaded, started, workers, task, accept, reason, origin)
            )
            if opened is not None and launched is not None:
                screen.table(
                    summary.first_screen(loaded, started, workers, task, opened, launched, changes, origin)
                )
            current = building.build(settings, task, workers, prepare)
            stack.callback(current.batches.close)
            if current.rehearsed:
                launched = workers.first_only(
                    partial(continuation.rehearsed, opened, launched, current.rehearsed, accept, screen.say)
                )
            if found is None:
                stream = workers.together(
                    partial(position.begin, current, None if origin is None else origin.loaded)
                )
                break
            resumed = continuation.resumed(workers, current, found, candidates, screen)
            if resumed is not None:
                stream = resumed
                break
            opened, found = continuation.open_run(workers, held, candidates, accept)
        kind = workers.broadcast_bytes(launched.segment.kind.encode() if launched else b"").decode()
        ledger = Ledger(
            settings.determinism.mode, settings.determinism.census_every, workers.rank, workers.device
        )
        start, head = 0, chain.GENESIS
        if found is not None:
            start, head = found.trainer["step"], bytes.fromhex(found.trainer["chain"])
            if workers.first:  # its counts would be added once for each rank
                ledger.load(found.files[layout.LEDGER])
        current.doubling = startup.doubling(settings, workers, current, ledger, start)
        desk = workers.first_only(
            lambda: open_desk(opened, launched, loaded, task, workers, events, screen, start, accept, store)
        )
        writer = startup.writer(workers, settings, desk, store)
        watchdog.give_up = writer.give_up
        recorder = Recorder(
            current, ledger, events, screen, writer, Arena(workers), desk,
            settings=settings, start=start, head=head,
        )  # fmt: skip
        stack.callback(recorder.close)
        evaluation = startup.evaluation_batches(task, settings)
        readback = Readback(workers.device, current.state.optimizer, scaled=current.state.scaler is not None)
        exchange = current.exchange()
        last = settings.train.steps
        screen.begin(start, last, task.unit, settings.train.log_every)
        began = time.monotonic()

        for step in range(start + 1, last + 1):
            digests: list[bytes] = []
            rate = current.schedule(step)
            try:
                with ledger.observe(step):
                    loss = current.forward_backward(stream, ledger, digests)
                    norm, sums = current.clip_gradients(), current.gradient_sums(step)
                    exchange.begin(
                        recorder.flag(stop.signal), digests, current.rng_digest(), compiled=ledger.compiled
                    )
                    readback.push(step, loss, norm, sums)
                    current.update(rate)
                told = exchange.end()
                recorder.note(step, rate, told)
                due = told.flag != 0 or step == last or step % settings.checkpoint.every == 0
                state = current.state_sums(step, due)
                if state is not None:
                    readback.push_state(state)
                evaluating = bool(evaluation) and (
                    step == last or session.is_due(step, settings.evaluate.every)
                )
                values = readback.drain() if due or evaluating else readback.collect()
            except NonFinite as broken:
                raise recorder.nonfinite(broken) from broken
            except RuntimeError as error:
                unavailable = determinism.explain(error)
                if unavailable is None:
                    raise
                raise unavailable from error
            if told.flag == FAILED:
                recorder.raise_failure()
            if told.flag:
                stop.heard()
            scores = None
            if evaluating and not told.flag:
                scores = evaluate(task, current.model, evaluation, workers, current.autocast())
            recorder.record(values, scores)
            if step == start + 1:
                workers.together(partial(recorder.read_back, at_launch))
            if due:
                recorder.save(step)
                meter.note(events, step)
                gc.collect()
            if step == start + 1:
                ledger.scan(step)
                recorder.prepare()
                _quiet_collector(stack)
            elif told.compiled:
                current.look_again(step, ledger)
            if step == start + startup.SETTLED:
                startup.tell_digests(current, step, screen, events)
            if told.flag:
                break

        recorder.finish()
        if recorder.last_step < last:
            stopped = Interrupted(
                f"{signals.name_of(told.flag)} on rank {told.rank}: "
                f"stopped after step {recorder.last_step} of {last}, saved",
                where=str(settings.run.dir),
                remedy="restart with the same command",
            )
            stopped.silent = not workers.first
            raise stopped
        screen.say(summary.closing(settings, recorder, desk, start, time.monotonic() - began))
        if not workers.first:
            return None
        return Result(
            run=str(settings.run.dir),
            kind=kind,
            first_step=start,
            last_step=recorder.last_step,
            checkpoint=newest_id(desk),
            loss=recorder.loss,
            evaluation=dict(recorder.evaluation),
        )


def _quiet_collector(stack: ExitStack) -> None:
    """Python's cycle collector must not walk a model's objects in the middle of a step; saves call it."""
    gc.collect()
    gc.freeze()
    gc.disable()
    stack.callback(gc.unfreeze)
    stack.callback(gc.enable)
