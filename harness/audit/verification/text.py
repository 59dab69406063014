"""The report of `harness verify` as a person reads it: the verdict, what it rests on, then every finding."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping
from typing import Any

from harness.audit.folders.opening import OpenedCheckpoint
from harness.audit.tiers import text as tier_text
from harness.audit.verification.report import Report
from harness.errors import visible
from harness.provenance.findings import Finding
from harness.terminal import Style, style
from harness.words import human_bytes

_COLOURS: dict[int, Style] = {0: "green", 1: "red", 4: "yellow"}
_LABEL = 12
_WIDTH = 86


def render(report: Report) -> str:
    """The whole report, ending with the verdict's reasons."""
    lines = [_head(report), *_facts(report), *_tiers(report), *(_line("note", note) for note in report.notes)]
    return "\n".join([*lines, *map(_finding, report.findings)])


def brief(report: Report) -> str:
    """The verdict and its reasons only."""
    return "\n".join([_head(report), *map(_finding, report.findings)])


def _head(report: Report) -> str:
    return f"{style(report.verdict, _COLOURS[report.exit_code])}  {visible(str(report.target))}"


def _facts(report: Report) -> list[str]:
    known = report.checkpoints
    lines = []
    if known:
        newest = known[-1].statement
        run = f"{newest.run_name}  {newest.run_id}"
        lines.append(_line("run", run))
        if newest.start is not None:
            began = f"step {newest.start['step']} of {newest.start['name']}  {newest.start['checkpoint']}"
            lines.append(_line("began with", began))
        lines += [_line("checkpoints", _checkpoints(known)), *_launches(known)]
        signers = Counter(f"{', '.join(each.signers)} (ed25519 {each.signer[:16]}…)" for each in known)
        lines += [_line("signed by", f"{name}: {count}") for name, count in signers.items()]
    speed = report.bytes_hashed / max(report.seconds, 1e-9)
    amount = f"{human_bytes(report.bytes_hashed)} in {report.seconds:.2f} s, {human_bytes(speed)}/s"
    lines.append(_line("hashed", amount))
    passed = textwrap.wrap(", ".join(report.passed) or "nothing", _WIDTH)
    return lines + [_line("" if number else "passed", text) for number, text in enumerate(passed)]


def _tiers(report: Report) -> list[str]:
    if report.kind == "export":
        return []
    return [_line(label, text) for label, text in tier_text.lines(report.tiers)]


def _checkpoints(known: tuple[OpenedCheckpoint, ...]) -> str:
    kinds = Counter(each.kind for each in known)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    first, last = known[0].statement.step_to, known[-1].statement.step_to
    return f"{counts}; step {first} to {last}" if len(known) > 1 else f"{counts}; step {last}"


def _launches(known: tuple[OpenedCheckpoint, ...]) -> list[str]:
    """One line for each launch that a checkpoint here tells of."""
    seen: dict[int, Mapping[str, Any]] = {}
    for each in known:
        seen.setdefault(each.statement.segment["number"], each.statement.segment)
    lines = []
    for number, segment in sorted(seen.items()):
        source = segment["resumed_from"]
        origin = "from step 0" if source is None else f"from step {source['step']}"
        changed = ", ".join(item["what"] for item in segment["differences"])
        accepted = f"; accepted {', '.join(segment['accepted'])}" if segment["accepted"] else ""
        text = f"{number}: {segment['class']} {origin}{f'; changed {changed}' if changed else ''}{accepted}"
        lines.append(_line("launch", text))
    return lines


def _finding(finding: Finding) -> str:
    label = "missing" if finding.missing else "wrong"
    colour: Style = "yellow" if finding.missing else "red"
    return f"  {style(label.ljust(_LABEL), colour)}{finding.check}: {finding}"


def _line(label: str, text: str) -> str:
    return f"  {label:<{_LABEL}}{visible(text)}"
