"""A run folder as a report needs it: metrics, events, and what each checkpoint's statement says.

Nothing is verified here: statements are read for display, whoever signed them.
`harness.audit.verification` judges, and `harness.report.verified` puts what it has read in the place
of what was read here.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from harness.errors import HarnessError, UsageError, visible
from harness.format import files, layout
from harness.format.json_lines import Line, read_all
from harness.format.layout import RunFolder
from harness.provenance import statements
from harness.provenance.signing import envelope
from harness.report.curves import Point

_CONFIG_LIMIT = 256 * 1024
_EVENTS = re.compile(r"rank-(\d+)\.jsonl")

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One folder under ``checkpoints/``."""

    name: str
    step: int
    kind: Literal["complete", "pruned", "nonfinite", "damaged"]
    facts: Facts | None
    """The predicate of its statement; None when it cannot be read, and ``problem`` says why."""
    problem: str | None = None
    signer: str | None = None
    """Whose signature a verification has accepted; None where none did."""


@dataclass(frozen=True)
class Evaluated:
    """A test-result of a checkpoint that a verification has accepted."""

    checkpoint: str
    """Name of its folder."""
    statement: str
    """``test-result-0``: its file's name without the ending."""
    sha256: str
    """Hex, of that file, as the log records it."""
    step: int
    signer: str
    """Name of the policy's identity."""
    facts: Facts
    """The predicate."""

    @property
    def metrics(self) -> dict[str, float]:
        """Measure → value; empty for a result of another tool that has none."""
        told = self.facts.get("harness_evaluation") or {}
        return {name: float(value) for name, value in told.get("metrics", {}).items()}

    @property
    def failed(self) -> list[str]:
        """Tests that did not hold."""
        return list(self.facts.get("failedTests") or ())


@dataclass(frozen=True)
class Incident:
    """A warning or an error from ``events/``."""

    time: float
    """Unix time; 0 when the line has none."""
    rank: int
    level: str
    event: str
    text: str


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    root: Path
    lines: tuple[Line, ...]
    """metrics.jsonl, one mapping a step."""
    unreadable: int
    partial: bool
    checkpoints: tuple[Checkpoint, ...]
    """Sorted by step."""
    incidents: tuple[Incident, ...]
    """Sorted by time."""
    superseded: int
    """Lines of steps that were run again after a resume."""
    config_text: str
    energy: Mapping[str, float] = field(default_factory=dict)
    """Source → joules, over all launches and ranks, as far as events/ tell; no signature covers them."""
    evaluated: tuple[Evaluated, ...] = ()
    """In the order of steps and statements; empty until a verification has found nothing wrong."""
    verified: bool = False
    """Whether a verification has read ``lines``, ``checkpoints`` and ``config_text``, and found no fault."""
    lines_signed: bool = True
    """Of a verified run: whether its checkpoints sign ``lines``; without checkpoints or step digests, not."""
    unsigned: int = 0
    """Lines behind the newest checkpoint's, which no signature covers yet; of a verified run they are not
    among ``lines``."""
    label: str | None = None
    """What to call it instead of its name, where several runs have the same."""

    @property
    def newest(self) -> Facts | None:
        """The predicate of the newest checkpoint that has a readable one; without any, that of the state
        which was kept when the run became non-finite."""
        for kinds in (("complete", "pruned"), ("nonfinite",)):
            readable = [one.facts for one in self.checkpoints if one.facts is not None and one.kind in kinds]
            if readable:
                return readable[-1]
        return None

    @property
    def name(self) -> str:
        """The run's name in its statements, else its folder's; its label if it has one."""
        if self.label is not None:
            return self.label
        return visible(str(self.newest["run"]["name"])) if self.newest else files.real(self.root).name

    @property
    def last_step(self) -> int:
        """The last step that has a metrics line."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    def curve(self, field: str) -> tuple[Point, ...]:
        """(step, value) of ``field`` wherever a line has it; null, as a NaN is written, becomes NaN."""
        return tuple(
            (float(line["step"]), _float(line[field]))
            for line in self.lines
            if "step" in line and field in line
        )

    def evaluation(self, name: str) -> tuple[Point, ...]:
        """(step, value) of the evaluation figure ``name``."""
        return tuple(
            (float(line["step"]), _float(line["evaluation"][name]))
            for line in self.lines
            if name in line.get("evaluation", {})
        )

    @property
    def evaluation_names(self) -> tuple[str, ...]:
        """Names of all evaluation figures, in the order of their first appearance."""
        return tuple(dict.fromkeys(name for line in self.lines for name in line.get("evaluation", {})))

    @property
    def unit(self) -> str:
        """What throughput counts: ``token``, ``image`` or another unit; ``sample`` without any."""
        fields = self.lines[-1] if self.lines else {}
        named = [field.removesuffix("s_per_s") for field in fields if field.endswith("s_per_s")]
        return named[0] if named else "sample"


def read(root: Path) -> Run:
    """Read the run folder ``root``. Raises `UsageError` when it holds neither metrics nor checkpoints."""
    folder = RunFolder(root)
    if not folder.metrics.exists() and not folder.checkpoints.exists():
        raise UsageError(
            "not a run folder: no metrics.jsonl and no checkpoints/", where=str(root), remedy="check the path"
        )
    metrics = read_all(folder.metrics)
    events = [(rank, line) for rank, path in event_files(root) for line in read_all(path).lines]
    return Run(
        root=root,
        lines=tuple(step_lines(metrics.lines)),
        unreadable=metrics.unreadable,
        partial=metrics.partial,
        checkpoints=tuple(sorted(_checkpoints(folder), key=lambda one: (one.step, one.name))),
        incidents=tuple(sorted(incidents(events), key=lambda one: one.time)),
        superseded=sum(line.get("event") == "superseded metrics" for _, line in events),
        config_text=config_text(root),
        energy=energy(events),
    )


def told_apart(found: Sequence[Run]) -> list[Run]:
    """``found``, with those that share a name labelled by their folders, by the whole path if need be."""
    labelled = _relabelled(found, lambda run: files.real(run.root).name)
    return _relabelled(labelled, lambda run: str(run.root))


def _relabelled(found: Sequence[Run], label: Callable[[Run], str]) -> list[Run]:
    names = Counter(run.name for run in found)
    return [replace(run, label=visible(label(run))) if names[run.name] > 1 else run for run in found]


def step_lines(lines: Iterable[Line]) -> Iterable[Line]:
    """Those of ``lines`` that are a step's, without fields of the wrong type."""
    for line in lines:
        step = line.get("step")
        if isinstance(step, int) and not isinstance(step, bool) and step > 0:
            wrong = {name for name, fits in _TYPES.items() if name in line and not fits(line[name])}
            yield {name: value for name, value in line.items() if name not in wrong}


def is_clock(value: object) -> bool:
    """Whether ``value`` is a Unix time that a calendar has."""
    return isinstance(value, int | float) and 0 <= value <= _LAST_CLOCK


_LAST_CLOCK = 253_402_300_799  # the end of the year 9999
_TYPES: dict[str, Callable[[object], bool]] = {
    "evaluation": lambda value: isinstance(value, dict),
    "time": is_clock,
}


def incidents(events: Iterable[tuple[int, Line]]) -> Iterable[Incident]:
    """The warnings and errors among ``events``, (rank, line) each."""
    for rank, line in events:
        if line.get("level") in ("warning", "error"):
            hidden = ("time", "level", "event", "traceback")
            text = visible("; ".join(f"{name} {value}" for name, value in line.items() if name not in hidden))
            clock = float(line["time"]) if is_clock(line.get("time")) else 0.0
            event = visible(str(line.get("event", "")))
            yield Incident(clock, rank, str(line["level"]), event, text[:400])


def energy(events: Iterable[tuple[int, Line]]) -> dict[str, float]:
    """Joules by source: of each launch of each rank the last reading, which is the largest.

    A counter that has not moved counts nothing: a virtual machine may show one that stands still.
    """
    largest: dict[tuple[int, str, float], float] = {}
    for rank, line in events:
        source, launch, joules = (line.get(name) for name in ("source", "launch", "joules"))
        numbers = all(isinstance(each, int | float) and math.isfinite(each) for each in (launch, joules))
        if line.get("event") == "energy" and isinstance(source, str) and numbers:
            key = (rank, visible(source), float(launch or 0))
            largest[key] = max(largest.get(key, 0.0), float(joules or 0))
    sums: dict[str, float] = {}
    for (_, source, _), joules in largest.items():
        sums[source] = sums.get(source, 0.0) + joules
    return {source: joules for source, joules in sums.items() if joules > 0}


def _unverified(checkpoint: Path) -> Facts:
    """The predicate of ``checkpoint``'s own statement. Raises `HarnessError` without one."""
    path = checkpoint / layout.CHECKPOINT_BUNDLE
    payload = envelope.unauthenticated_payload(files.read_limited(path, envelope.LIMIT), where=str(path))
    return statements.parse_checkpoint(payload, where=str(path)).predicate


def _checkpoints(folder: RunFolder) -> Iterable[Checkpoint]:
    entries = sorted(folder.checkpoints.iterdir()) if folder.checkpoints.is_dir() else []
    kinds: dict[str, Literal["pruned", "nonfinite", "damaged"]] = {
        layout.PRUNED: "pruned",
        layout.NONFINITE: "nonfinite",
        layout.DAMAGED: "damaged",
    }
    for path in entries:
        prefix = next((word for word in kinds if path.name.startswith(word)), "")
        kind = kinds[prefix] if prefix else "complete"
        step = _step(path.name.removeprefix(prefix), kind)
        if step is None:
            continue
        try:
            yield Checkpoint(path.name, step, kind, _unverified(path))
        except (HarnessError, OSError) as error:
            yield Checkpoint(path.name, step, kind, None, str(error))


def _step(name: str, kind: str) -> int | None:
    """The step in ``name``; a damaged folder has a number after it."""
    return layout.parse_checkpoint_name(name.rsplit("-", 1)[0] if kind == "damaged" else name)


def event_files(root: Path) -> Iterable[tuple[int, Path]]:
    """The events file of each rank, by rank. Raises `EnvironmentFault` for a folder that may not be read."""
    folder = root / layout.EVENTS
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise files.unreadable(error, str(folder)) from error
    for name in names:
        match = _EVENTS.fullmatch(name)
        if match is not None:
            yield int(match[1]), folder / name


def config_text(root: Path) -> str:
    """run.yaml as it is; empty when there is none."""
    path = RunFolder(root).run_config
    if not path.exists():
        return ""
    return files.read_limited(path, _CONFIG_LIMIT).decode("utf-8", "replace")


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
