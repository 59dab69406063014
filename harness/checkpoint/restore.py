"""Reading a checkpoint back: the bytes that were hashed are the bytes that are loaded.

`harness.audit.opening.open_checkpoint` has checked signatures, statements, the exact file set and the
manifest; here each payload file is read once, hashed while it is read, and its tensors are views of that
same memory. Nothing is read again after it was verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.audit.opening import MANIFEST_LIMIT, open_checkpoint
from harness.checkpoint.snapshot import DTYPES
from harness.errors import EnvironmentFault, HarnessError, VerificationFailed
from harness.format import files as durable
from harness.format import layout, safetensors_header, strict_json
from harness.format.layout import RunFolder
from harness.format.manifest import FileEntry, Manifest, checkpoint_id
from harness.provenance.policy import Policy
from harness.provenance.statements import CheckpointStatement

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that a resume could not use."""

    name: str
    reason: str
    checkpoint: str | None = None
    """Its id, where a log or a manifest tells."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory whose bytes are those of its manifest."""

    folder: Path
    checkpoint: str
    """Its id: hex sha256 of MANIFEST.json."""
    tensors: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    """File → name → CPU tensor."""
    files: Mapping[str, bytes] = field(repr=False)
    """The payload files that are not safetensors."""

    @property
    def trainer(self) -> dict[str, Any]:
        """The contents of trainer.json."""
        document = strict_json.loads(self.files[layout.TRAINER], where=layout.TRAINER)
        if not isinstance(document, dict):
            raise VerificationFailed("is not a JSON object", where=layout.TRAINER)
        return document


@dataclass(frozen=True)
class Found:
    """What a run folder has to continue from."""

    loaded: Loaded | None
    statement: CheckpointStatement | None
    skipped: tuple[Skipped, ...]
    """Newer checkpoints that do not verify, newest first."""


def newest(run: RunFolder, policy: Policy, wanted: Callable[[str], bool]) -> Found:
    """The newest checkpoint of ``run`` that verifies, every payload byte included.

    ``wanted`` names the payload files to keep in memory. Raises `EnvironmentFault` when a file cannot be
    read: a disk that fails now may work later, so it is no reason to go back in the run's history.
    """
    skipped: list[Skipped] = []
    for folder in reversed(run.complete()):
        try:
            opened = open_checkpoint(folder, policy)
            loaded = _load(folder, opened.checkpoint_id, opened.manifest, wanted, hash_others=True)
            return Found(loaded, opened.statement, tuple(skipped))
        except EnvironmentFault:
            raise
        except HarnessError as error:
            skipped.append(Skipped(folder.name, str(error), _claimed_id(folder)))
    return Found(None, None, tuple(skipped))


def load_agreed(folder: Path, checkpoint: str, wanted: Callable[[str], bool]) -> Loaded:
    """Load the ``wanted`` files of the checkpoint that rank 0 has verified and named by its id.

    The id is the digest of the manifest and the manifest holds the digest of every file, so the same bytes
    are loaded without the signing key on this host. Raises `VerificationFailed` for any other bytes.
    """
    data = durable.read_limited(folder / layout.MANIFEST, MANIFEST_LIMIT)
    if checkpoint_id(data) != checkpoint:
        raise VerificationFailed(
            "is not the manifest that rank 0 has read",
            where=str(folder / layout.MANIFEST),
            remedy="do all hosts see the same run folder?",
        )
    manifest = Manifest.parse(data, where=str(folder / layout.MANIFEST))
    return _load(folder, checkpoint, manifest, wanted, hash_others=False)


def _load(
    folder: Path, checkpoint: str, manifest: Manifest, wanted: Callable[[str], bool], *, hash_others: bool
) -> Loaded:
    tensors: dict[str, Mapping[str, Tensor]] = {}
    files: dict[str, bytes] = {}
    for entry in manifest.files:
        keep = wanted(entry.path)
        if not keep and not hash_others:
            continue
        memory = _read(folder, entry)
        if keep and entry.path.endswith(".safetensors"):
            tensors[entry.path] = _views(memory, entry)
        elif keep:
            files[entry.path] = memory.numpy().tobytes()
    return Loaded(folder, checkpoint, tensors, files)


def _read(folder: Path, entry: FileEntry) -> Tensor:
    """The file's bytes in fresh memory, hashed on the way in."""
    memory = torch.empty(entry.size, dtype=torch.uint8)
    view = memory.numpy().data
    digest = hashlib.sha256()
    where = str(folder / entry.path)
    try:
        with open(where, "rb", buffering=0) as stream:
            offset = 0
            while offset < entry.size:
                count = stream.readinto(view[offset : offset + _CHUNK])
                if not count:
                    raise VerificationFailed(f"ends after {offset} of {entry.size} bytes", where=where)
                digest.update(view[offset : offset + count])
                offset += count
            if stream.read(1):
                raise VerificationFailed(f"is longer than {entry.size} bytes", where=where)
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise EnvironmentFault(what, where=where, remedy="check the disk and the permissions") from error
    if digest.hexdigest() != entry.sha256:
        raise VerificationFailed("the sha256 is not the one in MANIFEST.json", where=where)
    return memory


def _views(memory: Tensor, entry: FileEntry) -> dict[str, Tensor]:
    # Parsing needs the header only; the copy of a large body would double the memory.
    prefix = memory[:8].numpy().tobytes()
    length = 8 + int.from_bytes(prefix, "little")
    header = safetensors_header.parse(memory[:length].numpy().tobytes(), entry.size, where=entry.path)
    return {span.name: _view(memory, span.start, span.end, span.dtype, span.shape) for span in header.tensors}


def _view(memory: Tensor, start: int, end: int, dtype: str, shape: Sequence[int]) -> Tensor:
    torch_dtype = _TORCH_DTYPES[dtype]
    piece = memory[start:end]
    if start % torch_dtype.itemsize:
        # Only files that others have written are laid out so.
        piece = piece.clone()
    return piece.view(torch_dtype).view(tuple(shape))


def _claimed_id(folder: Path) -> str | None:
    try:
        return hashlib.sha256((folder / layout.MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None
