"""A run as a verification has read it: nothing that is signed is read a second time.

Between a verification and the reading of a report a file may be exchanged. So the lines of metrics.jsonl,
run.yaml and the statements come from the verification itself; what no signature covers (events/, the names of
folders that were set aside) is shown as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from harness.audit.run.own_files import Kept
from harness.audit.verification.report import Report
from harness.format.json_lines import parsed
from harness.report.runs import Checkpoint, Run, step_lines


def of(read: Run, judged: Report, kept: Kept) -> Run:
    """``read``, with what ``judged`` has verified, and ``kept``, in the place of what was read before.

    Without a failure only: after one nothing counts, and a reader wants to see what is there.
    """
    commits = [each.statement for each in judged.checkpoints if each.kind != "nonfinite"]
    signed = [each.step_to for each in commits if each.predicate["metrics"]["chain"] is not None]
    checkpoints = tuple(sorted(_checkpoints(read, judged), key=lambda one: (one.step, one.name)))
    text = "" if kept.config is None else kept.config.decode("utf-8", "replace")
    if not commits and judged.checkpoints:  # it became non-finite before its first checkpoint
        text = str(judged.checkpoints[-1].statement.predicate["config"]["text"])
    verified = replace(read, checkpoints=checkpoints, config_text=text, verified=True)
    if not signed:
        return replace(verified, lines_signed=False)
    chunk = parsed(b"".join(kept.lines))
    lines = tuple(step_lines(chunk.lines))
    covered = tuple(line for line in lines if line["step"] <= max(signed))
    return replace(
        verified,
        lines=covered,
        unsigned=len(lines) - len(covered),
        unreadable=chunk.unreadable,
        partial=chunk.partial,
    )


def _checkpoints(read: Run, judged: Report) -> Iterator[Checkpoint]:
    """Those that are authentic with what they have signed, the others without what they say."""
    for each in judged.checkpoints:
        if each.kind in ("complete", "pruned", "nonfinite"):
            statement = each.statement
            signer = f"{', '.join(each.signers)} (ed25519 {each.signer[:16]}…)"
            yield Checkpoint(
                each.folder.name, statement.step_to, each.kind, statement.predicate, signer=signer
            )
    known = {each.folder.name for each in judged.checkpoints}
    # One that a running job has pruned meanwhile has another name, and the same step.
    steps = {each.statement.step_to for each in judged.checkpoints}
    for one in read.checkpoints:
        if one.kind == "damaged":
            yield replace(one, facts=None, problem=None)
        elif one.name not in known and one.step not in steps:
            yield replace(one, facts=None, problem=one.problem or "not verified")
