"""Signing through ssh-agent, so that the private key is on no disk of the machine that trains.

An agent signs any bytes: an Ed25519 signature of it is a plain one (RFC 8709 wraps the same 64 bytes), and
one of an ``ecdsa-sha2-nistp256`` key is ECDSA with SHA-256 (RFC 5656, section 3.1.2). So what an agent has
signed verifies like everything else. The protocol is draft-ietf-sshm-ssh-agent; two of its requests are used.
A key that is held under a constraint (`ssh-add -c`) asks its user, which no unattended run can wait for.
"""

from __future__ import annotations

import base64
import os
import socket
import struct
from dataclasses import dataclass
from typing import ClassVar, Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from harness.errors import EnvironmentFault, UsageError

SOCKET = "SSH_AUTH_SOCK"

_LIST, _LISTED, _SIGN, _SIGNED = 11, 12, 13, 14
_LIMIT = 256 << 10  # bytes of an answer, as in OpenSSH
_SECONDS = 30.0
_ADD = "ssh-add the private key, or ssh-add -X when the agent is locked"

Kind = Literal["ssh-ed25519", "ecdsa-sha2-nistp256"]
_KINDS: tuple[Kind, ...] = ("ssh-ed25519", "ecdsa-sha2-nistp256")

Public = Ed25519PublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class AgentKey:
    """A private key that the agent holds; it has what `keys.sign_with` needs of one."""

    kind: Kind
    blob: bytes
    """The public key as SSH encodes it, which is how an agent is told which key is meant."""
    name: str
    """Where the public key was read, for errors."""
    holder: ClassVar[str] = "ssh-agent"

    def public_key(self) -> Public:
        """The public half."""
        line = f"{self.kind} {base64.b64encode(self.blob).decode()}".encode()
        key = serialization.load_ssh_public_key(line)
        if not isinstance(key, Ed25519PublicKey | ec.EllipticCurvePublicKey):
            raise UsageError("holds a key other than Ed25519 or P-256", where=self.name)
        return key

    def sign(self, message: bytes) -> bytes:
        """The agent's signature over ``message``: 64 bytes, or ASN.1 for P-256.

        Raises `EnvironmentFault` when no agent answers, or it does not hold the key, or will not sign.
        """
        answer = _ask(_SIGN, _string(self.blob) + _string(message) + struct.pack(">I", 0), self.name)
        if answer[:1] != bytes([_SIGNED]):
            raise EnvironmentFault("ssh-agent does not sign with this key", where=self.name, remedy=_ADD)
        parts = [part for outer in _strings(answer[1:], self.name) for part in _strings(outer, self.name)]
        value = parts[-1] if len(parts) == 2 and parts[0] == self.kind.encode() else b""
        return value if self.kind == "ssh-ed25519" else _asn1(value, self.name)


def is_public(data: bytes) -> bool:
    """Whether ``data`` is lines of OpenSSH public keys, which is how a key in the agent is named."""
    return data.lstrip().startswith((b"ssh-", b"ecdsa-", b"sk-"))


def held(data: bytes, name: str) -> list[AgentKey]:
    """The keys of the lines ``data``, each of which the agent must hold.

    Raises `UsageError` for a line of another kind of key, `EnvironmentFault` when no agent answers or it has
    not all of them.
    """
    wanted = [_parse(line, name) for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
    there = _listed(name)
    for key in wanted:
        if key.blob not in there:
            what = f"ssh-agent holds {len(there)} keys, not this one" if there else "ssh-agent shows no key"
            raise EnvironmentFault(what, where=name, remedy=_ADD)
    return wanted


def _parse(line: str, name: str) -> AgentKey:
    word, _, rest = line.strip().partition(" ")
    kind = next((known for known in _KINDS if known == word), None)
    if kind is None:
        remedy = "ssh-keygen -t ed25519, and -t ecdsa -b 256 for model.sig"
        raise UsageError(f"names a key of kind {word[:40]}, not ssh-ed25519", where=name, remedy=remedy)
    try:
        key = AgentKey(kind, base64.b64decode(rest.split()[0], validate=True), name)
        key.public_key()
    except (ValueError, IndexError) as error:
        raise UsageError("is not a public key", where=name, remedy="expected an OpenSSH line") from error
    return key


def _listed(name: str) -> set[bytes]:
    """Public keys of what the agent holds; a locked agent says that it holds none."""
    answer = _ask(_LIST, b"", name)
    if answer[:1] != bytes([_LISTED]) or len(answer) < 5:
        raise EnvironmentFault("ssh-agent does not list its keys", where=name, remedy=_ADD)
    return set(_strings(answer[5:], name)[::2])  # key, comment, key, comment …


def _ask(kind: int, body: bytes, name: str) -> bytes:
    path = os.environ.get(SOCKET)
    if not path:
        remedy = "start one (eval $(ssh-agent)), forward yours (ssh -A), or name a private key file"
        raise EnvironmentFault(f"{SOCKET} is not set, so there is no ssh-agent", where=name, remedy=remedy)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(_SECONDS)
            link.connect(path)
            link.sendall(struct.pack(">IB", len(body) + 1, kind) + body)
            (size,) = struct.unpack(">I", _read(link, 4))
            if size > _LIMIT:
                raise OSError(f"its answer has {size} bytes")
            return _read(link, size)
    except OSError as error:
        text = error.strerror or str(error)
        remedy = "is it still running, and the connection that forwards it?"
        raise EnvironmentFault(
            f"no answer from ssh-agent: {text}", where=f"{SOCKET} for {name}", remedy=remedy
        ) from error


def _read(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            raise OSError("it closed the connection")
        data += part
    return data


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _strings(data: bytes, name: str) -> list[bytes]:
    """The strings that ``data`` is made of (RFC 4251, section 5)."""
    found = []
    while data:
        size = int.from_bytes(data[:4]) if len(data) >= 4 else len(data)
        if size > len(data) - 4:
            what = "ssh-agent gave an answer that cannot be read"
            raise EnvironmentFault(what, where=name, remedy="check what $SSH_AUTH_SOCK leads to")
        found.append(data[4 : 4 + size])
        data = data[4 + size :]
    return found


def _asn1(value: bytes, name: str) -> bytes:
    """The two numbers of an SSH ECDSA signature as every other tool writes them."""
    numbers = [int.from_bytes(part) for part in _strings(value, name)]
    return encode_dss_signature(numbers[0], numbers[1]) if len(numbers) == 2 else b""
