"""What may be said about a run, and what may not: how it ended, how it was resumed, what could still vary.

Pure functions of a `harness.report.runs.Run`. A number that was not measured is never replaced by another.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.audit.tiers import text as tier_text
from harness.audit.tiers.rules import Tiers
from harness.errors import ConfigError, HarnessError, VerificationFailed, visible
from harness.format import layout
from harness.format.files import read_limited
from harness.format.layout import RunFolder
from harness.format.ledger import Ledger
from harness.format.nonfinite import foremost
from harness.report.runs import Checkpoint, Run
from harness.strict_yaml import read as read_yaml

_LEDGER_LIMIT = 64 << 20


@dataclass(frozen=True)
class Ending:
    """How a run stands."""

    kind: Literal["good", "bad", "open"]
    text: str


@dataclass(frozen=True)
class Segment:
    """One launch, from the statements of the checkpoints it wrote."""

    number: int
    kind: str
    """``genesis``, ``exact``, ``same-data`` or ``accepted``."""
    resumed_from: int | None
    """Step of the checkpoint that it continued."""
    first: int
    last: int
    """Steps of its first and last checkpoint."""
    launch: Mapping[str, Any]
    differences: tuple[str, ...]
    skipped: tuple[str, ...]
    accepted: tuple[str, ...]


def planned_steps(config_text: str, where: str) -> int | None:
    """``train.steps`` of a run.yaml; None when it is missing or cannot be read."""
    steps = settings(config_text, where).get("train.steps")
    return steps if isinstance(steps, int) else None


def settings(config_text: str, where: str) -> dict[str, Any]:
    """A run.yaml as ``{"train.steps": 120, …}``; empty when there is none or it cannot be read."""
    try:
        return dict(_flat(read_yaml(config_text, where).value))
    except ConfigError:
        return {}


def ending(run: Run) -> Ending:
    """Finished, stopped, failed or gone non-finite; what is on disk decides."""
    planned, last = planned_steps(run.config_text, str(run.root)), run.last_step
    broken = _broken(run)
    reach = f"step {last:,}" if planned is None else f"step {last:,} of {planned:,}"
    if broken is not None:
        said = f"loss or gradients were not finite after {reach}; the state before is in `{broken.name}`"
        return Ending("bad", "; ".join([said, *_shown_again(run, broken)]))
    losses = run.curve("loss")
    if losses and not math.isfinite(losses[-1][1]):
        return Ending("bad", f"the loss was not finite at {reach}")
    if planned is not None and last >= planned:
        return Ending("good", f"finished: {last:,} of {planned:,} steps")
    errors = [one for one in run.incidents if one.event == "failure"]
    if errors and (not run.lines or errors[-1].time >= float(run.lines[-1].get("time", 0.0))):
        return Ending("bad", f"failed after {reach}: {errors[-1].text}")
    return Ending("open", f"not finished: {reach}; still running, interrupted or killed")


def _broken(run: Run) -> Checkpoint | None:
    """The state that was kept when the run became non-finite, unless it has gone on since."""
    kept = [one for one in run.checkpoints if one.kind == "nonfinite" and run.last_step <= one.step]
    return kept[-1] if kept else None


def _shown_again(run: Run, broken: Checkpoint) -> list[str]:
    """What executing the update again has shown."""
    try:
        ledger = _ledger(run, broken)
    except VerificationFailed as error:
        return [f"its ledger cannot be read: {error}"]
    return [] if ledger is None else [visible(each.told) for each in foremost(ledger.nonfinite)]


def segments(run: Run) -> list[Segment]:
    """The launches of ``run`` that left a checkpoint, in order."""
    found: dict[int, Segment] = {}
    for checkpoint in run.checkpoints:
        if checkpoint.facts is None or checkpoint.kind == "damaged":
            continue
        told = checkpoint.facts["segment"]
        number = int(told["number"])
        before = found.get(number)
        source = told.get("resumed_from")
        found[number] = Segment(
            number=number,
            kind=str(told["class"]),
            resumed_from=None if source is None else int(source["step"]),
            first=checkpoint.step if before is None else before.first,
            last=checkpoint.step,
            launch=checkpoint.facts["launch"],
            differences=tuple(f"{d['what']}: {d['before']} → {d['after']}" for d in told["differences"]),
            skipped=tuple(f"{s['name']}: {s['reason']}" for s in told["skipped"]),
            accepted=tuple(told["accepted"]),
        )
    return [found[number] for number in sorted(found)]


def missing_steps(run: Run) -> list[str]:
    """Ranges of steps that have no line in metrics.jsonl, and steps that have several."""
    gaps = []
    before = 0
    for line in run.lines:
        step = int(line["step"])
        if step <= before:
            gaps.append(f"step {step} appears again after step {before}")
        elif step > before + 1:
            gaps.append(f"steps {before + 1} to {step - 1} have no line")
        before = step
    return gaps


def newest_ledger(run: Run) -> Ledger | None:
    """The ledger of the newest complete checkpoint, or of the state that was kept when the run became
    non-finite after it; None when there is none.

    Raises `VerificationFailed` for what is no ledger, and in a verified run for one that its statement does
    not name.
    """
    broken = _broken(run)
    complete = [one for one in reversed(run.checkpoints) if one.kind == "complete"]
    found = (_ledger(run, one) for one in ([] if broken is None else [broken]) + complete)
    return next((ledger for ledger in found if ledger is not None), None)


def _ledger(run: Run, one: Checkpoint) -> Ledger | None:
    """That of a checkpoint; raises as `newest_ledger` does."""
    path = RunFolder(run.root).checkpoints / one.name / layout.LEDGER
    if not path.exists():
        return None
    data = read_limited(path, _LEDGER_LIMIT)
    stated = None if one.facts is None else one.facts["determinism"]["ledger"]
    if run.verified and (stated is None or stated["sha256"] != hashlib.sha256(data).hexdigest()):
        raise VerificationFailed("changed after it was verified", where=str(path))
    return Ledger.parse(data, str(path))


def could_vary(run: Run, tiers: Tiers) -> list[str]:
    """What another execution of this run could do differently, as far as statements and tiers tell."""
    facts = run.newest
    if facts is None:
        return ["no checkpoint statement can be read: nothing is known about how this run was made"]
    told = [
        f"segment {one.number} continued in class {one.kind}: the same samples, but not the bits of an "
        "uninterrupted run"
        for one in segments(run)
        if one.kind in ("same-data", "accepted")
    ]
    code = facts["code"]
    if code.get("git_commit") is None:
        told.append("the code's git commit is not known")
    elif code.get("dirty"):
        told.append(
            "the code had changes that were not committed; their digest is in the statement, not their text"
        )
    mode = facts["determinism"]["mode"]
    if mode != "strict":
        watched = "not watched for" if mode == "off" else "only watched for"
        told.append(f"determinism.mode is {mode}: kernels without a fixed order were allowed, and {watched}")
    told += _ledger_gaps(run)
    return [*told, *tier_text.could_vary(tiers)]


def _ledger_gaps(run: Run) -> list[str]:
    try:
        ledger = newest_ledger(run)
    except VerificationFailed as error:
        return [f"the ledger cannot be read: {error}"]
    if ledger is None or not ledger.observed_anything:
        return ["no observer looked for order-dependent kernels"]
    if not ledger.rows:
        return ["no order-dependent kernel was seen, in the steps that were looked at"]
    names = ", ".join(sorted({f"`{row.op}` ({row.evidence})" for row in ledger.rows}))
    return [f"order-dependent kernels ran: {names}"]


def final(run: Run, name: str) -> float | None:
    """The last evaluation figure ``name``, or the last training ``loss`` for the name ``loss (train)``."""
    points = run.curve("loss") if name == "loss (train)" else run.evaluation(name)
    return points[-1][1] if points else None


def corpora(runs: Iterable[Run]) -> set[str]:
    """What ``runs`` were trained and, while training, measured on: hex sha256, or ``unknown``."""
    return {"unknown" if run.newest is None else str(run.newest["data"].get("corpus_sha256")) for run in runs}


def seed(run: Run) -> int:
    """Of its newest statement, else of its config; 0 when neither has one."""
    if run.newest is not None:
        return int(run.newest["run"]["seed"])
    found = settings(run.config_text, str(run.root)).get("run.seed")
    return found if isinstance(found, int) else 0


def rate(run: Run) -> float | None:
    """Median throughput in units a second; None without metrics."""
    values = [value for _, value in run.curve(f"{run.unit}s_per_s") if math.isfinite(value)]
    return statistics.median(values) if values else None


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Config keys whose values differ among ``runs``, with each run's value; folders and names left out."""
    tables = [settings(run.config_text, str(run.root)) for run in runs]
    keys = sorted({key for table in tables for key in table} - {"run.dir", "run.name"})
    rows = [(key, [shown(table[key]) if key in table else "—" for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def shown(value: Any) -> str:
    """A config value as YAML would have it: ``null``, not ``None``."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def no_spread(runs: Sequence[Run]) -> str | None:
    """Why these runs say nothing about a spread over seeds; None when they do."""
    if len(runs) == 1:
        return "One run says nothing about other seeds: repeat it with several and report them together."
    differing = dict(differing_settings(runs))
    if set(differing) - {"run.seed"}:
        return "These runs differ in more than their seed, so no spread over seeds is given."
    if len(set(differing.get("run.seed", ()))) < len(runs):
        return "Several of these runs have the same seed, so no spread over seeds is given."
    return None


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [
        item
        for key, inner in value.items()
        for item in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    ]


def problem(error: HarnessError) -> str:
    """An error as a line of the report."""
    return f"{type(error).__name__}: {error}"
