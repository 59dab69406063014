"""Verifiers that share no code with harness, each on a checkpoint and on a twin with one byte changed.

python scripts/independent.py CKPT --key NAME.ed25519.pub NAME.p256.pub [--node DIR] [--json FILE]
    [--authority ROOT.pem]

- openssl: the statement (DSSE, Ed25519), the head of the log (a signed note), and, with ``--authority``,
  the timestamp of that head (RFC 3161)
- securesystemslib: the DSSE envelope of the statement
- sigstore-js: the bundles of the statement and of model.sig. ``--node``: a folder in which
  ``npm install @sigstore/verify @sigstore/bundle`` was run; without it that is done in a temporary folder
- model_signing (pip install model-signing==1.1.1 pyOpenSSL): model.sig and the files that it lists
- libsodium (pip install pynacl): the statement and the head of the log

Every one must accept what is there and reject its twin. Exit code 0 when all did, 1 when one did not, 4 when
a verifier is not here: nothing is known of it then. The keys must come from somewhere else than the folder.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATEMENT = "provenance/checkpoint.sigstore.json"
SIGSTORE = Path(__file__).with_suffix(".mjs")
NOTE = "log/checkpoint"
Verify = Callable[[Path], bool]


class Absent(Exception):
    """A verifier that is not installed, and how to get it."""


def dsse(bundle: Path) -> tuple[bytes, bytes]:
    """The message that a DSSE bundle signs (pre-authentication encoding, DSSE v1), and the signature."""
    envelope = json.loads(bundle.read_text())["dsseEnvelope"]
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    message = b" ".join([b"DSSEv1", b"%d" % len(kind), kind, b"%d" % len(payload), payload])
    return message, base64.b64decode(envelope["signatures"][0]["sig"])


def note(head: Path) -> tuple[bytes, bytes]:
    """The text of a signed note (C2SP signed-note) and its first signature, without the key's hint."""
    text, _, lines = head.read_bytes().partition(b"\n\n")
    return text + b"\n", base64.b64decode(lines.split()[2])[4:]


def openssl(key: Path) -> Callable[[tuple[bytes, bytes]], bool]:
    """Ed25519 by `openssl pkeyutl`."""

    def verify(signed: tuple[bytes, bytes]) -> bool:
        with tempfile.TemporaryDirectory() as scratch:
            message, signature = Path(scratch) / "message", Path(scratch) / "signature"
            message.write_bytes(signed[0])
            signature.write_bytes(signed[1])
            command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", key, "-rawin", "-in", message]
            return passes([*command, "-sigfile", signature])

    return verify


def stamped(root: Path) -> Verify:
    """The timestamp of a log's newest head by `openssl ts`, under the certificate ``root``."""

    def verify(head: Path) -> bool:
        text = b"".join(head.read_bytes().splitlines(keepends=True)[:3])
        answer = head.parent / "timestamps" / f"{int(text.splitlines()[1])}.tsr"
        with tempfile.TemporaryDirectory() as scratch:
            message = Path(scratch) / "head"
            message.write_bytes(text)
            command = ["openssl", "ts", "-verify", "-data", message, "-in", answer]
            return passes([*command, "-CAfile", root])

    return verify


def after(
    read: Callable[[Path], tuple[bytes, bytes]], verify: Callable[[tuple[bytes, bytes]], bool]
) -> Verify:
    """``verify`` of what ``read`` finds in a file."""
    return lambda path: verify(read(path))


def sodium(key: Path) -> Callable[[tuple[bytes, bytes]], bool]:
    """Ed25519 by libsodium."""
    if importlib.util.find_spec("nacl") is None:
        raise Absent("pip install pynacl")
    from nacl.exceptions import BadSignatureError
    from nacl.signing import VerifyKey

    raw = base64.b64decode("".join(key.read_text().splitlines()[1:-1]))[-32:]

    def verify(signed: tuple[bytes, bytes]) -> bool:
        try:
            VerifyKey(raw).verify(*signed)
        except BadSignatureError:
            return False
        return True

    return verify


def securesystemslib(key: Path) -> Verify:
    """The DSSE envelope; keys are looked up by the key id, which a bundle leaves empty."""
    if importlib.util.find_spec("securesystemslib") is None:
        raise Absent("pip install securesystemslib")
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    raw = base64.b64decode("".join(key.read_text().splitlines()[1:-1]))[-32:]
    known = SSlibKey("id", "ed25519", "ed25519", {"public": raw.hex()})

    def verify(bundle: Path) -> bool:
        document = json.loads(bundle.read_text())["dsseEnvelope"]
        document["signatures"][0]["keyid"] = "id"
        try:
            return bool(Envelope.from_dict(document).verify([known], 1))
        except VerificationError:
            return False

    return verify


def sigstore(node: Path, key: Path) -> Verify:
    """The bundle, by sigstore-js in ``node``."""
    return lambda bundle: passes(["node", SIGSTORE, bundle, key.resolve()], cwd=node)


def installed(folder: Path) -> Path:
    """``folder`` with sigstore-js in it. Raises `Absent` where npm cannot get it."""
    if not shutil.which("node"):
        raise Absent("install node and npm")
    if not (folder / "node_modules" / "@sigstore" / "verify").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        words = [
            "npm",
            "install",
            "--silent",
            "--no-audit",
            "--no-fund",
            "@sigstore/verify",
            "@sigstore/bundle",
        ]
        if not shutil.which("npm") or not passes(words, cwd=folder):
            raise Absent(f"npm install @sigstore/verify @sigstore/bundle, in {folder}")
    return folder


def model_signing(key: Path) -> Verify:
    """model.sig and the files of a checkpoint folder."""
    official = Path(sys.executable).with_name("model_signing")
    if not official.exists():
        raise Absent("pip install model-signing==1.1.1 pyOpenSSL")
    command = [official, "verify", "key", "--public_key", key, "--signature"]
    return lambda folder: passes([*command, folder / "model.sig", folder])


def passes(command: list[Any], cwd: Path | None = None) -> bool:
    """Whether ``command`` leaves with 0."""
    return subprocess.run(command, cwd=cwd, capture_output=True, check=False).returncode == 0


def twin_of(checkpoint: Path, folder: Path) -> Path:
    """A copy of run and checkpoint; statement, head and weights have another byte each."""
    run = folder / "run"
    shutil.copytree(checkpoint, run / "checkpoints" / checkpoint.name)
    shutil.copytree(checkpoint.parent.parent / "log", run / "log")
    copy = run / "checkpoints" / checkpoint.name
    for bundle in (copy / STATEMENT, copy / "model.sig"):
        document = json.loads(bundle.read_text())
        payload = bytearray(base64.b64decode(document["dsseEnvelope"]["payload"]))
        payload[len(payload) // 2] ^= 1
        document["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
        if bundle.name != "model.sig":
            bundle.write_text(json.dumps(document))
        else:
            (copy / "changed.sig").write_text(json.dumps(document))
    head = run / NOTE
    head.write_bytes(head.read_bytes().replace(b"\n", b"x\n", 1))
    weights = next(copy.glob("model*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return copy


def rows(
    checkpoint: Path, twin: Path, ed25519: Path, p256: Path, node: Path, root: Path | None
) -> list[list[str]]:
    """Verifier, what it verified, and what it said of the original and of the twin."""

    def run_of(folder: Path) -> Path:
        return folder.parent.parent

    statement = (checkpoint / STATEMENT, twin / STATEMENT)
    head = (run_of(checkpoint) / NOTE, run_of(twin) / NOTE)
    wanted: list[tuple[str, str, Callable[[], Verify], tuple[Path, Path]]] = [
        ("openssl", "statement", lambda: after(dsse, openssl(ed25519)), statement),
        ("openssl", "log head", lambda: after(note, openssl(ed25519)), head),
        ("securesystemslib", "statement", lambda: securesystemslib(ed25519), statement),
        ("sigstore-js", "statement", lambda: sigstore(installed(node), ed25519), statement),
        (
            "sigstore-js",
            "model.sig",
            lambda: sigstore(installed(node), p256),
            (checkpoint / "model.sig", twin / "changed.sig"),
        ),
        ("model_signing", "model.sig and files", lambda: model_signing(p256), (checkpoint, twin)),
        ("libsodium", "statement", lambda: after(dsse, sodium(ed25519)), statement),
        ("libsodium", "log head", lambda: after(note, sodium(ed25519)), head),
    ]  # fmt: skip
    if root is not None:
        wanted.append(("openssl", "timestamp", lambda: stamped(root), head))
    found = []
    for name, what, make, (good, bad) in wanted:
        try:
            verify = make()
            words = ["accepted" if verify(path) else "rejected" for path in (good, bad)]
        except Absent as absent:
            words = [f"not run: {absent}", ""]
        found.append([name, what, *words])
    return found


def main() -> int:
    """Verify, print, and say whether all were right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a checkpoint in its run folder")
    parser.add_argument("--key", type=Path, nargs=2, required=True, metavar=("ED25519", "P256"))
    parser.add_argument("--node", type=Path, metavar="DIR", help="where sigstore-js is, or is put")
    parser.add_argument("--authority", type=Path, metavar="PEM", help="root of the timestamps' authority")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint.resolve()
    with tempfile.TemporaryDirectory(prefix="independent-") as scratch:
        node = arguments.node or Path(scratch) / "node"
        twin = twin_of(checkpoint, Path(scratch))
        found = rows(checkpoint, twin, *arguments.key, node, arguments.authority)
    for name, what, good, bad in found:
        print(f"{name:<18} {what:<20} {good:<10} {f'its twin: {bad}' if bad else ''}".rstrip())
    if arguments.json is not None:
        names = ("verifier", "verified", "original", "twin")
        arguments.json.write_text(json.dumps([dict(zip(names, row, strict=True)) for row in found], indent=2))
    if any(row[2:] not in (["accepted", "rejected"], [row[2], ""]) for row in found):
        return 1
    return 4 if any(not row[3] for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
