"""Handing over from one signing key to the next: a statement that both keys sign.

The file holds two sigstore bundles, one a line, around the same in-toto statement (predicate
``urn:harness:predicate:key-rotation/v1``): the first signed by the old key, which hands over, the second by
the new one, which takes over. So whoever trusts one of the two knows the other, and nobody can hand over to
a key that is not theirs. Rules:

- one of the signatures is checked with a key that the policy accepts before the statement is read, the other
  one then with the key that the statement names
- a key hands over once, and takes over once; no key takes over again what it handed over (no forks, no
  cycles), and moments ascend along a chain
- a revoked key hands nothing over, unless something shows that it did so before the moment of its revocation
- both keys belong to one identity, with the limits of that identity, and the hand-over lies in its time
- where a policy names the file, the old key's signatures count until its moment, the new key's from then on,
  by the time that statements state. In a run's log the record of a hand-over is a place in the order of all
  records, which no clock decides (`harness.provenance.history`)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.errors import UsageError, VerificationFailed
from harness.format import strict_json
from harness.provenance.checks import Check
from harness.provenance.policy.rules import Identity, Policy, Rotation, Span
from harness.provenance.schema import DIALECT, HEX64, NULL, TEXT, TIME, Schema, check, closed, either
from harness.provenance.signing import envelope
from harness.provenance.signing.keys import PublicKey, Signer, parse_public, public_keys
from harness.provenance.statements import STATEMENT_TYPE

PREDICATE_TYPE = "urn:harness:predicate:key-rotation/v1"
CHECK: Check = "key rotation"
"""Name of the check."""
LIMIT = 32 << 10
"""Bytes of the file; it must fit into a record of the log."""
_KEYS = closed(ed25519=TEXT, p256=either(TEXT, NULL))
SCHEMA: Schema = {
    "$schema": DIALECT,
    "$id": PREDICATE_TYPE,
    "title": "One signing key hands over to the next",
    **closed(old=_KEYS, new=_KEYS, at=TIME, reason=TEXT),
}
"""JSON Schema (draft 2020-12) of the predicate; keys are SPKI PEM."""
_SUBJECT = closed(name=TEXT, digest=closed(sha256=HEX64))


@dataclass(frozen=True)
class Claim:
    """A file that nobody has checked yet."""

    data: bytes
    where: str
    proven: str | None = None
    """The moment at which something shows that it was there."""


def build(old: Signer, new: Signer, at: str, reason: str) -> bytes:
    """The file by which ``old`` hands over to ``new`` at ``at``. Raises `UsageError` when they are one."""
    if old.ed25519_id == new.ed25519_id:
        raise UsageError("a key cannot take over from itself", remedy="make another: harness keys new")
    predicate = {
        "old": _told(public_keys(old)),
        "new": _told(public_keys(new)),
        "at": at,
        "reason": reason,
    }
    check(predicate, where="predicate of the hand-over", schema=SCHEMA)
    payload = strict_json.dumps(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": "signing key", "digest": {"sha256": new.ed25519_id}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": predicate,
        }
    )
    signed = [envelope.sign(payload, each.ed25519, public_keys(each)[0]) for each in (old, new)]
    data = b"".join(signed)
    if len(data) > LIMIT:
        raise UsageError(f"a hand-over of {len(data)} bytes is over the limit of {LIMIT}")
    return data


def opened(claim: Claim, keys: Sequence[PublicKey]) -> Rotation | None:
    """The hand-over in ``claim``; None when none of ``keys`` has signed it.

    Raises `VerificationFailed` for what is none, or what only one of its keys has signed.
    """
    where = claim.where
    if len(claim.data) > LIMIT:
        raise VerificationFailed(f"is larger than {LIMIT} bytes", where=where)
    bundles = claim.data.removesuffix(b"\n").split(b"\n")
    if len(bundles) != 2 or not claim.data.endswith(b"\n"):
        raise VerificationFailed("is no hand-over of two signed bundles", where=where)
    payloads = [_payload(each, keys, where) for each in bundles]
    payload = payloads[0] or payloads[1]
    if payload is None:
        return None
    found = _parse(payload, claim)
    for bundle, key in zip(bundles, (found.old[0], found.new[0]), strict=True):
        if _payload(bundle, [key], where) != payload:
            what = f"is not signed by the key {key.key_id[:16]}… that it names"
            raise VerificationFailed(what, where=where, remedy="a hand-over needs the old and the new key")
    return found


def extended(policy: Policy, claims: Sequence[Claim], *, timed: bool) -> tuple[Policy, list[Rotation]]:
    """``policy``, whose identities also have the keys of ``claims``, and the hand-overs in their order.

    ``timed``: whether signatures count only on their side of the moment, by the time that they state.
    Raises `VerificationFailed` for a claim that breaks a rule above, or that no accepted key has signed.
    """
    found: dict[int, Rotation] = {}
    while len(found) < len(claims):
        before = len(found)
        for number, claim in enumerate(claims):
            if number in found:
                continue
            rotation = opened(claim, policy.as_of(claim.proven).statement_keys)
            if rotation is not None:
                policy = _with(policy, rotation, claim, timed)
                found[number] = rotation
        if len(found) == before:
            where = next(claim.where for number, claim in enumerate(claims) if number not in found)
            what = "hands over between keys of which the policy accepts none"
            raise VerificationFailed(what, where=where, remedy="check the key or the policy")
    return policy, [found[number] for number in range(len(claims))]


def handed_over(rotations: Iterable[Rotation]) -> frozenset[str]:
    """Ids of the keys that handed over."""
    return frozenset(key.key_id for each in rotations for key in each.old)


def _with(policy: Policy, rotation: Rotation, claim: Claim, timed: bool) -> Policy:
    if any(each.payload == rotation.payload for each in policy.rotations):
        return policy
    what = _conflict(policy.rotations, rotation)
    owners = [each for each in policy.identities if {key.key_id for key in each.keys} & _ids(rotation)]
    if what is None and len(owners) > 1:
        what = f"hands over from {owners[0].name} to {owners[1].name}"
    if what is None:
        what = _out_of_time(owners[0], rotation)
    if what is not None:
        raise VerificationFailed(what, where=claim.where, remedy="ask the owner of the keys")
    # What takes over from a key that is revoked later than this counts; the revoked one is lifted by as_of.
    (owner,) = owners
    changed = _joined(owner, rotation, timed)
    identities = tuple(changed if each is owner else each for each in policy.identities)
    return replace(policy, identities=identities, rotations=(*policy.rotations, rotation))


def _conflict(known: Sequence[Rotation], rotation: Rotation) -> str | None:
    """The rule that ``rotation`` would break beside those that are known."""
    for each in known:
        if each.old_id == rotation.old_id:
            return f"hands the key {rotation.old_id[:16]}… over a second time"
        if each.new_id == rotation.new_id:
            return f"hands over to the key {rotation.new_id[:16]}…, which took over from another one"
        before, after = (each, rotation) if each.new_id == rotation.old_id else (rotation, each)
        if before.new_id == after.old_id and before.at >= after.at:
            return f"hands over at {after.at} a key that took over at {before.at}"
    following = {each.old_id: each.new_id for each in known}
    key: str | None = rotation.new_id
    while key is not None:
        if key == rotation.old_id:
            return "hands a key over to one that it has taken over from"
        key = following.get(key)
    return None


def _out_of_time(owner: Identity, rotation: Rotation) -> str | None:
    start, end = owner.valid_from, owner.valid_until
    if start is not None and rotation.at < start:
        return f"is of {rotation.at}, and {owner.name} is valid from {start}"
    if end is not None and rotation.at >= end:
        return f"is of {rotation.at}, and {owner.name} is valid until {end}"
    return None


def _joined(owner: Identity, rotation: Rotation, timed: bool) -> Identity:
    """``owner`` with both keys. P-256 keys are added only where model.sig is checked for this owner."""
    known = {key.key_id for key in owner.keys}
    models = any(key.algorithm == "p256" for key in owner.keys)
    wanted = [key for key in (*rotation.old, *rotation.new) if key.algorithm == "ed25519" or models]
    more = tuple(key for key in wanted if key.key_id not in known)
    spans: dict[str, Span] = dict(owner.spans)
    for key in rotation.old if timed else ():
        spans[key.key_id] = (spans.get(key.key_id, (None, None))[0], rotation.at)
    for key in rotation.new if timed else ():
        spans[key.key_id] = (rotation.at, spans.get(key.key_id, (None, None))[1])
    return replace(owner, keys=(*owner.keys, *more), spans=spans)


def _ids(rotation: Rotation) -> set[str]:
    return {key.key_id for key in (*rotation.old, *rotation.new)}


def _payload(bundle: bytes, keys: Sequence[PublicKey], where: str) -> bytes | None:
    """What one of ``keys`` has signed; None when none has. Raises `VerificationFailed` for what is no bundle.

    Nothing of the payload is read here, only the envelope around it.
    """
    envelope.unauthenticated_payload(bundle, where=where)
    try:
        return envelope.open_bundle(bundle, keys, where=where).payload
    except VerificationFailed:
        return None


def _parse(payload: bytes, claim: Claim) -> Rotation:
    where = claim.where
    document = strict_json.loads(payload, where=where, limit=LIMIT)
    if not isinstance(document, dict) or set(document) != {"_type", "subject", "predicateType", "predicate"}:
        raise VerificationFailed("is no in-toto statement", where=where)
    if document["_type"] != STATEMENT_TYPE or document["predicateType"] != PREDICATE_TYPE:
        raise VerificationFailed(f"is a {document['predicateType']!r}, not {PREDICATE_TYPE}", where=where)
    predicate = document["predicate"]
    check(predicate, where=where, schema=SCHEMA)
    subjects = document["subject"]
    subject = subjects[0] if isinstance(subjects, list) and len(subjects) == 1 else None
    check(subject, where=where, schema=_SUBJECT)
    old, new = _read(predicate["old"], where), _read(predicate["new"], where)
    if subject is None or subject["digest"]["sha256"] != new[0].key_id:
        raise VerificationFailed("is about another key than the new one", where=where)
    if {key.key_id for key in old} & {key.key_id for key in new}:
        raise VerificationFailed("hands a key over to itself", where=where)
    return Rotation(payload, old, new, predicate["at"], predicate["reason"], claim.data)


def _read(told: Mapping[str, Any], where: str) -> tuple[PublicKey, ...]:
    found = []
    for algorithm in ("ed25519", "p256"):
        if told[algorithm] is None:
            continue
        try:
            key = parse_public(told[algorithm].encode(), where=where)
        except UsageError as error:
            raise VerificationFailed(error.what, where=where) from error
        if key.algorithm != algorithm:
            raise VerificationFailed(f"has a {key.algorithm} key where {algorithm} is due", where=where)
        found.append(key)
    return tuple(found)


def _told(keys: Sequence[PublicKey]) -> dict[str, str | None]:
    return {
        name: next((key.pem.decode() for key in keys if key.algorithm == name), None)
        for name in ("ed25519", "p256")
    }
