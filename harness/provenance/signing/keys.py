"""Signing identities: an Ed25519 key for statements and the log, a P-256 key for model.sig.

OpenSSF Model Signing knows no Ed25519, so an identity is a pair. ``NAME.key`` holds both private keys
(PKCS #8 PEM, mode 0600), ``NAME.ed25519.pub`` and ``NAME.p256.pub`` the public ones (SPKI PEM). An OpenSSH
Ed25519 key signs statements too; it makes no model.sig. Where a file with OpenSSH public keys is named,
ssh-agent signs with their private halves (`harness.provenance.signing.ssh_agent`); where one with PKCS#11
URIs is, a token does (`harness.provenance.signing.pkcs11_token`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from harness.errors import EnvironmentFault, UsageError, open_given, unreadable_input
from harness.format import files
from harness.provenance.signing import pkcs11_token, ssh_agent
from harness.provenance.signing.pkcs11_token import TokenKey
from harness.provenance.signing.ssh_agent import AgentKey

ENVIRONMENT = "HARNESS_SIGNING_KEY"

_PRIVATE_BLOCK = re.compile(
    rb"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY)-----\r?\n.*?-----END \1-----\r?\n?", re.DOTALL
)
_PUBLIC_BLOCK = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----\r?\n?", re.DOTALL)
_FILE_LIMIT = 64 << 10
_MAKE = "make a key: harness keys new --out NAME"
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, InternalError)
"""What cryptography raises for bytes that are no key; the last one for some that OpenSSL chokes on."""

HeldKey = AgentKey | TokenKey
"""A private key that somebody else holds, and signs with."""
PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey | HeldKey


@dataclass(frozen=True)
class PublicKey:
    """A key that may have signed something; where it comes from decides what it is worth."""

    algorithm: Literal["ed25519", "p256"]
    key: Ed25519PublicKey | ec.EllipticCurvePublicKey
    pem: bytes
    """SPKI PEM."""
    key_id: str
    """Hex sha256 of the SPKI DER."""

    @cached_property
    def hint(self) -> str:
        """Hex sha256 of the PEM text: the key hint in sigstore bundles as model_signing writes it."""
        return hashlib.sha256(self.pem).hexdigest()

    @property
    def raw(self) -> bytes:
        """The 32 bytes of an Ed25519 key."""
        if not isinstance(self.key, Ed25519PublicKey):
            raise UsageError("only an Ed25519 key has raw bytes")
        return self.key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether ``signature`` is this key's over ``message``; the algorithm is the key's own."""
        try:
            if isinstance(self.key, Ed25519PublicKey):
                self.key.verify(signature, message)
            else:
                self.key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class Signer:
    """A private identity."""

    ed25519: Ed25519PrivateKey | HeldKey
    p256: ec.EllipticCurvePrivateKey | HeldKey | None
    """None for an OpenSSH key alone: no model.sig is made."""

    @property
    def ed25519_id(self) -> str:
        """Key id of the Ed25519 half."""
        return public_keys(self)[0].key_id


@dataclass(frozen=True)
class KeyFiles:
    """What `create` wrote."""

    private: Path
    public: tuple[Path, ...]


@dataclass(frozen=True)
class Described:
    """What a key file holds."""

    kind: Literal["private", "public", "token"]
    """``token``: the file names private keys in PKCS#11 tokens, and holds none."""
    keys: tuple[PublicKey, ...]


def create(out: Path) -> KeyFiles:
    """Make an identity at ``out`` + .key, .ed25519.pub, .p256.pub. Raises `UsageError` if one exists.

    The private key comes first: of a start that was killed after it, `write_public` makes the rest.
    """
    private = _beside(out, ".key")
    ed25519, p256 = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
    public = public_keys(Signer(ed25519, p256))
    if os.path.lexists(private) and not all(map(os.path.lexists, _public_files(public, out))):
        remedy = f"its .pub files are missing: harness keys show {private} --out {out}"
        raise UsageError("exists already", where=str(private), remedy=remedy)
    _require_free(private, *_public_files(public, out))
    files.make_folder(out.parent)
    _write_new(private, _private_pem(ed25519) + _private_pem(p256), 0o600)
    return KeyFiles(private, write_public(public, out))


def write_public(keys: Sequence[PublicKey], out: Path) -> tuple[Path, ...]:
    """Write ``keys`` to ``out`` + .ed25519.pub, .p256.pub, but for what is there already.

    Raises `UsageError` for a name that holds something else.
    """
    public = _public_files(keys, out)
    wanted = [
        (path, key.pem)
        for path, key in zip(public, keys, strict=True)
        if not path.is_file() or _read(path) != key.pem
    ]
    _require_free(*(path for path, _ in wanted))
    files.make_folder(out.parent)
    for path, pem in wanted:
        _write_new(path, pem, 0o644)
    return public


def _public_files(keys: Sequence[PublicKey], out: Path) -> tuple[Path, ...]:
    return tuple(_beside(out, f".{key.algorithm}.pub") for key in keys)


def _beside(out: Path, ending: str) -> Path:
    if out.name in ("", ".."):
        raise UsageError("names no file", where=f"--out {out}", remedy="--out FOLDER/NAME, without an ending")
    return out.with_name(out.name + ending)


def _require_free(*paths: Path) -> None:
    for path in paths:
        if os.path.lexists(path):
            raise UsageError("exists already", where=str(path), remedy="choose another --out")


def load_signer(path: Path) -> Signer:
    """The identity in ``path``: a file of `create`, an OpenSSH Ed25519 private key without passphrase, the
    OpenSSH public keys of an identity whose private ones ssh-agent holds, or PKCS#11 URIs of keys in a token.

    Raises `UsageError` when it is not there or has other contents, `EnvironmentFault` when others may read a
    private key, or the agent or the token lacks it.
    """
    data = _read(path)
    if ssh_agent.is_public(data):
        return _held_signer(ssh_agent.held(data, str(path)), path)
    if pkcs11_token.is_reference(data):
        return _held_signer(pkcs11_token.held(data, str(path)), path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077 and b"PRIVATE KEY" in data:
        raise EnvironmentFault(
            f"the private key has mode {mode:04o}: others may read it",
            where=str(path),
            remedy=f"chmod 600 {path}",
        )
    private = _private_keys(data, path)
    ed25519 = [key for key in private if isinstance(key, Ed25519PrivateKey)]
    p256 = [key for key in private if isinstance(key, ec.EllipticCurvePrivateKey)]
    if len(ed25519) != 1 or len(p256) > 1:
        raise UsageError(
            "holds no single Ed25519 private key",
            where=str(path),
            remedy="make one: harness keys new --out NAME",
        )
    return Signer(ed25519[0], p256[0] if p256 else None)


def _held_signer(halves: Sequence[HeldKey], path: Path) -> Signer:
    ed25519 = [key for key in halves if isinstance(key.public_key(), Ed25519PublicKey)]
    p256 = [key for key in halves if key not in ed25519]
    if len(ed25519) != 1 or len(p256) > 1:
        remedy = "one line for an Ed25519 key, and at most one for a P-256 key, which makes model.sig"
        raise UsageError("names no single Ed25519 key", where=str(path), remedy=remedy)
    return Signer(ed25519[0], p256[0] if p256 else None)


def sign_with(private: PrivateKey, message: bytes) -> bytes:
    """The signature over ``message``: 64 bytes, or ASN.1 of ECDSA with SHA-256 for a P-256 key.

    Raises `EnvironmentFault` when an agent or a token that holds the key does not sign.
    """
    if isinstance(private, ec.EllipticCurvePrivateKey):
        return private.sign(message, ec.ECDSA(hashes.SHA256()))
    signature = private.sign(message)
    if isinstance(private, HeldKey) and not _public(private.public_key(), private.name).verifies(
        signature, message
    ):
        what = f"{private.holder} gave a signature that does not verify"
        raise EnvironmentFault(what, where=private.name, remedy="sign with another key (harness keys new)")
    return signature


def load_public(path: Path) -> PublicKey:
    """The public key in ``path``: SPKI PEM or an OpenSSH line. Raises `UsageError` for other contents, and
    for several keys."""
    return parse_public(_read(path), where=str(path))


def parse_public(data: bytes, *, where: str) -> PublicKey:
    """The public key in ``data``; `load_public` without the file."""
    first, *others = _public_ones(data, where)
    if others:
        what = f"holds {1 + len(others)} public keys, and one is to be trusted"
        raise UsageError(what, where=where, remedy="give each a file of its own")
    return first


def _public_ones(data: bytes, where: str) -> list[PublicKey]:
    """The keys in ``data``: lines of OpenSSH, or blocks of SPKI PEM; one at least."""
    try:
        if ssh_agent.is_public(data):
            lines = [line for line in data.splitlines() if line.strip()]
            found: list[object] = [serialization.load_ssh_public_key(line) for line in lines]
        elif b"PRIVATE KEY" in data:
            raise UsageError("is a private key", where=where, remedy="give auditors the .pub files")
        else:
            blocks = _PUBLIC_BLOCK.findall(data) or [data]
            found = [serialization.load_pem_public_key(block) for block in blocks]
    except _UNREADABLE as error:
        raise UsageError("is not a public key", where=where, remedy="expected SPKI PEM or OpenSSH") from error
    return [_public(key, where) for key in found]


def public_keys(signer: Signer) -> list[PublicKey]:
    """The public halves of ``signer``, Ed25519 first."""
    halves = [signer.ed25519.public_key(), *([signer.p256.public_key()] if signer.p256 else [])]
    return [_public(half, "signer") for half in halves]


def describe(file: Path) -> Described:
    """What ``file`` holds or names, of public keys all of them. Raises as `load_signer`."""
    data = _read(file)
    if pkcs11_token.is_reference(data):
        held = pkcs11_token.held(data, str(file))
        return Described("token", tuple(_public(key.public_key(), str(file)) for key in held))
    if b"PRIVATE KEY" not in data:
        return Described("public", tuple(_public_ones(data, str(file))))
    keys = tuple(_public(key.public_key(), str(file)) for key in _private_keys(data, file))
    return Described("private", keys)


def user_key_path() -> Path:
    """``harness/default.key`` in the user's config folder. Raises `UsageError` when the home is not known."""
    return expanded(Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")) / "harness" / "default.key"


def expanded(path: Path) -> Path:
    """``path`` with ``~`` resolved. Raises `UsageError` for the home of a user who has none."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UsageError(
            "names a home that is not known", where=str(path), remedy="set HOME, or write the whole path"
        ) from error


def signing_key_path(configured: Path | None, run_dir: Path | None) -> tuple[Path, str]:
    """The private key to sign with, and why it is that one: config, environment, or the user's own.

    The user's own is made when it does not exist. Raises `UsageError` for a path inside ``run_dir``, of the
    key or of a token's PIN: what is signed must not carry them; `EnvironmentFault` when the user's own can
    be neither read nor made.
    """
    if configured is not None:
        path, reason = expanded(configured), "signing.key"
    elif os.environ.get(ENVIRONMENT):
        path, reason = expanded(Path(os.environ[ENVIRONMENT])), f"${ENVIRONMENT}"
    else:
        path, reason = user_key_path(), "your default key"
        try:
            if not path.exists():
                create(path.with_suffix(""))
                reason = f"made just now, since you had no key: {path}; its .pub files are for auditors"
        except OSError as error:
            raise EnvironmentFault(
                f"you have no key yet, and it cannot be made: {error.strerror or error}",
                where=str(path),
                remedy=f"make one elsewhere (harness keys new --out NAME): signing.key or ${ENVIRONMENT}",
            ) from error
    if run_dir is not None:
        _require_outside(path, "signing key", run_dir)
        data = _read(path) if path.is_file() else b""
        for reference in pkcs11_token.references(data, str(path)) if pkcs11_token.is_reference(data) else []:
            if reference.pin_file is not None:
                _require_outside(reference.pin_file, "token's PIN", run_dir)
    return path, reason


def _require_outside(path: Path, what: str, run_dir: Path) -> None:
    if files.real(path).is_relative_to(files.real(run_dir)):
        raise UsageError(f"the {what} lies in the run folder", where=str(path), remedy="keep it elsewhere")


def _private_keys(data: bytes, path: Path) -> list[Ed25519PrivateKey | ec.EllipticCurvePrivateKey]:
    keys: list[Ed25519PrivateKey | ec.EllipticCurvePrivateKey] = []
    for match in _PRIVATE_BLOCK.finditer(data):
        block = match[0] if match[0].endswith(b"\n") else match[0] + b"\n"
        try:
            if match[1] == b"OPENSSH PRIVATE KEY":
                key: object = serialization.load_ssh_private_key(block, password=None)
            else:
                key = serialization.load_pem_private_key(block, password=None)
        except _UNREADABLE as error:
            remedy = "an encrypted key cannot sign unattended; make one: harness keys new"
            raise UsageError("cannot be read as a private key", where=str(path), remedy=remedy) from error
        odd_curve = isinstance(key, ec.EllipticCurvePrivateKey) and not isinstance(key.curve, ec.SECP256R1)
        if odd_curve or not isinstance(key, Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
            raise UsageError("holds a key other than Ed25519 or P-256", where=str(path), remedy=_MAKE)
        keys.append(key)
    if not keys:
        raise UsageError("holds no private key", where=str(path), remedy="make one: harness keys new")
    return keys


def _public(key: object, where: str) -> PublicKey:
    algorithm: Literal["ed25519", "p256"]
    if isinstance(key, Ed25519PublicKey):
        algorithm = "ed25519"
    elif isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        algorithm = "p256"
    else:
        raise UsageError("is neither an Ed25519 nor a P-256 key", where=where, remedy=_MAKE)
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    der = key.public_bytes(serialization.Encoding.DER, spki)
    return PublicKey(
        algorithm, key, key.public_bytes(serialization.Encoding.PEM, spki), hashlib.sha256(der).hexdigest()
    )


def _private_pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Give ``data`` the name ``path``, whole and on disk or not at all; never overwrites."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".tmp-{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(data)
            stream.flush()
            # A key that a power cut empties would leave every checkpoint that it has signed unusable.
            os.fsync(stream.fileno())
        # A rename would replace the key that another launch has just made.
        os.link(temporary, path)
    finally:
        os.unlink(temporary)
    files.fsync_folder(path.parent)


def _read(path: Path) -> bytes:
    try:
        with open_given(path) as stream:
            return stream.read(_FILE_LIMIT)
    except (OSError, ValueError) as error:
        if pkcs11_token.SCHEME in str(path):
            # It is not shown, since a PIN may be in it.
            remedy = "write the URI into a file, without a PIN, and name that (docs/keys.md)"
            raise UsageError("a PKCS#11 URI stands where a key file is named", remedy=remedy) from None
        told = error if isinstance(error, OSError) else FileNotFoundError(errno.ENOENT, str(error))
        remedy = f"check the path, or {_MAKE}"
        raise unreadable_input(told, "the key file", path, remedy) from error
