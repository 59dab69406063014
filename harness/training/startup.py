"""What happens once, before the first step: folder, task, facts, first screen, open files."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness import config, environment, privacy, tracking
from harness.checkpoint.keeping import Best, Keep
from harness.checkpoint.publisher import Publisher, durable_rename
from harness.checkpoint.restore import Candidates, DamagedCheckpoint, Loaded
from harness.checkpoint.writer import CheckpointWriter
from harness.determinism import settings as determinism
from harness.determinism.ledger import Ledger
from harness.errors import ResumeRefused, TrainingFailed
from harness.format import files as durable
from harness.format import layout, strict_json
from harness.format.layout import RunFolder
from harness.settings import Settings
from harness.stores.client import ObjectStore
from harness.tasks import build as tasks
from harness.tasks.task import Batch, Task
from harness.terminal import human_seconds
from harness.training import distributed, elastic, failure, remote, resume, session
from harness.training import start as begin
from harness.training.doubling import Doubling
from harness.training.launch import Launch
from harness.training.metrics import Events, MetricsLog, read_steps, rewind
from harness.training.record import RunFacts, Segment, plain
from harness.training.recorder import Desk, Recorder, announce
from harness.training.resume import HeldRun, OpenRun
from harness.training.screen import Screen
from harness.training.session import Session, wanted_files
from harness.training.signals import StopRequest
from harness.training.start import Origin
from harness.training.throughput import peak_flops
from harness.training.watchdog import Watchdog
from harness.workers import Workers

_MESH = {"ddp": "data_parallel", "fsdp2": "fully_sharded"}
"""The only dimension of the mesh of ranks."""


@dataclass(frozen=True)
class Launched:
    """How this launch continues the run, on rank 0."""

    segment: Segment
    facts: RunFacts


def events_path(settings: Settings, rank: int) -> Path:
    """The events file of ``rank``."""
    return RunFolder(settings.run.dir).events(rank)


def build_task(workers: Workers, settings: Settings, base: Path) -> Task:
    """The task on every rank; rank 0 first, since it may fill a cache that the others then read.

    Raises `TrainingFailed` when two ranks find different samples.
    """
    task = workers.first_only(lambda: tasks.build(settings, base))
    task = workers.together(lambda: task or tasks.build(settings, base))
    digest = strict_json.dumps({**task.identity().digests, "samples": task.samples})
    for rank, other in enumerate(workers.gather_bytes(digest)):
        if other != digest:
            raise TrainingFailed(
                f"rank {rank} finds other samples than rank {workers.rank}",
                where="data",
                remedy="give every host the same files and package versions",
            )
    return task


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
    file.
    """
    if opened is None:
        raise TrainingFailed("only rank 0 classifies a launch")
    facts = partial(facts_of, loaded, started, workers, task, _run_id(opened), _start(opened, origin))
    tokenizer = task.identity().digests.get("tokenizer")
    first = partial(begin.first_segment, origin, tokenizer, task.files(), accept)
    try:
        return Launched(*resume.segment(opened, facts, accept, reason, first))
    except ResumeRefused as error:
        changed = resume.changed_files(opened.folder.root / layout.CORPUS, task.identity().files)
        if not changed:
            raise
        named = "; ".join(f"{item.what}: {item.before} → {item.after}" for item in changed[:5])
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ResumeRefused(f"{error.what}; {named}{more}", where=error.where, remedy=error.remedy) from error


def _run_id(opened: OpenRun) -> str:
    statement = opened.found.statement
    return statement.run_id if statement is not None else opened.logged_run or secrets.token_hex(16)


def _start(opened: OpenRun, origin: Origin | None) -> Mapping[str, Any] | None:
    """What other run's checkpoint this run began with: as it was signed, or as it was opened just now."""
    if opened.found.statement is not None:
        return opened.found.statement.start
    return None if origin is None else origin.reference


def facts_of(
    loaded: config.Loaded,
    started: Launch,
    workers: Workers,
    task: Task,
    run_id: str,
    start: Mapping[str, Any] | None,
    segment: Segment,
) -> RunFacts:
    """What a statement of this launch says of it."""
    settings = loaded.settings
    text = config.resolved_text(settings)
    identity = task.identity()
    template = identity.digests.get("template")
    source = tasks.source(settings, loaded.path.parent)
    return RunFacts(
        run={"id": run_id, "name": settings.run_name, "seed": settings.run.seed},
        segment=segment,
        launch={
            "command": list(started.command),
            "launcher": started.launcher,
            "world_size": started.world_size,
            "nodes": started.nodes,
            "mesh": {
                "fully_sharded" if settings.parallel == "fsdp2" else "data_parallel": started.world_size
            },
            "precision": settings.precision,
            "compile": settings.compile,
            "parallel": settings.parallel,
            "backend": workers.backend,
        },
        config={"sha256": config.digest(text), "text": text},
        code={
            **environment.code(),
            "task": None if source is None else {"import_path": source[0], "sha256": source[1]},
        },
        data={
            "kind": identity.kind,
            "corpus_sha256": identity.digests["corpus"],
            "tokenizer_sha256": identity.digests.get("tokenizer"),
            "counts": dict(identity.counts),
            **({"template_sha256": template} if template else {}),
        },
        environment=plain({**environment.facts(settings.run.host), "stack": determinism.stack()}),
        determinism_mode=settings.determinism.mode,
        determinism_settings=plain({**determinism.read_back(), **elastic.recorded(settings)}),
        start=start,
    )


def open_desk(
    opened: OpenRun | None,
    launched: Launched | None,
    loaded: config.Loaded,
    task: Task,
    workers: Workers,
    events: Events,
    screen: Screen,
    start: int,
    accept: Sequence[str],
    store: ObjectStore | None,
) -> Desk:
    """The run's files, opened by rank 0 at step ``start``; ``store`` is brought up to date with them."""
    if opened is None or launched is None:
        raise TrainingFailed("only rank 0 writes")
    folder, facts = opened.folder, launched.facts
    moved = rewind(folder.root / layout.METRICS, start, events, accept_gap="metrics" in accept)
    if moved:
        screen.say(f"metrics.jsonl: {moved} lines after step {start} moved to {events.path.name}")
    for item in launched.segment.skipped:
        events.write("skipped checkpoint", "warning", name=item.name, reason=item.reason)
    corpus = {"format": "harness-corpus/1", "files": dict(task.identity().files)}
    durable.write_durable(folder.root / layout.CORPUS, strict_json.dumps(corpus))
    _write_config(opened, facts)
    _set_aside_pruned(folder, start)
    publisher = Publisher(
        folder,
        str(facts.run["id"]),
        opened.held.signer,
        parent=opened.parent,
        head=opened.head,
        keep=_keep(loaded.settings),
        set_aside=dict(opened.set_aside),
    )
    if store is not None:
        only = loaded.settings.checkpoint.store_only
        publisher.mirror = remote.mirror(store, publisher, start, only, events, screen)
    publisher.on_commit.append(partial(announce, events, screen))
    text = str(facts.config["text"]).encode()
    publisher.on_commit.append(lambda _: _keep_config(folder, text))
    return Desk(
        folder=folder,
        facts=facts,
        publisher=publisher,
        metrics=MetricsLog(folder.root / layout.METRICS),
        tracking=tracking.start(
            loaded.settings,
            str(facts.run["id"]),
            folder.root,
            privacy.abbreviated(loaded.settings.model_dump(mode="json")),
            partial(read_steps, folder.root / layout.METRICS),
        ),
        peak_flops=_peak(task, facts, loaded.settings, started_world=workers.world_size),
    )


def _set_aside_pruned(folder: RunFolder, start: int) -> None:
    """Statements of checkpoints after ``start``, which this launch is going to write again."""
    for each in folder.pruned():
        step = layout.parse_checkpoint_name(each.name.removeprefix(layout.PRUNED))
        if step is not None and step > start:
            durable_rename(each, folder.free_aside(each.name))


def watchdog(workers: Workers, settings: Settings, stop: StopRequest) -> Watchdog:
    """What watches the other ranks and the deadline of this one."""
    return Watchdog(
        workers,
        stop,
        peer_timeout=settings.train.peer_timeout,
        deadline=settings.checkpoint.deadline,
        report=lambda error: failure.report(error, settings.run.dir),
    )


def writer(
    workers: Workers, settings: Settings, desk: Desk | None, store: ObjectStore | None
) -> CheckpointWriter:
    """This rank's writer of checkpoints; collective, since its threads get a control group of their own."""
    return CheckpointWriter(
        RunFolder(settings.run.dir),
        distributed.beside(workers),
        None if desk is None else desk.publisher,
        store=store,
        step_back=workers.device.type == "cpu",
    )


def _keep(settings: Settings) -> Keep:
    """What `checkpoint.keep` means."""
    chosen = settings.checkpoint.keep
    if chosen == "all":
        return Keep()
    if isinstance(chosen, int):
        return Keep(newest=chosen)
    best = None if chosen.best is None else Best(chosen.best.metric, chosen.best.mode, chosen.best.count)
    return Keep(chosen.newest, chosen.every, best, frozenset(chosen.pinned))


def _write_config(opened: OpenRun, facts: RunFacts) -> None:
    """run.yaml is the config of the newest checkpoint, or of this launch when there is none yet."""
    statement = opened.found.statement
    text = facts.config["text"] if statement is None else statement.predicate["config"]["text"]
    _keep_config(opened.folder, str(text).encode())


def _keep_config(folder: RunFolder, text: bytes) -> None:
    path = folder.root / layout.RUN_CONFIG
    if not path.exists() or path.read_bytes() != text:
        durable.write_durable(path, text)


def _peak(task: Task, facts: RunFacts, settings: Settings, *, started_world: int) -> float | None:
    device = facts.environment.get("stack", {}).get("device")
    peak = peak_flops(str(device), settings.precision) if device else None
    return None if peak is None or task.flops_per_sample() is None else peak * started_world


def doubling(
    settings: Settings, workers: Workers, current: Session, ledger: Ledger, start: int
) -> Doubling | None:
    """What executes micro-steps twice; None when the config lets nothing be looked at."""
    if not ledger.looks or settings.determinism.budget == 0:
        return None
    return Doubling(
        ledger,
        workers,
        current.model,
        current.wrapped,
        current.task.generators(),
        (current.task,),
        start=start,
        budget=settings.determinism.budget,
    )


def evaluation_batches(task: Task, settings: Settings) -> Sequence[Batch]:
    """The held-out batches, the same at every evaluation and world size."""
    return task.evaluation(settings.train.micro_batch, settings.evaluate.batches)


def first_screen(
    loaded: config.Loaded,
    started: Launch,
    workers: Workers,
    task: Task,
    opened: OpenRun,
    launched: Launched,
    changes: Sequence[str],
    origin: Origin | None,
) -> list[tuple[str, str, str]]:
    """What this run is, each row with where it came from."""
    settings, origins, segment = loaded.settings, loaded.origins, launched.segment
    accumulation = settings.train.global_batch // (settings.train.micro_batch * workers.world_size)
    batch = (
        f"{settings.train.global_batch} samples = {settings.train.micro_batch} x {workers.world_size} ranks "
        f"x {accumulation} accumulated"
    )
    identity = task.identity()
    counts = ", ".join(
        f"{value:,} {name}" for name, value in identity.counts.items() if not name.startswith("held_out")
    )
    rows = [
        (
            "run",
            f"{settings.run_name}  {launched.facts.run['id'][:12]}  in {settings.run.dir}",
            origins["run.dir"],
        ),
        ("world size", f"{workers.world_size} on {workers.device.type}", f"launched by {started.launcher}"),
        ("parallel", _parallel_text(settings, workers), origins["parallel"]),
        ("global batch", batch, origins["train.global_batch"]),
        ("precision", settings.precision, origins["precision"]),
        (
            "data",
            f"{identity.kind} {(identity.digests['corpus'] or '')[:12]}  {counts}",
            "checked just now",
        ),
        (
            "resume",
            _resume_text(segment, settings),
            "compared with the signed statement" if segment.number else "",
        ),
        ("parent", _parent_text(segment), ""),
        *_start_rows(launched.facts, origin),
        *_elastic_rows(settings, origins),
        ("determinism", _determinism_text(settings, changes), origins["determinism.mode"]),
        ("signed by", opened.held.signer.ed25519_id[:12], opened.held.signer_reason),
    ]
    rows += [("differs", f"{item.what}: {item.before} → {item.after}", "") for item in segment.differences]
    rows += [("accepted", text, "--accept") for text in segment.accepted]
    rows += [("skipped", f"{item.name}: {item.reason}", "left where it is") for item in segment.skipped]
    return rows


def _start_rows(facts: RunFacts, origin: Origin | None) -> list[tuple[str, str, str]]:
    if origin is not None:
        return [("begins with", origin.words, origin.trust)]
    if facts.start is None:
        return []
    began = (
        f"step {facts.start['step']} of {facts.start['name']}, checkpoint {facts.start['checkpoint'][:12]}"
    )
    return [("began with", began, "signed when the run began")]


def _parallel_text(settings: Settings, workers: Workers) -> str:
    if workers.world_size == 1:
        return f"{settings.parallel}: one process, nothing to share"
    meaning = {"ddp": "ddp: the whole model on every rank", "fsdp2": "fsdp2: a shard of every tensor on each"}
    return meaning[settings.parallel]


def _elastic_rows(settings: Settings, origins: Mapping[str, str]) -> list[tuple[str, str, str]]:
    if not settings.determinism.elastic:
        return []
    return [("elastic", elastic.in_words(settings), origins["determinism.elastic"])]


def _resume_text(segment: Segment, settings: Settings) -> str:
    world = "at any world size" if settings.determinism.elastic else "and world size"
    meaning = {
        "genesis": "none: a new run",
        "exact": f"exact: same stack {world}, the same bits as without the interruption",
        "same-data": "same-data: the same samples in the same order, other rounding",
        "accepted": "accepted: continues although it differs, as asked",
    }
    return meaning[segment.kind]


def _parent_text(segment: Segment) -> str:
    if segment.resumed_from is None:
        return "genesis"
    checkpoint, step = segment.resumed_from
    return f"step {step}, checkpoint {checkpoint[:12]}"


def _determinism_text(settings: Settings, changes: Sequence[str]) -> str:
    meaning = {
        "off": "off: nothing is watched",
        "warn": "warn: kernels are watched, no bit is changed",
        "strict": "strict: " + "; ".join(changes),
    }
    return meaning[settings.determinism.mode]


def newest_id(desk: Desk | None) -> str | None:
    """The id of the newest checkpoint, on rank 0."""
    return None if desk is None or desk.publisher.parent is None else desk.publisher.parent.checkpoint


def closing(settings: Settings, recorder: Recorder, desk: Desk | None, start: int, seconds: float) -> str:
    """The last line of a run that reached its end."""
    if start >= settings.train.steps:
        return f"complete: step {start} of {settings.train.steps} was saved before; nothing to do"
    scores = "".join(f"  {name} {value:.4f}" for name, value in recorder.evaluation.items())
    scores = scores and f"  held out{scores}"
    loss = "" if recorder.loss is None else f"  loss {recorder.loss:.4f}"
    checkpoint = newest_id(desk)
    return (
        f"complete: {settings.train.steps} steps in {human_seconds(seconds)}{loss}{scores}  "
        f"newest checkpoint {'' if checkpoint is None else checkpoint[:12]}"
    )


def hold_run(
    workers: Workers, settings: Settings, store: ObjectStore | None, screen: Screen
) -> tuple[HeldRun | None, Candidates]:
    """The run folder, held by rank 0, with what only the store had, and the way back to its checkpoints."""
    held = workers.first_only(lambda: resume.hold(settings))
    folder = RunFolder(settings.run.dir)
    if store is not None:
        workers.first_only(partial(remote.fetch_newer, store, held, screen))
    policy = None if held is None else held.policy
    return held, Candidates(workers, folder, policy, partial(wanted_files, workers.rank))


def open_run(
    workers: Workers, held: HeldRun | None, candidates: Candidates, accept: Sequence[str]
) -> tuple[OpenRun | None, Loaded | None]:
    """What this launch continues from: the newest checkpoint that was not rejected yet, if there is one."""
    found = candidates.next()
    return workers.first_only(lambda: resume.open_run(held, found, accept)), found.loaded


def open_start(workers: Workers, settings: Settings, held: HeldRun | None) -> Origin | None:
    """What a run that has no checkpoint yet begins with; None for random weights."""
    return begin.open_origin(workers, settings, None if held is None else held.policy)


def resumed(
    workers: Workers, current: Session, found: Loaded, candidates: Candidates, screen: Screen
) -> Iterator[Batch] | None:
    """`harness.training.session.resume`; None on every rank when the checkpoint turned out to be damaged."""

    def attempt() -> Iterator[Batch] | DamagedCheckpoint:
        try:
            return session.resume(current, found)
        except DamagedCheckpoint as damaged:
            return damaged

    stream = workers.together(attempt)
    if not isinstance(stream, DamagedCheckpoint):
        return stream
    candidates.reject(found, str(stream))
    screen.say(f"{found.folder.name} is damaged: {stream}; going back to the one before")
    return None
