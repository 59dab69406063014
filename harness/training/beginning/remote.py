"""`checkpoint.store` at the start of a launch: what only the store has is fetched, what it lacks is sent."""

from __future__ import annotations

from pathlib import Path

from harness.audit.folders import story
from harness.audit.run import handover
from harness.checkpoint.mirror import Mirror
from harness.checkpoint.publisher import Publisher, dropped
from harness.errors import HarnessError, TrainingFailed
from harness.format import layout
from harness.provenance.transparency import log
from harness.settings import Settings
from harness.stores.client import ObjectStore
from harness.stores.fetch import fetch_newest
from harness.training.beginning.resume import HeldRun
from harness.training.telemetry.metrics import Events
from harness.training.telemetry.screen import Screen
from harness.words import human_bytes
from harness.workers import Workers


def client(workers: Workers, settings: Settings) -> ObjectStore | None:
    """The client of `checkpoint.store`, on every rank. Raises `EnvironmentFault` when it cannot be made."""
    chosen = settings.checkpoint
    if chosen.store is None:
        return None
    url, patience = chosen.store, chosen.store_timeout
    return workers.together(lambda: ObjectStore(url, patience=patience))


def fetch_newer(store: ObjectStore, held: HeldRun | None, screen: Screen) -> None:
    """The newest checkpoint, when only the store has it, with log and metrics. Raises as `fetch_newest`."""
    if held is None:
        raise TrainingFailed("only rank 0 fetches a run")
    policy = held.policy

    def damaged(name: str, error: HarnessError) -> None:
        screen.say(f"{name} in the store is not in order: {error}; going back to the one before")

    def trust(folder: Path) -> None:
        if policy is not None:
            handover.check_head(folder, policy, store.at(f"{layout.LOG}/{log.HEAD}"))

    def check(folder: Path, logged: Path) -> None:
        story.read(folder, policy, logged=logged)

    fetched = fetch_newest(store, held.folder, check, damaged, trust)
    for name in fetched.superseded:
        screen.say(f"{name} was set aside: {store.url} has another one, and a log that goes further")
    for name in fetched.checkpoints:
        screen.say(f"{name} was fetched from {store.url} ({human_bytes(fetched.size)}), to be verified now")


def mirror(
    store: ObjectStore, publisher: Publisher, start: int, only: bool, events: Events, screen: Screen
) -> Mirror:
    """The copy in ``store`` of the run that continues from step ``start``, complete as of now."""

    def warn(text: str) -> None:
        events.write("store", "warning", text=text)
        screen.say(text)

    keep, run = publisher.keep, publisher.run
    made = Mirror(store, run, only, lambda folders: dropped(keep, folders), warn)
    there = made.begin(start)
    missing = {folder.name for folder in run.complete()} - {*there, *publisher.set_aside}
    more = f"; {len(missing)} more go there now" if missing else ""
    screen.say(f"{store.url} holds {len(there)} checkpoints{more}")
    made.sync(publisher.set_aside)
    return made
