"""The verifier's core: bytes in, findings out. Nothing here touches a file.

Rules for one checkpoint, in the order in which they are checked:

- the statement's bundle carries a good signature of an accepted Ed25519 key over its raw bytes, before its
  contents are read; then types, strict JSON and every field are checked
- the signer may sign this kind of statement for this run at this time, is not revoked, and enough distinct
  identities have signed; SLSA statement and model.sig are signed by somebody who may, later statements by
  somebody who may sign that kind for the run
- MANIFEST.json is the one that the statement names by sha256, and dirHash agrees
- the SLSA statement is signed and says the same facts
- model.sig, when a P-256 key is accepted, signs exactly the manifest's files and MANIFEST.json
- the folder's name, the config's digest, the state's digest, the ledger's digest, the cursor and trainer.json
  agree with the statement
- every later statement in provenance/ is signed by an accepted key, or without one by an accepted identity
  (`harness.provenance.signing.keyless`), is about this checkpoint, is of the kind that its file's name says,
  fits that kind's schema (`harness.provenance.later`), and was made, as far as it says when, in its signer's
  time
- every kind that the policy requires is there, and says nothing unfavourable

Of a statement and a manifest that a kept head covers (``--since``), byte for byte, the signature is not
computed again, and what they say of each other is not compared again; who may sign is asked again. Of a
pruned checkpoint among them, SLSA statement and model.sig are not looked at, and the manifest is not parsed:
nothing is left that they could mislead anybody about.

Every failure is collected; one that makes a later check impossible ends the list. Its place among the other
rules of a verification: `harness.provenance.checks`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial

from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format import layout, strict_json
from harness.format.manifest import Manifest, checkpoint_id
from harness.provenance import agreement, later, signers, statements
from harness.provenance.checks import REMEDIES, Check
from harness.provenance.evidence import Evidence
from harness.provenance.findings import Findings
from harness.provenance.policy import rules as policies
from harness.provenance.policy.rules import Policy
from harness.provenance.signers import Added
from harness.provenance.signing import envelope, model_signature
from harness.provenance.statements import CheckpointStatement


@dataclass(frozen=True)
class Examined:
    """A checkpoint whose statement and manifest are authentic."""

    statement: CheckpointStatement
    manifest: Manifest | None
    """None where it was not read, since it was verified before and the folder is a pruned one (`is_left`)."""
    checkpoint_id: str
    signers: tuple[str, ...]
    """Names of the identities that have signed the statement."""
    key_id: str
    """Of the key that signed provenance/checkpoint.sigstore.json."""
    bundle_sha256: str
    """Of provenance/checkpoint.sigstore.json, as the log records it."""
    later: Mapping[str, str] = field(default_factory=dict)
    """Name → hex sha256 of the bundles that were added afterwards, as the log records them."""
    added: tuple[Added, ...] = ()
    """Those of them that are good and no countersignature."""


def examine(evidence: Evidence, policy: Policy, findings: Findings) -> Examined | None:
    """Check all that the small files say. None when statement or manifest cannot be relied on."""
    path = evidence.at(layout.CHECKPOINT_BUNDLE)
    bundle = findings.attempt("statement present", _present, evidence.bundle, path)
    if bundle is None:
        return None
    whole = policy
    policy = policy.as_of(evidence.seen.get(evidence.bundle_sha256))
    check: Check = "kept head" if evidence.is_known else "signature"
    opening = envelope.reopen_own if evidence.is_known else envelope.open_own
    opened = findings.attempt(check, opening, bundle, policy.statement_keys, where=path)
    if opened is None:
        return None
    statement = findings.attempt("statement", statements.parse_checkpoint, opened.payload, where=path)
    if statement is None:
        return None
    data = findings.attempt("manifest present", _present, evidence.manifest, evidence.at(layout.MANIFEST))
    manifest, left = None, is_left(evidence.name, evidence.is_known)
    if data is not None and not left:
        where = evidence.at(layout.MANIFEST)
        words = (data, statement.subject_id, statement.dir_hash)
        manifest = findings.attempt("manifest", Manifest.stated, *words, where=where)
    signed, good = signers.later_statements(evidence, whole, findings, statement, opened)
    told = signers.check_enough(policy, findings, statement, signed, path)
    if manifest is not None:
        _check_slsa(evidence, policy, findings, statement, told)
        _check_model_signature(evidence, policy, findings, manifest, statement, told)
    elif not left:
        return None
    findings.all_of("agreement", agreement.disagreements(evidence, statement, manifest))
    names = tuple(each.identity.name for each in signed)
    there = {
        later.name_of(path) or path: hashlib.sha256(data).hexdigest() for path, data in evidence.later.items()
    }
    return Examined(
        statement,
        manifest,
        statement.subject_id,
        names,
        opened.key.key_id,
        evidence.bundle_sha256,
        there,
        tuple(good),
    )


def is_known(known: Mapping[str, str], bundle_sha256: str, manifest: bytes | None) -> bool:
    """Whether the bytes of a statement's bundle and of a manifest are among the ``known``: hex sha256 of
    bundles → checkpoint id, of what a head covers that was kept when all of it had been verified."""
    wanted = known.get(bundle_sha256)
    return wanted is not None and manifest is not None and wanted == checkpoint_id(manifest)


def is_left(name: str, is_known: bool) -> bool:
    """Whether the folder ``name`` is what pruning has left of a checkpoint that was verified before."""
    return is_known and layout.kind_of_name(name)[0] == "pruned"


def _present(data: bytes | None, where: str) -> bytes:
    if data is None:
        raise EvidenceIncomplete("is missing", where=where, remedy="get the whole folder from its maker")
    return data


def _check_slsa(
    evidence: Evidence, policy: Policy, findings: Findings, statement: CheckpointStatement, told: Set[str]
) -> None:
    if evidence.slsa is None:
        return
    where = evidence.at(layout.SLSA_BUNDLE)
    opening = partial(envelope.open_own, evidence.slsa, policy.statement_keys, where=where)
    payload = _signed(opening, "slsa", policies.SLSA, policy, statement, told, findings, where)
    if payload is not None:
        findings.attempt("slsa", _slsa, payload, statement, where)


def _slsa(payload: bytes, statement: CheckpointStatement, where: str) -> None:
    document = statements.slsa_document(
        statement.subject_id, statement.dir_hash, statement.name, statement.predicate
    )
    expected = strict_json.rewritten(document)
    if payload == expected:
        return  # as it is written here; other bytes may say the same
    statements.parse_statement(payload, statements.SLSA_TYPE, where=where)
    found = strict_json.loads(payload, where=where)
    if strict_json.dumps(found) != expected:
        place = agreement.first_difference(strict_json.loads(expected, where=where), found, "") or "a type"
        raise VerificationFailed(f"says something else than the checkpoint statement at {place}", where=where)


def _signed(
    opening: Callable[[], envelope.Opened],
    check: Check,
    kind: str,
    policy: Policy,
    statement: CheckpointStatement,
    told: Set[str],
    findings: Findings,
    where: str,
) -> bytes | None:
    """What somebody has signed who may sign that ``kind`` for the run of ``statement`` at its time; None and
    a finding otherwise, but none where ``told`` has the reason, which is one of the checkpoint already."""
    try:
        opened = opening()
    except VerificationFailed as error:
        findings.bad(check, error.what, where, error.remedy)
        return None
    run, key = (statement.run_id, statement.run_name), opened.key
    objection = policy.identity(key).objection(*run, statement.created, kind, policy.proven, key.key_id)
    if objection is None:
        return opened.payload
    if objection not in told:
        findings.bad(check, f"does not count: {objection}", where, REMEDIES["policy"].wrong)
    return None


def _check_model_signature(
    evidence: Evidence,
    policy: Policy,
    findings: Findings,
    manifest: Manifest,
    statement: CheckpointStatement,
    told: Set[str],
) -> None:
    data, where = evidence.model_signature, evidence.at(layout.MODEL_SIGNATURE)
    if not policy.model_keys and policies.MODEL_SIGNATURE not in policy.required:
        findings.note("model.sig: not checked (no P-256 key given)")
    elif data is not None:
        opening = partial(model_signature.opened, data, policy.model_keys, where=where)
        kind = policies.MODEL_SIGNATURE
        payload = _signed(opening, "model signature", kind, policy, statement, told, findings, where)
        if payload is not None:
            listed = {**manifest.digests, layout.MANIFEST: statement.subject_id}
            comparing = partial(model_signature.compare, payload, listed, statement.name, where=where)
            findings.attempt("model signature", comparing)
