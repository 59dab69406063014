"""A sigstore instance on this machine: Fulcio, its certificate transparency log, Rekor, a trusted root.

The formats are written here from their specifications, with `cryptography` alone: Fulcio's certificate
profile (github.com/sigstore/fulcio, docs/certificate-specification.md), RFC 6962 for the SCT and Merkle
hashes, Rekor v1's entry of type dsse 0.0.1 with its signed timestamp, sigstore's protobuf-specs for bundle,
trusted root and signing config. Its keys are fresh, so nothing outside trusts it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

ISSUER, IDENTITY = "https://token.example.org", "https://example.org/lab/eval.yml@refs/heads/main"
LIFETIME = timedelta(minutes=10)
_SCT = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_ISSUER_V1, _ISSUER_V2 = (ObjectIdentifier(f"1.3.6.1.4.1.57264.1.{number}") for number in (1, 8))
_SHA256 = ec.ECDSA(hashes.SHA256())
_START = {"validFor": {"start": "2020-01-01T00:00:00Z"}}


def text_of(data: bytes) -> str:
    """Base64."""
    return base64.b64encode(data).decode()


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The DER of its public half."""
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return key.public_key().public_bytes(*form)


def pem(certificate: x509.Certificate) -> bytes:
    """Its PEM text."""
    return certificate.public_bytes(serialization.Encoding.PEM)


class Instance:
    """The four services and their keys."""

    def __init__(self) -> None:
        self.fulcio, self.ct, self.rekor = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self.url = "http://127.0.0.1:9"
        """Where it listens; nothing does when it only makes bundles."""
        self._name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fulcio of a test")])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        identifier = x509.SubjectKeyIdentifier.from_public_key(self.fulcio.public_key())
        self.root = (
            self._builder(
                self.fulcio.public_key(), self._name, datetime(2020, 1, 1, tzinfo=UTC), timedelta(9999)
            )
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(identifier, critical=False)
            .sign(self.fulcio, hashes.SHA256())
        )

    def _builder(
        self, public: ec.EllipticCurvePublicKey, subject: x509.Name, start: datetime, lifetime: timedelta
    ) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().issuer_name(self._name).subject_name(subject).public_key(public)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(start).not_valid_after(start + lifetime)

    def certificate(
        self,
        public: ec.EllipticCurvePublicKey,
        *,
        issuer: str = ISSUER,
        identity: str = IDENTITY,
        start: datetime | None = None,
        use: x509.ObjectIdentifier = ExtendedKeyUsageOID.CODE_SIGNING,
        ct: ec.EllipticCurvePrivateKey | None = None,
        logged: bool = True,
    ) -> x509.Certificate:
        """What Fulcio gives to ``identity``; ``ct`` signs the SCT, which is there when ``logged``."""
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.fulcio.public_key())
        name = x509.UniformResourceIdentifier(identity) if "://" in identity else x509.RFC822Name(identity)
        start = (start or datetime.now(UTC) - timedelta(minutes=1)).replace(microsecond=0)
        builder = (
            self._builder(public, x509.Name([]), start, LIFETIME)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(authority, critical=False)
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(x509.UnrecognizedExtension(_ISSUER_V1, issuer.encode()), critical=False)
            .add_extension(x509.UnrecognizedExtension(_ISSUER_V2, _utf8(issuer)), critical=False)
        )
        if not logged:
            return builder.sign(self.fulcio, hashes.SHA256())
        log = ct or self.ct
        # What the log signs leaves the list of its own signatures out.
        draft = builder.add_extension(_sct_list(log, b"", start), critical=False).sign(
            self.fulcio, hashes.SHA256()
        )
        tbs = draft.tbs_precertificate_bytes
        issuer_hash = hashlib.sha256(spki(self.fulcio)).digest()
        signed = struct.pack("!BBQH", 0, 0, _milliseconds(start), 1) + issuer_hash
        signed += len(tbs).to_bytes(3, "big") + tbs + b"\0\0"
        extension = _sct_list(log, log.sign(signed, _SHA256), start)
        return builder.add_extension(extension, critical=False).sign(self.fulcio, hashes.SHA256())

    def entry(
        self, payload: bytes, signature: bytes, certificate: x509.Certificate, at: int | None = None
    ) -> dict[str, Any]:
        """Rekor's answer for a DSSE envelope: an entry in a log of one."""
        body = {
            "apiVersion": "0.0.1",
            "kind": "dsse",
            "spec": {
                "envelopeHash": {"algorithm": "sha256", "value": hashlib.sha256(b"its JSON").hexdigest()},
                "payloadHash": {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()},
                "signatures": [{"signature": text_of(signature), "verifier": text_of(pem(certificate))}],
            },
        }
        encoded = _canonical(body)
        leaf = hashlib.sha256(b"\0" + encoded).digest()
        key_id = hashlib.sha256(spki(self.rekor)).digest()
        note = f"rekor.example.org - 1\n1\n{text_of(leaf)}\n"
        line = f"\u2014 rekor.example.org {text_of(key_id[:4] + self.rekor.sign(note.encode(), _SHA256))}\n"
        stated = {
            "body": text_of(encoded),
            "integratedTime": int(time.time()) if at is None else at,
            "logID": key_id.hex(),
            "logIndex": 0,
        }
        proof = {
            "checkpoint": f"{note}\n{line}",
            "hashes": [],
            "logIndex": 0,
            "rootHash": leaf.hex(),
            "treeSize": 1,
        }
        promise = text_of(self.rekor.sign(_canonical(stated), _SHA256))
        return stated | {"verification": {"inclusionProof": proof, "signedEntryTimestamp": promise}}

    def bundle(self, payload: bytes, *, at: int | None = None, **certified: Any) -> dict[str, Any]:
        """A keyless bundle of ``payload``, with Rekor's time ``at``; the rest is of `certificate`."""
        private = ec.generate_private_key(ec.SECP256R1())
        kind = "application/vnd.in-toto+json"
        message = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
        signature = private.sign(message, _SHA256)
        certificate = self.certificate(private.public_key(), **certified)
        told = self.entry(payload, signature, certificate, at)
        proof = told["verification"]["inclusionProof"]
        entry = {
            "logIndex": "0",
            "logId": {"keyId": text_of(bytes.fromhex(told["logID"]))},
            "kindVersion": {"kind": "dsse", "version": "0.0.1"},
            "integratedTime": str(told["integratedTime"]),
            "inclusionPromise": {"signedEntryTimestamp": told["verification"]["signedEntryTimestamp"]},
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": text_of(bytes.fromhex(proof["rootHash"])),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": proof["checkpoint"]},
            },
            "canonicalizedBody": told["body"],
        }
        der = certificate.public_bytes(serialization.Encoding.DER)
        return {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {"certificate": {"rawBytes": text_of(der)}, "tlogEntries": [entry]},
            "dsseEnvelope": {
                "payload": text_of(payload),
                "payloadType": kind,
                "signatures": [{"sig": text_of(signature)}],
            },
        }

    def trusted_root(self) -> dict[str, Any]:
        """What an auditor keeps of the instance."""

        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            public = {"rawBytes": text_of(spki(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", **_START}
            identity = {"keyId": text_of(hashlib.sha256(spki(key)).digest())}
            return {"baseUrl": self.url, "hashAlgorithm": "SHA2_256", "publicKey": public, "logId": identity}

        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self.rekor)],
            "certificateAuthorities": [self.authority("fulcio", [self.root])],
            "ctlogs": [log(self.ct)],
            "timestampAuthorities": [],
        }

    def authority(self, name: str, chain: list[x509.Certificate]) -> dict[str, Any]:
        """How a trusted root tells of an authority; its own certificate comes first."""
        ders = [each.public_bytes(serialization.Encoding.DER) for each in chain]
        return {
            "subject": {"organization": "a test", "commonName": name},
            "uri": self.url,
            "certChain": {"certificates": [{"rawBytes": text_of(each)} for each in ders]},
            **_START,
        }

    def client_config(self) -> dict[str, Any]:
        """What a signer is given of the instance."""
        service = {"url": self.url, "majorApiVersion": 1, "operator": "a test", **_START}
        signing = {
            "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
            "caUrls": [service],
            "oidcUrls": [service],
            "rekorTlogUrls": [service],
            "rekorTlogConfig": {"selector": "ANY"},
            "tsaUrls": [],
            "tsaConfig": {"selector": "ANY"},
        }
        return {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": self.trusted_root(),
            "signingConfig": signing,
        }

    @contextmanager
    def listening(self) -> Iterator[Instance]:
        """Answers on a port of this machine, as long as the block runs."""
        instance = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = _certify if self.path == "/api/v2/signingCert" else _log
                data = json.dumps(answer(instance, asked, self.headers.get("Authorization", ""))).encode()
                self.send_response(201)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *words: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


def identity_token(**claims: Any) -> str:
    """A token as an issuer would sign it; Fulcio, who checks that, is ours."""
    now = int(time.time())
    told = {"iss": ISSUER, "sub": IDENTITY, "aud": "sigstore", "iat": now, "exp": now + 600, **claims}
    parts = ({"alg": "RS256", "typ": "JWT"}, told, {})
    return ".".join(base64.urlsafe_b64encode(_canonical(part)).decode().rstrip("=") for part in parts)


def _certify(instance: Instance, asked: dict[str, Any], authorization: str) -> dict[str, Any]:
    claims = authorization.removeprefix("Bearer ").split(".")[1]
    told = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    request = x509.load_pem_x509_csr(base64.b64decode(asked["certificateSigningRequest"]))
    public = request.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    certificate = instance.certificate(public, issuer=told["iss"], identity=told["sub"])
    chain = [pem(each).decode() for each in (certificate, instance.root)]
    return {"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}}


def _log(instance: Instance, asked: dict[str, Any], _: str) -> dict[str, Any]:
    proposed = asked["spec"]["proposedContent"]
    envelope = json.loads(proposed["envelope"])
    certificate = x509.load_pem_x509_certificate(base64.b64decode(proposed["verifiers"][0]))
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    return {"0" * 64: instance.entry(base64.b64decode(envelope["payload"]), signature, certificate)}


def _sct_list(log: ec.EllipticCurvePrivateKey, signature: bytes, at: datetime) -> x509.UnrecognizedExtension:
    """The extension with one SCT of ``log`` (RFC 6962, section 3.3)."""
    sct = b"\0" + hashlib.sha256(spki(log)).digest() + struct.pack("!QH", _milliseconds(at), 0)
    sct += b"\x04\x03" + len(signature).to_bytes(2, "big") + signature
    listed = len(sct).to_bytes(2, "big") + sct
    value = len(listed).to_bytes(2, "big") + listed
    size = bytes([len(value)]) if len(value) < 128 else b"\x81" + bytes([len(value)])
    return x509.UnrecognizedExtension(_SCT, b"\x04" + size + value)


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp()) * 1000


def _utf8(text: str) -> bytes:
    """ASN.1 UTF8String of fewer than 128 bytes."""
    return bytes([0x0C, len(text.encode())]) + text.encode()


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
