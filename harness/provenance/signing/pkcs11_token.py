"""Signing with keys in a PKCS#11 token: an HSM, a smart card, SoftHSM. No private key leaves it.

A file with a `pkcs11:` URI a line (RFC 7512) names the keys: an Ed25519 one, and a P-256 one for model.sig::

    pkcs11:token=lab;object=alice?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/lab.pin

- The PIN is read from the file of ``pin-source`` at each signature, and is nowhere else: a URI with
  ``pin-value`` is refused, and so is a PIN file that others may read.
- Every signature has a session of its own. So a token that was pulled out and put back signs again, and
  nothing that is open crosses a fork; the forked process initialises the library anew, as PKCS #11 2.40,
  section 2.5.2 asks of it.
- python-pkcs11 tells a library that one thread at a time calls it, so one thread at a time does.
- Tokens lock after a few wrong PINs. Before the last try that is left, nothing logs in any more.

Mechanisms: CKM_EDDSA over the whole message, CKM_ECDSA over its sha256 (PKCS #11 3.0, section 2.3).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import unquote_to_bytes

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from harness.errors import EnvironmentFault, UsageError, open_given

if TYPE_CHECKING:
    from pkcs11._pkcs11 import lib as Library
    from pkcs11.types import Session, Token

SCHEME = "pkcs11:"

_TOKEN = ("token", "serial", "manufacturer", "model")
_OBJECT = ("object", "id")
_QUERY = ("module-path", "pin-source")
_PIN_LIMIT = 256  # bytes
_P256 = bytes.fromhex("06082a8648ce3d030107")
"""Object identifier 1.2.840.10045.3.1.7, as CKA_EC_PARAMS has it."""
_EXAMPLE = f"{SCHEME}token=LABEL;object=LABEL?module-path=/usr/lib/…/MODULE.so&pin-source=file:/PATH"
_REMEDIES = {
    "PinIncorrect": "the PIN in the file of pin-source is wrong; tokens lock after a few wrong ones",
    "PinLocked": "too many wrong PINs: unlock it with the security officer's",
    "MechanismInvalid": "the token cannot sign with that kind of key",
    "DataLenRange": "the token takes no message as long as a statement",
}
_THERE = "is it plugged in, and is its service running?"

Public = Ed25519PublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Reference:
    """What a URI names."""

    shown: str
    """The URI without its query, for errors."""
    token: Mapping[str, str]
    label: str | None
    identifier: bytes | None
    module: str
    pin_file: Path | None


@dataclass(frozen=True)
class TokenKey:
    """A private key in a token; it has what `keys.sign_with` needs of one."""

    reference: Reference
    public: Public
    name: str
    """The file that names it, for errors."""
    holder: ClassVar[str] = "the PKCS#11 token"

    def public_key(self) -> Public:
        """The public half, as the token told it when the key was loaded."""
        return self.public

    def sign(self, message: bytes) -> bytes:
        """The token's signature over ``message``: 64 bytes, or ASN.1 for P-256.

        Raises `EnvironmentFault` when the token is not there or does not sign.
        """
        from pkcs11 import Mechanism

        with _session(self.reference, self.name) as session:
            key: Any = _private(session, self.reference, self.name)
            if isinstance(self.public, Ed25519PublicKey):
                return bytes(key.sign(message, mechanism=Mechanism.EDDSA))
            raw = bytes(key.sign(hashlib.sha256(message).digest(), mechanism=Mechanism.ECDSA))
        half = len(raw) // 2
        return encode_dss_signature(int.from_bytes(raw[:half]), int.from_bytes(raw[half:]))


def is_reference(data: bytes) -> bool:
    """Whether ``data`` is lines of PKCS#11 URIs."""
    return data.lstrip().startswith(SCHEME.encode())


def held(data: bytes, name: str) -> list[TokenKey]:
    """The keys of the lines ``data``, each of which its token must have.

    Raises `UsageError` for a line that cannot be understood, `EnvironmentFault` when a token, its PIN or the
    key is not there, or python-pkcs11 is not installed.
    """
    found = []
    for reference in references(data, name):
        with _session(reference, name) as session:
            found.append(TokenKey(reference, _public(session, reference, name), name))
    return found


def references(data: bytes, name: str) -> list[Reference]:
    """The lines ``data``, understood; no token is asked. Raises `UsageError`."""
    lines = data.decode("utf-8", "replace").splitlines()
    return [_parse(line.strip(), name) for line in lines if line.strip()]


def _parse(line: str, name: str) -> Reference:
    if not line.startswith(SCHEME):
        raise UsageError("has a line that is no PKCS#11 URI", where=name, remedy=f"expected {_EXAMPLE}")
    path, _, query = line.removeprefix(SCHEME).partition("?")
    named = _attributes(path, ";", (*_TOKEN, *_OBJECT, "type"), name)
    asked = _attributes(query, "&", _QUERY, name)
    if named.get("type", b"private") != b"private":
        raise UsageError(
            "names an object that is no private key", where=name, remedy="type=private, or no type"
        )
    texts = {key: _text(value, key, name) for key, value in (named | asked).items() if key != "id"}
    module = texts.get("module-path", "")
    if not os.path.isabs(module):
        remedy = "add ?module-path=/usr/lib/…/MODULE.so, the token's own library"
        raise UsageError("has a URI without an absolute module-path", where=name, remedy=remedy)
    return Reference(
        shown=f"{SCHEME}{path}",
        token={key: texts[key] for key in _TOKEN if key in texts},
        label=texts.get("object"),
        identifier=named.get("id"),
        module=module,
        pin_file=_pin_file(texts["pin-source"], name) if "pin-source" in texts else None,
    )


def _attributes(text: str, separator: str, known: tuple[str, ...], name: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for part in text.split(separator) if text else []:
        key, equals, value = part.partition("=")
        if key == "pin-value":
            remedy = "put the PIN into a file of mode 0600 and name that: pin-source=file:/PATH"
            raise UsageError("has a PIN in a URI, where others read it", where=name, remedy=remedy)
        if key not in known or not equals or key in found:
            what = f"has a URI with {key[:40]!r} twice" if key in found else f"has a URI with {key[:40]!r}"
            raise UsageError(what, where=name, remedy=f"known are {', '.join(known)}, each once")
        if re.search("%(?![0-9A-Fa-f]{2})", value):
            raise UsageError(f"has a URI whose {key} is not percent-encoded", where=name)
        found[key] = unquote_to_bytes(value)
    return found


def _text(value: bytes, key: str, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"has a URI whose {key} is no UTF-8", where=name) from error


def _pin_file(source: str, name: str) -> Path:
    """RFC 7512, section 2.4: a `file` URI or a path; the command that it also knows is not run."""
    match = re.fullmatch("(?:file:(?://(?=/))?)?(/(?!/).*)", source)
    if match is None:
        raise UsageError(
            "has a pin-source that is no absolute path", where=name, remedy="pin-source=file:/PATH"
        )
    return Path(match[1])


def _pin(file: Path) -> str:
    """The first line of ``file``."""
    try:
        with open_given(file) as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            data = stream.read(_PIN_LIMIT + 1)
        pin = data.removesuffix(b"\n").removesuffix(b"\r").decode()
    except (OSError, ValueError) as error:
        what = f"the PIN cannot be read: {getattr(error, 'strerror', 'it is no UTF-8')}"
        # The decoder's own error quotes the bytes.
        raise EnvironmentFault(what, where=str(file), remedy="check pin-source") from None
    if mode & 0o077:
        what = f"the PIN file has mode {mode:04o}: others may read it"
        raise EnvironmentFault(what, where=str(file), remedy=f"chmod 600 {file}")
    if not pin or "\n" in pin or len(data) > _PIN_LIMIT:
        raise EnvironmentFault("holds no single line with a PIN", where=str(file), remedy="check pin-source")
    return pin


_locks: dict[int, threading.Lock] = {}
"""One a process: a lock that another thread holds while this process is forked stays held for ever."""
_initialised: dict[str, int] = {}
"""In which process a module was initialised; 0 when it has failed since."""


@contextlib.contextmanager
def _session(reference: Reference, name: str) -> Iterator[Session]:
    """A session in which the user of the token is logged in, for one operation."""
    try:
        from pkcs11.exceptions import PKCS11Error
    except ImportError as error:
        what = "the package python-pkcs11 is not installed"
        raise EnvironmentFault(what, where=name, remedy="pip install 'harness[pkcs11]'") from error
    with _locks.setdefault(os.getpid(), threading.Lock()):
        session: Session | None = None
        try:
            token = _token(_library(reference, name), reference, name)
            session = token.open(user_pin=_login(token, reference))
            yield session
            session.close()
        except BaseException as error:
            _initialised[reference.module] = 0
            if session is not None:
                with contextlib.suppress(PKCS11Error):
                    session.close()
            if isinstance(error, PKCS11Error):
                raise _fault(error, reference, name) from error
            raise


def _library(reference: Reference, name: str) -> Library:
    """The module of ``reference``, which forgets slots and sessions after a fork or a failure."""
    import pkcs11
    from pkcs11.exceptions import PKCS11Error

    try:
        library = pkcs11.lib(reference.module)
    except PKCS11Error as error:
        what = f"the PKCS#11 module cannot be loaded: {error or type(error).__name__}"
        raise EnvironmentFault(what, where=name, remedy="check module-path") from error
    if _initialised.get(reference.module, os.getpid()) != os.getpid():
        library.reinitialize()
    _initialised[reference.module] = os.getpid()
    return library


def _token(library: Library, reference: Reference, name: str) -> Token:
    found = [token for token in library.get_tokens() if _told(token).items() >= reference.token.items()]
    if len(found) != 1:
        what = f"{len(found) or 'no'} PKCS#11 token{'s fit' if found else ' fits'} {reference.shown}"
        raise EnvironmentFault(what, where=name, remedy="add its serial" if found else _THERE)
    return found[0]


def _told(token: Token) -> dict[str, str]:
    """What a URI may ask for, of ``token``."""
    return {
        "token": token.label,
        "serial": token.serial.decode("utf-8", "replace"),
        "manufacturer": token.manufacturer_id,
        "model": token.model,
    }


def _login(token: Token, reference: Reference) -> str | None:
    """The PIN, where one is needed and a wrong one would not lock the token."""
    from pkcs11 import TokenFlag

    if reference.pin_file is None:
        return None
    if token.flags & (TokenFlag.USER_PIN_FINAL_TRY | TokenFlag.USER_PIN_LOCKED):
        what = f"the PKCS#11 token has one try left for its PIN, or none: {reference.shown}"
        raise EnvironmentFault(
            what, where=str(reference.pin_file), remedy="log in once by hand with the right PIN"
        )
    return _pin(reference.pin_file)


def _private(session: Session, reference: Reference, name: str) -> Any:
    from pkcs11 import Attribute, ObjectClass

    wanted: dict[Attribute, Any] = {Attribute.CLASS: ObjectClass.PRIVATE_KEY}
    if reference.label is not None:
        wanted[Attribute.LABEL] = reference.label
    if reference.identifier is not None:
        wanted[Attribute.ID] = reference.identifier
    found = list(session.get_objects(wanted))
    if len(found) != 1:
        what = f"{len(found) or 'no'} private keys in the PKCS#11 token fit {reference.shown}"
        lacks_pin = not found and reference.pin_file is None
        remedy = (
            "add &pin-source=file:/PATH" if lacks_pin else "check object and id; pkcs11-tool --list-objects"
        )
        raise EnvironmentFault(what, where=name, remedy=remedy)
    return found[0]


def _public(session: Session, reference: Reference, name: str) -> Public:
    """The public key that lies beside the private one, under the same id."""
    from pkcs11 import Attribute, ObjectClass

    private = _private(session, reference, name)
    wanted = {Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.ID: private[Attribute.ID]}
    points = [_decoded(each) for each in session.get_objects(wanted)]
    if len(points) != 1 or points[0] is None:
        what = f"the PKCS#11 token has no Ed25519 or P-256 public key beside {reference.shown}"
        raise EnvironmentFault(what, where=name, remedy="store it under the id of the private key")
    return points[0]


def _decoded(key: Any) -> Public | None:
    """CKA_EC_POINT is an OCTET STRING around the point; of an Ed25519 key, some modules have a BIT STRING or
    nothing around it."""
    from pkcs11 import Attribute, KeyType

    try:
        if key.key_type == KeyType.EC_EDWARDS:
            match = re.fullmatch(rb"(?:\x04\x20|\x03\x21\x00|)(.{32})", key[Attribute.EC_POINT], re.DOTALL)
            return None if match is None else Ed25519PublicKey.from_public_bytes(match[1])
        if key.key_type != KeyType.EC or key[Attribute.EC_PARAMS] != _P256:
            return None
        match = re.fullmatch(rb"(?:\x04\x41)?(\x04.{64})", key[Attribute.EC_POINT], re.DOTALL)
        return (
            None if match is None else ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), match[1])
        )
    except ValueError:
        return None


def _fault(error: Exception, reference: Reference, name: str) -> EnvironmentFault:
    code = type(error).__name__
    what = f"the PKCS#11 token does not sign ({code}): {reference.shown}"
    return EnvironmentFault(what, where=name, remedy=_REMEDIES.get(code, _THERE))
