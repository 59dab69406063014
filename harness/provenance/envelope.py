"""One signature over the raw bytes of a statement: DSSE 1.0.2 in a sigstore bundle v0.3.

The verifier checks the signature before it parses the payload, takes key and algorithm from its caller only,
and treats the key hint of the bundle as what it is: unauthenticated. A bundle has exactly one signature.
Sources: github.com/secure-systems-lab/dsse (protocol.md), github.com/sigstore/protobuf-specs (bundle v0.3).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from harness.errors import VerificationFailed
from harness.format import strict_json
from harness.provenance.keys import PublicKey, sign_with
from harness.provenance.ssh_agent import AgentKey

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
LIMIT = 16 << 20
"""Bytes of a bundle."""

PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey | AgentKey


@dataclass(frozen=True)
class Opened:
    """The payload of a bundle, and the key whose signature over it is good."""

    payload: bytes
    key: PublicKey


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, private_key: PrivateKey, public_key: PublicKey) -> bytes:
    """The bundle of ``payload``; ``public_key`` is the other half, for the hint."""
    message = pae(PAYLOAD_TYPE, payload)
    signature = sign_with(private_key, message)
    return strict_json.dumps(
        {
            "mediaType": MEDIA_TYPE,
            "verificationMaterial": {"publicKey": {"hint": public_key.hint}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        }
    )


def open_bundle(data: bytes, keys: Sequence[PublicKey], *, where: str) -> Opened:
    """The payload that one of ``keys`` has signed. Raises `VerificationFailed` for anything else."""
    payload, signature = _parts(data, where)
    message = pae(PAYLOAD_TYPE, payload)
    for key in keys:
        if key.verifies(signature, message):
            return Opened(payload, key)
    raise VerificationFailed(
        f"is signed by none of the {len(keys)} accepted keys",
        where=where,
        remedy="check the key or the policy",
    )


def unauthenticated_payload(data: bytes, *, where: str) -> bytes:
    """The payload of a bundle whose signature nobody has checked: to be shown as such, never to be relied on.

    Raises `VerificationFailed` when it is no bundle.
    """
    return _parts(data, where)[0]


def _parts(data: bytes, where: str) -> tuple[bytes, bytes]:
    """Payload and signature of a bundle."""
    bundle = strict_json.loads(data, where=where, limit=LIMIT)
    envelope = _fields(bundle, {"mediaType", "verificationMaterial", "dsseEnvelope"}, "a bundle", where)
    if envelope["mediaType"] != MEDIA_TYPE:
        raise VerificationFailed(f"has the media type {envelope['mediaType']!r}", where=where)
    inner = _fields(envelope["dsseEnvelope"], {"payload", "payloadType", "signatures"}, "an envelope", where)
    if inner["payloadType"] != PAYLOAD_TYPE:
        raise VerificationFailed(f"has the payload type {inner['payloadType']!r}", where=where)
    signatures = inner["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise VerificationFailed("does not have exactly one signature", where=where)
    if not isinstance(signatures[0], dict) or not {"sig"} <= set(signatures[0]) <= {"sig", "keyid"}:
        raise VerificationFailed("has a signature with other fields than sig and keyid", where=where)
    return _base64(inner["payload"], where), _base64(signatures[0]["sig"], where)


def _fields(value: Any, names: set[str], what: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != names:
        raise VerificationFailed(f"is {what} with other fields than {', '.join(sorted(names))}", where=where)
    return value


def _base64(value: Any, where: str) -> bytes:
    """Both alphabets, as DSSE asks; padding and nothing else."""
    if not isinstance(value, str):
        raise VerificationFailed("has base64 that is no string", where=where)
    try:
        return base64.b64decode(value.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise VerificationFailed("has broken base64", where=where) from error
