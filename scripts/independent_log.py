"""The transparency log of a run by verifiers that share no code with harness, and twins for them to reject.

python scripts/independent_log.py RUN --key NAME.ed25519.pub … [--head FILE …] [--node DIR] [--json FILE]

- Go: golang.org/x/mod/sumdb, in the copy with which `go` checks sum.golang.org: the head's signature
  (``note.Open``), the tiles under its root (``tlog.TileHashReader``), each record (``tlog.CheckRecord``), and
  each earlier head as a prefix (``tlog.CheckTree``): those that checkpoints say they saw, and ``--head``
- sigstore-python and sigstore-js: the head's signature and the inclusion of each record, by the code that
  they have for Rekor's entries. It is private in both, they have none for consistency and read no tiles: the
  proofs that they are given are made by `harness.provenance.transparency.merkle` from the leaf hashes in the
  log's tiles. ``--node``: as for independent.py

Go: apt-get install golang-go; no module is fetched. Each twin has one thing changed. Exit code 0 when every
verifier accepts the log and rejects every twin, 1 when one does not, 4 when one is not here: nothing is known
of it then. The keys must come from somewhere else than the folder.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from independent import STATEMENT, Absent, installed

from harness.provenance.transparency import merkle

HEAD = "checkpoint"
WIDTH = 256
ED25519 = b"\x01"
"""Signature type in a signed note (c2sp.org/signed-note)."""
Rejects = Callable[["Shown"], str | None]
"""Why a verifier rejects a log; None when it accepts it."""


@dataclass(frozen=True)
class Shown:
    """What a stranger is shown."""

    log: Path
    keys: tuple[Path, ...]
    """Ed25519 keys in SPKI PEM of which one has signed the head."""
    earlier: tuple[tuple[int, bytes], ...]
    """Size and root of heads that were seen before."""

    @property
    def note(self) -> list[str]:
        """Origin, size, root of the head, and what follows."""
        return (self.log / HEAD).read_text().split("\n")

    @property
    def size(self) -> int:
        """The number of records that the head says."""
        return int(self.note[1])

    def files(self, row: str) -> list[Path]:
        """The tiles of a row (``entries``, ``0``, …) that a log of this size has (c2sp.org/tlog-tiles)."""
        width = self.size if row == "entries" else self.size // WIDTH ** int(row)
        full, rest = divmod(width, WIDTH)
        names = [_name(index) for index in range(full)] + ([f"{_name(full)}.p/{rest}"] if rest else [])
        return [self.log / "tile" / row / name for name in names]

    def proofs(self) -> list[tuple[bytes, list[bytes]]]:
        """Each record, and its inclusion proof by the leaf hashes that are there."""
        data = b"".join(path.read_bytes() for path in self.files("entries"))
        leaves = b"".join(path.read_bytes() for path in self.files("0"))
        hashes = [leaves[start : start + 32] for start in range(0, len(leaves), 32)]
        return [
            (each, merkle.inclusion_proof(hashes, index)) for index, each in enumerate(_split_records(data))
        ]


def _name(index: int) -> str:
    groups = [f"{index // 1000**power % 1000:03d}" for power in range(4) if not power or index >= 1000**power]
    return "/".join(f"x{each}" if place else each for place, each in reversed(list(enumerate(groups))))


def _split_records(data: bytes) -> list[bytes]:
    found = []
    while data:
        (length,) = struct.unpack_from(">H", data)
        found.append(data[2 : 2 + length])
        data = data[2 + length :]
    return found


def _join(records: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack(">H", len(each)) + each for each in records)


def _key_id(origin: str, pem: bytes) -> bytes:
    """How a signed note names a key (c2sp.org/signed-note, "Signatures")."""
    raw = base64.b64decode("".join(pem.decode().splitlines()[1:-1]))[-32:]
    return hashlib.sha256(origin.encode() + b"\n" + ED25519 + raw).digest()[:4]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# Verifiers.


def go(scratch: Path) -> Rejects:
    """Go's own sumdb packages. Raises `Absent` without a Go that has their source."""
    found = shutil.which("go")
    if found is None:
        raise Absent("apt-get install golang-go")
    environment = os.environ | {
        "GO111MODULE": "off",
        "GOFLAGS": "",
        "CGO_ENABLED": "0",
        "GOPATH": str(scratch / "go"),
    }
    environment.setdefault("GOCACHE", str(scratch / "cache"))
    root = subprocess.run(
        [found, "env", "GOROOT"], env=environment, capture_output=True, text=True, check=True
    )
    vendored = Path(root.stdout.strip()) / "src" / "cmd" / "vendor" / "golang.org"
    if not (vendored / "x" / "mod" / "sumdb" / "tlog").is_dir():
        raise Absent(f"{vendored}/x/mod/sumdb is not there: install Go with its source")
    (scratch / "go" / "src").mkdir(parents=True)
    (scratch / "go" / "src" / "golang.org").symlink_to(vendored)
    # Outside of GOPATH mode a program would need them from a module proxy.
    program, source = scratch / "independent_log", Path(__file__).with_suffix(".go")
    subprocess.run([found, "build", "-o", program, source], env=environment, check=True)

    def rejects(shown: Shown) -> str | None:
        earlier = [f"{size}:{_text(hashed)}" for size, hashed in shown.earlier]
        return _asked([program, shown.log, ",".join(map(str, shown.keys)), *earlier])

    return rejects


def _asked(command: Sequence[Any], **options: Any) -> str | None:
    """None for exit code 0, what was printed for 1; anything else is a fault of the verifier."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{command[0]} broke down: {done.stderr}")
    if done.returncode and not done.stdout.strip():
        raise SystemExit(f"{command[0]} gave no reason: {done.stderr}")
    return done.stdout.strip() if done.returncode else None


def sigstore_python() -> Rejects:
    """Its ``verify_checkpoint`` and ``verify_merkle_inclusion``."""
    if importlib.util.find_spec("sigstore") is None:
        raise Absent("pip install sigstore==4.5.1")
    from sigstore._internal.merkle import verify_merkle_inclusion
    from sigstore._internal.rekor.checkpoint import verify_checkpoint
    from sigstore._internal.trust import Keyring, RekorKeyring
    from sigstore.errors import VerificationError
    from sigstore.models import TransparencyLogEntry
    from sigstore_models.common import v1 as common
    from sigstore_models.rekor import v1 as rekor

    def rejects(shown: Shown) -> str | None:
        origin, size, root = shown.note[:3]
        details = common.PublicKeyDetails.PKIX_ED25519
        pems = [each.read_bytes() for each in shown.keys]
        ders = ["".join(pem.decode().splitlines()[1:-1]) for pem in pems]
        known = [common.PublicKey.from_dict({"rawBytes": each, "keyDetails": details}) for each in ders]
        keyring = RekorKeyring(Keyring(known))
        note = (shown.log / HEAD).read_text()
        signers = [_key_id(origin, pem) for pem in pems]
        signer = next((each for each in signers if _text(each)[:5] in note.partition("\n\n")[2]), signers[0])
        for index, (record, proof) in enumerate(shown.proofs()):
            told = {
                "logIndex": str(index), "logId": {"keyId": _text(signer)},
                "kindVersion": {"kind": "harness", "version": "1"}, "canonicalizedBody": _text(record),
                "inclusionProof": {
                    "logIndex": str(index), "treeSize": size, "rootHash": root,
                    "hashes": list(map(_text, proof)), "checkpoint": {"envelope": note},
                },
            }  # fmt: skip
            try:
                entry = TransparencyLogEntry(rekor.TransparencyLogEntry.from_dict(told))
                verify_checkpoint(keyring, entry)
                verify_merkle_inclusion(entry)
            except VerificationError as error:
                return f"record {index}: {str(error).partition(': expected')[0]}"
        return None

    return rejects


def sigstore_js(node: Path) -> Rejects:
    """Its ``verifyCheckpoint`` and ``verifyMerkleInclusion``, in ``node``."""

    def rejects(shown: Shown) -> str | None:
        origin = shown.note[0]
        pems = [each.read_bytes() for each in shown.keys]
        told = {
            "note": (shown.log / HEAD).read_text(),
            "origin": origin,
            "keys": [{"pem": each.decode(), "id": _key_id(origin, each).hex()} for each in pems],
            "records": [
                {"body": _text(record), "hashes": list(map(_text, proof))} for record, proof in shown.proofs()
            ],
        }
        command = ["node", Path(__file__).with_suffix(".mjs").resolve()]
        return _asked(command, cwd=node, input=json.dumps(told))

    return rejects


# Twins. Each changes a copy of the log, or says what else the stranger is shown.


def _flipped(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def _signed_by_another(shown: Shown) -> None:
    stranger, head = Ed25519PrivateKey.generate(), shown.log / HEAD
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    text = "\n".join(shown.note[:3]) + "\n"
    blob = _key_id(shown.note[0], stranger.public_key().public_bytes(*form)) + stranger.sign(text.encode())
    head.write_text(f"{text}\n— {shown.note[0]} {_text(blob)}\n")


def _signature_changed(shown: Shown) -> None:
    encoded = shown.note[4].split()[2]
    blob = bytearray(base64.b64decode(encoded))
    blob[-1] ^= 1
    (shown.log / HEAD).write_text("\n".join(shown.note).replace(encoded, _text(blob)))


def _size_changed(shown: Shown) -> None:
    origin, size, *others = shown.note
    (shown.log / HEAD).write_text("\n".join([origin, str(int(size) - 1), *others]))


def _records_changed(shown: Shown, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = shown.files("entries")[0]
    records = change(_split_records(path.read_bytes()))
    path.write_bytes(b"".join(struct.pack(">H", len(each)) + each for each in records))


Twin = Callable[[Shown], Shown | None]
OF_ALL: Mapping[str, Twin] = {
    "a bit of the head's signature": _signature_changed,
    "head signed by another key": _signed_by_another,
    "a record changed": lambda shown: _flipped(shown.files("entries")[0]),
    "two records swapped": lambda shown: _records_changed(shown, lambda all: [all[1], all[0], *all[2:]]),
    "a record removed": lambda shown: _records_changed(shown, lambda all: all[1:]),
    "a leaf hash changed": lambda shown: _flipped(shown.files("0")[0], 0),
}
OF_GO: Mapping[str, Twin] = {
    "the head's size changed": _size_changed,
    "an upper tile changed": lambda shown: _flipped(shown.files("1")[-1]),
    "an earlier head of another history": lambda shown: replace(
        shown, earlier=((shown.size - 1, bytes(32)),)
    ),
    "an earlier head of more records": lambda shown: replace(shown, earlier=((shown.size + 1, bytes(32)),)),
}
"""What is no business of those who read no tiles and know no consistency."""


def judged(name: str, shown: Shown, make: Callable[[], Rejects], twins: Sequence[str]) -> dict[str, Any]:
    """What a verifier says of the log and of each of ``twins``."""
    row: dict[str, Any] = {"verifier": name, "records": shown.size, "earlier": len(shown.earlier)}
    try:
        rejects = make()
    except Absent as absent:
        return row | {"absent": str(absent)}
    found: dict[str, str | None] = {}
    for twin in twins:
        with tempfile.TemporaryDirectory() as scratch:
            copy = replace(shown, log=shutil.copytree(shown.log, Path(scratch) / "log"))
            found[twin] = rejects({**OF_ALL, **OF_GO}[twin](copy) or copy)
    return row | {"original": rejects(shown), "twins": found}


def told(row: Mapping[str, Any]) -> str:
    """A line, and one for each thing that is not as it must be."""
    if "absent" in row:
        return f"{row['verifier']:<16} not run: {row['absent']}"
    rejected = sum(why is not None for why in row["twins"].values())
    verdict = "accepted" if row["original"] is None else f"rejected: {row['original']}"
    lines = [f"{row['verifier']:<16} {verdict}; rejected {rejected} of {len(row['twins'])} twins"]
    lines += [f"  accepts a twin: {twin}" for twin, why in row["twins"].items() if why is None]
    return "\n".join(lines)


def wrong(row: Mapping[str, Any]) -> bool:
    """Whether a verifier that ran rejects the log or accepts a twin."""
    return "absent" not in row and (row["original"] is not None or None in row["twins"].values())


def seen(run: Path, kept: Sequence[Path]) -> tuple[tuple[int, bytes], ...]:
    """The heads that the run's statements say they saw, and those in the files ``kept``."""
    found = {}
    for bundle in sorted((run / "checkpoints").glob(f"*step-*/{STATEMENT}")):
        if bundle.parent.parent.name.startswith("damaged-"):
            continue
        payload = json.loads(bundle.read_bytes())["dsseEnvelope"]["payload"]
        head = json.loads(base64.b64decode(payload))["predicate"]["log"]
        if head is not None:
            found[(int(head["size"]), bytes.fromhex(head["root"]))] = None
    for file in kept:
        _, size, root = file.read_text().split("\n")[:3]
        found[(int(size), base64.b64decode(root))] = None
    return tuple(found)


def main() -> int:
    """Verify, print, and say whether all were right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--key", type=Path, nargs="+", required=True, metavar="PUB", help="Ed25519, SPKI PEM")
    parser.add_argument(
        "--head", type=Path, nargs="+", default=[], metavar="FILE", help="heads that were kept"
    )
    parser.add_argument("--node", type=Path, metavar="DIR", help="where sigstore-js is, or is put")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    keys = tuple(path.resolve() for path in arguments.key)
    shown = Shown(arguments.run.resolve() / "log", keys, seen(arguments.run, arguments.head))
    upper = [twin for twin in OF_GO if shown.size >= WIDTH or twin != "an upper tile changed"]
    with tempfile.TemporaryDirectory(prefix="independent-") as name:
        scratch = Path(name)
        node = arguments.node or scratch / "node"
        asked: list[tuple[str, Callable[[], Rejects], list[str]]] = [
            ("Go sumdb", functools.partial(go, scratch), [*OF_ALL, *upper]),
            ("sigstore-python", sigstore_python, [*OF_ALL]),
            ("sigstore-js", lambda: sigstore_js(installed(node)), [*OF_ALL]),
        ]
        found = [judged(who, shown, make, twins) for who, make, twins in asked]
    print(f"log of {shown.size} records, {len(shown.earlier)} earlier heads")
    for row in found:
        print(told(row))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2))
    if any(map(wrong, found)):
        return 1
    return 4 if any("absent" in row for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
