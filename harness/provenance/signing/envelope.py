"""One signature over the raw bytes of a statement: DSSE 1.0.2 in a sigstore bundle v0.3.

The verifier checks the signature before it parses the payload, takes key and algorithm from its caller only,
and never chooses by the key hint of the bundle, which is unauthenticated. A bundle has exactly one signature.
The bundles that are made with a checkpoint have one layout, so that no byte of them can change unnoticed.
Sources: github.com/secure-systems-lab/dsse (protocol.md), github.com/sigstore/protobuf-specs (bundle v0.3).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import VerificationFailed
from harness.format import strict_json
from harness.provenance.signing.keys import PrivateKey, PublicKey, sign_with

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
LIMIT = 16 << 20
"""Bytes of a bundle."""


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
    return _written(payload, sign_with(private_key, message), public_key)


def open_bundle(data: bytes, keys: Sequence[PublicKey], *, where: str) -> Opened:
    """The payload that one of ``keys`` has signed. Raises `VerificationFailed` for anything else."""
    payload, signature, _ = _parts(data, where)
    return Opened(payload, _signer(payload, signature, keys, where))


def open_own(data: bytes, keys: Sequence[PublicKey], *, where: str) -> Opened:
    """The same for a bundle without a byte that could change: JSON, base64 and the key hint leave room that a
    signature does not cover, and the bundles that are made with a checkpoint use none of it.

    Its keys may come in another order than `sign` has, as the official signer of models writes them. Raises
    as `open_bundle`.
    """
    own = _own(data)
    if own is not None:
        payload, signature, hint = own
        key = _signer(payload, signature, keys, where)
        if hint == key.hint:
            return Opened(payload, key)
    opened = open_bundle(data, keys, where=where)
    if not _is_tight(data, opened, where):
        raise VerificationFailed(
            "is signed, and has changed where no signature reaches: layout, base64 or key hint",
            where=where,
            remedy="get the file from its maker again",
        )
    return opened


def reopen_own(data: bytes, keys: Sequence[PublicKey], *, where: str) -> Opened:
    """The same for bytes of which the caller knows that `open_own` has opened them before: only one key fits
    their hint, and whether it is among ``keys`` is all that is left to ask. Raises as `open_bundle`."""
    own = _own(data)
    for key in keys:
        if own is not None and key.hint == own[2]:
            return Opened(own[0], key)
    return open_own(data, keys, where=where)


def _own(data: bytes) -> tuple[bytes, bytes, str] | None:
    """Payload, signature and hint of a bundle as `sign` writes it, to the byte; None for any other."""
    if len(data) > LIMIT:
        return None
    texts, end = [], 0
    for before in _FRAME[:-1]:
        start = end + len(before)
        if not data.startswith(before, end):
            return None
        end = data.find(b'"', start)
        texts.append(data[start:end])
    if data[end:] != _FRAME[-1]:
        return None
    try:
        payload, signature = map(_canonical, texts[:2])
    except binascii.Error:
        return None
    return payload, signature, texts[2].decode("latin-1")


def _canonical(text: bytes) -> bytes:
    """What ``text`` is the only base64 of (RFC 4648 section 3.5). Raises `binascii.Error` for any other."""
    data = binascii.a2b_base64(text, strict_mode=True)
    # Four letters within it are three bytes, and nothing else is; the last bytes could be written otherwise.
    last = data[-(len(data) % 3 or 3) :]
    if len(text) != -(-len(data) // 3) * 4 or not text.endswith(binascii.b2a_base64(last, newline=False)):
        raise binascii.Error("is not canonical")
    return data


def _is_tight(data: bytes, opened: Opened, where: str) -> bool:
    bundle = strict_json.loads(data, where=where, limit=LIMIT)
    tight = json.dumps(bundle, ensure_ascii=False, separators=(",", ":")).encode()
    inner = bundle["dsseEnvelope"]
    signature = inner["signatures"][0]
    encoded = base64.b64encode(_base64(signature["sig"], where)).decode()
    return (
        data in (tight, tight + b"\n")
        and inner["payload"] == base64.b64encode(opened.payload).decode()
        and signature == {"sig": encoded, "keyid": ""}
        and bundle["verificationMaterial"] == {"publicKey": {"hint": opened.key.hint}, "tlogEntries": []}
    )


def unauthenticated_payload(data: bytes, *, where: str) -> bytes:
    """The payload of a bundle whose signature nobody has checked: to be shown as such, never to be relied on.

    Raises `VerificationFailed` when it is no bundle.
    """
    return _parts(data, where)[0]


def unauthenticated(data: bytes, *, where: str) -> tuple[bytes, object]:
    """The same, and the verification material beside it."""
    payload, _, material = _parts(data, where)
    return payload, material


def _signer(payload: bytes, signature: bytes, keys: Sequence[PublicKey], where: str) -> PublicKey:
    """The one of ``keys`` that has signed ``payload``."""
    message = pae(PAYLOAD_TYPE, payload)
    for key in keys:
        if key.verifies(signature, message):
            return key
    raise VerificationFailed(f"is signed by none of the {len(keys)} accepted keys", where=where)


_FRAME = (
    b'{"dsseEnvelope":{"payload":"',
    b'","payloadType":"application/vnd.in-toto+json","signatures":[{"keyid":"","sig":"',
    b'"}]},"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{"publicKey":{"hint":"',
    b'"},"tlogEntries":[]}}\n',
)
"""What lies around payload, signature and hint in a bundle of ours: canonical JSON."""


def _written(payload: bytes, signature: bytes, key: PublicKey) -> bytes:
    start, signatures, material, end = _FRAME
    texts = (binascii.b2a_base64(each, newline=False) for each in (payload, signature))
    return b"".join((start, next(texts), signatures, next(texts), material, key.hint.encode(), end))


def _parts(data: bytes, where: str) -> tuple[bytes, bytes, object]:
    """Payload, signature and verification material of a bundle."""
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
    payload, signature = (_base64(each, where) for each in (inner["payload"], signatures[0]["sig"]))
    return payload, signature, envelope["verificationMaterial"]


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
