"""Reading a checkpoint back: the bytes that were hashed are the bytes that are loaded.

`harness.audit.opening.open_checkpoint` has checked signatures, statements, the exact file set, headers and
the manifest on rank 0. Then every rank reads its share of the tensors, each byte of the checkpoint once in
the whole job, and compares each tensor with its digest in the manifest while it reads. Nothing is read again
after it was verified: `Loaded.fill` hands the tensors on from memory, to the ranks that need them.

The files that are not tensors, and the headers, are checked by rank 0 alone: a header must have the very
bytes that this program writes for the manifest's tensors, otherwise the sha256 of the whole file decides.
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
from torch import Tensor

from harness.audit.opening import MANIFEST_LIMIT, open_checkpoint
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
from harness.provenance.policy import Policy
from harness.provenance.statements import CheckpointStatement
from harness.workers import Workers

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_CHUNK = 4 << 20
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


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in the memory of the ranks, verified; each rank holds a share of its tensors."""

    folder: Path
    checkpoint: str
    """Its id: hex sha256 of MANIFEST.json."""
    workers: Workers
    entries: Mapping[Key, TensorEntry] = field(repr=False)
    readers: Mapping[Key, int] = field(repr=False)
    """Which rank has read a tensor."""
    share: Mapping[Key, Tensor] = field(repr=False)
    """What this rank has read: whole tensors in host memory."""
    memory: HostMemory = field(repr=False)
    """Where they lie."""
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

    def fill(self, group: Group, name: str, target: Tensor) -> None:
        """Copy a tensor into ``target`` on every rank; every rank must ask for the same."""
        key = (group, name)
        mesh.spread(self.workers, name, target, self.readers[key], self.share.get(key))


@dataclass(frozen=True)
class Found:
    """What a run folder has to continue from."""

    loaded: Loaded | None
    statement: CheckpointStatement | None
    """On rank 0."""
    skipped: tuple[Skipped, ...]
    """Newer checkpoints that do not verify, newest first; on rank 0."""


def newest(workers: Workers, run: RunFolder, policy: Policy | None, wanted: Callable[[str], bool]) -> Found:
    """The newest checkpoint of ``run`` that verifies, every payload byte included; called by every rank.

    ``policy``: rank 0's, which opens; the others take the manifest with the id that rank 0 names, so they
    need no key. ``wanted`` names the small files that this rank keeps. Raises `EnvironmentFault` when a file
    cannot be read: a disk that fails now may work later, so it is no reason to go back in the run's history.
    """
    skipped: list[Skipped] = []
    opening = _Opening(run, policy, skipped) if policy is not None else None

    def advance() -> bytes:
        if opening is None:
            raise HarnessError("only rank 0 opens checkpoints")
        return opening.advance()

    while agreed := json.loads(workers.agree(advance)):
        folder = run.checkpoints / agreed["name"]
        loaded = workers.together(partial(_attempt, workers, folder, agreed["checkpoint"], wanted))
        problems = workers.gather_bytes(loaded.encode() if isinstance(loaded, str) else b"")
        if not any(problems) and not isinstance(loaded, str):
            return Found(loaded, None if opening is None else opening.statement, tuple(skipped))
        reason = next(problem for problem in problems if problem).decode()
        skipped.append(Skipped(folder.name, reason, agreed["checkpoint"]))
    return Found(None, None, tuple(skipped))


def tensors_in(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a small safetensors file. Raises `VerificationFailed` for a broken header."""
    header = safetensors_header.parse(data, len(data), where=where)
    memory = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return {
        # A copy of each: only files that others have written are laid out so that it is needed.
        span.name: memory[span.start : span.end].clone().view(_TORCH_DTYPES[span.dtype]).view(span.shape)
        for span in header.tensors
    }


class _Opening:
    """Rank 0's way back through the checkpoints of a run."""

    def __init__(self, run: RunFolder, policy: Policy, skipped: list[Skipped]) -> None:
        self._folders: Iterator[Path] = iter(reversed(run.complete()))
        self._policy = policy
        self._skipped = skipped
        self.statement: CheckpointStatement | None = None

    def advance(self) -> bytes:
        """The next checkpoint that opens, as JSON with its name and id; null after the last."""
        for folder in self._folders:
            try:
                opened = open_checkpoint(folder, self._policy)
                _check_rest(folder, opened.manifest)
            except EnvironmentFault:
                raise
            except HarnessError as error:
                self._skipped.append(Skipped(folder.name, str(error), _claimed_id(folder)))
                continue
            self.statement = opened.statement
            return json.dumps({"name": folder.name, "checkpoint": opened.checkpoint_id}).encode()
        return b"null"


def _attempt(workers: Workers, folder: Path, checkpoint: str, wanted: Callable[[str], bool]) -> Loaded | str:
    """This rank's share, or why the checkpoint is not to be used."""
    try:
        return _load(workers, folder, checkpoint, wanted)
    except (VerificationFailed, EvidenceIncomplete) as error:
        return str(error)


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
        raise _unreadable(error, where) from error
    if digest.hexdigest() != entry.sha256:
        raise VerificationFailed("the sha256 is not the one in MANIFEST.json", where=where)


def _load(workers: Workers, folder: Path, checkpoint: str, wanted: Callable[[str], bool]) -> Loaded:
    """This rank's share. Raises `VerificationFailed` for any byte that is not the manifest's."""
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
    hands = deal([entry.end - entry.start for entry in entries.values()], workers.world_size)
    readers = dict(zip(entries, hands, strict=True))
    own = {key: entry for key, entry in entries.items() if readers[key] == workers.rank}
    memory, share = _read_tensors(folder, manifest, own, workers.cores)
    files = {
        entry.path: _read_small(folder, entry)
        for entry in manifest.files
        if _group_of(entry.path) is None and wanted(entry.path)
    }
    return Loaded(folder, checkpoint, workers, entries, readers, share, memory, files)


def _read_tensors(
    folder: Path, manifest: Manifest, own: Mapping[Key, TensorEntry], threads: int
) -> tuple[HostMemory, dict[Key, Tensor]]:
    places: dict[Key, int] = {}
    size = 0
    for key, entry in own.items():
        places[key] = size
        size += -(-(entry.end - entry.start) // _ALIGNMENT) * _ALIGNMENT
    memory = HostMemory(size)
    sizes = {entry.path: entry.size for entry in manifest.files}
    descriptors: dict[str, int] = {}
    try:
        for file in sorted({entry.file for entry in own.values()}):
            with durable.open_regular(folder / file) as stream:
                descriptors[file] = os.dup(stream.fileno())
            if os.fstat(descriptors[file]).st_size != sizes[file]:
                raise VerificationFailed(f"does not have {sizes[file]} bytes", where=str(folder / file))
        with ThreadPoolExecutor(max(1, threads), "checkpoint-read") as pool:
            reads = [
                pool.submit(
                    _read_tensor,
                    descriptors[entry.file],
                    entry,
                    memory.view[places[key] : places[key] + entry.end - entry.start],
                    str(folder / entry.file),
                )
                for key, entry in sorted(own.items(), key=lambda pair: pair[1].start - pair[1].end)
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
    return memory, {key: _view(memory, places[key], entry) for key, entry in own.items()}


def _read_tensor(descriptor: int, entry: TensorEntry, target: memoryview, where: str) -> None:
    """Read a tensor into ``target``, hashed on the way in."""
    digest = RunningDigest()
    offset = 0
    while offset < len(target):
        piece = target[offset : offset + _CHUNK]
        try:
            count = os.preadv(descriptor, [piece], entry.start + offset)
        except OSError as error:
            raise _unreadable(error, where) from error
        if not count:
            raise VerificationFailed(f"ends within tensor `{entry.name}`", where=where)
        digest.update(piece[:count])
        offset += count
    if digest.result() != entry.digest:
        raise VerificationFailed(
            f"tensor `{entry.name}` (bytes {entry.start} to {entry.end}) has other bytes than were signed",
            where=where,
        )


def _read_small(folder: Path, entry: FileEntry) -> bytes:
    data = durable.read_limited(folder / entry.path, entry.size)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise VerificationFailed("the sha256 is not the one in MANIFEST.json", where=str(folder / entry.path))
    return data


def _view(memory: HostMemory, start: int, entry: TensorEntry) -> Tensor:
    piece = memory.tensor[start : start + entry.end - entry.start]
    return piece.view(_TORCH_DTYPES[entry.dtype]).view(entry.shape)


def _unreadable(error: OSError, where: str) -> EnvironmentFault:
    what = f"cannot be read: {error.strerror or error}"
    return EnvironmentFault(what, where=where, remedy="check the disk and the permissions")


def _claimed_id(folder: Path) -> str | None:
    try:
        return hashlib.sha256((folder / layout.MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None
