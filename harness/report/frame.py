"""One screen of a run that is under way, drawn from what is in its folder.

Pure: a `View` in, lines of text out; `harness watch` fills the view and repaints.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from harness.errors import visible
from harness.format.json_lines import Line
from harness.report.runs import Incident
from harness.words import human_seconds

_BARS = "▁▂▃▄▅▆▇█"
_RECENT = 50
"""Speed and time left come from the last so many steps."""
_STALE_SECONDS = 60.0


@dataclass(frozen=True)
class View:
    """What the folder holds at ``now``."""

    name: str
    planned: int | None
    """``train.steps``; None when the config is not there."""
    lines: Sequence[Line]
    unreadable: int
    """Lines of metrics.jsonl that are none."""
    checkpoint: tuple[int, float] | None
    """Step and Unix time of the newest complete checkpoint."""
    checkpoints: int
    incidents: Sequence[Incident]
    """Warnings and errors, the newest last."""
    now: float
    """Unix time."""


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` as at most ``width`` bars, each the mean of a stretch; `×` where a stretch is not finite."""
    if not values or width < 1:
        return ""
    columns = min(width, len(values))
    edges = [round(index * len(values) / columns) for index in range(columns + 1)]
    means = [_mean(values[start:end]) for start, end in pairwise(edges)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    return "".join(_bar(mean, low, high) for mean in means)


def seconds_a_step(lines: Sequence[Line]) -> float | None:
    """Median time between the last steps, from their clocks; None with fewer than two.

    A median, since the pause before a resume belongs to no step.
    """
    clocks = [_value(line.get("time")) for line in lines[-_RECENT:]]
    between = [after - before for before, after in pairwise(clocks) if math.isfinite(after - before)]
    return statistics.median(between) if between else None


def draw(view: View, width: int) -> list[str]:
    """The screen's lines, each at most ``width`` characters, control characters replaced."""
    return [_cut(visible(line), width) for line in _lines(view, width)]


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _lines(view: View, width: int) -> Iterator[str]:
    last = view.lines[-1] if view.lines else None
    step = 0 if last is None else int(last["step"])
    yield f"{view.name}  {_reach(step, view.planned)}  {_state(view, step)}"
    if view.planned:
        filled = round(min(step / view.planned, 1.0) * (width - 8))
        yield f"{'█' * filled}{'░' * (width - 8 - filled)} {step / view.planned:6.1%}"
    if last is None:
        yield "no step recorded yet"
    else:
        yield from _numbers(view, last, width)
    yield _checkpoint(view)
    if view.unreadable:
        yield f"unreadable  {view.unreadable:,} lines of metrics.jsonl: harness verify tells where"
    for incident in view.incidents[-3:]:
        ago = human_seconds(max(0.0, view.now - incident.time))
        yield f"{incident.level:<10}  rank {incident.rank}, {ago} ago: {incident.event}: {incident.text}"


def _numbers(view: View, last: Line, width: int) -> Iterator[str]:
    losses = [_value(line.get("loss")) for line in view.lines]
    finite = [loss for loss in losses if math.isfinite(loss)]
    reach = f"  from {finite[0]:.4f}, lowest {min(finite):.4f}" if finite else ""
    yield f"loss        {_shown(losses[-1])}{reach}"
    yield f"            {sparkline(losses, width - 12)}"
    scored = next((line for line in reversed(view.lines) if line.get("evaluation")), None)
    if scored is not None:
        figures = "  ".join(f"{name} {_shown(_value(value))}" for name, value in scored["evaluation"].items())
        yield f"held out    {figures}  (step {scored['step']:,})"
    speeds = [f"{value:,.0f} {name.removesuffix('_per_s')}/s" for name, value in _rates(last)]
    if isinstance(last.get("mfu"), float):
        speeds.append(f"MFU {last['mfu']:.1%}")
    pace = seconds_a_step(view.lines)
    if pace is not None:
        speeds.append(f"{pace * 1000:,.1f} ms a step")
        left = (view.planned or 0) - int(last["step"])
        if left > 0 and _state(view, int(last["step"])) == "running":
            speeds.append(f"{human_seconds(pace * left)} left")
    yield f"speed       {'  '.join(speeds)}"


def _rates(line: Line) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if name.endswith("_per_s") and isinstance(value, int | float):
            yield name, value


def _reach(step: int, planned: int | None) -> str:
    return f"step {step:,}" if planned is None else f"step {step:,} of {planned:,}"


def _state(view: View, step: int) -> str:
    """Whether it moves: a run whose last line is old is not said to be running."""
    if view.planned is not None and step >= view.planned:
        return "finished"
    if not view.lines:
        return "not started"
    quiet = view.now - _value(view.lines[-1].get("time"))
    pace = seconds_a_step(view.lines) or 0.0
    if quiet > max(_STALE_SECONDS, 10 * pace):
        return f"quiet for {human_seconds(quiet)}"
    return "running"


def _checkpoint(view: View) -> str:
    if view.checkpoint is None:
        return "checkpoint  none yet"
    step, written = view.checkpoint
    ago = human_seconds(max(0.0, view.now - written))
    return f"checkpoint  step {step:,}, {ago} ago  ({view.checkpoints} on disk)"


def _bar(mean: float, low: float, high: float) -> str:
    if not math.isfinite(mean):
        return "×"
    # Halves, since the difference of two finite floats may be infinite.
    share = 0.0 if high == low else (mean / 2 - low / 2) / (high / 2 - low / 2)
    return _BARS[round(share * (len(_BARS) - 1))]


def _mean(values: Sequence[float]) -> float:
    return sum(value / len(values) for value in values)


def _value(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _shown(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"
