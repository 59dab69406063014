"""Cosignatures of log heads: somebody outside has seen that a head continues those that they saw before.

Format: C2SP tlog-cosignature (c2sp.org/tlog-cosignature), ``cosignature/v1`` with Ed25519: one more line in
the signed note, over the moment and the head's text. A note with such lines is the same head for whoever does
not know the witnesses. A witness cosigns only what continues its own file of the head, so that nobody can
show two histories of one log without its help; its moment is a proof of time.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

from harness.errors import UsageError, VerificationFailed
from harness.format import moments
from harness.provenance.signing.keys import PublicKey, Signer, public_keys, sign_with
from harness.provenance.transparency import log

_COSIGNATURE = b"\x04"
"""Signature type of cosignature/v1 in a signed note."""
_LENGTH = 4 + 8 + 64
"""Bytes of key id, moment (big-endian seconds of Unix time) and Ed25519 signature."""


def cosign(note: bytes, signer: Signer, name: str, now: datetime, *, where: str) -> bytes:
    """``note`` with the cosignature of ``signer``, a witness that is called ``name``.

    The caller has checked the head. Raises `UsageError` for a name that a note cannot hold,
    `VerificationFailed` for what is no log head.
    """
    if not name or any(each.isspace() or each == "+" for each in name):
        raise UsageError(f"{name!r} is no name of a witness: no spaces, no plus sign")
    log.claimed(note, where=where)
    key = public_keys(signer)[0]
    moment = int(now.timestamp())
    signature = sign_with(signer.ed25519, _message(_text(note), moment))
    blob = _key_id(name, key) + moment.to_bytes(8, "big") + signature
    return note + f"— {name} {base64.b64encode(blob).decode()}\n".encode()


def cosigned(note: bytes, witnesses: Sequence[PublicKey]) -> dict[str, str]:
    """Key id of each of ``witnesses`` whose cosignature in ``note`` is good → the earliest moment that it
    states, as ``2026-11-23T20:00:00Z``. Lines that are none of theirs are nobody's."""
    found: dict[str, str] = {}
    text = _text(note)
    for line in note.partition(b"\n\n")[2].decode("utf-8", "replace").split("\n"):
        parts = line.split(" ")
        if len(parts) != 3 or parts[0] != "—":
            continue
        try:
            blob = base64.b64decode(parts[2], validate=True)
        except ValueError:
            continue
        if len(blob) != _LENGTH:
            continue
        moment = int.from_bytes(blob[4:12], "big")
        for key in witnesses:
            if blob[:4] == _key_id(parts[1], key) and key.verifies(blob[12:], _message(text, moment)):
                told = _told(moment)
                found[key.key_id] = min(told, found.get(key.key_id, told))
    return found


def seen(note: bytes, witnesses: Sequence[PublicKey], threshold: int, *, where: str) -> str:
    """The moment at which ``threshold`` of ``witnesses`` had cosigned. Raises `VerificationFailed`."""
    moments = sorted(cosigned(note, witnesses).values())
    if len(moments) < threshold:
        what = f"is cosigned by {len(moments)} of the {threshold} witnesses that the policy wants"
        raise VerificationFailed(what, where=where, remedy="ask a witness: harness head RUN --cosign KEY")
    return moments[threshold - 1]


def _text(note: bytes) -> bytes:
    return note.partition(b"\n\n")[0] + b"\n"


def _message(text: bytes, moment: int) -> bytes:
    return b"cosignature/v1\ntime %d\n" % moment + text


def _key_id(name: str, key: PublicKey) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + _COSIGNATURE + key.raw).digest()[:4]


def _told(moment: int) -> str:
    try:
        return moments.text(datetime.fromtimestamp(moment, UTC))
    except (ValueError, OverflowError, OSError):
        return "9999-12-31T23:59:59Z"  # a moment that no calendar has proves no time
