"""What a fetch has brought, judged by the auditor's own policy before any of it is put in place.

What the run would be is verified as `harness verify` does (`harness.audit.verification`), from the statements
of all checkpoints, those included that the folder had before: signatures, lineage, log, kept heads, metrics,
config. Payload comes afterwards, each byte compared with what was found authentic here.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.audit.folders import opening
from harness.audit.run import handover
from harness.audit.verification import verify
from harness.errors import EvidenceIncomplete, HarnessError, VerificationFailed
from harness.format import layout
from harness.provenance.findings import Finding, Findings
from harness.provenance.policy.rules import Policy
from harness.stores.staged import SMALL_FILES, Staged, files_in, is_signature


@dataclass
class Judge:
    """Whom the auditor trusts, and what was found good under that."""

    policy: Policy
    heads: Sequence[Path] = ()
    """Files with log heads that were kept, which the run's log must continue."""
    quiet: bool = False
    document: Mapping[str, Any] | None = field(default=None, init=False)
    """What was examined, as plain JSON; None until it was found good."""
    _trusted: Policy | None = field(default=None, init=False, repr=False)
    _shown: Mapping[str, str] = field(default_factory=dict, init=False, repr=False)

    def left_out(self, staged: Staged) -> list[str]:
        """The checkpoint, one at most, that is in the store and not in its log yet: a save is entered last.

        Raises `EvidenceIncomplete` when there are more, `VerificationFailed` for a log that was rolled back.
        """
        if staged.behind is not None:
            theirs, ours = staged.behind
            what = f"the store's log has {theirs} records, and this folder's has {ours}: it was rolled back"
            remedy = "get the newest state of the run from its maker, unless a job trains in this folder"
            raise VerificationFailed(what, where=staged.store.url, remedy=remedy)
        last = layout.step_of(next(reversed(list(staged.told)), ""))
        beyond = [name for name in staged.contents.all if layout.step_of(name) > last]
        if len(beyond) > 1 or beyond == staged.contents.all:
            what = (
                f"holds {len(beyond)} checkpoints that its log does not name, and a save enters its own last"
            )
            remedy = "wait for the job that sends them; if there is none, the log was rolled back"
            raise EvidenceIncomplete(what, where=staged.store.url, remedy=remedy)
        return beyond

    def examine(self, staged: Staged) -> None:
        """Raise the first thing that is wrong, or missing, with what the run would be."""
        _complete(staged)
        report = verify.verify(staged.folder.root, self.policy, head=self.heads, quiet=self.quiet)
        failed = [each for each in report.findings if not _is_of_payload(each)]
        if failed:
            raise _error(failed, staged)
        self._shown = report.shown
        self._trusted = handover.trust(staged.folder.root, self.policy).policy
        signers = sorted({name for each in report.checkpoints for name in each.signers})
        self.document = {"checkpoints": len(report.checkpoints), "signers": signers}

    def examine_payload(self, folder: Path) -> None:
        """Raise the first thing that is wrong with a whole checkpoint of what was examined, bytes aside."""
        findings = Findings()
        opening.examine_folder(folder, self._trusted or self.policy, findings, self._shown)
        findings.raise_first()


def _complete(staged: Staged) -> None:
    """Add what the run had before and keeps."""
    run, folder = staged.run, staged.folder
    if not staged.ahead:
        shutil.rmtree(folder.log, ignore_errors=True)
    for path in files_in(run.log):
        _copy(path, folder.root / path.relative_to(run.root))
    kept = [name for name in SMALL_FILES if not (name == layout.POLICY and staged.drops_policy)]
    for name in [*kept, layout.METRICS]:
        _copy(run.root / name, folder.root / name)
    for source in [*run.complete(), *run.pruned()]:
        name = source.name.removeprefix(layout.PRUNED)
        if source not in staged.superseded:
            for path in files_in(source):
                inside = path.relative_to(source).as_posix()
                if is_signature(inside):
                    _copy(path, folder.checkpoints / f"{layout.PRUNED}{name}" / inside)


def _copy(source: Path, target: Path) -> None:
    if source.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _is_of_payload(finding: Finding) -> bool:
    """Whether it is that of the newest checkpoint that is missing, which may be brought next."""
    return finding.check == "payload" and finding.missing


def _error(failed: Sequence[Finding], staged: Staged) -> HarnessError:
    """The first of ``failed``, what is wrong before what is missing, told of where it was read."""
    first = min(failed, key=lambda each: each.missing)
    more = f" ({len(failed) - 1} more)" if len(failed) > 1 else ""
    kind = EvidenceIncomplete if first.missing else VerificationFailed
    return kind(
        f"{first.what}{more}",
        where=staged.told_of(first.where),
        remedy=f"nothing was put in place; {first.remedy}",
    )
