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
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format import layout, strict_json
from harness.format import ledger as ledgers
from harness.format.manifest import Manifest, checkpoint_id, dir_hash, state_digest
from harness.provenance import later, statements
from harness.provenance.checks import REMEDIES, Check
from harness.provenance.findings import Findings, Reason
from harness.provenance.later import Later
from harness.provenance.policy import rules as policies
from harness.provenance.policy.rules import Identity, Policy
from harness.provenance.signing import envelope, keyless, model_signature
from harness.provenance.statements import CheckpointStatement

_COUNTERSIGNED = f"{later.COUNTERSIGNATURE}-0"
_OF_EXPORTS = {
    *(policies.CHECKPOINT, policies.SLSA, policies.MODEL_SIGNATURE, policies.EXPORT),
    *(policies.LOG, policies.TIMESTAMP),
}
"""Kinds that an export is not asked for here: its statement repeats what SLSA's says, and a log is asked for
where one could be."""
Kind = Literal["complete", "pruned", "nonfinite", "damaged", "elsewhere"]


@dataclass(frozen=True)
class Evidence:
    """The small files of a checkpoint folder, as read; None for one that is not there."""

    where: str
    """The folder, for messages."""
    name: str
    """The folder's own name."""
    bundle: bytes | None
    bundle_sha256: str
    """Of the statement's bundle, hex, as the log records it."""
    manifest: bytes | None
    slsa: bytes | None
    model_signature: bytes | None
    there: Set[str] = frozenset()
    """Paths of all files in the folder, those too that are not read."""
    later: Mapping[str, bytes] = field(default_factory=dict)
    """Path → bytes of statements that were added afterwards."""
    seen: Mapping[str, str] = field(default_factory=dict)
    """Hex sha256 of a bundle → the moment at which a kept or timestamped log head shows it there."""
    is_known: bool = False
    """Whether statement and manifest are, byte for byte, those that were verified before (`is_known`)."""


@dataclass(frozen=True)
class Added:
    """A statement that was added afterwards, under a key that the policy trusts for this run."""

    statement: Later
    signer: str
    """Name of the policy's identity."""
    key_id: str


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


@dataclass(frozen=True)
class _Signature:
    """Of an identity, over a checkpoint's statement."""

    identity: Identity
    kind: str
    """Of statement, as policies name it."""
    seen: str | None
    """The moment at which a kept or timestamped head shows that it was there."""
    key_id: str
    dated: bool = False
    """Whether sigstore shows when it was made, and that was compared with the identity's time."""


@dataclass(frozen=True)
class _Opened:
    """A later statement's payload, and whose signature over it is good."""

    payload: bytes
    identity: Identity
    key_id: str
    dated: bool = False


def kind_of_name(name: str) -> tuple[Kind, str | None]:
    """What a folder's name claims, and the signed name that belongs to it (None: any)."""
    if layout.parse_checkpoint_name(name) is not None:
        return "complete", name
    inner = name.removeprefix(layout.PRUNED)
    if inner != name and layout.parse_checkpoint_name(inner) is not None:
        return "pruned", inner
    nonfinite = layout.parse_nonfinite_name(name)
    if nonfinite is not None:
        return "nonfinite", layout.checkpoint_name(nonfinite[0])
    return ("damaged", None) if name.startswith(layout.DAMAGED) else ("elsewhere", None)


def examine(evidence: Evidence, policy: Policy, findings: Findings) -> Examined | None:
    """Check all that the small files say. None when statement or manifest cannot be relied on."""
    path = _path(evidence, layout.CHECKPOINT_BUNDLE)
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
    data = findings.attempt("manifest present", _present, evidence.manifest, _path(evidence, layout.MANIFEST))
    manifest, left = None, is_left(evidence.name, evidence.is_known)
    if data is not None and not left:
        where = _path(evidence, layout.MANIFEST)
        manifest = findings.attempt("manifest", _manifest, data, statement, where)
    signers, good = _later_statements(evidence, whole, findings, statement, opened)
    _may_sign(policy, findings, statement, signers, path)
    if manifest is not None:
        _check_slsa(evidence, policy, findings, statement)
        _check_model_signature(evidence, policy, findings, manifest, statement)
    elif not left:
        return None
    findings.all_of("agreement", _disagreements(evidence, statement, manifest))
    names = tuple(each.identity.name for each in signers)
    there = {later.name_of(path) or path: _sha256(data) for path, data in evidence.later.items()}
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


def check_signers(
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
    signers = [_Signature(policy.identity(first.key), policies.CHECKPOINT, None, first.key.key_id)]
    for path, data in countersignatures.items():
        found = _later_statement(path, _COUNTERSIGNED, data, policy, findings, statement, first, None)
        if found is not None:
            signers.append(_countersignature(found[0], None))
    once = {each.identity.name: each for each in reversed(signers)}
    there = _OF_EXPORTS | ({policies.COUNTERSIGNATURE} if len(signers) > 1 else set())
    for kind in sorted(policy.required - there):
        what = f"the policy requires a statement of kind {kind}, and an exported folder alone has none"
        findings.missing("required", what, where, "verify the checkpoint, or the run folder")
    remedy = "export the checkpoint again once enough of them have countersigned it"
    _may_sign(policy, findings, statement, list(once.values()), where, remedy)


def is_known(known: Mapping[str, str], bundle_sha256: str, manifest: bytes | None) -> bool:
    """Whether the bytes of a statement's bundle and of a manifest are among the ``known``: hex sha256 of
    bundles → checkpoint id, of what a head covers that was kept when all of it had been verified."""
    wanted = known.get(bundle_sha256)
    return wanted is not None and manifest is not None and wanted == checkpoint_id(manifest)


def is_left(name: str, is_known: bool) -> bool:
    """Whether the folder ``name`` is what pruning has left of a checkpoint that was verified before."""
    return is_known and kind_of_name(name)[0] == "pruned"


def trainer_disagreements(
    data: bytes, statement: CheckpointStatement, where: str
) -> Iterator[tuple[str, str]]:
    """What trainer.json says otherwise than the statement. Raises `VerificationFailed` for broken JSON."""
    document = strict_json.loads(data, where=where)
    if not isinstance(document, dict):
        yield "is no JSON object", where
        return
    facts = statement.predicate
    expected = {
        "step": statement.step_to,
        "world_size": facts["launch"]["world_size"],
        "segment": facts["segment"]["number"],
        "cursor": facts["cursor"],
    }
    if facts["metrics"]["chain"] is not None:
        expected["chain"] = facts["metrics"]["chain"]
    for key, value in expected.items():
        if strict_json.dumps(document.get(key)) != strict_json.dumps(value):
            yield f"has {key} {_short(document.get(key))}, the statement {_short(value)}", where


def ledger_disagreements(
    data: bytes, statement: CheckpointStatement, where: str
) -> Iterator[tuple[str, str]]:
    """What ledger.json holds otherwise than the statement counts.

    Earlier statements count fewer kinds of rows; what they do count must be right. Raises
    `VerificationFailed` for what is no ledger.
    """
    facts, ledger = statement.predicate["determinism"], ledgers.Ledger.parse(data, where)
    stated = facts["ledger"] or {}
    for key, found in ledgers.counts(ledger).items():
        place = _first_difference(stated[key], found, key) if key in stated else None
        if place is not None:
            yield f"holds other {place} than the statement says", where
    if ledger.mode != facts["mode"]:
        yield f"was kept in mode {ledger.mode}, the statement says {facts['mode']}", where


def _path(evidence: Evidence, name: str) -> str:
    return f"{evidence.where}/{name}"


def _present(data: bytes | None, where: str) -> bytes:
    if data is None:
        raise EvidenceIncomplete("is missing", where=where, remedy="get the whole folder from its maker")
    return data


def _manifest(data: bytes, statement: CheckpointStatement, where: str) -> Manifest:
    identity = checkpoint_id(data)
    if identity != statement.subject_id:
        raise VerificationFailed(
            f"is not the manifest that the statement is about ({_short(statement.subject_id)})",
            where=where,
            remedy="the manifest was changed, or the statement belongs to another checkpoint",
        )
    manifest = Manifest.parse(data, where=where)
    if dir_hash([*manifest.digests.items(), (layout.MANIFEST, identity)]) != statement.dir_hash:
        raise VerificationFailed("has another dirHash than the statement", where=where)
    return manifest


def _later_statements(
    evidence: Evidence,
    policy: Policy,
    findings: Findings,
    statement: CheckpointStatement,
    first: envelope.Opened,
) -> tuple[list[_Signature], list[Added]]:
    """Check the statements that were added afterwards; returns one signature of each identity that signed the
    checkpoint's own statement, and the good ones of the others."""
    moment = evidence.seen.get(evidence.bundle_sha256)
    maker = _Signature(policy.identity(first.key), policies.CHECKPOINT, moment, first.key.key_id)
    signers = {maker.identity.name: maker}
    good: list[Added] = []
    kinds = {policies.CHECKPOINT, policies.LOG, policies.TIMESTAMP}
    kinds |= {policies.SLSA} if layout.SLSA_BUNDLE in evidence.there else set()
    kinds |= {policies.MODEL_SIGNATURE} if layout.MODEL_SIGNATURE in evidence.there else set()
    for path, data in sorted(evidence.later.items()):
        name = later.name_of(path) or path
        where, seen = _path(evidence, path), evidence.seen.get(_sha256(data))
        judged = findings if policy.judges_later else Findings()
        found = _later_statement(where, name, data, policy, judged, statement, first, seen)
        if found is None:
            continue
        opened, read = found
        signer = opened.identity
        if read is None or read.is_favourable:
            kinds.add(later.kind_of(name) or "")
        if read is None:
            signers.setdefault(signer.name, _countersignature(opened, seen))
        else:
            good.append(Added(read, signer.name, opened.key_id))
    for kind in sorted(policy.required - kinds):
        told = [
            f"{each.statement.name}: {each.statement.summary}" for each in good if each.statement.kind == kind
        ]
        but = f", and there is only {', '.join(told)}" if told else ""
        what = f"the policy requires a statement of kind {kind}{but}"
        findings.missing("required", what, evidence.where)
    return list(signers.values()), good


def _countersignature(opened: _Opened, seen: str | None) -> _Signature:
    return _Signature(opened.identity, later.COUNTERSIGNATURE, seen, opened.key_id, opened.dated)


def _later_statement(
    where: str,
    name: str,
    data: bytes,
    policy: Policy,
    findings: Findings,
    statement: CheckpointStatement,
    first: envelope.Opened,
    seen: str | None,
) -> tuple[_Opened, Later | None] | None:
    """Who has signed a good statement ``name``, and what it says (None for a countersignature, which says
    nothing new); None, and a finding, for any other."""
    check: Check = "later statement"
    kind = later.kind_of(name) or ""
    opened = findings.attempt(check, _open_later, data, policy.as_of(seen), statement, kind, where=where)
    if opened is None:
        return None
    if kind == later.COUNTERSIGNATURE:
        if opened.payload == first.payload:
            return opened, None
        findings.bad(check, "signs another statement than the checkpoint's", where)
        return None
    read = findings.attempt(check, later.parse, opened.payload, name, statement, where=where)
    if read is not None and not opened.dated:
        words = (statement.run_id, statement.run_name, read.created, kind, seen, opened.key_id)
        objection = opened.identity.objection(*words)
        if objection is not None:
            findings.bad(check, f"does not count: {objection}", where, REMEDIES["policy"].wrong)
            return None
    if read is not None and read.summary:
        place = f"{statement.run_name} {statement.name} {name}"
        findings.note(f"{place}: {read.summary} (signed by {opened.identity.name})")
    return None if read is None else (opened, read)


def _open_later(
    data: bytes, policy: Policy, statement: CheckpointStatement, kind: str, *, where: str
) -> _Opened:
    """``data``, signed by somebody who may sign that kind for that run."""
    if policy.sigstore is not None:
        signed = keyless.open_bundle(data, policy.subjects, policy.sigstore, where=where)
        if signed is not None:
            return _signed_keyless(signed, policy, statement, kind, where)
    # When it was made is said in its payload, which is read once somebody is found to have signed it.
    keys = policy.within(statement.run_id, statement.run_name, None, kind).statement_keys
    opened = envelope.open_bundle(data, keys, where=where)
    return _Opened(opened.payload, policy.identity(opened.key), opened.key.key_id)


def _signed_keyless(
    signed: keyless.Signed, policy: Policy, statement: CheckpointStatement, kind: str, where: str
) -> _Opened:
    """The same without a key; it was signed in the certificate's minutes, so the identity's time is asked."""
    identity = policy.identity_of(signed.subject)
    run = (statement.run_id, statement.run_name)
    for moment in (signed.start, signed.end):
        objection = identity.objection(*run, moment, kind, signed.end)
        if objection is not None:
            raise VerificationFailed(f"does not count: {objection}", where=where)
    if signed.key.key_id in policy.revoked:
        raise VerificationFailed("is signed with a revoked key", where=where)
    return _Opened(signed.payload, identity, signed.key.key_id, dated=True)


def _may_sign(
    policy: Policy,
    findings: Findings,
    statement: CheckpointStatement,
    signers: Sequence[_Signature],
    where: str,
    remedy: str = "add provenance/countersignature-N.sigstore.json",
) -> None:
    objections = [
        None
        if each.dated
        else each.identity.objection(
            statement.run_id, statement.run_name, statement.created, each.kind, each.seen, each.key_id
        )
        for each in signers
    ]
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


def _check_slsa(
    evidence: Evidence, policy: Policy, findings: Findings, statement: CheckpointStatement
) -> None:
    if evidence.slsa is not None:
        where = _path(evidence, layout.SLSA_BUNDLE)
        findings.attempt("slsa", _slsa, evidence.slsa, policy, statement, where)


def _slsa(data: bytes, policy: Policy, statement: CheckpointStatement, where: str) -> None:
    keys = _entitled(policy, statement, policies.SLSA).statement_keys
    payload = envelope.open_own(data, keys, where=where).payload
    told = statements.slsa_document(
        statement.subject_id, statement.dir_hash, statement.name, statement.predicate
    )
    expected = strict_json.rewritten(told)
    if payload == expected:
        return  # as it is written here; other bytes may say the same
    statements.parse_statement(payload, statements.SLSA_TYPE, where=where)
    found = strict_json.loads(payload, where=where)
    if strict_json.dumps(found) != expected:
        place = _first_difference(strict_json.loads(expected, where=where), found, "") or "a type"
        raise VerificationFailed(f"says something else than the checkpoint statement at {place}", where=where)


def _entitled(policy: Policy, statement: CheckpointStatement, kind: str) -> Policy:
    """Whoever may sign a statement of ``kind`` for the run of ``statement`` at its time."""
    return policy.within(statement.run_id, statement.run_name, statement.created, kind)


def _check_model_signature(
    evidence: Evidence, policy: Policy, findings: Findings, manifest: Manifest, statement: CheckpointStatement
) -> None:
    data, where = evidence.model_signature, _path(evidence, layout.MODEL_SIGNATURE)
    if not policy.model_keys and policies.MODEL_SIGNATURE not in policy.required:
        findings.note("model.sig: not checked (no P-256 key given)")
    elif data is not None:
        keys = _entitled(policy, statement, policies.MODEL_SIGNATURE).model_keys
        listed = {**manifest.digests, layout.MANIFEST: statement.subject_id}
        findings.attempt(
            "model signature", model_signature.check, data, keys, listed, statement.name, where=where
        )


def _disagreements(
    evidence: Evidence, statement: CheckpointStatement, manifest: Manifest | None
) -> Iterator[Reason]:
    """Every place where folder, manifest and statement say different things; of what was verified before,
    only the folder can."""
    yield from _misplaced(evidence, statement)
    if manifest is not None and not evidence.is_known:
        yield from _contradictions(evidence, statement, manifest)


def _misplaced(evidence: Evidence, statement: CheckpointStatement) -> Iterator[Reason]:
    """What the folder's name says otherwise than the statement."""
    kind, name = kind_of_name(evidence.name)
    outcome = statement.predicate["outcome"]
    if name is not None and name != statement.name:
        yield f"the folder was signed as {statement.name}", evidence.where, "give it that name again"
    if outcome != "ok" and kind != "nonfinite":
        what = "the state of a run that became non-finite is shown as a good checkpoint"
        yield what, evidence.where, "use an older checkpoint"
    if outcome == "ok" and kind == "nonfinite":
        yield "a good checkpoint is shown as non-finite", evidence.where


def _contradictions(
    evidence: Evidence, statement: CheckpointStatement, manifest: Manifest
) -> Iterator[Reason]:
    """What the statement says twice, or otherwise than the manifest."""
    facts, where = statement.predicate, _path(evidence, layout.CHECKPOINT_BUNDLE)
    step = statement.step_to
    if statement.name != layout.checkpoint_name(step):
        yield f"is named {statement.name}, its step is {step}", where
    if facts["cursor"]["step"] != step:
        yield f"has the data cursor at step {facts['cursor']['step']}, not {step}", where
    if hashlib.sha256(facts["config"]["text"].encode()).hexdigest() != facts["config"]["sha256"]:
        yield "has a config text with another digest than its own", where
    state = facts["state"]
    if state["sha256"] != state_digest(manifest.tensors) or state["tensors"] != len(manifest.tensors):
        yield "has a state digest that is not that of the manifest's tensors", where
    ledger = facts["determinism"]["ledger"]
    if ledger is not None and ledger["sha256"] != manifest.digests.get(layout.LEDGER):
        yield "names another ledger.json than the manifest", where
    if layout.TRAINER not in manifest.digests:
        yield "lists no trainer.json", _path(evidence, layout.MANIFEST)
    for tensor in manifest.tensors:
        if not tensor.file.endswith(".safetensors"):
            yield f"lists the tensor `{tensor.name}` in {tensor.file}", _path(evidence, layout.MANIFEST)


def _first_difference(expected: Any, found: Any, path: str) -> str | None:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            place = _first_difference(expected.get(key), found.get(key), f"{path}.{key}")
            if place is not None:
                return place
        return None if set(expected) == set(found) else path.lstrip(".")
    return None if expected == found else path.lstrip(".")


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text[:60]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
