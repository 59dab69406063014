"""Trackers: where metrics go besides metrics.jsonl, which stays the truth.

A tracker is given the lines of metrics.jsonl once a committed checkpoint covers them, never earlier. A step
that a crash undoes has therefore never been sent, so a resumed run continues the same curve without a step
twice or missing. What a tracker still has after a crash it says itself; for one that cannot know,
``tracking.json`` in the run folder remembers the last step that was handed over.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from harness.errors import ConfigError, EnvironmentFault
from harness.format import files, layout, strict_json
from harness.settings import Settings, Track

Lines = Sequence[Mapping[str, Any]]

_AT_ONCE = 10_000  # lines in memory


class Tracker(Protocol):
    """What a user's own tracker has; named in ``track.trackers`` by its import path."""

    def start(self, run_id: str, name: str, folder: Path, config: Mapping[str, Any]) -> int | None:
        """The run begins or continues; the same ``run_id`` each time.

        Returns the last step that an earlier launch has left, or None to rely on tracking.json.
        """

    def log(self, lines: Lines) -> None:
        """Lines of metrics.jsonl, in order of step."""

    def finish(self) -> None:
        """The launch ends."""


class Wandb:
    """Weights & Biases, offline or online; imported only here.

    Its writer buffers, so a kill loses what it was given last. Online the server says which step it has.
    Offline each launch writes a folder of its own, which gets the curve from step 1: `wandb sync` of the
    newest one uploads the whole run.
    """

    def __init__(self, mode: str, project: str) -> None:
        self._mode = mode
        self._project = project
        self._run: Any = None

    def start(self, run_id: str, name: str, folder: Path, config: Mapping[str, Any]) -> int:
        """Open the wandb run ``run_id``, or continue it. Never prompts.

        Raises `EnvironmentFault` when wandb is absent, or online without a key.
        """
        try:
            import wandb
        except ImportError as error:
            raise EnvironmentFault(
                f"track.wandb={self._mode} needs wandb", remedy="pip install wandb, or track.wandb=off"
            ) from error
        if self._mode == "online" and not wandb.api.api_key:
            raise EnvironmentFault(
                "track.wandb=online finds no API key",
                where="WANDB_API_KEY",
                remedy="set it, run `wandb login`, or use track.wandb=offline",
            )
        with _no_paths_in_its_log():
            self._run = wandb.init(
                project=self._project,
                id=run_id,
                name=name,
                dir=str(folder),
                config=dict(config),
                mode="offline" if self._mode == "offline" else "online",
                resume="allow" if self._mode == "online" else None,
                settings=_quiet(wandb.Settings),
            )
        # A resumed run starts at the step after the server's last one, a new run at 0.
        return max(int(self._run.starting_step) - 1, 0) if self._mode == "online" else 0

    def log(self, lines: Lines) -> None:
        """One wandb step a line; digests and times stay in metrics.jsonl."""
        for line in lines:
            numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
            evaluation = {f"evaluation/{key}": value for key, value in (line.get("evaluation") or {}).items()}
            self._run.log({**numbers, **evaluation}, step=line["step"])

    def finish(self) -> None:
        """Close the wandb run."""
        self._run.finish()


def _quiet(settings: Callable[..., Any]) -> Any:
    """wandb's settings with nothing on the screen, and without host, user, command line and SLURM variables
    in its files, where it writes them unasked."""
    private = {"host": "", "x_disable_meta": True, "x_disable_machine_info": True}
    return settings(silent=True, console="off", disable_git=True, x_disable_stats=True, **private)


@contextmanager
def _no_paths_in_its_log() -> Iterator[None]:
    """wandb's own debug.log, which is in the run folder, names absolute paths at level INFO."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)
        logging.getLogger("wandb").setLevel(logging.WARNING)


class Tracking:
    """All trackers of a run, fed from metrics.jsonl up to the last committed step."""

    def __init__(self, folder: Path, read: Callable[[int, int], Lines]) -> None:
        """``read(after, through)`` gives the lines of metrics.jsonl of those steps."""
        self._state = folder / layout.TRACKING
        self._read = read
        self._through: dict[Tracker, int] = {}

    def add(self, tracker: Tracker, through: int | None) -> None:
        """Feed ``tracker``, which has everything up to step ``through`` (None: as remembered)."""
        self._through[tracker] = self._remembered() if through is None else through

    def advance(self, step: int) -> None:
        """Everything up to ``step`` is committed: hand over what is new."""
        behind = {tracker: through for tracker, through in self._through.items() if through < step}
        for tracker, through in behind.items():
            for after in range(through, step, _AT_ONCE):
                tracker.log(self._read(after, min(after + _AT_ONCE, step)))
            self._through[tracker] = step
        if behind:
            files.write_durable(self._state, strict_json.dumps({"through": step}))

    def finish(self) -> None:
        """Close every tracker."""
        for tracker in self._through:
            tracker.finish()

    def _remembered(self) -> int:
        try:
            return int(json.loads(self._state.read_text())["through"])
        except FileNotFoundError:
            return 0


def start(
    settings: Settings,
    run_id: str,
    folder: Path,
    config: Mapping[str, Any],
    read: Callable[[int, int], Lines],
) -> Tracking:
    """Build and start the trackers that ``settings.track`` names."""
    tracking = Tracking(folder, read)
    for tracker in build(settings.track):
        tracking.add(tracker, tracker.start(run_id, settings.run_name, folder, config))
    return tracking


def build(track: Track) -> list[Tracker]:
    """wandb when on, then the user's own. Raises `ConfigError` for a tracker that cannot be imported."""
    trackers: list[Tracker] = [] if track.wandb == "off" else [Wandb(track.wandb, track.project)]
    return trackers + [_imported(path) for path in track.trackers]


def _imported(path: str) -> Tracker:
    module, _, name = path.partition(":")
    try:
        tracker: Tracker = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "write package.module:Class, importable from here"
        raise ConfigError(
            f"no such tracker `{path}` ({error})", where="track.trackers", remedy=remedy
        ) from error
    return tracker
