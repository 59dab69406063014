"""Everything a run leaves behind: metrics lines, checkpoints, the last state of a run that went wrong.

Every rank has a `Recorder` and calls it at the same steps: each writes its part of a checkpoint. The rest of
the run folder is rank 0's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from harness.checkpoint import shards, state
from harness.checkpoint.publisher import Publication
from harness.checkpoint.shards import Part
from harness.checkpoint.snapshot import Arena, Tensors, image_of
from harness.checkpoint.writer import NICENESS, CheckpointWriter, Save
from harness.determinism import settings as determinism
from harness.determinism.ledger import Ledger
from harness.errors import HarnessError, TrainingFailed
from harness.format import chain, layout, strict_json
from harness.format import ledger as ledgers
from harness.format.ledger_merge import unite_files
from harness.format.nonfinite import foremost
from harness.settings import Settings
from harness.training.desk import Desk
from harness.training.ranks.exchange import FAILED, Told
from harness.training.statement import record
from harness.training.statement.record import StepFacts
from harness.training.step import post_mortem
from harness.training.step.position import captured_rng
from harness.training.step.readback import NonFinite, Values
from harness.training.step.session import Session
from harness.training.telemetry.metrics import Events
from harness.training.telemetry.screen import Screen


@dataclass(frozen=True)
class _Noted:
    step: int
    rate: float
    batch: bytes
    rng: bytes
    at: float


class Recorder:
    """Writes down what happens at each step of one launch."""

    def __init__(
        self,
        session: Session,
        ledger: Ledger,
        events: Events,
        screen: Screen,
        writer: CheckpointWriter,
        arena: Arena,
        desk: Desk | None,
        *,
        settings: Settings,
        start: int,
        head: bytes,
    ) -> None:
        """``start`` and ``head``: the step and the chain head that this launch continues from."""
        self._session = session
        self._workers = session.workers
        self._ledger = ledger
        self._events = events
        self._screen = screen
        self._desk = desk
        self._writer = writer
        self._arena = arena
        self._global_batch = settings.train.global_batch
        self._checkpoint = settings.checkpoint
        self._mode = settings.determinism.mode
        self._awaits_timestamp_at = settings.train.steps if settings.signing.timestamp is not None else None
        self._head = head
        self._noted: deque[_Noted] = deque()
        self._latest: Values | None = None
        self._seen: Mapping[str, Any] = {"coverage": [], "rows": [], "unclassified": []}
        self._clock = time.perf_counter()
        self.last_step = start
        self.evaluation: Mapping[str, float] = {}
        """The newest evaluation of this launch."""

    @property
    def loss(self) -> float | None:
        """The newest loss, on rank 0."""
        return None if self._latest is None else self._latest.loss

    def flag(self, signal: int) -> int:
        """What to tell the other ranks: a failed save in the background, else a stop signal, else 0."""
        if not self._writer.failed:
            return signal
        if self._checkpoint.on_failure == "stop" or self._writer.contested:
            return FAILED
        self._go_on()
        return signal

    def note(self, step: int, rate: float, told: Told) -> None:
        """Step ``step`` was taken; its numbers may come later."""
        self.last_step = step
        if self._desk is not None:
            self._noted.append(_Noted(step, rate, told.batch, told.rng, time.perf_counter()))

    def record(self, values: Sequence[Values], scores: Mapping[str, float] | None) -> None:
        """Write the lines of ``values``, the last with the evaluation's ``scores`` when there are any."""
        if scores is not None:
            self.evaluation = scores
        if self._desk is None:
            return
        for number, value in enumerate(values, start=1):
            self._write_line(self._desk, value, scores if number == len(values) else None)
        if scores is not None:
            self._clock = time.perf_counter()

    def save(self, step: int) -> None:
        """Checkpoint the state after ``step``; the write goes on in the background.

        Raises `VerificationFailed` on every rank when the samples are not any more what would be signed.
        """
        started = time.perf_counter()
        self._workers.together(self._session.task.require_unchanged)
        self._ledger.scan(step)
        scanned = time.perf_counter()
        self._wait(last=False)
        waited = time.perf_counter() - scanned
        self._writer.save(self._snapshot(step, "ok"))
        blocked = time.perf_counter() - started
        self._events.write(
            "save",
            step=step,
            waited_s=waited,
            blocked_s=blocked,
            arena_bytes=self._arena.size,
            pinned=self._arena.pinned,
        )
        if waited > 1.0:
            self._screen.say(f"step {step}: waited {waited:.1f} s for the save before to finish")
        self._note_ledger(step)
        self._advance()
        self._clock = time.perf_counter()

    def _note_ledger(self, step: int) -> None:
        """What this rank has seen, as it is before ledger.json adds it to what the others have."""
        seen = strict_json.loads(self._ledger.to_bytes(), where=layout.LEDGER)
        seen = {name: seen[name] for name in ("coverage", "rows", "unclassified")}
        if seen != self._seen:
            self._seen = seen
            self._events.write("ledger", step=step, **seen)

    def read_back(self, before: Mapping[str, determinism.Value]) -> None:
        """After the first step: sign the settings that hold now, and say which are not as ``before``.

        Raises `TrainingFailed` when strict settings do not hold any more.
        """
        now, changed = determinism.read_again(self._mode, before)
        for each in changed:
            self._events.write("setting changed", "warning", reason=each)
        if changed:
            self._screen.say(f"changed by the first step, and signed as it is now: {'; '.join(changed)}")
        if self._desk is not None:
            known = {**self._desk.facts.determinism_settings, **now}
            known |= {"changed_by_first_step": "; ".join(changed)} if changed else {}
            self._desk.facts = replace(self._desk.facts, determinism_settings=record.plain(known))

    def prepare(self) -> None:
        """Take the memory that a save will need, now that the optimizer has its state."""
        tensors = state.tensors_of(self._session.state)
        niceness = NICENESS if self._workers.device.type == "cpu" else 0
        self._arena.prepare(self._parts(tensors), tensors, niceness=niceness)

    def nonfinite(self, broken: NonFinite) -> TrainingFailed:
        """Execute ``broken.step`` again, save the state before it aside, signed, with what that has shown;
        returns the error to raise."""
        step = broken.step - 1
        self._wait(last=False)
        self._screen.say(f"{broken}: executed again before the run ends, to see where it comes from")
        found = post_mortem.examine(self._session, self._ledger, broken)
        self._writer.save(self._snapshot(step, "nonfinite"))
        self._wait()
        first, *others = foremost(found)
        own = found[self._workers.rank]
        self._events.write("nonfinite", "error", step=broken.step, reason=str(broken), again=own.told)
        more = f" (and on rank {', '.join(str(each.rank) for each in others)})" if others else ""
        return TrainingFailed(
            f"{broken}; {first.told}{more}",
            where=f"{layout.CHECKPOINTS}/nonfinite-{layout.checkpoint_name(step)} holds the state before it",
            remedy=first.remedy,
        )

    def raise_failure(self) -> None:
        """Raise the background failure of any rank on every rank."""
        self._wait()

    def finish(self) -> None:
        """Wait for the last save, at the run's end for its timestamp too, and close what is open."""
        self._wait()
        # A launch that was stopped leaves at once; the next one asks for the head that it finds.
        if self.last_step == self._awaits_timestamp_at:
            self._workers.together(self._finish_timestamps)
        self._advance()
        self._screen.close()

    def _finish_timestamps(self) -> None:
        if self._desk is None or self._desk.stamper is None:
            return
        self._desk.stamper.finish()
        if self._desk.publisher.mirror is not None:
            self._desk.publisher.mirror.add_timestamps()

    def close(self) -> None:
        """Close the files, each of them; also after an error."""
        if self._desk is not None:
            with ExitStack() as last_to_first:
                last_to_first.callback(self._desk.tracking.finish)
                last_to_first.callback(self._desk.metrics.close)
                last_to_first.callback(self._screen.close)

    def _advance(self) -> None:
        """Tell the trackers what is safe on disk."""
        if self._desk is not None and self._desk.publisher.parent is not None:
            self._desk.tracking.advance(self._desk.publisher.parent.step)

    def _wait(self, *, last: bool = True) -> None:
        """Until no rank has anything in flight; a failure is raised on every rank.

        Unless ``last``, when `checkpoint.on_failure` says to go on: another save follows.
        """
        if not last and self._checkpoint.on_failure == "continue":
            self._writer.join()
            if not self._writer.contested:
                if self._writer.failed:
                    self._go_on()
                return
        self._workers.together(self._writer.wait)

    def _go_on(self) -> None:
        """Say what a save has failed of, and go on without it, as the config wants."""
        try:
            self._writer.check()
        except HarnessError as error:
            self._events.failure(error)
            self._screen.say(f"a save has failed: {error}; goes on, as checkpoint.on_failure says")

    def _write_line(self, desk: Desk, value: Values, scores: Mapping[str, float] | None) -> None:
        noted = self._noted.popleft()
        seconds, self._clock = noted.at - self._clock, noted.at
        task = self._session.task
        samples = noted.step * self._global_batch
        rate = self._global_batch * task.units_per_sample / max(seconds, 1e-9)
        line: dict[str, Any] = {
            "step": noted.step,
            "loss": value.loss,
            "lr": noted.rate,
            "grad_norm": value.norm,
            "samples": samples,
            f"{task.unit}s": samples * task.units_per_sample,
            f"{task.unit}s_per_s": rate,
            "mfu": None if desk.least_seconds is None else desk.least_seconds / seconds,
            "time": time.time(),
        }
        if self._session.digests:
            self._head = chain.advance(
                self._head,
                step=noted.step,
                batch=noted.batch,
                rng=noted.rng,
                loss=value.loss,
                grad_norm=value.norm or 0.0,
                gradients=value.gradients,
                state=value.state,
            )
            taken = {"gradients": value.gradients, "state": value.state}
            line |= {"batch": noted.batch.hex(), "rng": noted.rng.hex()}
            line |= {name: digest.hex() for name, digest in taken.items() if digest is not None}
            line["chain"] = self._head.hex()
        if scores is not None:
            line["evaluation"] = dict(scores)
        desk.metrics.write(line)
        self._latest = value
        self._screen.step(noted.step, value.loss, rate, line["mfu"], scores)

    def _parts(self, tensors: Tensors) -> tuple[Part, ...]:
        return state.parts_of(
            self._session.state, tensors, self._workers.world_size, self._checkpoint.file_bytes
        )

    def _snapshot(self, step: int, outcome: str) -> Save:
        """Copy this rank's part of the state into the arena; the rest of the facts are frozen here too."""
        generators = self._workers.gather_bytes(captured_rng(self._session))
        if self._session.doubling is not None:
            self._session.doubling.settle(step)
        seen = self._workers.gather_bytes(self._ledger.to_bytes())
        training = self._session.state
        tensors = state.tensors_of(training)
        parts = self._parts(tensors)
        images = self._arena.fill(parts, tensors)
        if self._desk is None:
            return Save(step, images)
        ranks = [image_of(state.rng_file(rank), data) for rank, data in enumerate(generators) if data]
        size = sum(image.size for image in ranks)
        publication = self._publication(self._desk, step, outcome, parts, size, unite_files(seen))
        return Save(step, [*images, *ranks], publication)

    def _publication(
        self, desk: Desk, step: int, outcome: str, parts: Sequence[Part], others: int, ledger: bytes
    ) -> Publication:
        desk.metrics.flush()
        training = self._session.state
        facts = StepFacts(
            step=step,
            cursor=self._cursor(step),
            ledger=ledgers.summary(ledger),
            chain=self._head.hex() if self._session.digests else None,
            lines=desk.metrics.digest if self._session.digests else None,
            latest=self._latest,
            evaluation=dict(self.evaluation),
            outcome=outcome,
        )
        trainer = {
            "format": "harness-trainer/1",
            "step": step,
            "world_size": self._workers.world_size,
            "cursor": dict(facts.cursor),
            "chain": self._head.hex(),
            # Told to whoever reads the file: a resume computes the one, and takes the other from its tensors.
            "schedule": self._session.schedule.document(step),
            "scaler": state.scaler_facts(training),
            "aliases": state.model_tensors(training.model)[1],
            "groups": state.group_names(training),
            "segment": desk.facts.segment.number,
        }
        return Publication(
            files={
                **shards.index(parts),
                **self._session.task.files(),
                layout.TRAINER: strict_json.dumps(trainer),
                layout.LEDGER: ledger,
            },
            size=sum(part.size for part in parts) + others,
            predicate=partial(record.predicate, desk.facts, facts),
            before=desk.metrics.sync,
            nonfinite=outcome != "ok",
        )

    def _cursor(self, step: int) -> dict[str, int]:
        task = self._session.task
        samples = step * self._global_batch
        return {
            "step": step,
            "samples": samples,
            "tokens": samples * task.units_per_sample,
            "epoch": samples // task.samples,
            "position": samples % task.samples,
        }
