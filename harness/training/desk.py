"""The files of a run as rank 0 has them open, and what is put in order before the first step is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness import config, privacy, tracking
from harness.checkpoint.keeping import Best, Keep
from harness.checkpoint.publisher import Commit, Publisher, durable_rename
from harness.checkpoint.stamper import Stamper
from harness.errors import TrainingFailed
from harness.format import files as durable
from harness.format import layout, strict_json
from harness.format.layout import RunFolder
from harness.settings import Settings
from harness.stores.client import ObjectStore
from harness.tasks.task import Task
from harness.tracking import Tracking
from harness.training.beginning import own_policy, remote
from harness.training.beginning.continuation import Launched
from harness.training.beginning.resume import OpenRun
from harness.training.statement.record import RunFacts
from harness.training.telemetry.metrics import Events, MetricsLog, read_steps, rewind
from harness.training.telemetry.screen import Screen
from harness.training.telemetry.throughput import peak_flops
from harness.workers import Workers


@dataclass
class Desk:
    """What only rank 0 has: the open files of the run."""

    folder: RunFolder
    facts: RunFacts
    publisher: Publisher
    metrics: MetricsLog
    tracking: Tracking
    stamper: Stamper | None
    """Asks for timestamps; None when the config names no authority."""
    least_seconds: float | None
    """What a step would take if all GPUs of the run computed at their peak; None when unknown."""


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
    publisher.on_commit.append(lambda _: _keep_text(folder.run_config, text))
    _keep_policy(opened, publisher)
    if opened.policy_end is not None:
        remind = own_policy.reminder(opened.policy_end, partial(_warn, events, screen, "policy"))
        publisher.on_commit.append(lambda _: remind())
    stamper = _stamper(loaded.settings, publisher, events, screen)
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
        stamper=stamper,
        least_seconds=_least_seconds(task, facts, loaded.settings, workers.world_size),
    )


def newest_id(desk: Desk | None) -> str | None:
    """The id of the newest checkpoint, on rank 0."""
    return None if desk is None or desk.publisher.parent is None else desk.publisher.parent.checkpoint


def _warn(events: Events, screen: Screen, about: str, text: str) -> None:
    events.write(about, "warning", text=text)
    screen.say(text)


def _stamper(settings: Settings, publisher: Publisher, events: Events, screen: Screen) -> Stamper | None:
    """Has the log's head timestamped, now and after each commit."""
    url = settings.signing.timestamp
    if url is None:
        return None

    warn = partial(_warn, events, screen, "timestamp")
    stamper = Stamper(publisher.run.log, url, settings.signing.timestamp_timeout, warn)
    publisher.on_commit.append(lambda _: stamper.stamp(publisher.head))
    stamper.stamp(publisher.head)  # the launch before may have ended without an answer
    return stamper


def _write_config(opened: OpenRun, facts: RunFacts) -> None:
    """run.yaml is the config of the newest checkpoint, or of this launch when there is none yet."""
    statement = opened.found.statement
    text = facts.config["text"] if statement is None else statement.predicate["config"]["text"]
    _keep_text(opened.folder.run_config, str(text).encode())


def _keep_policy(opened: OpenRun, publisher: Publisher) -> None:
    """policy.json is the copy of what the newest checkpoint names, or of this launch's policy when there is
    none yet; another one, which a resume has accepted, comes with the first checkpoint under it."""
    own, statement, path = opened.held.own_policy, opened.found.statement, opened.folder.policy
    before = None if statement is None or statement.policy is None else statement.policy["sha256"]

    def keep(_: Commit | None = None) -> None:
        if own is not None:
            _keep_text(path, own.copy)
        elif path.exists():
            path.unlink()
            durable.fsync_folder(path.parent)

    if statement is None or (own is not None and own.reference["sha256"] == before):
        keep()
    elif own is not None or before is not None:
        publisher.on_commit.append(keep)


def _keep_text(path: Path, text: bytes) -> None:
    if not path.exists() or path.read_bytes() != text:
        durable.write_durable(path, text)


def _set_aside_pruned(folder: RunFolder, start: int) -> None:
    """Statements of checkpoints after ``start``, which this launch is going to write again."""
    for each in folder.pruned():
        step = layout.parse_checkpoint_name(each.name.removeprefix(layout.PRUNED))
        if step is not None and step > start:
            durable_rename(each, folder.free_aside(each.name))


def _keep(settings: Settings) -> Keep:
    """What `checkpoint.keep` means."""
    chosen = settings.checkpoint.keep
    if chosen == "all":
        return Keep()
    if isinstance(chosen, int):
        return Keep(newest=chosen)
    best = None if chosen.best is None else Best(chosen.best.metric, chosen.best.mode, chosen.best.count)
    return Keep(chosen.newest, chosen.every, best, frozenset(chosen.pinned))


def _least_seconds(task: Task, facts: RunFacts, settings: Settings, world_size: int) -> float | None:
    device = facts.environment.get("stack", {}).get("device")
    peak = peak_flops(str(device), settings.precision) if device else None
    flops = None if peak is None else task.flops_per_sample()
    if peak is None or flops is None:
        return None
    return flops * settings.train.global_batch / (peak * world_size)


def announce(events: Events, screen: Screen, commit: Commit) -> None:
    """Say that a checkpoint is on disk; called in the writer's thread."""
    events.write(
        "checkpoint",
        step=commit.step,
        checkpoint=commit.checkpoint,
        seconds=commit.seconds,
        bytes=commit.size,
        direct_bytes=commit.direct,
    )
    screen.saved(commit)
