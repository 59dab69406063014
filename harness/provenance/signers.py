"""Whose signatures count: under a checkpoint's own statement, and under what was added to it later.

The rules are those of `harness.provenance.verifier`; here is who may sign, whether enough have, and which of
the statements in provenance/ are good.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.errors import VerificationFailed
from harness.format import layout
from harness.provenance import later
from harness.provenance.checks import REMEDIES, Check
from harness.provenance.evidence import Evidence
from harness.provenance.findings import Findings
from harness.provenance.later import Later
from harness.provenance.policy import rules as policies
from harness.provenance.policy.rules import Identity, Policy
from harness.provenance.signing import envelope, keyless
from harness.provenance.statements import CheckpointStatement

_COUNTERSIGNED = f"{later.COUNTERSIGNATURE}-0"
_OF_EXPORTS = {
    *(policies.CHECKPOINT, policies.SLSA, policies.MODEL_SIGNATURE, policies.EXPORT),
    *(policies.LOG, policies.TIMESTAMP),
}
"""Kinds that an export is not asked for here: its statement repeats what SLSA's says, and a log is asked for
where one could be."""


@dataclass(frozen=True)
class Added:
    """A statement that was added afterwards, under a key that the policy trusts for this run."""

    statement: Later
    signer: str
    """Name of the policy's identity."""
    key_id: str


@dataclass(frozen=True)
class Signature:
    """Of an identity, over a checkpoint's statement."""

    identity: Identity
    kind: str
    """Of statement, as policies name it."""
    seen: str | None
    """The moment at which a kept or timestamped head shows that it was there."""
    key_id: str
    dated: bool = False
    """Whether sigstore shows when it was made, and that was compared with the identity's time."""

    def objection(self, statement: CheckpointStatement, created: str | None) -> str | None:
        """Why it does not count for the run of ``statement`` when it was made at the moment ``created``, as
        far as that says; None for one that counts."""
        if self.dated:
            return None
        run = (statement.run_id, statement.run_name)
        return self.identity.objection(*run, created, self.kind, self.seen, self.key_id)


def later_statements(
    evidence: Evidence,
    policy: Policy,
    findings: Findings,
    statement: CheckpointStatement,
    first: envelope.Opened,
) -> tuple[list[Signature], list[Added]]:
    """Check the statements that were added afterwards; returns one signature of each identity that signed the
    checkpoint's own statement, and the good ones of the others."""
    moment = evidence.seen.get(evidence.bundle_sha256)
    maker = _of_maker(policy, first, moment)
    signers = {maker.identity.name: maker}
    good: list[Added] = []
    kinds = {policies.CHECKPOINT, policies.LOG, policies.TIMESTAMP}
    kinds |= {policies.SLSA} if layout.SLSA_BUNDLE in evidence.there else set()
    kinds |= {policies.MODEL_SIGNATURE} if layout.MODEL_SIGNATURE in evidence.there else set()
    for path, data in sorted(evidence.later.items()):
        name = later.name_of(path) or path
        where, seen = evidence.at(path), evidence.seen.get(hashlib.sha256(data).hexdigest())
        judged = findings if policy.judges_later else Findings()
        found = _later_statement(where, name, data, policy, judged, statement, first, seen)
        if found is None:
            continue
        signature, read = found
        name_of_signer = signature.identity.name
        if read is None or read.is_favourable:
            kinds.add(later.kind_of(name) or "")
        if read is None:
            signers.setdefault(name_of_signer, signature)
        else:
            good.append(Added(read, name_of_signer, signature.key_id))
    for kind in sorted(policy.required - kinds):
        told = [
            f"{each.statement.name}: {each.statement.summary}" for each in good if each.statement.kind == kind
        ]
        but = f", and there is only {', '.join(told)}" if told else ""
        what = f"the policy requires a statement of kind {kind}{but}"
        findings.missing("required", what, evidence.where)
    return list(signers.values()), good


def check_exported(
    policy: Policy,
    findings: Findings,
    statement: CheckpointStatement,
    first: envelope.Opened,
    countersignatures: Mapping[str, bytes],
    where: str,
) -> None:
    """That enough identities have signed ``statement``, which ``first`` holds, outside its folder: in an
    export. ``countersignatures``: path → bytes of what carries the others' signatures. What else the policy
    requires of those who add statements to a checkpoint has no place there."""
    signers = [_of_maker(policy, first, None)]
    for path, data in countersignatures.items():
        found = _later_statement(path, _COUNTERSIGNED, data, policy, findings, statement, first, None)
        if found is not None:
            signers.append(found[0])
    once = {each.identity.name: each for each in reversed(signers)}
    there = _OF_EXPORTS | ({policies.COUNTERSIGNATURE} if len(signers) > 1 else set())
    for kind in sorted(policy.required - there):
        what = f"the policy requires a statement of kind {kind}, and an exported folder alone has none"
        findings.missing("required", what, where, "verify the checkpoint, or the run folder")
    remedy = "export the checkpoint again once enough of them have countersigned it"
    check_enough(policy, findings, statement, list(once.values()), where, remedy)


def check_enough(
    policy: Policy,
    findings: Findings,
    statement: CheckpointStatement,
    signers: Sequence[Signature],
    where: str,
    remedy: str = "add provenance/countersignature-N.sigstore.json",
) -> frozenset[str]:
    """That ``signers``, one signature of each identity, are enough, and the checkpoint is not revoked.

    Returns why some of them do not count, where that is a finding: what else they have signed of the
    checkpoint does not count for the same reason, which need not be said again.
    """
    objections = [each.objection(statement, statement.created) for each in signers]
    good = objections.count(None)
    enough = good >= policy.threshold
    for reason in filter(None, objections):
        if enough:
            findings.note(f"not counted: {reason}")
        else:
            findings.bad("policy", reason, where)
    if not enough and not any(objections):
        what = f"is signed by {good} of the {policy.threshold} identities that the policy wants"
        findings.missing("policy", what, where, remedy)
    if statement.subject_id in policy.revoked:
        findings.bad("policy", f"the checkpoint {statement.subject_id} is revoked", where, "use another one")
    elif enough:
        findings.passed.append("policy")
    return frozenset() if enough else frozenset(filter(None, objections))


def _of_maker(policy: Policy, first: envelope.Opened, seen: str | None) -> Signature:
    return Signature(policy.identity(first.key), policies.CHECKPOINT, seen, first.key.key_id)


def _later_statement(
    where: str,
    name: str,
    data: bytes,
    policy: Policy,
    findings: Findings,
    statement: CheckpointStatement,
    first: envelope.Opened,
    seen: str | None,
) -> tuple[Signature, Later | None] | None:
    """Who has signed a good statement ``name``, and what it says (None for a countersignature, which says
    nothing new); None, and a finding, for any other."""
    check: Check = "later statement"
    kind = later.kind_of(name) or ""
    opened = findings.attempt(check, _opened, data, policy.as_of(seen), statement, kind, seen, where=where)
    if opened is None:
        return None
    payload, signature = opened
    if kind == later.COUNTERSIGNATURE:
        if payload == first.payload:
            return signature, None
        findings.bad(check, "signs another statement than the checkpoint's", where)
        return None
    read = findings.attempt(check, later.parse, payload, name, statement, where=where)
    if read is None:
        return None
    objection = signature.objection(statement, read.created)
    if objection is not None:
        findings.bad(check, f"does not count: {objection}", where, REMEDIES["policy"].wrong)
        return None
    if read.summary:
        place = f"{statement.run_name} {statement.name} {name}"
        findings.note(f"{place}: {read.summary} (signed by {signature.identity.name})")
    return signature, read


def _opened(
    data: bytes, policy: Policy, statement: CheckpointStatement, kind: str, seen: str | None, *, where: str
) -> tuple[bytes, Signature]:
    """What ``data`` holds, and who has signed it, who may sign that kind for that run."""
    if policy.sigstore is not None:
        signed = keyless.open_bundle(data, policy.subjects, policy.sigstore, where=where)
        if signed is not None:
            return signed.payload, _keyless(signed, policy, statement, kind, seen, where)
    # When it was made is said in its payload, which is read once somebody is found to have signed it.
    keys = policy.within(statement.run_id, statement.run_name, None, kind).statement_keys
    opened = envelope.open_bundle(data, keys, where=where)
    return opened.payload, Signature(policy.identity(opened.key), kind, seen, opened.key.key_id)


def _keyless(
    signed: keyless.Signed,
    policy: Policy,
    statement: CheckpointStatement,
    kind: str,
    seen: str | None,
    where: str,
) -> Signature:
    """The same without a key; it was signed in the certificate's minutes, so the identity's time is asked."""
    identity = policy.identity_of(signed.subject)
    run = (statement.run_id, statement.run_name)
    for moment in (signed.start, signed.end):
        objection = identity.objection(*run, moment, kind, signed.end)
        if objection is not None:
            raise VerificationFailed(f"does not count: {objection}", where=where)
    if signed.key.key_id in policy.revoked:
        raise VerificationFailed("is signed with a revoked key", where=where)
    return Signature(identity, kind, seen, signed.key.key_id, dated=True)
