"""Writing behind the training loop: hash while writing, seal, publish by one rename, then log and prune.

- `CheckpointWriter.save` takes images in host memory and returns; a thread does the rest. A second save waits
  for the first and returns how long it waited: at most one save is in flight, the arena is never overwritten.
- The digests in the manifest are of the bytes in memory, while they are written; nothing is read back.
- The folder is built as ``.tmp-NAME`` and renamed after every file and folder in it is on disk, so a name
  ``step-*`` is complete by construction. The log entry follows the rename: a crash between the two leaves
  a signed checkpoint that is not in the log yet, which the next launch completes.
- ``keep`` removes the tensors of older checkpoints only after a newer one is logged; their manifests and
  signatures stay under ``pruned-step-*``, so the lineage survives.
- A failure is raised in the training thread by the next `check`, `save` or `wait`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.checkpoint.snapshot import FileImage
from harness.errors import EnvironmentFault, HarnessError, UsageError, storage_fault
from harness.format import files as durable
from harness.format import layout
from harness.format.layout import RunFolder
from harness.format.manifest import FileEntry, Manifest, TensorEntry
from harness.provenance import log, seal
from harness.provenance.history import origin_of, record_of
from harness.provenance.keys import Signer
from harness.terminal import human_bytes

_CHUNK = 16 << 20
"""Bytes of one write call."""
_SLACK = 1 << 20
"""Bytes that manifest, signatures and log may need besides the payload."""
_NICENESS = 19
"""Of the writing threads of a writer that steps back: on two cores that also train, the step after a save
took 0.5 s longer at 0, and 0.1 s at 19."""


@dataclass(frozen=True)
class Commit:
    """A checkpoint that is on disk, signed and logged."""

    name: str
    step: int
    sequence: int
    checkpoint: str
    """Checkpoint id: hex sha256 of MANIFEST.json."""
    seconds: float = 0.0
    """From the start of the background work to the end of the log entry."""
    size: int = 0
    """Bytes of the payload."""


Predicate = Callable[[Manifest, Commit | None, log.Head | None], Mapping[str, Any]]
"""The statement's facts, given the manifest, the parent commit and the log head seen."""


@dataclass(frozen=True)
class Save:
    """What a checkpoint holds."""

    step: int
    images: Sequence[FileImage]
    files: Mapping[str, bytes]
    """Small payload files besides the images."""
    predicate: Predicate
    before: Callable[[], None] = lambda: None
    """Runs first, in the background: makes durable what the checkpoint relies on (metrics.jsonl)."""
    nonfinite: bool = False
    """The last state of a run that went wrong: published as ``nonfinite-step-*``, never a parent."""


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time, from one process (rank 0)."""

    def __init__(
        self,
        run: RunFolder,
        run_id: str,
        signer: Signer,
        *,
        parent: Commit | None,
        head: log.Head | None,
        keep: int | Literal["all"] = "all",
        set_aside: Mapping[str, Path] | None = None,
        step_back: bool = False,
    ) -> None:
        """``set_aside``: folders with the name of a coming checkpoint that a resume has skipped as damaged;
        they are renamed, not overwritten. ``step_back``: leave the cores to other threads that want them, for
        training on a CPU; on a GPU only the loader would be in the way, and a save must not starve."""
        self._run = run
        self._run_id = run_id
        self._signer = signer
        self._keep = keep
        self._set_aside = dict(set_aside or {})
        self._step_back = step_back
        self._head = head
        self._thread: threading.Thread | None = None
        self._failure: HarnessError | None = None
        self.parent = parent
        self.on_commit: list[Callable[[Commit], None]] = []
        """Called in the background thread after each commit."""

    def save(self, save: Save) -> float:
        """Begin to write; returns the seconds spent waiting for a save still in flight."""
        started = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - started
        self._thread = threading.Thread(target=self._work, args=(save,), name="checkpoint-writer")
        self._thread.start()
        return waited

    @property
    def failed(self) -> bool:
        """Whether a background save went wrong; `wait` raises the reason."""
        return self._failure is not None

    def check(self) -> None:
        """Raise the failure of a background save, if there was one."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Until nothing is in flight; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _work(self, save: Save) -> None:
        if self._step_back and sys.platform.startswith("linux"):
            # Niceness belongs to a thread on Linux, and the threads that it starts inherit it.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            self._commit(save)
        except HarnessError as error:
            self._failure = error
        except OSError as error:
            self._failure = storage_fault(error, "writing a checkpoint", self._run.checkpoints)
        except Exception as error:
            self._failure = HarnessError(f"writing a checkpoint failed: {type(error).__name__}: {error}")
            self._failure.__cause__ = error

    def _commit(self, save: Save) -> None:
        started = time.perf_counter()
        save.before()
        self._run.checkpoints.mkdir(parents=True, exist_ok=True)
        _require_space(self._run.checkpoints, save)
        name = layout.checkpoint_name(save.step)
        temporary = self._run.checkpoints / f".tmp-{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            manifest = write_payload(temporary, save.images, save.files)
            predicate = save.predicate(manifest, self.parent, self._head)
            sealed = seal.seal(temporary, manifest, name, predicate, self._signer)
            final = self._free_nonfinite(name) if save.nonfinite else self._free(name)
            durable.publish(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if save.nonfinite:
            return
        sequence = int(predicate["sequence"])
        record = record_of(self._run_id, sequence, save.step, sealed.checkpoint_id, sealed.bundle_sha256)
        self._head = log.append(self._run.log, record, self._signer, origin_of(self._run_id))
        size = sum(entry.size for entry in manifest.files)
        seconds = time.perf_counter() - started
        self.parent = Commit(name, save.step, sequence, sealed.checkpoint_id, seconds, size)
        if self._keep != "all":
            prune(self._run, self._keep)
        for notify in self.on_commit:
            notify(self.parent)

    def _free(self, name: str) -> Path:
        """The final path of ``name``, after a damaged namesake has been set aside."""
        final = self._run.checkpoints / name
        if not final.exists():
            return final
        if name not in self._set_aside:
            raise UsageError(
                "a checkpoint of that step exists already, and this run did not write it",
                where=str(final),
                remedy="is another job training in this folder?",
            )
        durable_rename(final, self._set_aside.pop(name))
        return final

    def _free_nonfinite(self, name: str) -> Path:
        """A run that is restarted may fail at the same step again; each end is kept."""
        final = self._run.checkpoints / f"nonfinite-{name}"
        number = 2
        while final.exists():
            final = self._run.checkpoints / f"nonfinite-{name}-{number}"
            number += 1
        return final


def write_payload(folder: Path, images: Sequence[FileImage], files: Mapping[str, bytes]) -> Manifest:
    """Write every file into ``folder`` while hashing it, and return the manifest of what was written."""
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        writes = [pool.submit(_write_image, folder / image.path, image) for image in images]
        hashes = [pool.submit(_sha256, image.header, image.body) for image in images]
        tensors = [pool.submit(_tensor_entries, image) for image in images]
        entries = [
            FileEntry(image.path, image.size, digest.result())
            for image, digest in zip(images, hashes, strict=True)
        ]
        for path, data in files.items():
            (folder / path).write_bytes(data)
            entries.append(FileEntry(path, len(data), _sha256(data)))
        for write in writes:
            write.result()
        spans = [entry for group in tensors for entry in group.result()]
    return Manifest(
        files=tuple(sorted(entries, key=lambda entry: entry.path)),
        tensors=tuple(sorted(spans, key=lambda entry: (entry.file, entry.start, entry.name))),
    )


def prune(run: RunFolder, keep: int) -> list[str]:
    """Remove the tensors of all but the ``keep`` newest checkpoints; returns the names pruned.

    The rename to ``pruned-step-*`` comes first: a crash in the middle leaves no half-empty ``step-*``.
    """
    pruned = []
    for folder in run.complete()[:-keep]:
        target = folder.with_name(f"pruned-{folder.name}")
        if target.exists():
            continue
        durable_rename(folder, target)
        pruned.append(folder.name)
    for folder in run.pruned():
        _drop_payload(folder)
    return pruned


def durable_rename(source: Path, target: Path) -> None:
    """Rename a folder within its parent, and put the change on disk."""
    source.rename(target)
    durable.fsync_folder(target.parent)


def clear_unfinished(run: RunFolder) -> list[str]:
    """Remove what cut-off saves have left behind; returns their names."""
    names = []
    for leftover in sorted(run.checkpoints.glob(".tmp-*")) if run.checkpoints.is_dir() else []:
        names.append(leftover.name)
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return names


def _drop_payload(folder: Path) -> None:
    kept = {layout.MANIFEST, layout.MODEL_SIGNATURE, layout.PROVENANCE}
    for entry in folder.iterdir():
        if entry.name not in kept:
            with contextlib.suppress(FileNotFoundError):
                entry.unlink()


def _write_image(path: Path, image: FileImage) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        if image.size:
            os.posix_fallocate(descriptor, 0, image.size)
        _write_all(descriptor, memoryview(image.header))
        _write_all(descriptor, image.body)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview) -> None:
    offset = 0
    while offset < len(data):
        offset += os.write(descriptor, data[offset : offset + _CHUNK])


def _tensor_entries(image: FileImage) -> list[TensorEntry]:
    base = len(image.header)
    return [
        TensorEntry(
            name=span.name,
            file=image.path,
            dtype=span.dtype,
            shape=tuple(span.shape),
            start=span.start,
            end=span.end,
            digest="sha256:" + _sha256(image.body[span.start - base : span.end - base]),
        )
        for span in image.spans
    ]


def _sha256(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _require_space(folder: Path, save: Save) -> None:
    needed = sum(image.size for image in save.images) + sum(map(len, save.files.values())) + _SLACK
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentFault(
            f"no space for the checkpoint of step {save.step}: "
            f"it needs {human_bytes(needed)}, {human_bytes(free)} are free",
            where=str(folder),
            remedy="free space or set checkpoint.keep, then restart with the same command",
        )
