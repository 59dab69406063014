"""The statement of a checkpoint folder, for verbs that show: authentic with a policy, a claim without.

Nothing here hashes payload; `harness verify` does. A reader must say which of the two kinds it has shown
(`Story.trust`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from harness.audit.folders import opening
from harness.audit.folders.opening import OpenedCheckpoint
from harness.audit.run import handover, seen
from harness.errors import EvidenceIncomplete, VerificationFailed, visible
from harness.format import files, layout
from harness.format.layout import FolderKind, RunFolder
from harness.format.ledger import Ledger
from harness.provenance.findings import Findings
from harness.provenance.policy.rules import Policy
from harness.provenance.signers import Added
from harness.provenance.signing import envelope
from harness.provenance.statements import CheckpointStatement, parse_checkpoint

NOT_VERIFIED = "not verified: no signature was checked (give --key PUB or --policy FILE)"
LEDGER_LIMIT = 64 << 20
"""Largest ledger.json that is read, in bytes."""


@dataclass(frozen=True)
class Story:
    """What a checkpoint says of itself."""

    folder: Path
    statement: CheckpointStatement
    kind: FolderKind
    """What its folder's name says it is."""
    bundle_sha256: str
    """Of provenance/checkpoint.sigstore.json."""
    signers: tuple[str, ...] = ()
    """Identities that have signed; empty when no signature was checked."""
    key_id: str | None = None
    """Of the key that signed; None when no signature was checked."""
    added: tuple[Added, ...] = ()
    """Good statements that were added afterwards; empty when no signature was checked."""
    shown_at: str | None = None
    """The earliest moment at which a kept or timestamped head of the run's log shows its statement there."""

    @property
    def verified(self) -> bool:
        """Whether signatures, statements, manifest and file set were checked, payload bytes aside."""
        return self.key_id is not None

    @property
    def trust(self) -> str:
        """One line for the reader."""
        if self.key_id is None:
            return NOT_VERIFIED
        who = visible(", ".join(self.signers))
        return f"signed by {who} (ed25519 {self.key_id[:16]}…); payload bytes not hashed: harness verify does"


def newest(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest complete one of a run.

    Raises `UsageError` when it is neither, `EvidenceIncomplete` for a run without a complete checkpoint.
    """
    if layout.kind_of(path) == "checkpoint":
        return path
    complete = RunFolder(path).complete()
    if not complete:
        raise EvidenceIncomplete("the run has no complete checkpoint", where=str(path))
    return complete[-1]


def last(path: Path) -> Path:
    """The same, or the state that a run has kept which became non-finite after its newest checkpoint."""
    if layout.kind_of(path) == "checkpoint":
        return path
    run = RunFolder(path)
    reached = max((layout.step_of(each.name) for each in run.complete()), default=0)
    kept = [folder for step, folder in run.nonfinite() if step >= reached]
    return kept[-1] if kept else newest(path)


def read(folder: Path, policy: Policy | None, *, logged: Path | None = None) -> Story:
    """The story of ``folder``. With a policy every check but that of payload bytes is made, and the first
    failure raised; a checkpoint whose payload was pruned has a story still.

    ``logged``: the folder of its run's log, where that is not beside it.

    Raises `VerificationFailed`, `EvidenceIncomplete`, `EnvironmentFault`.
    """
    if policy is None:
        return unverified(folder)
    findings = Findings()
    shown = seen.beside(folder, policy) if logged is None else seen.look(logged, policy, Findings())
    trusted = handover.trust(folder, policy, shown, logged=logged).policy
    story = examined(folder, trusted, findings, shown.bundles)
    findings.raise_first()
    if story is None:
        raise VerificationFailed("could not be examined", where=str(folder))
    return story


def examined(
    folder: Path, policy: Policy, findings: Findings, shown: Mapping[str, str] | None = None
) -> Story | None:
    """The story of ``folder`` with every failure in ``findings``; None when it is not authentic.

    ``shown``: hex sha256 of a bundle → the moment at which a kept or timestamped head shows it there.
    """
    opened = opening.examine_folder(folder, policy, findings, shown)
    if opened is None:
        return None
    return replace(of(opened), shown_at=(shown or {}).get(opened.bundle_sha256))


def of(opened: OpenedCheckpoint) -> Story:
    """The story of a checkpoint that was examined."""
    return Story(
        opened.folder,
        opened.statement,
        opened.kind,
        opened.bundle_sha256,
        opened.signers,
        opened.signer,
        opened.added,
    )


def unverified(folder: Path) -> Story:
    """What ``folder`` claims; its format is checked, its signature is not.

    Raises `VerificationFailed` for a broken statement, `EvidenceIncomplete` when there is none.
    """
    path = folder / layout.CHECKPOINT_BUNDLE
    data = files.read_limited(path, envelope.LIMIT)
    payload = envelope.unauthenticated_payload(data, where=str(path))
    statement = parse_checkpoint(payload, where=str(path))
    kind, _ = layout.kind_of_name(layout.name_of(folder))
    return Story(folder, statement, kind, hashlib.sha256(data).hexdigest())


def ledger(story: Story) -> Ledger | None:
    """The ledger in the folder; None when neither folder nor statement has one, or the payload was pruned.

    Raises `VerificationFailed` when it is not the one that the statement names, `EvidenceIncomplete` when the
    statement names one that is not there.
    """
    path = story.folder / layout.LEDGER
    stated = story.statement.predicate["determinism"]["ledger"]
    if story.kind == "pruned" or (stated is None and not path.exists()):
        return None
    data = files.read_limited(path, LEDGER_LIMIT)
    if stated is None or stated["sha256"] != hashlib.sha256(data).hexdigest():
        raise VerificationFailed("the ledger is not the one that the statement names", where=str(path))
    return Ledger.parse(data, str(path))
