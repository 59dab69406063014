"""Timestamps of an authority outside (RFC 3161) over log heads: what was there, and when at the latest.

A timestamp is a TimeStampResp as every tool reads it, with status "granted" and no other words, over the
sha256 of a head's three lines, which are what the log's key signs. It lies in the log folder as
``timestamps/SIZE.tsr``. Whoever signed the head does not matter to it: the head's root names every record
before it, and a checkpoint's record names its statement, signature included, by digest.

Rules for one that counts:

- the bytes are DER, of one signer, without a byte after the end
- the signer's certificate is one that the policy vouches for (`harness.provenance.transparency.authorities`),
  is named by digest in what is signed (RFC 2634, RFC 5816), and its key has signed with SHA-2
- what is signed is a timestamp (content type), over this head and no other

The moment that it proves is the time that it states and the accuracy that it claims, rounded up.
Sources: RFC 3161 (timestamps), RFC 5652 (CMS), RFC 5816 (ESSCertIDv2). Needs nothing but `cryptography`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from harness.errors import VerificationFailed
from harness.format import der, moments
from harness.format.der import Element
from harness.provenance.checks import Check
from harness.provenance.transparency import authorities

CHECK: Check = "timestamp"
"""Name of the check."""
FOLDER = "timestamps"
"""In the log folder."""
LIMIT = 64 << 10
"""Bytes of a timestamp; with three certificates they have about 6,000."""
_NAME = re.compile(rf"{FOLDER}/([1-9][0-9]{{0,15}})\.tsr")
_GRANTED = der.encode(der.SEQUENCE, der.encode_integer(0))
_TIME = re.compile(r"(\d{14})(\.\d{1,9})?Z", re.ASCII)

_SIGNED_DATA, _TST_INFO = "1.2.840.113549.1.7.2", "1.2.840.113549.1.9.16.1.4"
_CONTENT_TYPE, _MESSAGE_DIGEST = "1.2.840.113549.1.9.3", "1.2.840.113549.1.9.4"
_SIGNING_CERTIFICATE = "1.2.840.113549.1.9.16.2.12"
_SIGNING_CERTIFICATE_V2 = "1.2.840.113549.1.9.16.2.47"
_SHA256 = "2.16.840.1.101.3.4.2.1"
_HASHES: Mapping[str, hashes.HashAlgorithm] = {
    _SHA256: hashes.SHA256(),
    "2.16.840.1.101.3.4.2.2": hashes.SHA384(),
    "2.16.840.1.101.3.4.2.3": hashes.SHA512(),
}
_RSA, _SIGNATURES = "1.2.840.113549.1.1.1", {
    "1.2.840.113549.1.1.11": "sha256",
    "1.2.840.113549.1.1.12": "sha384",
    "1.2.840.113549.1.1.13": "sha512",
    "1.2.840.10045.4.3.2": "sha256",
    "1.2.840.10045.4.3.3": "sha384",
    "1.2.840.10045.4.3.4": "sha512",
}  # fmt: skip
"""Signature algorithm → its hash; the bare name of RSA leaves that to the digest algorithm."""


@dataclass(frozen=True)
class Stamp:
    """What a good timestamp says."""

    moment: str
    """The latest moment at which it was made, as ``2026-11-23T20:00:00Z``."""
    authority: str
    """Whom the certificate that has signed it is of."""
    nonce: int | None


@dataclass(frozen=True)
class _Signed:
    """A signed message (CMS SignedData) of one signer, taken apart and not verified."""

    content: bytes
    certificates: list[bytes]
    issuer: bytes
    serial: int
    digest: str
    """Object identifier of the digest algorithm."""
    attributes: bytes
    """As they are signed: DER of a SET."""
    values: Mapping[str, Element]
    """Object identifier of an attribute → its one value."""
    algorithm: str
    signature: bytes


def path_of(size: int) -> str:
    """Where the timestamp of the head of ``size`` records lies, relative to the log folder."""
    return f"{FOLDER}/{size}.tsr"


def size_of(path: str) -> int | None:
    """The size of a path that `path_of` gives; None for any other path."""
    match = _NAME.fullmatch(path)
    return None if match is None else int(match[1])


def request(message: bytes, nonce: int) -> bytes:
    """The TimeStampReq over ``message``; the answer is to bring its certificates."""
    algorithm = der.encode(der.SEQUENCE, der.encode_oid(_SHA256), der.encode(der.NULL))
    imprint = der.encode(der.SEQUENCE, algorithm, der.encode(der.OCTETS, hashlib.sha256(message).digest()))
    wanted = der.encode(der.BOOLEAN, b"\xff")
    return der.encode(der.SEQUENCE, der.encode_integer(1), imprint, der.encode_integer(nonce), wanted)


def granted(answer: bytes, *, where: str) -> bytes:
    """The timestamp in an authority's ``answer``, in the form in which it is kept.

    Raises `VerificationFailed` for a refusal, and for what is no answer.
    """
    parts = der.children(der.parse(answer, where=where), where=where)
    status = der.children(parts[0], where=where) if parts else []
    number = der.integer(status[0], where=where) if status else -1
    if number != 0 or len(parts) != 2:
        words = [text.content.decode("utf-8", "replace") for text in _texts(status[1:], where)]
        raise VerificationFailed(": ".join([f"was refused with status {number}", *words]), where=where)
    return der.encode(der.SEQUENCE, _GRANTED, parts[1].whole)


def opened(data: bytes, message: bytes, trusted: Sequence[bytes], *, where: str) -> Stamp:
    """What the timestamp ``data`` says of ``message``; ``trusted``: certificates of the policy, as DER.

    Raises `VerificationFailed` for anything but a good one.
    """
    signed, signer = _verified(data, where)
    windows = authorities.vouched(signer, signed.certificates, trusted, where=where)
    # Only now is anything read of what is signed.
    stamp, time = _told(signed.content, signer, message, where)
    authorities.require_valid(windows, time, where=where)
    return stamp


def opened_by_anybody(data: bytes, message: bytes, *, where: str) -> Stamp:
    """The same of a timestamp whose certificate nobody vouches for: for whoever has just asked for it and
    wants to know that it is whole. Proves nothing to anybody else."""
    signed, signer = _verified(data, where)
    authorities.require_timestamping(authorities.certificate(signer, where=where), where=where)
    return _told(signed.content, signer, message, where)[0]


def _verified(data: bytes, where: str) -> tuple[_Signed, bytes]:
    """The parts of a timestamp, and the certificate whose key has signed its contents."""
    signed = _taken_apart(data, where)
    signer = _certificate(signed, where)
    algorithm = _hash(signed.digest, where)
    digest = hashes.Hash(algorithm)
    digest.update(signed.content)
    stated = der.contents(_value(signed, _MESSAGE_DIGEST, where), der.OCTETS, where=where)
    if der.oid(_value(signed, _CONTENT_TYPE, where), where=where) != _TST_INFO or stated != digest.finalize():
        raise VerificationFailed("is signed over something else than its contents", where=where)
    _check_named(signed, signer, where)
    key = authorities.key_of(authorities.certificate(signer, where=where), where=where)
    fits = signed.algorithm == _RSA and isinstance(key, rsa.RSAPublicKey)
    if not fits and _SIGNATURES.get(signed.algorithm) != algorithm.name:
        raise VerificationFailed(f"is signed by the algorithm {signed.algorithm}, not RSA or ECDSA with "
                                 "SHA-2", where=where)  # fmt: skip
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signed.signature, signed.attributes, padding.PKCS1v15(), algorithm)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signed.signature, signed.attributes, ec.ECDSA(algorithm))
        else:
            raise VerificationFailed("is signed with a key that is neither RSA nor ECDSA", where=where)
    except (InvalidSignature, ValueError, UnsupportedAlgorithm) as error:
        raise VerificationFailed("is not signed by the certificate that it names", where=where) from error
    return signed, signer


def _taken_apart(data: bytes, where: str) -> _Signed:
    if len(data) > LIMIT:
        raise VerificationFailed(f"is larger than {LIMIT} bytes", where=where)
    parts = der.children(der.parse(data, where=where), where=where)
    if len(parts) != 2 or parts[0].whole != _GRANTED:
        raise VerificationFailed("is no timestamp that was granted", where=where)
    kind, outer = _pair(parts[1], where)
    if der.oid(kind, where=where) != _SIGNED_DATA:
        raise VerificationFailed("is no signed message (CMS)", where=where)
    inner = der.children(_inside(outer, 0, where), where=where)
    if len(inner) < 4 or len(inner) > 6:
        raise VerificationFailed("is no signed message (CMS)", where=where)
    version = der.integer(inner[0], where=where)
    digests = [_algorithm(each, where) for each in der.children(inner[1], where=where, tag=der.SET)]
    kind, content = _pair(inner[2], where)
    if der.oid(kind, where=where) != _TST_INFO:
        raise VerificationFailed("is signed, and is no timestamp", where=where)
    certificates = der.children(inner[3], where=where, tag=der.context(0)) if len(inner) > 4 else []
    if len(certificates) > authorities.MOST:
        raise VerificationFailed(f"brings more than {authorities.MOST} certificates", where=where)
    signers = der.children(inner[-1], where=where, tag=der.SET)
    if len(signers) != 1:
        raise VerificationFailed(f"has {len(signers)} signers, not one", where=where)
    fields = der.children(signers[0], where=where)
    if not 6 <= len(fields) <= 7:
        raise VerificationFailed("has a signer without signed attributes", where=where)
    digest = _algorithm(fields[2], where)
    # RFC 5652 wants version 3; sigstore's authority writes 1. No rule depends on it.
    if version not in (1, 3) or der.integer(fields[0], where=where) != 1 or digest not in digests:
        raise VerificationFailed("is signed in a way that is not of RFC 3161", where=where)
    issuer, serial = _pair(fields[1], where)
    attributes = der.contents(fields[3], der.context(0), where=where)
    return _Signed(
        der.contents(_inside(content, 0, where), der.OCTETS, where=where),
        [each.whole for each in certificates],
        issuer.whole,
        der.integer(serial, where=where),
        digest,
        der.encode(der.SET, attributes),
        _attributes(fields[3], where),
        _algorithm(fields[4], where),
        der.contents(fields[5], der.OCTETS, where=where),
    )


def _certificate(signed: _Signed, where: str) -> bytes:
    """The certificate that the signer names by issuer and number."""
    wanted = (signed.issuer, signed.serial)
    found = next((each for each in signed.certificates if _issuer_and_number(each) == wanted), None)
    if found is None:
        raise VerificationFailed("does not bring the certificate of its signer", where=where)
    return found


@lru_cache(maxsize=64)  # the timestamps of a run are of a few certificates
def _issuer_and_number(data: bytes) -> tuple[bytes, int]:
    """As they are written in a certificate."""
    where = "a certificate of the timestamp"
    body = der.children(_first(der.parse(data, where=where), where), where=where)
    body = body[1:] if body and body[0].tag == der.context(0) else body
    if len(body) < 3:
        raise VerificationFailed("is cut short", where=where)
    return body[2].whole, der.integer(body[0], where=where)


def _check_named(signed: _Signed, signer: bytes, where: str) -> None:
    """That what is signed names the signer's certificate: another one with the same key is another signer."""
    for name, old in ((_SIGNING_CERTIFICATE_V2, False), (_SIGNING_CERTIFICATE, True)):
        if name not in signed.values:
            continue
        listed = der.children(_first(signed.values[name], where), where=where)
        fields = der.children(listed[0], where=where) if listed else []
        if not old and fields and fields[0].tag == der.SEQUENCE:
            algorithm, fields = _hash(_algorithm(fields[0], where), where).name, fields[1:]
        else:
            algorithm = "sha1" if old else "sha256"
        stated = der.contents(fields[0], der.OCTETS, where=where) if fields else b""
        if stated != hashlib.new(algorithm, signer).digest():
            raise VerificationFailed("names another certificate of its signer than it brings", where=where)
        return
    raise VerificationFailed("does not name the certificate of its signer in what is signed", where=where)


def _told(content: bytes, signer: bytes, message: bytes, where: str) -> tuple[Stamp, datetime]:
    """What a TSTInfo whose signature is good says, and the time that it states."""
    fields = der.children(der.parse(content, where=where), where=where)
    if len(fields) < 5 or der.integer(fields[0], where=where) != 1:
        raise VerificationFailed("is a timestamp of another version than 1", where=where)
    der.oid(fields[1], where=where)
    algorithm, digest = _pair(fields[2], where)
    if _algorithm(algorithm, where) != _SHA256:
        raise VerificationFailed("is over another digest than sha256", where=where)
    if der.contents(digest, der.OCTETS, where=where) != hashlib.sha256(message).digest():
        raise VerificationFailed("is a timestamp of something else", where=where)
    der.integer(fields[3], where=where)
    time = _time(der.contents(fields[4], der.TIME, where=where), where)
    accuracy, nonce = timedelta(), None
    for field in fields[5:]:
        if field.tag == der.SEQUENCE:
            accuracy = _accuracy(field, where)
        elif field.tag == der.INTEGER:
            nonce = der.integer(field, where=where)
        elif field.tag == der.context(1):
            _check_extensions(field, where)
        elif field.tag not in (der.BOOLEAN, der.context(0)):
            raise VerificationFailed("has a field that RFC 3161 does not know", where=where)
    try:
        latest = time + accuracy
        latest = latest if not latest.microsecond else latest.replace(microsecond=0) + timedelta(seconds=1)
    except OverflowError as error:
        raise VerificationFailed("states a time that no calendar has", where=where) from error
    return Stamp(moments.text(latest), authorities.name_of(signer), nonce), time


def _time(data: bytes, where: str) -> datetime:
    match = _TIME.fullmatch(data.decode("ascii", "replace"))
    try:
        if match is None:
            raise ValueError("no such form")
        time = datetime.strptime(match[1], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        return time + timedelta(seconds=float(f"0{match[2]}" if match[2] else 0))
    except (ValueError, OverflowError) as error:
        raise VerificationFailed("states a time that is none", where=where) from error


def _accuracy(field: Element, where: str) -> timedelta:
    """Seconds, and milliseconds and microseconds under tags of their own."""
    units = {der.INTEGER: "seconds", 0x80: "milliseconds", 0x81: "microseconds"}
    found: dict[str, int] = {}
    for part in der.children(field, where=where):
        value = der.integer(Element(der.INTEGER, part.content, part.whole), where=where)
        name = units.get(part.tag)
        if name is None or name in found or not 0 <= value < 1 << 32:
            raise VerificationFailed("has an accuracy that is none", where=where)
        found[name] = value
    return timedelta(**found)


def _check_extensions(field: Element, where: str) -> None:
    """None of them may be one that must be understood."""
    for each in der.children(field, where=where, tag=der.context(1)):
        if any(part.tag == der.BOOLEAN and part.content != b"\0" for part in der.children(each, where=where)):
            raise VerificationFailed("has an extension that must be understood, and is not", where=where)


def _attributes(field: Element, where: str) -> dict[str, Element]:
    found: dict[str, Element] = {}
    for each in der.children(field, where=where, tag=der.context(0)):
        name, values = _pair(each, where)
        listed = der.children(values, where=where, tag=der.SET)
        kind = der.oid(name, where=where)
        if len(listed) != 1 or kind in found:
            raise VerificationFailed("has a signed attribute twice", where=where)
        found[kind] = listed[0]
    return found


def _value(signed: _Signed, name: str, where: str) -> Element:
    if name not in signed.values:
        raise VerificationFailed(f"lacks the signed attribute {name}", where=where)
    return signed.values[name]


def _hash(name: str, where: str) -> hashes.HashAlgorithm:
    if name not in _HASHES:
        raise VerificationFailed(f"uses the digest algorithm {name}, which is not SHA-2", where=where)
    return _HASHES[name]


def _algorithm(field: Element, where: str) -> str:
    """The name in an AlgorithmIdentifier, whose parameters are absent or NULL."""
    parts = der.children(field, where=where)
    if not parts or len(parts) > 2 or (len(parts) == 2 and parts[1].whole != der.encode(der.NULL)):
        raise VerificationFailed("names an algorithm with parameters", where=where)
    return der.oid(parts[0], where=where)


def _pair(field: Element, where: str) -> tuple[Element, Element]:
    parts = der.children(field, where=where)
    if len(parts) != 2:
        raise VerificationFailed(f"has {len(parts)} elements in place of two", where=where)
    return parts[0], parts[1]


def _inside(field: Element, number: int, where: str) -> Element:
    """The one element in ``[number]``."""
    return der.parse(der.contents(field, der.context(number), where=where), where=where)


def _first(field: Element, where: str) -> Element:
    parts = der.children(field, where=where)
    if not parts:
        raise VerificationFailed("has an empty list", where=where)
    return parts[0]


def _texts(fields: Sequence[Element], where: str) -> list[Element]:
    """What a refusal says."""
    return [text for each in fields if each.tag == der.SEQUENCE for text in der.children(each, where=where)]
