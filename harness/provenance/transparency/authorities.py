"""Certificates of time-stamping authorities: which of them a policy's certificates vouch for, and when.

Rules (RFC 5280 section 6, RFC 3161 section 2.3), for a path from the certificate that has signed a timestamp
to one that the policy names:

- certificates that came with a timestamp are links of a path and never its end; the end is one of the
  policy's, byte for byte: a root, one in between, or the authority's own
- each is signed by the next, with SHA-2, and valid at the moment that the timestamp states
- each but the first is of a certificate authority, may sign certificates, and has as few below it as it says
- the first may be used for timestamps and for nothing else, and says so in a critical extension
- an extension that is critical and not looked at here is refused

Whether a certificate was revoked is not asked: that takes a network, and an answer that is signed by the same
authority. Whoever learns that an authority is not to be trusted takes its certificate out of the policy.
"""

from __future__ import annotations

import base64
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from harness.errors import VerificationFailed
from harness.format import moments

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
    from cryptography.x509 import Certificate, Extension, ExtensionType

E = TypeVar("E", bound="ExtensionType")
_LONGEST = 5
"""Certificates of a path, at most."""
MOST = 8
"""Certificates that come with a timestamp, at most: those of a stranger may all seem to sign each other."""
FILE_LIMIT = 64 << 10
"""Bytes of a file with a certificate."""
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\r?\n(.*?)-----END CERTIFICATE-----", re.DOTALL)
_RSA_BITS = 2048
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_HASHES = ("sha256", "sha384", "sha512")
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, InternalError)
"""What cryptography raises for bytes that are no certificate, or one that it cannot check."""


@dataclass(frozen=True)
class Window:
    """When every certificate of a path is valid, both ends included."""

    start: datetime
    end: datetime


def certificate(data: bytes, *, where: str) -> Certificate:
    """The certificate in ``data``, DER. Raises `VerificationFailed` for anything else."""
    try:
        return _read(data)
    except _UNREADABLE as error:
        raise VerificationFailed(f"has a certificate that cannot be read: {error}", where=where) from error


def parse(data: bytes, *, where: str) -> bytes:
    """The one certificate in ``data``, PEM or DER, as DER. Raises `VerificationFailed` for anything else."""
    if not data.startswith(b"\x30"):
        blocks = _PEM.findall(data)
        if len(blocks) != 1:
            raise VerificationFailed(f"holds {len(blocks)} certificates in PEM, not one", where=where)
        try:
            data = base64.b64decode(b"".join(blocks[0].split()), validate=True)
        except ValueError as error:
            raise VerificationFailed("has broken base64", where=where) from error
    certificate(data, where=where)
    return data


@lru_cache(maxsize=64)  # the timestamps of a run are of a few certificates
def _read(data: bytes) -> Certificate:
    # x509 takes 80 ms to import, and only whoever has timestamps needs it.
    from cryptography import x509

    try:
        with warnings.catch_warnings():  # of a number below zero, say: a stranger's words on the screen
            warnings.simplefilter("ignore")
            found = x509.load_der_x509_certificate(data)
        found.extensions  # noqa: B018  (parsed at the first look, which raises for broken ones)
        found.subject.rfc4514_string()
        return found
    except (x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise ValueError(str(error)) from error  # they are no `ValueError`, as everything else is


def pem_of(data: bytes) -> str:
    """A certificate in DER as PEM."""
    return certificate(data, where="certificate").public_bytes(Encoding.PEM).decode()


def vouched(
    signer: bytes, others: Sequence[bytes], trusted: Sequence[bytes], *, where: str
) -> tuple[Window, ...]:
    """When the certificate ``signer`` may sign timestamps, says one of ``trusted``: a window for each path.

    ``others`` came with the timestamp. All are DER. Raises `VerificationFailed` when it never may.
    """
    require_timestamping(certificate(signer, where=where), where=where)
    windows = _paths(signer, tuple(sorted({*others} - {signer})), tuple(trusted))
    if not windows:
        raise VerificationFailed(
            f"is signed by {name_of(signer)}, for which no certificate of the policy vouches",
            where=where,
            remedy="add the certificate of its authority to the policy's timestamps, if you trust it",
        )
    return windows


def require_valid(windows: Sequence[Window], moment: datetime, *, where: str) -> None:
    """Raise `VerificationFailed` unless ``moment`` lies in one of ``windows``."""
    if not any(window.start <= moment <= window.end for window in windows):
        what = f"states {moments.text(moment)}, when the certificate of its authority was not valid"
        raise VerificationFailed(what, where=where)


def name_of(signer: bytes) -> str:
    """Whom a certificate is of, as RFC 4514 writes it."""
    return certificate(signer, where="certificate").subject.rfc4514_string()


def key_of(found: Certificate, *, where: str) -> CertificatePublicKeyTypes:
    """The public key of ``found``. Raises `VerificationFailed` for one that cannot be read."""
    try:
        return found.public_key()
    except _UNREADABLE as error:
        raise VerificationFailed(f"has a certificate of an unreadable key: {error}", where=where) from error


def require_timestamping(found: Certificate, *, where: str) -> None:
    """Raise `VerificationFailed` unless ``found`` may sign timestamps and nothing else."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    usage = _extension(found, x509.ExtendedKeyUsage)
    wanted = [ExtendedKeyUsageOID.TIME_STAMPING]
    if usage is None or not usage.critical or list(usage.value) != wanted:
        raise VerificationFailed("is signed by a certificate that is not for timestamps alone", where=where)
    keys = _extension(found, x509.KeyUsage)
    if keys is not None and not (keys.value.digital_signature or keys.value.content_commitment):
        raise VerificationFailed("is signed by a certificate whose key may not sign", where=where)


@lru_cache(maxsize=64)
def _paths(signer: bytes, others: tuple[bytes, ...], trusted: tuple[bytes, ...]) -> tuple[Window, ...]:
    """When the paths from ``signer`` to one of ``trusted`` are valid."""
    read = [certificate(each, where="a certificate of the timestamp") for each in (signer, *others)]
    ends = [certificate(each, where="policy") for each in trusted]
    return tuple(_window(path) for path in _search(read[:1], read[1:], ends))


def _search(
    path: list[Certificate], links: Sequence[Certificate], ends: Sequence[Certificate]
) -> Iterator[list[Certificate]]:
    if _odd_extension(path[-1]) or not _sound_key(path[-1]):
        return
    if path[-1] in ends:
        yield path
        return
    if len(path) == _LONGEST:
        return
    for issuer in (*ends, *(link for link in links if link not in path)):
        if _may_issue(issuer, len(path) - 1) and _signed_by(path[-1], issuer):
            yield from _search([*path, issuer], links, ends)


@lru_cache(maxsize=256)  # each pair once: certificates that all seem to sign each other make many paths
def _signed_by(found: Certificate, issuer: Certificate) -> bool:
    try:
        algorithm = found.signature_hash_algorithm
        if algorithm is None or algorithm.name not in _HASHES:
            return False
        found.verify_directly_issued_by(issuer)
    except (*_UNREADABLE, InvalidSignature):
        return False
    return True


def _may_issue(issuer: Certificate, between: int) -> bool:
    """Whether ``issuer`` may sign certificates, with ``between`` more of authorities below it."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    constraints, keys = _extension(issuer, x509.BasicConstraints), _extension(issuer, x509.KeyUsage)
    usage = _extension(issuer, x509.ExtendedKeyUsage)
    if constraints is None or not constraints.value.ca:
        return False
    if constraints.value.path_length is not None and constraints.value.path_length < between:
        return False
    if usage is not None and not {
        ExtendedKeyUsageOID.TIME_STAMPING,
        ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
    } & set(usage.value):
        return False
    return keys is None or keys.value.key_cert_sign


def _odd_extension(found: Certificate) -> bool:
    """Whether something in ``found`` must be understood, and is not looked at here."""
    from cryptography import x509

    known = (x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage, x509.CertificatePolicies)
    return any(each.critical and not isinstance(each.value, known) for each in found.extensions)


def _sound_key(found: Certificate) -> bool:
    try:
        key = key_of(found, where="certificate")
    except VerificationFailed:
        return False
    if isinstance(key, rsa.RSAPublicKey):
        return key.key_size >= _RSA_BITS
    return isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES


def _extension(found: Certificate, kind: type[E]) -> Extension[E] | None:
    return next((each for each in found.extensions if isinstance(each.value, kind)), None)


def _window(path: Sequence[Certificate]) -> Window:
    return Window(
        max(each.not_valid_before_utc for each in path), min(each.not_valid_after_utc for each in path)
    )
