"""What attacks on a run folder have in common: the scene, the register, and who signs what.

An attack is a function that changes the folder of a `Scene`; it is registered with what must be said::

    @attack("has 4133 bytes, the manifest says 4132")
    def a_file_is_one_byte_longer(scene: Scene) -> None:
        ...
"""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import run_folder

from harness.audit.verification import verify
from harness.format import layout, strict_json
from harness.format.manifest import checkpoint_id, dir_hash
from harness.provenance.policy import rules as policy
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import envelope, keys
from harness.provenance.signing.keys import Signer
from harness.provenance.transparency import log, tiles

MODEL = "model.safetensors"
NOBODY = "is signed by none of the 1 accepted keys"


@dataclass
class Scene:
    """A copy of a good run, the people around it, and whom the auditor trusts."""

    root: Path
    signer: Signer
    """Made the run."""
    stranger: Signer
    """Nobody trusts this one."""
    policy: Policy
    target: Path
    """What is verified: the run folder unless the attack says otherwise."""
    beside: tuple[Path, ...] = ()
    """Folders of the runs that it began with, as ``--with`` gives them."""

    def checkpoint(self, step: int) -> Path:
        """A checkpoint folder."""
        return run_folder.checkpoint(self.root, step)

    def model(self, step: int) -> Path:
        """The model file of a checkpoint."""
        return self.checkpoint(step) / MODEL

    def bundle(self, step: int) -> Path:
        """The statement of a checkpoint."""
        return self.checkpoint(step) / layout.CHECKPOINT_BUNDLE

    def rebuild(self, **options: Any) -> Path:
        """Replace the run by another one that the right key has signed."""
        shutil.rmtree(self.root)
        return run_folder.build(self.root, self.signer, **options)

    def restate(
        self, step: int, change: Callable[[dict[str, Any]], Any], *, by: Signer | None = None,
        name: str = layout.CHECKPOINT_BUNDLE,
    ) -> None:  # fmt: skip
        """Sign a changed statement, with the right key unless ``by`` is given."""
        path = self.checkpoint(step) / name
        statement = payload_of(path)
        change(statement)
        path.write_bytes(signed(strict_json.dumps(statement), by or self.signer))

    def manifest(self, step: int, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change MANIFEST.json and have the right key sign a statement about it."""
        path = self.checkpoint(step) / layout.MANIFEST
        document = json.loads(path.read_bytes())
        change(document)
        self.write_manifest(step, strict_json.dumps(document))

    def write_manifest(self, step: int, data: bytes) -> None:
        """Replace MANIFEST.json and have the right key sign a statement about it."""
        (self.checkpoint(step) / layout.MANIFEST).write_bytes(data)
        identity = checkpoint_id(data)
        entries = json.loads(data)["files"]
        covered = [(entry["path"], entry["sha256"]) for entry in entries] + [(layout.MANIFEST, identity)]
        digests = {"sha256": identity, "dirHash": dir_hash(covered)}
        self.restate(step, lambda statement: statement["subject"][0].update(digest=digests))

    def relog(self, records: Sequence[bytes], *, by: Signer | None = None) -> None:
        """Write the log anew with any records, as whoever has the key can; the right key unless ``by``."""
        folder = self.root / layout.LOG
        origin = log.read_claimed(folder).head.origin
        shutil.rmtree(folder)
        folder.mkdir()
        edge = tiles.Edge()
        for number, record in enumerate(records, start=1):
            edge.add(record)
            if number % tiles.WIDTH == 0 or number == len(records):
                for path, data in edge.files().items():
                    if number == len(records) or not tiles.is_partial(path):
                        (folder / path).parent.mkdir(parents=True, exist_ok=True)
                        (folder / path).write_bytes(data)
        head = log.Head(edge.size, edge.root(), origin)
        (folder / log.HEAD).write_bytes(log.sign_note(head, by or self.signer))

    def trust(self, **changes: Any) -> None:
        """Change the auditor's policy."""
        self.policy = dataclasses.replace(self.policy, **changes)


@dataclass(frozen=True)
class Attack:
    """A change, and what the verifier must answer."""

    mutate: Callable[[Scene], None]
    says: str
    """A part of one of its findings."""
    code: int


ATTACKS: dict[str, Attack] = {}


def attack(says: str, code: int = 1) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Register an attack that must be answered with exit code ``code`` and a finding that ``says`` this."""

    def register(mutate: Callable[[Scene], None]) -> Callable[[Scene], None]:
        name = mutate.__name__.replace("_", " ")
        assert name not in ATTACKS, name
        ATTACKS[name] = Attack(mutate, says, code)
        return mutate

    return register


def judge(scene: Scene) -> tuple[int, list[str]]:
    """Exit code and findings of the verifier; its report must be plain JSON, and each finding one line that
    says what, where, and what to do next."""
    report = verify.verify(scene.target, scene.policy, beside=scene.beside, quiet=True)
    json.dumps(report.document(), allow_nan=False).encode()
    for finding in report.findings:
        assert finding.what
        assert finding.where
        assert finding.remedy
    messages = [str(finding) for finding in report.findings]
    assert not [text for text in (*messages, *report.notes) if not text.isprintable()]
    return report.exit_code, messages


def trusted(*signers: Signer) -> Policy:
    """The policy of somebody who was given the public keys."""
    return policy.from_keys([key for signer in signers for key in keys.public_keys(signer)])


def signed(payload: bytes, signer: Signer) -> bytes:
    """A bundle around ``payload``."""
    return envelope.sign(payload, signer.ed25519, keys.public_keys(signer)[0])


def payload_of(bundle: Path) -> dict[str, Any]:
    """What a bundle signs, unchecked."""
    document = json.loads(bundle.read_bytes())["dsseEnvelope"]["payload"]
    statement: dict[str, Any] = json.loads(base64.b64decode(document))
    return statement


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(strict_json.dumps(document))


def flip(path: Path, offset: int, bits: int = 1) -> None:
    """Flip ``bits`` of a byte; negative offsets count from the end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= bits
    path.write_bytes(bytes(data))
