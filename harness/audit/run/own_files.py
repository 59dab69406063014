"""What a run holds beside its checkpoints, against what they have signed: its metrics, config and policy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from harness.audit.run import chain
from harness.format import files, layout, metrics_line
from harness.format.layout import RunFolder
from harness.provenance.findings import Findings
from harness.provenance.history import Entry
from harness.provenance.policy import canonical

_CONFIG_LIMIT = 1 << 20


@dataclass
class Kept:
    """What was read of a run's own files when they were checked: who uses them must not read them again."""

    lines: list[bytes] = field(default_factory=list)
    """Of metrics.jsonl, those that no checkpoint has signed yet, too."""
    config: bytes | None = None
    """run.yaml, as a checkpoint has signed it."""


def check_metrics(
    run: RunFolder,
    entries: Sequence[Entry],
    findings: Findings,
    keep: Callable[[bytes], object] | None = None,
) -> None:
    """metrics.jsonl against the heads that ``entries`` have signed.

    ``keep`` gets each line that is checked: who uses them must not read the file again.
    """
    signed = [entry for entry in entries if entry.statement.predicate["metrics"]["chain"] is not None]
    if not signed:
        findings.note(f"{layout.METRICS}: not checked (no checkpoint has signed its chain)")
        return
    stream = findings.attempt("plain files", files.open_regular, run.metrics)
    if stream is None:
        return
    gaps = _gaps(entries)
    for step in sorted(gaps):
        findings.note(
            f"{layout.METRICS}: lines before step {step + 1} may be missing, a resume accepted that"
        )
    newest = b""

    def lines() -> Iterator[bytes]:
        """Each cut at the limit that `chain` refuses."""
        nonlocal newest
        while line := stream.readline(chain.LINE_LIMIT + 1):
            newest = line
            if keep is not None:
                keep(line)
            yield line

    with stream:
        broken = chain.check(lines(), map(_anchor, signed), gaps, str(run.metrics))
        findings.all_of("metrics", ((each.what, each.where) for each in broken))
    last = signed[-1].statement.step_to
    more = metrics_line.step_of(newest) != last
    findings.note(f"{layout.METRICS}: signed up to step {last}{', later lines are not yet' if more else ''}")


def _anchor(entry: Entry) -> chain.Anchor:
    metrics = entry.statement.predicate["metrics"]
    source = entry.statement.segment["resumed_from"]
    return chain.Anchor(
        entry.statement.step_to,
        metrics["chain"],
        metrics.get("lines"),
        0 if source is None else source["step"],
        metrics["loss"],
        metrics["grad_norm"],
        metrics["gradients"],
        metrics["state"],
        metrics["evaluation"],
        entry.where,
    )


def _gaps(entries: Sequence[Entry]) -> dict[int, str]:
    """Step → head of the checkpoints after which a resume went on without the lines."""
    heads = {entry.checkpoint_id: entry.statement.predicate["metrics"]["chain"] for entry in entries}
    gaps = {}
    for entry in entries:
        segment = entry.statement.segment
        source = segment["resumed_from"]
        if source is not None and any(each.startswith("metrics") for each in segment["accepted"]):
            head = heads.get(source["checkpoint"])
            if head is not None:
                gaps[int(source["step"])] = str(head)
    return gaps


def check_config(run: RunFolder, entries: Sequence[Entry], findings: Findings) -> bytes | None:
    """run.yaml, if it is a config that one of ``entries`` has signed."""
    if not entries:
        return None
    data = findings.attempt("run.yaml", files.read_limited, run.run_config, _CONFIG_LIMIT)
    if data is None:
        return None
    digest = hashlib.sha256(data).hexdigest()
    signed = [entry.statement.predicate["config"]["sha256"] for entry in entries]
    if digest not in signed:
        findings.bad("run.yaml", "is a config that no checkpoint has signed", str(run.run_config))
        return None
    if digest != signed[-1]:
        findings.note("run.yaml is the config of an earlier checkpoint, not of the newest")
    return data


def check_policy(run: RunFolder, entries: Sequence[Entry], findings: Findings) -> bytes | None:
    """policy.json, if it is the copy of a policy that one of ``entries`` names, and there where none does."""
    named = [None if (told := entry.statement.policy) is None else told["sha256"] for entry in entries]
    if not named or (named[-1] is None and not os.path.lexists(run.policy)):
        return None
    data = findings.attempt("policy.json", files.read_limited, run.policy, canonical.LIMIT)
    if data is None:
        return None
    digest = canonical.digest(data)
    if digest not in named:
        findings.bad("policy.json", "is a policy that no checkpoint names", str(run.policy))
        return None
    if digest != named[-1]:
        findings.note(f"{layout.POLICY} is the policy of an earlier checkpoint, not of the newest")
        return None
    return data
