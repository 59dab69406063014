"""Reading a checkpoint back: the bytes that were hashed are the bytes that are loaded.

Which checkpoint it is, is found by `harness.checkpoint.candidates`. Rank 0 hashes the files that are not
tensors. A header must have the very bytes that this program writes for the manifest's tensors, otherwise the
sha256 of the whole file decides.

`Loaded.fill` then reads the tensors: every rank its share, each byte of the checkpoint once in the whole job,
straight into the live tensors where they are in host memory, and compared with the digest in the manifest
while it is read. Nothing is read again after it was verified. A tensor with other bytes rejects the
checkpoint on every rank (`DamagedCheckpoint`); what was read until then is overwritten from the next one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.audit.folders.file_set import MANIFEST_LIMIT, read_listed
from harness.checkpoint import mesh
from harness.checkpoint.memory import PAGE, HostMemory
from harness.checkpoint.shards import Group, deal
from harness.checkpoint.snapshot import DTYPES, METADATA
from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format import files as durable
from harness.format import layout, safetensors_header, strict_json
from harness.format.manifest import FileEntry, Manifest, TensorEntry, checkpoint_id
from harness.format.tensor_digests import RunningDigest
from harness.workers import Workers

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_CHUNK = 1 << 20
"""Bytes that are read and then hashed while they are in the processor's cache."""
_ALIGNMENT = 64
"""Of each tensor in memory; a cache line."""

Key = tuple[Group, str]
"""Group and name of a tensor."""


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


def tensors_in(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a small safetensors file. Raises `VerificationFailed` for a broken header."""
    header = safetensors_header.parse(data, len(data), where=where)
    memory = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return {
        # A copy of each: only files that others have written are laid out so that it is needed.
        span.name: memory[span.start : span.end].clone().view(_TORCH_DTYPES[span.dtype]).view(span.shape)
        for span in header.tensors
    }


def check_rest(folder: Path, manifest: Manifest) -> None:
    """Check every payload byte that is not a tensor of the model or the optimizer.

    Raises `VerificationFailed` for one that is not the manifest's, `EnvironmentFault` for a bad disk.
    """
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
