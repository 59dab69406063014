"""A policy in the one form in which a run keeps and names it: policy.json, strict JSON with the keys in it.

The file that its user writes names other files; the copy stands alone, and is a policy file itself. Two files
that mean the same have one copy, whatever their order, comments and paths:

- keys, certificates, hand-overs and the trusted root are in the text; defaults are written out
- identities by name, keys by id, kinds and runs by name, revocations by id, certificates by their bytes
- the reasons of revocations are left out, and so are log heads: these are what its user has seen of runs, and
  grow with them

A copy says under which policy a run was made. Whoever verifies brings their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from harness.errors import VerificationFailed
from harness.format import strict_json
from harness.provenance.policy import policy_schema, reader
from harness.provenance.policy.rules import Identity, Policy
from harness.provenance.signing.keys import PublicKey
from harness.provenance.transparency import authorities

LIMIT = reader.FILE_LIMIT
"""Bytes of a copy, as of any policy file."""


def written(policy: Policy) -> bytes:
    """The copy of ``policy``."""
    return strict_json.dumps(_document(policy))


def digest(copy: bytes) -> str:
    """Hex sha256 of a copy, by which statements name it."""
    return hashlib.sha256(copy).hexdigest()


def changed(before: bytes, after: bytes) -> list[str]:
    """Names of the rules in which two copies differ; none when one of them cannot be read. What is no rule of
    this version is called ``rules of another version``."""
    try:
        one, other = (strict_json.loads(each, where="policy", limit=LIMIT) for each in (before, after))
    except VerificationFailed:
        return []
    if not isinstance(one, dict) or not isinstance(other, dict):
        return []
    differ = {name for name in {*one, *other} if one.get(name) != other.get(name)}
    known = sorted(differ & set(policy_schema.SCHEMA["properties"]))
    return known + (["rules of another version"] if differ - set(known) else [])


def _document(policy: Policy) -> dict[str, Any]:
    made: dict[str, Any] = {
        "format": policy_schema.FORMAT,
        "identities": [_identity(each) for each in sorted(policy.identities, key=lambda each: each.name)],
        "required": sorted(policy.required),
        "threshold": policy.threshold,
    }
    if policy.revoked:
        moments = policy.revoked_from
        made["revoked"] = [
            {"id": each, "from": moments[each]} if each in moments else {"id": each}
            for each in sorted(policy.revoked)
        ]
    if policy.rotations:
        made["rotations"] = sorted(each.file.decode() for each in policy.rotations)
    if policy.sigstore is not None:
        made["sigstore"] = policy.sigstore.decode()
    if policy.witnesses:
        made["witnesses"] = {"keys": _keys(policy.witnesses), "threshold": policy.witness_threshold}
    if policy.authorities:
        pems = [authorities.pem_of(each) for each in sorted(policy.authorities)]
        made["timestamps"] = {"certificates": pems}
    if policy.max_age is not None:
        made["max_age"] = _age(policy.max_age)
    return made


def _identity(identity: Identity) -> dict[str, Any]:
    made: dict[str, Any] = {"name": identity.name, "runs": sorted(set(identity.runs))}
    if identity.keys:
        made["keys"] = _keys(identity.keys)
    if identity.subjects:
        told = sorted((each.issuer, each.identity) for each in identity.subjects)
        made["keyless"] = [{"issuer": issuer, "identity": name} for issuer, name in told]
    if identity.statements is not None:
        made["statements"] = sorted(identity.statements)
    times = {"from": identity.valid_from, "until": identity.valid_until, "proven": identity.proven or None}
    if valid := {name: value for name, value in times.items() if value is not None}:
        made["valid"] = valid
    return made


def _keys(keys: Iterable[PublicKey]) -> list[str]:
    return [key.pem.decode() for key in sorted(keys, key=lambda each: each.key_id)]


def _age(age: timedelta) -> str:
    hours = age // timedelta(hours=1)
    return f"{hours}h" if hours % 24 else f"{hours // 24}d"
