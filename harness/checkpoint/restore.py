"""Reading a checkpoint back: the bytes that were hashed are the bytes that are loaded.

`Candidates` goes back through a run's checkpoints. `harness.audit.folders.opening.open_checkpoint` checks
signatures, statements, the exact file set, headers and the manifest on rank 0, which also hashes the files
that are not tensors. A header must have the very bytes that this program writes for the manifest's tensors,
otherwise the sha256 of the whole file decides.

`Loaded.fill` then reads the tensors: every rank its share, each byte of the checkpoint once in the whole job,
straight into the live tensors where they are in host memory, and compared with the digest in the manifest
while it is read. Nothing is read again after it was verified. A tensor with other bytes rejects the
checkpoint on every rank (`DamagedCheckpoint`); what was read until then is overwritten from the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.audit.folders.file_set import MANIFEST_LIMIT, read_listed
from harness.audit.folders.opening import OpenedCheckpoint, open_checkpoint
from harness.checkpoint import mesh
from harness.checkpoint.memory import PAGE, HostMemory
from harness.checkpoint.shards import Group, deal
from harness.checkpoint.snapshot import DTYPES, METADATA
from harness.errors import EnvironmentFault, EvidenceIncomplete, HarnessError, VerificationFailed
from harness.format import files as durable
from harness.format import layout, safetensors_header, strict_json
from harness.format.layout import RunFolder
from harness.format.manifest import FileEntry, Manifest, TensorEntry, checkpoint_id
from harness.format.tensor_digests import RunningDigest
from harness.provenance import log_record
from harness.provenance.policy.rules import Policy
from harness.provenance.statements import CheckpointStatement
from harness.workers import Workers

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_CHUNK = 1 << 20
"""Bytes that are read and then hashed while they are in the processor's cache."""
_ALIGNMENT = 64
"""Of each tensor in memory; a cache line."""

Key = tuple[Group, str]
"""Group and name of a tensor."""


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that a resume could not use."""

    name: str
    reason: str
    checkpoint: str | None = None
    """Its id, where a log or a manifest tells."""


class DamagedCheckpoint(VerificationFailed):
    """Tensors of a checkpoint are not what was signed; an older one may serve."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that opens: everything but its tensors is verified and in memory."""

    folder: Path
    checkpoint: str
    """Its id: hex sha256 of MANIFEST.json."""
    workers: Workers
    manifest: Manifest = field(repr=False)
    entries: Mapping[Key, TensorEntry] = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)
    """The small files that were asked for."""

    @property
    def trainer(self) -> dict[str, Any]:
        """The contents of trainer.json."""
        document = strict_json.loads(self.files[layout.TRAINER], where=layout.TRAINER)
        if not isinstance(document, dict):
            raise VerificationFailed("is not a JSON object", where=layout.TRAINER)
        return document

    def described(self, group: Group) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor of ``group``."""
        return {
            name: (_TORCH_DTYPES[entry.dtype], entry.shape)
            for (of, name), entry in self.entries.items()
            if of == group
        }

    def fill(self, targets: Mapping[Key, Tensor]) -> None:
        """Read the tensors into ``targets`` on every rank, which must be the same ones everywhere.

        Raises `DamagedCheckpoint` on every rank when a byte is not the manifest's, `EnvironmentFault` when it
        cannot be read.
        """
        sizes = [self.entries[key].end - self.entries[key].start for key in targets]
        readers = dict(zip(targets, deal(sizes, self.workers.world_size), strict=True))
        own = {key: targets[key] for key in targets if readers[key] == self.workers.rank}
        staged = _staged({key: self.entries[key] for key, target in own.items() if not _is_direct(target)})
        views = {key: staged.get(key, target) for key, target in own.items()}
        problem = self.workers.together(lambda: self._read(views))
        problems = self.workers.gather_bytes(problem.encode())
        if any(problems):
            raise DamagedCheckpoint(next(text for text in problems if text).decode())
        for key, target in targets.items():
            mesh.spread(self.workers, key[1], target, readers[key], staged.get(key))

    def _read(self, views: Mapping[Key, Tensor]) -> str:
        """Read and verify this rank's tensors; returns what is wrong with them, or nothing."""
        try:
            _read_tensors(self.folder, self.manifest, self.entries, views, self.workers.cores)
        except (VerificationFailed, EvidenceIncomplete) as error:
            return str(error)
        return ""


@dataclass(frozen=True)
class Found:
    """What a run folder has to continue from."""

    loaded: Loaded | None
    opened: OpenedCheckpoint | None
    """On rank 0."""
    skipped: tuple[Skipped, ...]
    """Newer checkpoints that do not verify, newest first; on rank 0."""

    @property
    def statement(self) -> CheckpointStatement | None:
        """What the checkpoint says of itself; on rank 0."""
        return None if self.opened is None else self.opened.statement


class Candidates:
    """The way back through the checkpoints of a run, newest first; every rank has one and goes along."""

    def __init__(
        self,
        workers: Workers,
        run: RunFolder,
        policy: Policy | None,
        wanted: Callable[[str], bool],
        origin: str | None = None,
    ) -> None:
        """``policy``: rank 0's, which opens; the others take the manifest with the id that rank 0 names, so
        they need no key. ``wanted`` names the small files that this rank keeps. ``origin``: of the run's log;
        checkpoints of other runs are passed over. None: whatever is there is of the run."""
        self._workers = workers
        self._run = run
        self._policy = policy
        self._wanted = wanted
        self._origin = origin
        self._folders: Iterator[Path] = iter(reversed(run.complete())) if policy is not None else iter(())
        self._opened: OpenedCheckpoint | None = None
        self._skipped: list[Skipped] = []

    def next(self) -> Found:
        """The newest checkpoint that opens, of those that this has not returned yet.

        Raises `EnvironmentFault` when a file cannot be read: a disk that fails now may work later, so it is
        no reason to go back in the run's history.
        """
        while agreed := json.loads(self._workers.agree(self._advance)):
            folder = self._run.checkpoints / agreed["name"]
            loaded = self._workers.together(partial(self._load, folder, agreed["checkpoint"]))
            problems = self._workers.gather_bytes(loaded.encode() if isinstance(loaded, str) else b"")
            if not any(problems) and not isinstance(loaded, str):
                return Found(loaded, self._opened, tuple(self._skipped))
            reason = next(problem for problem in problems if problem).decode()
            self._skipped.append(Skipped(folder.name, reason, agreed["checkpoint"]))
        return Found(None, None, tuple(self._skipped))

    def reject(self, loaded: Loaded, reason: str) -> None:
        """What `next` has returned turned out to be damaged."""
        self._skipped.append(Skipped(loaded.folder.name, reason, loaded.checkpoint))

    def _advance(self) -> bytes:
        """On rank 0: the next checkpoint that opens, as JSON with its name and id; null after the last."""
        if self._policy is None:
            raise HarnessError("only rank 0 opens checkpoints")
        for folder in self._folders:
            try:
                opened = open_checkpoint(folder, self._policy)
                self._require_own(opened)
                _check_rest(folder, opened.manifest)
            except EnvironmentFault:
                raise
            except HarnessError as error:
                self._skipped.append(Skipped(folder.name, str(error), _claimed_id(folder)))
                continue
            self._opened = opened
            return json.dumps({"name": folder.name, "checkpoint": opened.checkpoint_id}).encode()
        return b"null"

    def _require_own(self, opened: OpenedCheckpoint) -> None:
        run = opened.statement.run_id
        if self._origin is not None and log_record.origin_of(run) != self._origin:
            raise VerificationFailed(
                f"belongs to the run {run}, and the log to another", where=str(opened.folder)
            )

    def _load(self, folder: Path, checkpoint: str) -> Loaded | str:
        """What this rank needs of a checkpoint besides tensors, or why it is not to be used."""
        try:
            return load(self._workers, folder, checkpoint, self._wanted)
        except (VerificationFailed, EvidenceIncomplete) as error:
            return str(error)


def open_elsewhere(
    workers: Workers, opening: Callable[[], OpenedCheckpoint], wanted: Callable[[str], bool]
) -> tuple[Loaded, OpenedCheckpoint | None]:
    """The checkpoint of another run that rank 0 opens by ``opening``, verified as the own ones are.

    Only rank 0 gets the opened one. Raises on every rank what is wrong with it.
    """

    def opened_whole() -> OpenedCheckpoint:
        opened = opening()
        _check_rest(opened.folder, opened.manifest)
        return opened

    opened = workers.first_only(opened_whole)
    named = {} if opened is None else {"folder": str(opened.folder), "checkpoint": opened.checkpoint_id}
    agreed = json.loads(workers.broadcast_bytes(json.dumps(named).encode()))
    folder, identity = Path(agreed["folder"]), agreed["checkpoint"]
    return workers.together(lambda: load(workers, folder, identity, wanted)), opened


def tensors_in(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a small safetensors file. Raises `VerificationFailed` for a broken header."""
    header = safetensors_header.parse(data, len(data), where=where)
    memory = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return {
        # A copy of each: only files that others have written are laid out so that it is needed.
        span.name: memory[span.start : span.end].clone().view(_TORCH_DTYPES[span.dtype]).view(span.shape)
        for span in header.tensors
    }


def _check_rest(folder: Path, manifest: Manifest) -> None:
    """Every payload byte that is not a tensor of the model or the optimizer."""
    shared = _by_file(manifest)
    for entry in manifest.files:
        tensors = shared.get(entry.path)
        if tensors is None or not _has_our_header(folder, entry, tensors):
            _check_sha256(folder, entry)


def _by_file(manifest: Manifest) -> dict[str, list[TensorEntry]]:
    files: dict[str, list[TensorEntry]] = {}
    for tensor in manifest.tensors:
        if _group_of(tensor.file) is not None:
            files.setdefault(tensor.file, []).append(tensor)
    return files


def _group_of(file: str) -> Group | None:
    if file.startswith("model"):
        return "model"
    return "optimizer" if file.startswith("optimizer-") else None


def _has_our_header(folder: Path, entry: FileEntry, tensors: list[TensorEntry]) -> bool:
    """Whether the bytes before the tensors are the ones that `safetensors_header.build` gives for them."""
    named = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    expected, spans = safetensors_header.build(named, METADATA, alignment=PAGE)
    places = [(span.start, span.end) for span in spans]
    if places != [(tensor.start, tensor.end) for tensor in tensors]:
        return False
    with durable.open_regular(folder / entry.path) as stream:
        return stream.read(len(expected)) == expected


def _check_sha256(folder: Path, entry: FileEntry) -> None:
    where = str(folder / entry.path)
    try:
        with durable.open_regular(folder / entry.path) as stream:
            digest = hashlib.sha256()
            while piece := stream.read(_CHUNK):
                digest.update(piece)
    except OSError as error:
        raise durable.unreadable(error, where) from error
    if digest.hexdigest() != entry.sha256:
        raise VerificationFailed("the sha256 is not the one in MANIFEST.json", where=where)


def load(workers: Workers, folder: Path, checkpoint: str, wanted: Callable[[str], bool]) -> Loaded:
    """Manifest and small files of the checkpoint with that id, which is all that is trusted.

    Raises `VerificationFailed` for any byte that is not the manifest's.
    """
    data = durable.read_limited(folder / layout.MANIFEST, MANIFEST_LIMIT)
    if checkpoint_id(data) != checkpoint:
        raise VerificationFailed(
            "is not the manifest that rank 0 has read",
            where=str(folder / layout.MANIFEST),
            remedy="do all hosts see the same run folder?",
        )
    manifest = Manifest.parse(data, where=str(folder / layout.MANIFEST))
    entries: dict[Key, TensorEntry] = {}
    for entry in manifest.tensors:
        group = _group_of(entry.file)
        if group is None:
            continue
        if (group, entry.name) in entries:
            raise VerificationFailed(f"tensor `{entry.name}` is in two files", where=str(folder))
        entries[group, entry.name] = entry
    files = {
        entry.path: read_listed(folder, entry, entry.size)
        for entry in manifest.files
        if _group_of(entry.path) is None and wanted(entry.path)
    }
    return Loaded(folder, checkpoint, workers, manifest, entries, files)


def _is_direct(target: Tensor) -> bool:
    """Whether a file can be read straight into ``target``."""
    return type(target) in (Tensor, nn.Parameter) and target.device.type == "cpu" and target.is_contiguous()


def _staged(entries: Mapping[Key, TensorEntry]) -> dict[Key, Tensor]:
    """Host memory for the tensors that cannot be read into where they belong."""
    places: dict[Key, int] = {}
    size = 0
    for key, entry in entries.items():
        places[key] = size
        size += -(-(entry.end - entry.start) // _ALIGNMENT) * _ALIGNMENT
    if not places:
        return {}
    memory = HostMemory(size)
    return {
        key: memory.tensor[places[key] : places[key] + entry.end - entry.start]
        .view(_TORCH_DTYPES[entry.dtype])
        .view(entry.shape)
        for key, entry in entries.items()
    }


def _read_tensors(
    folder: Path,
    manifest: Manifest,
    entries: Mapping[Key, TensorEntry],
    views: Mapping[Key, Tensor],
    threads: int,
) -> None:
    sizes = {entry.path: entry.size for entry in manifest.files}
    descriptors: dict[str, int] = {}
    largest_first = sorted(views, key=lambda key: entries[key].start - entries[key].end)
    try:
        for file in sorted({entries[key].file for key in views}):
            with durable.open_regular(folder / file) as stream:
                descriptors[file] = os.dup(stream.fileno())
            if os.fstat(descriptors[file]).st_size != sizes[file]:
                raise VerificationFailed(f"does not have {sizes[file]} bytes", where=str(folder / file))
        with ThreadPoolExecutor(max(1, threads), "checkpoint-read") as pool:
            reads = [
                pool.submit(_read_tensor, descriptors[entries[key].file], entries[key], views[key], folder)
                for key in largest_first
            ]
            try:
                for read in reads:
                    read.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _read_tensor(descriptor: int, entry: TensorEntry, view: Tensor, folder: Path) -> None:
    """Read a tensor into the memory of ``view``, hashed on the way in."""
    where = str(folder / entry.file)
    target = view.detach().reshape(-1).view(torch.uint8).numpy().data
    digest = RunningDigest()
    offset = 0
    while offset < len(target):
        piece = target[offset : offset + _CHUNK]
        try:
            count = os.preadv(descriptor, [piece], entry.start + offset)
        except OSError as error:
            raise durable.unreadable(error, where) from error
        if not count:
            raise VerificationFailed(f"ends within tensor `{entry.name}`", where=where)
        digest.update(piece[:count])
        offset += count
    if digest.result() != entry.digest:
        raise VerificationFailed(
            f"tensor `{entry.name}` (bytes {entry.start} to {entry.end}) has other bytes than were signed",
            where=where,
        )


def _claimed_id(folder: Path) -> str | None:
    try:
        return hashlib.sha256((folder / layout.MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None
