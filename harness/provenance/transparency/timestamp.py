"""Timestamps of an authority outside (RFC 3161) over log heads: what was there, and when at the latest.

A timestamp is a TimeStampResp as every tool reads it, with status "granted" and no other words, over the
sha256 of a head's three lines, which are what the log's key signs. It lies in the log folder as
``timestamps/SIZE.tsr``. Whoever signed the head does not matter to it: the head's root names every record
before it, and a checkpoint's record names its statement, signature included, by digest.

Rules for one that counts:

- the bytes are DER, of one signer, without a byte after the end; the signer's certificate is named in what is
  signed, and its key has signed with SHA-2 (`harness.provenance.transparency.cms`)
- that certificate is one that the policy vouches for (`harness.provenance.transparency.authorities`)
- what is signed is a timestamp (content type), over this head and no other

The moment that it proves is the time that it states and the accuracy that it claims, rounded up.
Sources: RFC 3161 (timestamps), RFC 5652 (CMS), RFC 5816 (ESSCertIDv2). Needs nothing but `cryptography`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from harness.errors import VerificationFailed
from harness.format import der, moments
from harness.format.der import Element
from harness.provenance.checks import Check
from harness.provenance.transparency import authorities, cms
from harness.provenance.transparency.cms import SignedData

CHECK: Check = "timestamp"
"""Name of the check."""
FOLDER = "timestamps"
"""In the log folder."""
LIMIT = 64 << 10
"""Bytes of a timestamp; with three certificates they have about 6,000."""
_NAME = re.compile(rf"{FOLDER}/([1-9][0-9]{{0,15}})\.tsr")
_GRANTED = der.encode(der.SEQUENCE, der.encode_integer(0))
_TIME = re.compile(r"(\d{14})(\.\d{1,9})?Z", re.ASCII)


@dataclass(frozen=True)
class Stamp:
    """What a good timestamp says."""

    moment: str
    """The latest moment at which it was made, as ``2026-11-23T20:00:00Z``."""
    authority: str
    """Whom the certificate that has signed it is of."""
    nonce: int | None


def path_of(size: int) -> str:
    """Where the timestamp of the head of ``size`` records lies, relative to the log folder."""
    return f"{FOLDER}/{size}.tsr"


def size_of(path: str) -> int | None:
    """The size of a path that `path_of` gives; None for any other path."""
    match = _NAME.fullmatch(path)
    return None if match is None else int(match[1])


def request(message: bytes, nonce: int) -> bytes:
    """The TimeStampReq over ``message``; the answer is to bring its certificates."""
    algorithm = der.encode(der.SEQUENCE, der.encode_oid(cms.SHA256), der.encode(der.NULL))
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
    signed = _granted(data, where)
    signer = cms.verified(signed, where=where)
    windows = authorities.vouched(signer, signed.certificates, trusted, where=where)
    # Only now is anything read of what is signed.
    stamp, time = _told(signed.content, signer, message, where)
    authorities.require_valid(windows, time, where=where)
    return stamp


def opened_by_anybody(data: bytes, message: bytes, *, where: str) -> Stamp:
    """The same of a timestamp whose certificate nobody vouches for: for whoever has just asked for it and
    wants to know that it is whole. Proves nothing to anybody else."""
    signed = _granted(data, where)
    signer = cms.verified(signed, where=where)
    authorities.require_timestamping(authorities.certificate(signer, where=where), where=where)
    return _told(signed.content, signer, message, where)[0]


def _granted(data: bytes, where: str) -> SignedData:
    """The signed message in an answer that is kept."""
    if len(data) > LIMIT:
        raise VerificationFailed(f"is larger than {LIMIT} bytes", where=where)
    parts = der.children(der.parse(data, where=where), where=where)
    if len(parts) != 2 or parts[0].whole != _GRANTED:
        raise VerificationFailed("is no timestamp that was granted", where=where)
    return cms.parse(parts[1], where=where)


def _told(content: bytes, signer: bytes, message: bytes, where: str) -> tuple[Stamp, datetime]:
    """What a TSTInfo whose signature is good says, and the time that it states."""
    fields = der.children(der.parse(content, where=where), where=where)
    if len(fields) < 5 or der.integer(fields[0], where=where) != 1:
        raise VerificationFailed("is a timestamp of another version than 1", where=where)
    der.oid(fields[1], where=where)
    algorithm, digest = der.pair(fields[2], where=where)
    if cms.algorithm_of(algorithm, where=where) != cms.SHA256:
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


def _texts(fields: Sequence[Element], where: str) -> list[Element]:
    """What a refusal says."""
    return [text for each in fields if each.tag == der.SEQUENCE for text in der.children(each, where=where)]
