"""A signed message around a timestamp (CMS SignedData, RFC 5652) of one signer, strictly read and verified.

The signer's certificate is named by digest in what is signed (RFC 2634, RFC 5816), and its key has signed
with SHA-2. Who vouches for the certificate is another question:
`harness.provenance.transparency.authorities`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from harness.errors import VerificationFailed
from harness.format import der
from harness.format.der import Element
from harness.provenance.transparency import authorities

TIMESTAMP = "1.2.840.113549.1.9.16.1.4"
"""The one type of contents that is read: TSTInfo of RFC 3161."""
_SIGNED_DATA = "1.2.840.113549.1.7.2"
_CONTENT_TYPE, _MESSAGE_DIGEST = "1.2.840.113549.1.9.3", "1.2.840.113549.1.9.4"
_SIGNING_CERTIFICATE = "1.2.840.113549.1.9.16.2.12"
_SIGNING_CERTIFICATE_V2 = "1.2.840.113549.1.9.16.2.47"
SHA256 = "2.16.840.1.101.3.4.2.1"
_HASHES: Mapping[str, hashes.HashAlgorithm] = {
    SHA256: hashes.SHA256(),
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
class SignedData:
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


def parse(message: Element, *, where: str) -> SignedData:
    """Take the ContentInfo ``message`` apart. Raises `VerificationFailed` for another form than this."""
    kind, outer = der.pair(message, where=where)
    if der.oid(kind, where=where) != _SIGNED_DATA:
        raise VerificationFailed("is no signed message (CMS)", where=where)
    inner = der.children(der.inside(outer, 0, where=where), where=where)
    if len(inner) < 4 or len(inner) > 6:
        raise VerificationFailed("is no signed message (CMS)", where=where)
    version = der.integer(inner[0], where=where)
    digests = [algorithm_of(each, where=where) for each in der.children(inner[1], where=where, tag=der.SET)]
    kind, content = der.pair(inner[2], where=where)
    if der.oid(kind, where=where) != TIMESTAMP:
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
    digest = algorithm_of(fields[2], where=where)
    # RFC 5652 wants version 3; sigstore's authority writes 1. No rule depends on it.
    if version not in (1, 3) or der.integer(fields[0], where=where) != 1 or digest not in digests:
        raise VerificationFailed("is signed in a way that is not of RFC 3161", where=where)
    issuer, serial = der.pair(fields[1], where=where)
    attributes = der.contents(fields[3], der.context(0), where=where)
    return SignedData(
        der.contents(der.inside(content, 0, where=where), der.OCTETS, where=where),
        [each.whole for each in certificates],
        issuer.whole,
        der.integer(serial, where=where),
        digest,
        der.encode(der.SET, attributes),
        _attributes(fields[3], where),
        algorithm_of(fields[4], where=where),
        der.contents(fields[5], der.OCTETS, where=where),
    )


def verified(signed: SignedData, *, where: str) -> bytes:
    """The certificate, of those that ``signed`` brings, whose key has signed its contents.

    Raises `VerificationFailed` when it does not bring it, does not name it in what is signed, or is signed
    over something else, or otherwise than by RSA or ECDSA with SHA-2.
    """
    signer = _certificate(signed, where)
    algorithm = _hash(signed.digest, where)
    digest = hashes.Hash(algorithm)
    digest.update(signed.content)
    stated = der.contents(_value(signed, _MESSAGE_DIGEST, where), der.OCTETS, where=where)
    if der.oid(_value(signed, _CONTENT_TYPE, where), where=where) != TIMESTAMP or stated != digest.finalize():
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
    return signer


def algorithm_of(field: Element, *, where: str) -> str:
    """The name in an AlgorithmIdentifier, whose parameters are absent or NULL."""
    parts = der.children(field, where=where)
    if not parts or len(parts) > 2 or (len(parts) == 2 and parts[1].whole != der.encode(der.NULL)):
        raise VerificationFailed("names an algorithm with parameters", where=where)
    return der.oid(parts[0], where=where)


def _certificate(signed: SignedData, where: str) -> bytes:
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
    body = der.children(der.first(der.parse(data, where=where), where=where), where=where)
    body = body[1:] if body and body[0].tag == der.context(0) else body
    if len(body) < 3:
        raise VerificationFailed("is cut short", where=where)
    return body[2].whole, der.integer(body[0], where=where)


def _check_named(signed: SignedData, signer: bytes, where: str) -> None:
    """That what is signed names the signer's certificate: another one with the same key is another signer."""
    for name, old in ((_SIGNING_CERTIFICATE_V2, False), (_SIGNING_CERTIFICATE, True)):
        if name not in signed.values:
            continue
        listed = der.children(der.first(signed.values[name], where=where), where=where)
        fields = der.children(listed[0], where=where) if listed else []
        if not old and fields and fields[0].tag == der.SEQUENCE:
            algorithm, fields = _hash(algorithm_of(fields[0], where=where), where).name, fields[1:]
        else:
            algorithm = "sha1" if old else "sha256"
        stated = der.contents(fields[0], der.OCTETS, where=where) if fields else b""
        if stated != hashlib.new(algorithm, signer).digest():
            raise VerificationFailed("names another certificate of its signer than it brings", where=where)
        return
    raise VerificationFailed("does not name the certificate of its signer in what is signed", where=where)


def _attributes(field: Element, where: str) -> dict[str, Element]:
    found: dict[str, Element] = {}
    for each in der.children(field, where=where, tag=der.context(0)):
        name, values = der.pair(each, where=where)
        listed = der.children(values, where=where, tag=der.SET)
        kind = der.oid(name, where=where)
        if len(listed) != 1 or kind in found:
            raise VerificationFailed("has a signed attribute twice", where=where)
        found[kind] = listed[0]
    return found


def _value(signed: SignedData, name: str, where: str) -> Element:
    if name not in signed.values:
        raise VerificationFailed(f"lacks the signed attribute {name}", where=where)
    return signed.values[name]


def _hash(name: str, where: str) -> hashes.HashAlgorithm:
    if name not in _HASHES:
        raise VerificationFailed(f"uses the digest algorithm {name}, which is not SHA-2", where=where)
    return _HASHES[name]
