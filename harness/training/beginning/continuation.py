"""What this launch continues from, agreed by all ranks: the run folder, a checkpoint, and the launch's class.

Rank 0 holds the folder and compares (`harness.training.beginning.resume`); every rank reads its share of the
tensors. Those are verified while they are read, so a checkpoint may turn out to be damaged as late as in
`resumed`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from harness import config
from harness.checkpoint.candidates import Candidates
from harness.checkpoint.restore import DamagedCheckpoint, Loaded
from harness.errors import ResumeRefused, TrainingFailed
from harness.format import layout, leftovers
from harness.format.layout import RunFolder
from harness.settings import Settings
from harness.stores.client import ObjectStore
from harness.tasks.task import Batch, Task
from harness.training.beginning import remote, resume
from harness.training.beginning import start as begin
from harness.training.beginning.resume import HeldRun, OpenRun
from harness.training.beginning.start import Origin
from harness.training.elastic import mode as elastic
from harness.training.ranks.launch import Launch
from harness.training.statement.facts import facts_of
from harness.training.statement.record import Difference, RunFacts, Segment, in_words
from harness.training.step import position
from harness.training.step.position import wanted_files
from harness.training.step.session import Session
from harness.training.telemetry.screen import Screen
from harness.workers import Workers


@dataclass(frozen=True)
class Launched:
    """How this launch continues the run, on rank 0."""

    segment: Segment
    facts: RunFacts


def hold_run(
    workers: Workers, settings: Settings, store: ObjectStore | None, screen: Screen
) -> tuple[HeldRun | None, Candidates]:
    """The run folder, held by rank 0, with what only the store had, and the way back to its checkpoints."""
    held = workers.first_only(partial(resume.hold, settings, screen.say))
    if held is not None and held.cleared:
        screen.say(leftovers.in_words(held.cleared))
    folder = RunFolder(settings.run.dir)
    if store is not None:
        workers.first_only(partial(remote.fetch_newer, store, held, screen))
    policy, origin = (None, None) if held is None else (held.policy, resume.log_origin(held))
    return held, Candidates(workers, folder, policy, partial(wanted_files, workers.rank), origin)


def open_run(
    workers: Workers, held: HeldRun | None, candidates: Candidates, accept: Sequence[str]
) -> tuple[OpenRun | None, Loaded | None]:
    """What this launch continues from: the newest checkpoint that was not rejected yet, if there is one."""
    found = candidates.next()
    return workers.first_only(lambda: resume.open_run(held, found, accept)), found.loaded


def open_start(workers: Workers, settings: Settings, held: HeldRun | None) -> Origin | None:
    """What a run that has no checkpoint yet begins with; None for random weights."""
    return begin.open_origin(workers, settings, None if held is None else held.policy)


def classify(
    opened: OpenRun | None,
    loaded: config.Loaded,
    started: Launch,
    workers: Workers,
    task: Task,
    accept: Sequence[str],
    reason: str | None,
    origin: Origin | None,
) -> Launched:
    """The class of this launch and its facts. Raises `ResumeRefused`; a changed corpus is named file by
    file, a changed policy rule by rule.
    """
    if opened is None:
        raise TrainingFailed("only rank 0 classifies a launch")
    own, start = opened.held.own_policy, _start(opened, origin)
    policy = None if own is None else own.reference
    facts = partial(facts_of, loaded, started, workers, task, _run_id(opened), start, policy)
    tokenizer = task.identity().digests.get("tokenizer")
    first = partial(begin.first_segment, origin, tokenizer, task.files(), accept)
    try:
        return Launched(*resume.segment(opened, facts, accept, reason, first))
    except ResumeRefused as error:
        changed = resume.changed_files(opened.folder.root / layout.CORPUS, task.identity().files)
        rules = resume.changed_rules(opened)
        if not changed and not rules:
            raise
        told = [in_words(changed)] if changed else []
        told += [f"of the policy: {', '.join(rules)}"] if rules else []
        what = "; ".join([error.what, *told])
        raise ResumeRefused(what, where=error.where, remedy=error.remedy) from error


def rehearsed(
    opened: OpenRun | None,
    launched: Launched | None,
    rehearsal: str,
    accept: Sequence[str],
    say: Callable[[str], None],
) -> Launched:
    """``launched`` with the digest ``rehearsal`` of what the first shards give at the run's first weights.

    Raises `ResumeRefused` when it would be ``exact`` and the launch before, which may have had another world
    size, got something else; ``accept`` of ``code`` makes it ``accepted``.
    """
    if opened is None or launched is None:
        raise TrainingFailed("only rank 0 compares a launch with the one before it")
    facts, segment = launched.facts, launched.segment
    settings = {**facts.determinism_settings, elastic.REHEARSAL: rehearsal}
    facts = replace(facts, determinism_settings=settings)
    if segment.kind != "exact" or opened.found.statement is None:
        return Launched(segment, facts)
    before = opened.found.statement.predicate
    known = before["determinism"]["settings"].get(elastic.REHEARSAL, rehearsal)
    if known == rehearsal:
        return Launched(segment, facts)
    ranks = [str(each["world_size"]) for each in (before["launch"], facts.launch)]
    if "code" not in accept:
        raise ResumeRefused(
            "from the same weights and samples this launch gets other gradients than the one before it, "
            f"which had {ranks[0]} processes and this one {ranks[1]}",
            where="determinism.elastic, shards 0 and 1",
            remedy="look for what the task reads of world size or host (files, /proc, MPI) and for what has "
            "changed, or continue and sign why: --accept code --reason TEXT",
        )
    told = Difference("gradients of shards 0 and 1", f"{known[:12]}…", f"{rehearsal[:12]}…")
    segment = replace(segment, kind="accepted", differences=(*segment.differences, told))
    say(f"accepted, not exact: {told}")
    return Launched(segment, replace(facts, segment=segment))


def _run_id(opened: OpenRun) -> str:
    statement = opened.found.statement
    return statement.run_id if statement is not None else opened.logged_run or secrets.token_hex(16)


def _start(opened: OpenRun, origin: Origin | None) -> Mapping[str, Any] | None:
    """What other run's checkpoint this run began with: as it was signed, or as it was opened just now."""
    if opened.found.statement is not None:
        return opened.found.statement.start
    return None if origin is None else origin.reference


def resumed(
    workers: Workers, current: Session, found: Loaded, candidates: Candidates, screen: Screen
) -> Iterator[Batch] | None:
    """`position.resume`; None on every rank when the checkpoint turned out to be damaged."""

    def attempt() -> Iterator[Batch] | DamagedCheckpoint:
        try:
            return position.resume(current, found)
        except DamagedCheckpoint as damaged:
            return damaged

    stream = workers.together(attempt)
    if not isinstance(stream, DamagedCheckpoint):
        return stream
    candidates.reject(found, str(stream))
    screen.say(f"{found.folder.name} is damaged: {stream}; going back to the one before")
    return None
