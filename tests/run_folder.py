"""A small run folder, valid in every part and signed, made without torch and without training.

Example::

    signer = run_folder.identity(tmp_path / "me")
    root = run_folder.build(tmp_path / "run", signer)                      # checkpoints 10, 20, 30
    root = run_folder.build(tmp_path / "run", signer, pruned=(10,))        # the first without payload
    root = run_folder.build(tmp_path / "run", signer, tweak=change)        # change(step, predicate)

For another story, write it step by step with `SampleRun`: `train`, `save`, `advance`, `resume`, `prune`…
Two builds with the same arguments hold the same tensors, metrics and identities; signatures of P-256 differ.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.format import chain, ledger, strict_json
from harness.format.layout import RunFolder, checkpoint_name
from harness.format.manifest import FileEntry, Manifest, TensorEntry, state_digest
from harness.format.safetensors_header import build as build_header
from harness.format.tensor_digests import tensor_digest
from harness.provenance import seal
from harness.provenance.log_record import record_of
from harness.provenance.signing import keys
from harness.provenance.signing.keys import Signer
from harness.provenance.transparency import log

Predicate = dict[str, Any]
Tweak = Callable[[int, Predicate], None]
"""Given step and predicate just before sealing; changes the predicate in place."""

CONFIG = """\
run: {dir: runs/sample, seed: 3}
task: {kind: "toy_task:Toy"}
train: {steps: 30, global_batch: 8, micro_batch: 8}
checkpoint: {every: 10}
"""
TENSORS = {
    "model.safetensors": [("embed.weight", [4, 3]), ("head.bias", [3])],
    "optimizer-00001-of-00001.safetensors": [
        ("optimizer.embed.weight.exp_avg", [4, 3]),
        ("optimizer.head.bias.exp_avg", [3]),
    ],
    "rng-rank-00000.safetensors": [("torch.cpu", [16])],
}
"""File → (name, shape) of its tensors, all F32."""
SAMPLES = 8
"""Samples of an update."""


def identity(out: Path) -> Signer:
    """A new signing identity in ``out`` + .key, .ed25519.pub, .p256.pub."""
    return keys.load_signer(keys.create(out).private)


@dataclass(frozen=True)
class Saved:
    """A checkpoint of the sample run."""

    folder: Path
    step: int
    sequence: int
    checkpoint: str
    """Checkpoint id."""

    @property
    def reference(self) -> dict[str, Any]:
        """How statements name it: ``{checkpoint, step}``."""
        return {"checkpoint": self.checkpoint, "step": self.step}

    def as_start(self, run: SampleRun) -> dict[str, Any]:
        """How the statements of a child name it; ``run`` is the one that it belongs to."""
        bundle = (self.folder / "provenance" / "checkpoint.sigstore.json").read_bytes()
        return {**self.reference, "run": run.run_id, "name": run.name, "bundle_sha256": _sha256(bundle)}


@dataclass
class SampleRun:
    """A run that is being written; the attributes say where it stands."""

    root: Path
    signer: Signer
    name: str = "sample"
    seed: int = 3
    values: str = ""
    """Goes into every tensor value: two runs with other ``values`` have other tensors."""
    config: str = CONFIG
    tweak: Tweak | None = None
    shift: Mapping[str, float] = field(default_factory=dict)
    """Tensor name → what is added to each of its elements."""
    files: Mapping[str, bytes] = field(default_factory=lambda: {"config.json": b"{}\n"})
    """More payload."""
    tensors: Mapping[str, Sequence[tuple[str, list[int]]]] = field(default_factory=lambda: TENSORS)
    """File → (name, shape) of its tensors."""
    step: int = 0
    head: bytes = chain.GENESIS
    parent: Saved | None = None
    start: Mapping[str, Any] | None = None
    """The checkpoint of another run that this one began with, as `Saved.as_start` names it."""
    policy: bytes | None = None
    """The copy of the policy that it is made under, written with each checkpoint."""
    log_head: log.Head | None = None
    segment: dict[str, Any] = field(default_factory=lambda: _segment(0, "first launch", "genesis", None))
    saved: dict[int, Saved] = field(default_factory=dict)
    """Newest checkpoint of each step."""
    _last: dict[str, Any] = field(default_factory=dict)
    """The newest line of the metrics."""
    _lines: bytes = b""
    """The lines of this launch."""

    def __post_init__(self) -> None:
        self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        self.folder.run_config.write_text(self.config)

    @property
    def folder(self) -> RunFolder:
        """The names in the folder."""
        return RunFolder(self.root)

    @property
    def run_id(self) -> str:
        """Depends on name and seed only."""
        return hashlib.sha256(f"{self.name} {self.seed}".encode()).hexdigest()[:32]

    def train(self, until: int) -> None:
        """Append the metrics of every step up to ``until``."""
        with open(self.folder.metrics, "ab") as stream:
            for step in range(self.step + 1, until + 1):
                line = self._line(step)
                data = strict_json.dumps(line)
                stream.write(data)
                self._last = line
                self._lines += data
                self.head, self.step = bytes.fromhex(line["chain"]), step

    def save(self) -> Saved:
        """Seal and log a checkpoint of the current step, whose parent is the one before."""
        folder = self.folder.checkpoint(self.step)
        folder.mkdir()
        manifest = self._payload(folder)
        facts = self._predicate(manifest)
        if self.tweak is not None:
            self.tweak(self.step, facts)
        sealed = seal.seal(folder, manifest, folder.name, facts, self.signer)
        if self.policy is not None:
            self.folder.policy.write_bytes(self.policy)
        sequence = int(facts["sequence"])
        record = record_of(self.run_id, sequence, self.step, sealed.checkpoint_id, sealed.bundle_sha256)
        self.log_head = log.append(self.folder.log, record, self.signer, f"harness/run/{self.run_id}")
        self.parent = Saved(folder, self.step, sequence, sealed.checkpoint_id)
        self.saved[self.step] = self.parent
        return self.parent

    def advance(self, *steps: int) -> None:
        """Train up to each of ``steps`` and save there."""
        for step in steps:
            self.train(step)
            self.save()

    def resume(
        self, kind: str = "exact", *, at: int | None = None, skipped: Sequence[Mapping[str, Any]] = (),
        accepted: Sequence[str] = (), differences: Sequence[Mapping[str, str]] = (),
    ) -> None:  # fmt: skip
        """A new launch that continues the checkpoint ``at`` (default: the newest); later metrics go.

        Without any checkpoint it is the first launch once more, as a trainer calls it.
        """
        if at is not None:
            self.parent = self.saved[at]
        if self.parent is None:
            self.segment = _segment(0, "first launch", "genesis", None)
        else:
            self.segment = _segment(self.segment["number"] + 1, "resume", kind, self.parent.reference)
        self.segment |= {
            "skipped": list(skipped), "accepted": list(accepted), "differences": list(differences),
        }  # fmt: skip
        self.step = 0 if self.parent is None else self.parent.step
        lines = self.folder.metrics.read_bytes().splitlines(keepends=True)[: self.step]
        self.folder.metrics.write_bytes(b"".join(lines))
        self._lines = b""
        self._last = strict_json.loads(lines[-1], where="metrics") if lines else {}
        self.head = bytes.fromhex(self._last["chain"]) if lines else bytes(32)

    def set_aside(self, step: int, reason: str = "has other bytes than were signed") -> dict[str, Any]:
        """Rename a checkpoint as a resume does that found it damaged; returns the entry for ``skipped``."""
        saved = self.saved[step]
        saved.folder.rename(saved.folder.with_name(f"damaged-{saved.folder.name}-1"))
        return {"name": saved.folder.name, "reason": reason, "checkpoint": saved.checkpoint}

    def prune(self, step: int) -> Path:
        """Remove the payload of a checkpoint as ``checkpoint.keep`` does."""
        return prune(self.saved[step].folder)

    def _line(self, step: int) -> Predicate:
        batch = hashlib.sha256(f"batch {step} {self.seed}".encode()).digest()[:16]
        rng = hashlib.sha256(f"rng {step} {self.seed}".encode()).digest()[:16]
        loss, grad_norm = _float32(1 + 1 / step), _float32(1 / (step + 2))
        gradients = hashlib.sha256(f"gradients {step} {self.seed}".encode()).digest()
        state = hashlib.sha256(f"state {step} {self.seed}".encode()).digest() if step % 5 == 0 else None
        head = chain.advance(
            self.head, step=step, batch=batch, rng=rng, loss=loss, grad_norm=grad_norm,
            gradients=gradients, state=state,
        )  # fmt: skip
        line = {
            "step": step, "loss": loss, "lr": 0.001, "grad_norm": grad_norm, "samples": step * SAMPLES,
            "samples_per_s": 100.0, "time": 1_795_000_000.0 + step, "batch": batch.hex(), "rng": rng.hex(),
            "gradients": gradients.hex(), "chain": head.hex(),
        }  # fmt: skip
        line |= {} if state is None else {"state": state.hex()}
        return line | ({"evaluation": {"accuracy": 0.5}} if step % 10 == 0 else {})

    def _payload(self, folder: Path) -> Manifest:
        contents: dict[str, bytes] = {}
        tensors: list[TensorEntry] = []
        for file, specification in self.tensors.items():
            header, spans = build_header(
                [(name, "F32", shape) for name, shape in specification], {"format": "pt"}
            )
            bodies = [self._values(span.name, span.end - span.start) for span in spans]
            contents[file] = header + b"".join(bodies)
            tensors += [
                TensorEntry(
                    span.name, file, span.dtype, span.shape, span.start, span.end, tensor_digest(body)
                )
                for span, body in zip(spans, bodies, strict=True)
            ]
        contents["trainer.json"] = strict_json.dumps(self._trainer())
        contents["ledger.json"] = ledger.Ledger(mode="warn").to_bytes()
        contents |= self.files
        for path, data in contents.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(data)
        entries = (FileEntry(path, len(data), _sha256(data)) for path, data in sorted(contents.items()))
        return Manifest(
            tuple(entries), tuple(sorted(tensors, key=lambda each: (each.file, each.start, each.name)))
        )

    def _values(self, name: str, size: int) -> bytes:
        seeds = [
            f"{self.values}{self.seed} {name} {self.step} {index}".encode() for index in range(size // 4)
        ]
        numbers = [int.from_bytes(hashlib.sha256(seed).digest()[:3]) / 2**24 - 0.5 for seed in seeds]
        return b"".join(struct.pack("<f", number + self.shift.get(name, 0.0)) for number in numbers)

    def _cursor(self) -> dict[str, int]:
        samples = self.step * SAMPLES
        return {"step": self.step, "samples": samples, "tokens": samples, "epoch": 0, "position": samples}

    def _trainer(self) -> dict[str, Any]:
        return {
            "format": "harness-trainer/1", "step": self.step, "world_size": 1, "chain": self.head.hex(),
            "segment": self.segment["number"], "cursor": self._cursor(), "aliases": {}, "groups": [],
        }  # fmt: skip

    def _predicate(self, manifest: Manifest) -> Predicate:
        line = self._last
        assert line["step"] == self.step
        parent, head = self.parent, self.log_head
        return {
            "run": {"id": self.run_id, "name": self.name, "seed": self.seed},
            "sequence": 0 if parent is None else parent.sequence + 1,
            "steps": {"from": 0 if parent is None else parent.step, "to": self.step},
            "parent": "genesis" if parent is None else parent.reference,
            "start": self.start,
            "policy": None if self.policy is None else {"name": "team.yaml", "sha256": _sha256(self.policy)},
            "segment": self.segment,
            "launch": {
                "command": ["harness", "train", "toy.yaml"], "launcher": "bare", "world_size": 1, "nodes": 1,
                "mesh": {"data_parallel": 1}, "precision": "fp32", "compile": False, "parallel": "ddp",
                "backend": "gloo",
            },
            "config": {"sha256": _sha256(self.config.encode()), "text": self.config},
            "code": {
                "harness": "0.1.0", "git_commit": "d" * 40, "dirty": False, "diff_sha256": None,
                "task": {"import_path": "toy_task:Toy", "sha256": "a" * 64},
            },
            "data": {
                "kind": "toy", "corpus_sha256": "e" * 64, "tokenizer_sha256": None, "counts": {"samples": 50},
            },
            "cursor": self._cursor(),
            "environment": {"python": "3.11.7", "packages": {"torch": "2.13.0"}},
            "determinism": {
                "mode": "warn", "settings": {"threads": 1, "deterministic_algorithms": False},
                "ledger": ledger.summary(ledger.Ledger(mode="warn").to_bytes()),
            },
            "state": {
                "sha256": state_digest(manifest.tensors), "tensors": len(manifest.tensors), "parameters": 15,
            },
            "metrics": {
                "chain": self.head.hex(), "lines": _sha256(self._lines),
                "loss": repr(line["loss"]), "grad_norm": repr(line["grad_norm"]),
                "gradients": line["gradients"], "state": line.get("state"),
                "evaluation": {"accuracy": "0.5"} if self.step >= 10 else {},
            },
            "log": None if head is None else {"size": head.size, "root": head.root.hex()},
            "created": "2026-11-23T20:00:00Z",
            "outcome": "ok",
        }  # fmt: skip


def build(
    root: Path, signer: Signer, *, steps: Sequence[int] = (10, 20, 30), pruned: Sequence[int] = (),
    resumes: Mapping[int, str] | None = None, skipped: Sequence[Mapping[str, Any]] = (), **options: Any,
) -> Path:  # fmt: skip
    """A run folder at ``root`` with checkpoints of ``steps``; ``options`` are the fields of `SampleRun`.

    ``resumes``: step → class (``exact``, ``same-data``, ``accepted``) of launches that continue that step's
    checkpoint; their statements list ``skipped``. ``pruned``: steps whose payload is removed.
    """
    run = SampleRun(root, signer, **options)
    for step in steps:
        run.advance(step)
        if resumes is not None and step in resumes:
            run.resume(resumes[step], skipped=skipped)
    for step in pruned:
        run.prune(step)
    return root


def prune(folder: Path) -> Path:
    """Remove the payload of a checkpoint folder and rename it; returns the new path."""
    target = folder.rename(folder.with_name(f"pruned-{folder.name}"))
    for entry in target.iterdir():
        if entry.name not in ("MANIFEST.json", "model.sig", "provenance"):
            entry.unlink()
    return target


def checkpoint(root: Path, step: int) -> Path:
    """The folder of ``step``."""
    return root / "checkpoints" / checkpoint_name(step)


def _segment(number: int, reason: str, kind: str, source: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "number": number, "reason": reason, "class": kind, "differences": [], "accepted": [], "skipped": [],
        "resumed_from": source,
    }  # fmt: skip


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
