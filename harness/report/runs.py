"""A run folder as a report needs it: metrics, events, and what each checkpoint's statement says.

Nothing is verified here: statements are read for display, whoever signed them. `harness.audit.verify` judges.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.errors import HarnessError, UsageError
from harness.format import layout, strict_json
from harness.format.files import read_limited
from harness.format.layout import RunFolder
from harness.report.figure import Point
from harness.report.lines import Line, read_all

_BUNDLE_LIMIT = 16 * 1024 * 1024
_CONFIG_LIMIT = 256 * 1024

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


@dataclass(frozen=True)
class Incident:
    """A warning or an error from ``events/``."""

    time: float
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

    @property
    def newest(self) -> Facts | None:
        """The predicate of the newest checkpoint that has a readable one."""
        readable = [
            one.facts for one in self.checkpoints if one.facts is not None and one.kind != "nonfinite"
        ]
        return readable[-1] if readable else None

    @property
    def name(self) -> str:
        """The run's name in its statements, else its folder's."""
        return str(self.newest["run"]["name"]) if self.newest else self.root.resolve().name

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
        """What throughput counts: ``token``, ``image`` or another unit of the task; ``sample`` without any."""
        fields = self.lines[-1] if self.lines else {}
        named = [field.removesuffix("s_per_s") for field in fields if field.endswith("s_per_s")]
        return named[0] if named else "sample"


def read(root: Path) -> Run:
    """Read the run folder ``root``. Raises `UsageError` when it holds neither metrics nor checkpoints."""
    folder = RunFolder(root)
    if not folder.metrics.exists() and not folder.checkpoints.exists():
        raise UsageError("not a run folder: no metrics.jsonl and no checkpoints/", where=str(root))
    metrics = read_all(folder.metrics)
    events = [(rank, line) for rank, path in _event_files(root) for line in read_all(path).lines]
    return Run(
        root=root,
        lines=tuple(line for line in metrics.lines if isinstance(line.get("step"), int)),
        unreadable=metrics.unreadable,
        partial=metrics.partial,
        checkpoints=tuple(sorted(_checkpoints(folder), key=lambda one: (one.step, one.name))),
        incidents=tuple(sorted(incidents(events), key=lambda one: one.time)),
        superseded=sum(line.get("event") == "superseded metrics" for _, line in events),
        config_text=_text(folder.run_config),
    )


def incidents(events: Iterable[tuple[int, Line]]) -> Iterable[Incident]:
    """The warnings and errors among ``events``, (rank, line) each."""
    for rank, line in events:
        if line.get("level") in ("warning", "error"):
            hidden = ("time", "level", "event", "traceback")
            text = "; ".join(f"{name} {value}" for name, value in line.items() if name not in hidden)
            yield Incident(
                _float(line.get("time")), rank, str(line["level"]), str(line.get("event", "")), text[:400]
            )


def statement_facts(checkpoint: Path) -> Facts:
    """The predicate of ``checkpoint``'s own statement, unverified. Raises `HarnessError` when there is none."""
    path = checkpoint / layout.CHECKPOINT_BUNDLE
    bundle = strict_json.loads(read_limited(path, _BUNDLE_LIMIT), where=str(path))
    try:
        payload = base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)
        facts = strict_json.loads(payload, where=str(path))["predicate"]
    except (KeyError, TypeError, binascii.Error) as error:
        raise UsageError("no statement in this bundle", where=str(path)) from error
    if not isinstance(facts, dict) or not _WANTED <= facts.keys():
        raise UsageError("the statement is of another kind", where=str(path))
    return facts


_WANTED = {
    "run",
    "steps",
    "segment",
    "launch",
    "config",
    "code",
    "data",
    "environment",
    "determinism",
    "outcome",
}


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
            yield Checkpoint(path.name, step, kind, statement_facts(path))
        except (HarnessError, OSError) as error:
            yield Checkpoint(path.name, step, kind, None, str(error))


def _step(name: str, kind: str) -> int | None:
    """The step in ``name``; a damaged folder has a number after it."""
    return layout.parse_checkpoint_name(name.rsplit("-", 1)[0] if kind == "damaged" else name)


def _event_files(root: Path) -> Iterable[tuple[int, Path]]:
    for path in sorted((root / layout.EVENTS).glob("rank-*.jsonl")):
        digits = path.stem.removeprefix("rank-")
        if digits.isdecimal():
            yield int(digits), path


def _text(path: Path) -> str:
    if not path.exists():
        return ""
    return read_limited(path, _CONFIG_LIMIT).decode("utf-8", "replace")


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
