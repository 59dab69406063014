"""Signatures without a key that anybody keeps: sigstore keyless, for statements that are added later.

Fulcio certifies a fresh key for minutes, for whoever an OpenID Connect issuer says it is; Rekor logs the
signature, which shows that it is of those minutes. Here sigstore-python does both sides:

- `open_bundle` verifies offline. Who may have signed (issuer and identity, compared whole) and the trusted
  root of the sigstore instance come from the policy, nothing from the bundle or the network. Required are the
  chain to that root's Fulcio at a time that its Rekor or timestamping authority has signed, a certificate
  transparency timestamp, the use for code signing, the inclusion proof under a signed head, and that the
  log's entry is about this very envelope.
- `KeylessSigner` needs the network, and an identity token from the environment; what it made is verified
  before it is used.

Bundles are sigstore bundle v0.3 with one DSSE signature over an in-toto statement, like all others here; a
checkpoint's own statement and the log need a key that lasts as long as the run.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import EnvironmentFault, UsageError, VerificationFailed
from harness.format import moments
from harness.provenance.signing import envelope
from harness.provenance.signing.keys import PublicKey, parse_public

if TYPE_CHECKING:
    from cryptography.x509 import Certificate
    from sigstore.models import ClientTrustConfig
    from sigstore.oidc import IdentityToken
    from sigstore.verify import Verifier

TOKEN = "SIGSTORE_IDENTITY_TOKEN"
"""Environment variable with an identity token, as for sigstore's own commands."""
ROOT_LIMIT = 1 << 20
"""Bytes of a trusted root."""

_UNKEPT = "try again: nothing was written"
_MATERIAL = {"certificate", "tlogEntries", "timestampVerificationData"}


@dataclass(frozen=True)
class Subject:
    """Whom a certificate speaks of."""

    issuer: str
    """URL of the OpenID Connect issuer."""
    identity: str
    """The certificate's subject alternative name: an address, or the URL of a workflow."""


@dataclass(frozen=True)
class Signed:
    """What a verified bundle holds."""

    payload: bytes
    key: PublicKey
    """Of the certificate; it has signed within the certificate's minutes and never after."""
    subject: Subject
    start: str
    """First moment of the certificate, as ``2026-11-23T20:00:00Z``."""
    end: str
    """Its last; the signature is no younger."""


def open_bundle(data: bytes, subjects: Sequence[Subject], root: bytes, *, where: str) -> Signed | None:
    """What one of ``subjects`` has signed, by the trusted root ``root`` (JSON of sigstore's protobuf-specs).
    None for a bundle without a certificate: that it is signed with a key only says how it must be verified.

    Raises `VerificationFailed` for anything else, `UsageError` for a root that is none, `EnvironmentFault`
    without sigstore.
    """
    claimed, material = envelope.unauthenticated(data, where=where)
    if not isinstance(material, dict) or "certificate" not in material:
        return None
    return _opened(data, claimed, material, subjects, _verifier(root), where)


def _opened(
    data: bytes, claimed: bytes, material: object, subjects: Sequence[Subject], verifier: Verifier, where: str
) -> Signed:
    """``data``, of which ``claimed`` and ``material`` are payload and verification material."""
    from sigstore.models import Bundle

    if not isinstance(material, dict) or not {"certificate", "tlogEntries"} <= set(material) <= _MATERIAL:
        raise VerificationFailed("has other verification material than a keyless bundle v0.3", where=where)
    matching = _Matching(subjects)
    try:
        bundle = Bundle.from_json(data)
        kind, payload = verifier.verify_dsse(bundle, matching)
        certificate = bundle.signing_certificate
    except Exception as error:  # whatever its parsers raise about a stranger's bytes, it is not verified
        what = f"has no good keyless signature: {_told(error)}"
        remedy = "check the identity and the trusted root in the policy"
        raise VerificationFailed(what, where=where, remedy=remedy) from error
    if matching.found is None or (kind, payload) != (envelope.PAYLOAD_TYPE, claimed):
        raise VerificationFailed("has no good keyless signature over its payload", where=where)
    return Signed(payload, _key(certificate, where), matching.found, *_validity(certificate))


class _Matching:
    """A policy as sigstore asks it, once the certificate's chain is verified."""

    def __init__(self, subjects: Sequence[Subject]) -> None:
        self._subjects = subjects
        self.found: Subject | None = None
        """The one that the certificate speaks of."""

    def verify(self, cert: Certificate) -> None:
        """Raise sigstore's `VerificationError` for a certificate of somebody else."""
        from sigstore.errors import VerificationError
        from sigstore.verify.policy import Identity

        reasons = []
        for subject in self._subjects:
            try:
                Identity(identity=subject.identity, issuer=subject.issuer).verify(cert)
            except VerificationError as error:
                reasons.append(str(error))
            else:
                self.found = subject
                return
        raise VerificationError("; ".join(reasons) or "the policy names nobody")


@functools.lru_cache(maxsize=4)
def _verifier(root: bytes) -> Verifier:
    try:
        from sigstore.models import TrustedRoot
        from sigstore.verify import Verifier
        from sigstore_models.trustroot import v1
    except ImportError as error:
        raise _not_installed() from error
    try:
        return Verifier(trusted_root=TrustedRoot(v1.TrustedRoot.from_json(root)))
    except Exception as error:
        what = f"sigstore does not read the trusted root: {_told(error)}"
        raise UsageError(
            what, where="sigstore", remedy="get trusted_root.json of that instance again"
        ) from error


def _key(certificate: Certificate, where: str) -> PublicKey:
    from cryptography.hazmat.primitives import serialization

    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    pem = certificate.public_key().public_bytes(serialization.Encoding.PEM, spki)
    return parse_public(pem, where=where)


def _validity(certificate: Certificate) -> tuple[str, str]:
    return moments.text(certificate.not_valid_before_utc), moments.text(certificate.not_valid_after_utc)


def _told(error: Exception) -> str:
    """The first line, which says it; pydantic's go on with what was put in, and a link."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _not_installed() -> EnvironmentFault:
    return EnvironmentFault("the package sigstore is not installed", remedy="pip install 'harness[sigstore]'")


@dataclass(frozen=True)
class KeylessSigner:
    """Whoever the environment's identity token speaks of, at one sigstore instance."""

    token: IdentityToken
    instance: ClientTrustConfig

    @property
    def subject(self) -> Subject:
        """Whom the certificate will speak of, which a policy must name."""
        return Subject(self.token.federated_issuer, self.token.identity)

    def sign(self, payload: bytes, *, where: str) -> bytes:
        """The bundle of ``payload``, an in-toto statement, verified as a stranger would.

        Sends the envelope to the instance's Rekor, and the token to its Fulcio. Raises `EnvironmentFault`
        when they do not answer, or not with what verifies.
        """
        from sigstore.dsse import Statement
        from sigstore.sign import SigningContext
        from sigstore.verify import Verifier

        class Exact(Statement):
            """Bytes as they are: sigstore's check of statements does not know in-toto's digest dirHash."""

            def __init__(self, contents: bytes) -> None:
                self._contents = contents

        try:
            with SigningContext.from_trust_config(self.instance).signer(self.token) as signer:
                bundle = signer.sign_dsse(Exact(payload)).to_json().encode()
            verifier = Verifier(trusted_root=self.instance.trusted_root)
        except Exception as error:  # of the network, of the instance, or of a token that has run out
            what = f"sigstore did not sign: {_told(error)}"
            raise EnvironmentFault(what, where=where, remedy="try again with a fresh token") from error
        try:
            read = envelope.unauthenticated(bundle, where=where)
            signed = _opened(bundle, *read, [self.subject], verifier, where)
        except VerificationFailed as error:
            what = f"sigstore's signature {error.what}"
            raise EnvironmentFault(what, where=where, remedy=_UNKEPT) from error
        if signed.payload != payload:
            raise EnvironmentFault("sigstore has signed other bytes", where=where, remedy=_UNKEPT)
        return bundle


def load_signer(config: bytes | None) -> KeylessSigner:
    """The identity of the environment, at the instance of ``config`` (JSON of a ClientTrustConfig), or at
    sigstore's public one, whose configuration is then fetched.

    Raises `EnvironmentFault` without sigstore, a token or an answer, `UsageError` for a config that is none.
    """
    try:
        from sigstore.models import ClientTrustConfig
        from sigstore.oidc import IdentityToken, detect_credential
    except ImportError as error:
        raise _not_installed() from error
    try:
        raw = os.environ.get(TOKEN) or detect_credential()
        token = None if raw is None else IdentityToken(raw)
    except Exception as error:  # the token is in none of their texts
        what = f"the identity token cannot be used: {_told(error)}"
        raise EnvironmentFault(what, where=f"${TOKEN}", remedy="get a fresh one") from error
    if token is None:
        remedy = f"set ${TOKEN}, or run where one is given: GitHub Actions with `id-token: write`"
        raise EnvironmentFault("there is no identity token", remedy=remedy)
    try:
        instance = (
            ClientTrustConfig.production() if config is None else ClientTrustConfig.from_json(config.decode())
        )
    except Exception as error:
        what = f"the sigstore instance is not known: {_told(error)}"
        kind = EnvironmentFault if config is None else UsageError
        raise kind(what, remedy="name its client trust config: --sigstore-config FILE") from error
    return KeylessSigner(token, instance)
