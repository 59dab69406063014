"""Time-stamping authorities for tests: one in Python whose every part can be made wrong, and OpenSSL's own.

Example::

    tsa = Authority("tsa")
    data = tsa.stamp(message, "20261124000000Z")          # as a log folder keeps it
    with answering(tsa.openssl(tmp_path)) as url:         # `openssl ts` behind HTTP
        ...
"""

from __future__ import annotations

import hashlib
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from harness.format import der
from harness.provenance.transparency import timestamp

START, END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2036, 1, 1, tzinfo=UTC)
SHA256, ECDSA = "2.16.840.1.101.3.4.2.1", "1.2.840.10045.4.3.2"
TST_INFO, DATA = "1.2.840.113549.1.9.16.1.4", "1.2.840.113549.1.7.1"
CONTENT_TYPE, MESSAGE_DIGEST = "1.2.840.113549.1.9.3", "1.2.840.113549.1.9.4"
SIGNING_CERTIFICATE = "1.2.840.113549.1.9.16.2.47"
Key = ec.EllipticCurvePrivateKey
Values = dict[str, bytes]


def issued(
    name: str, key: Key, issuer: str, issuer_key: Key, *, ca: bool = False,
    usages: Sequence[x509.ObjectIdentifier] = (ExtendedKeyUsageOID.TIME_STAMPING,), critical: bool = True,
    end: datetime = END, path_length: int | None = None, odd: bool = False,
) -> x509.Certificate:  # fmt: skip
    """A certificate of ``name``, by ``issuer``."""

    def called(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    made = (
        x509.CertificateBuilder(called(issuer), called(name), key.public_key(), x509.random_serial_number())
        .not_valid_before(START)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca, path_length), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if ca:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        made = made.add_extension(usage, critical=True)
    elif usages:
        made = made.add_extension(x509.ExtendedKeyUsage(usages), critical=critical)
    if odd:
        made = made.add_extension(
            x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), critical=True
        )
    return made.sign(issuer_key, hashes.SHA256())


class Authority:
    """A root, and the certificate that it gives to who signs timestamps."""

    def __init__(
        self, name: str, *, between: int = 0, path_length: int | None = None, **options: object
    ) -> None:
        """``between``: authorities between the two, of which the root allows ``path_length``; ``options``: of
        the certificate that signs timestamps, as for `issued`."""
        self.name = name
        issuer, key = f"{name} root", ec.generate_private_key(ec.SECP256R1())
        self.root_key = key
        self.root = issued(issuer, key, issuer, key, ca=True, path_length=path_length)
        self.chain: list[x509.Certificate] = []
        for number in range(between):
            below = ec.generate_private_key(ec.SECP256R1())
            self.chain.append(issued(f"{name} {number}", below, issuer, key, ca=True))
            issuer, key = f"{name} {number}", below
        self.issuer, self.issuer_key = issuer, key
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = issued(name, self.key, issuer, key, **options)  # type: ignore[arg-type]

    @property
    def trusted(self) -> tuple[bytes, ...]:
        """What a policy names."""
        return (der_of(self.root),)

    def info(
        self, message: bytes, time: str = "20261124000000Z", *, nonce: int | None = None,
        hashed: str = SHA256, accuracy: bytes = b"", extensions: bytes = b"", version: int = 1,
    ) -> bytes:  # fmt: skip
        """A TSTInfo."""
        algorithm = der.encode(der.SEQUENCE, der.encode_oid(hashed), der.encode(der.NULL))
        digest = der.encode(der.OCTETS, hashlib.sha256(message).digest())
        return der.encode(
            der.SEQUENCE,
            der.encode_integer(version),
            der.encode_oid("1.2.3.4.1"),
            der.encode(der.SEQUENCE, algorithm, digest),
            der.encode_integer(7),
            der.encode(der.TIME, time.encode()),
            accuracy,
            b"" if nonce is None else der.encode_integer(nonce),
            extensions,
        )

    def stamp(self, message: bytes, time: str = "20261124000000Z") -> bytes:
        """A good timestamp, as it is kept."""
        return self.signed(self.info(message, time))

    def signed(
        self, info: bytes, *, by: Key | None = None, certificates: Sequence[bytes] | None = None,
        change: Callable[[Values], object] = lambda values: None, kind: str = TST_INFO, signers: int = 1,
        status: int = 0, algorithm: str = ECDSA,
    ) -> bytes:  # fmt: skip
        """A TimeStampResp around ``info``; ``change`` may alter the signed attributes, name → DER value."""
        own = der_of(self.certificate)
        values: Values = {
            CONTENT_TYPE: der.encode_oid(TST_INFO),
            MESSAGE_DIGEST: der.encode(der.OCTETS, hashlib.sha256(info).digest()),
            SIGNING_CERTIFICATE: named(own),
        }
        change(values)
        attributes = b"".join(
            sorted(
                der.encode(der.SEQUENCE, der.encode_oid(name), der.encode(der.SET, value))
                for name, value in values.items()
            )
        )
        signature = (by or self.key).sign(der.encode(der.SET, attributes), ec.ECDSA(hashes.SHA256()))
        sha256 = der.encode(der.SEQUENCE, der.encode_oid(SHA256))
        signer = der.encode(
            der.SEQUENCE,
            der.encode_integer(1),
            der.encode(
                der.SEQUENCE,
                self.certificate.issuer.public_bytes(),
                der.encode_integer(self.certificate.serial_number),
            ),
            sha256,
            der.encode(der.context(0), attributes) if attributes else b"",
            der.encode(der.SEQUENCE, der.encode_oid(algorithm)),
            der.encode(der.OCTETS, signature),
        )
        brought = [own, *map(der_of, self.chain)] if certificates is None else certificates
        content = der.encode(der.context(0), der.encode(der.OCTETS, info))
        body = der.encode(
            der.SEQUENCE,
            der.encode_integer(3),
            der.encode(der.SET, sha256),
            der.encode(der.SEQUENCE, der.encode_oid(kind), content),
            der.encode(der.context(0), *sorted(brought)) if brought else b"",
            der.encode(der.SET, *[signer] * signers),
        )
        token = der.encode(
            der.SEQUENCE, der.encode_oid("1.2.840.113549.1.7.2"), der.encode(der.context(0), body)
        )
        return der.encode(der.SEQUENCE, der.encode(der.SEQUENCE, der.encode_integer(status)), token)

    def openssl(self, folder: Path) -> Callable[[bytes], bytes]:
        """Answers a request by `openssl ts -reply`, from files in ``folder``."""
        for name, each in (("root", self.root), ("tsa", self.certificate)):
            (folder / f"{name}.pem").write_bytes(each.public_bytes(Encoding.PEM))
        form = PrivateFormat.PKCS8
        (folder / "tsa.key").write_bytes(self.key.private_bytes(Encoding.PEM, form, NoEncryption()))
        (folder / "tsa.cnf").write_text(_CONFIG.format(folder=folder))
        return partial(_reply, folder)


_CONFIG = """\
[tsa]
default_tsa = own
[own]
serial = {folder}/serial
crypto_device = builtin
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256
accuracy = secs:1, millisecs:500
tsa_name = yes
ess_cert_id_alg = sha256
"""


def _reply(folder: Path, request: bytes) -> bytes:
    (folder / "request.tsq").write_bytes(request)
    words = ["-queryfile", "request.tsq", "-config", "tsa.cnf", "-signer", "tsa.pem", "-inkey", "tsa.key"]
    command = ["openssl", "ts", "-reply", *words, "-chain", "root.pem", "-out", "answer.tsr"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return (folder / "answer.tsr").read_bytes()


def named(certificate: bytes) -> bytes:
    """A SigningCertificateV2 (RFC 5816) that names ``certificate``."""
    listed = der.encode(der.SEQUENCE, der.encode(der.OCTETS, hashlib.sha256(certificate).digest()))
    return der.encode(der.SEQUENCE, der.encode(der.SEQUENCE, listed))


def der_of(certificate: x509.Certificate) -> bytes:
    """A certificate as DER."""
    return certificate.public_bytes(Encoding.DER)


@contextmanager
def answering(
    answer: Callable[[bytes], bytes], *, kind: str = "application/timestamp-reply", code: int = 200
) -> Iterator[str]:
    """A server that answers each request by ``answer``; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = answer(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *words: None  # type: ignore[method-assign]  (whoever asked has left)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/tsr"
        finally:
            server.shutdown()


def stamp_log(folder: Path, tsa: Authority, size: int, time: str = "20261124000000Z") -> Path:
    """Have the head of the first ``size`` records of the log ``folder`` timestamped at ``time``."""
    from harness.provenance.transparency import log

    book = log.read_claimed(folder)
    message = log.text_of(log.Head(size, book.root_of_prefix(size), book.head.origin))
    path = folder / timestamp.path_of(size)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(tsa.stamp(message, time))
    return path
