"""From files on disk to a checkpoint that others see: manifest, seal, one rename, log entry, rotation.

- The folder is built as ``.tmp-NAME`` and renamed after every file and folder in it is on disk, so a name
  ``step-*`` is complete by construction. The log entry follows the rename: a crash between the two leaves
  a signed checkpoint that is not in the log yet, which the next save or the next launch enters.
- Rotation removes the tensors of older checkpoints only after the new one is in the log and has been read
  back from the disk and verified; their manifests and signatures stay under ``pruned-step-*``, so the lineage
  survives.
- With a store (`harness.checkpoint.mirror`), a checkpoint goes there after it is in the folder. Where the
  store is the only place, it goes there first, and the folder gets ``pruned-step-*`` at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.audit.folders import opening, story
from harness.checkpoint.keeping import Keep
from harness.checkpoint.mirror import Mirror
from harness.errors import EnvironmentFault, HarnessError, UsageError
from harness.format import files as durable
from harness.format import layout
from harness.format.layout import RunFolder
from harness.format.manifest import FileEntry, Manifest, TensorEntry
from harness.provenance import seal
from harness.provenance.log_record import origin_of, record_of
from harness.provenance.policy.rules import of_own_run
from harness.provenance.signing.keys import Signer, public_keys
from harness.provenance.transparency import log
from harness.words import human_bytes

_SLACK = 1 << 20
"""Bytes that manifest, signatures and log may need besides the payload."""


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
    direct: int = 0
    """Bytes of it that were written around the page cache."""


Predicate = Callable[[Manifest, Commit | None, log.Head | None], Mapping[str, Any]]
"""The statement's facts, given the manifest, the parent commit and the log head seen."""


@dataclass(frozen=True)
class Publication:
    """What rank 0 adds to the files that the ranks write."""

    files: Mapping[str, bytes]
    """Small payload files besides the images."""
    size: int
    """Bytes that all ranks together are going to write."""
    predicate: Predicate
    before: Callable[[], None] = lambda: None
    """Runs first, in the background: makes durable what the checkpoint relies on (metrics.jsonl)."""
    nonfinite: bool = False
    """The last state of a run that went wrong: published as ``nonfinite-step-*``, never a parent."""


@dataclass(frozen=True)
class Written:
    """The files that a rank has written."""

    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    direct: int
    """Bytes of the files that went around the page cache."""


@dataclass(frozen=True)
class Destination:
    """Where the ranks put their files."""

    folder: str
    """Name under checkpoints/ of the folder on disk."""
    name: str
    """The checkpoint's name once it is published, in the folder and in the store."""
    on_disk: bool
    """Whether files go to the folder; else only to the store."""


@dataclass
class _Open:
    """The save that is being published."""

    step: int
    temporary: Path
    started: float
    only_store: bool
    name: str


@dataclass
class Publisher:
    """Publishes the checkpoints of one run, one at a time, on rank 0."""

    run: RunFolder
    run_id: str
    signer: Signer
    parent: Commit | None
    """The newest checkpoint; what the next one follows."""
    head: log.Head | None
    keep: Keep = field(default_factory=Keep)
    set_aside: dict[str, Path] = field(default_factory=dict)
    """Folders with the name of a coming checkpoint that a resume has skipped as damaged: renamed, not
    overwritten."""
    mirror: Mirror | None = None
    on_commit: list[Callable[[Commit], None]] = field(default_factory=list)
    """Called in the background thread after each commit."""

    def __post_init__(self) -> None:
        self._open: _Open | None = None
        self._unlogged: Commit | None = None
        self._bundle_sha256 = ""

    def begin(self, step: int, publication: Publication) -> Destination:
        """Make the folder that the ranks write into. Raises `EnvironmentFault` when there is no space."""
        started = time.perf_counter()
        publication.before()
        self._enter_log()
        durable.make_folder(self.run.checkpoints)
        name = layout.checkpoint_name(step)
        # The last state of a run that went wrong is looked at where it went wrong.
        only_store = self.mirror is not None and self.mirror.only and not publication.nonfinite
        _require_space(self.run.checkpoints, step, publication, on_disk=not only_store)
        temporary = self.run.checkpoints / f"{layout.TEMPORARY}{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        final = self._nonfinite_name(name) if publication.nonfinite else name
        self._open = _Open(step, temporary, started, only_store, final)
        temporary.mkdir()
        return Destination(temporary.name, final, on_disk=not only_store)

    def publish(self, publication: Publication, parts: Sequence[Written]) -> str:
        """Seal what the ranks have written, and show it under its name.

        Returns that name when there is an older checkpoint to remove, so that the new one must be read back
        first, else nothing.
        """
        if self._open is None:
            raise HarnessError("there is no save to publish")
        name = layout.checkpoint_name(self._open.step)
        temporary, only_store = self._open.temporary, self._open.only_store
        manifest = _manifest(temporary, publication.files, parts)
        predicate = publication.predicate(manifest, self.parent, self.head)
        sealed = seal.seal(temporary, manifest, name, predicate, self.signer)
        if only_store and self.mirror is not None:
            self.mirror.send(temporary, name)
            _drop_payload(temporary)
        if publication.nonfinite:
            durable.publish(temporary, self.run.checkpoints / self._open.name)
            return ""
        final = self._free(name)
        durable.rename_synced(temporary, final.with_name(f"{layout.PRUNED}{name}") if only_store else final)
        self._bundle_sha256 = sealed.bundle_sha256
        self._unlogged = Commit(
            name,
            self._open.step,
            int(predicate["sequence"]),
            sealed.checkpoint_id,
            time.perf_counter() - self._open.started,
            sum(entry.size for entry in manifest.files),
            sum(part.direct for part in parts),
        )
        self._enter_log()
        return final.name if self._droppable() and not only_store else ""

    def enter_store(self) -> bytes:
        """Raise `harness.stores.client.ObjectExistsError` when somebody else writes to the store; else nobody
        can send a checkpoint of this name until this one is whole there."""
        if self.mirror is not None and self._open is not None:
            self.mirror.enter(self._open.name)
        return b""

    def mirrored(self, publication: Publication) -> str:
        """Bring the store up to date, after the ranks have sent what they wrote; returns where it is."""
        if self.mirror is None or self._open is None:
            raise HarnessError("there is no store")
        if publication.nonfinite:
            self.mirror.send(self.run.checkpoints / self._open.name, self._open.name)
        self.mirror.sync(self.set_aside)
        if self.mirror.only:
            there = self.mirror.complete
            prune(self.run, [_step(folder) for folder in self._complete() if folder.name in there])
        return self.mirror.store.url

    def rotate(self) -> str:
        """Remove what `keep` does not want, once the ranks have read back what they wrote of the new one.

        Raises as `harness.audit.folders.opening.open_checkpoint` when the new one, read back, is not in
        order; then nothing is removed. Returns its name.
        """
        if self.parent is None:
            raise HarnessError("there is no checkpoint to keep")
        newest = self.run.checkpoints / self.parent.name
        opening.open_checkpoint(newest, of_own_run(public_keys(self.signer)))
        prune(self.run, self._droppable())
        return newest.name

    def abandon(self) -> None:
        """Remove what was written of a save that failed; no rank writes to it any more."""
        if self._open is not None:
            shutil.rmtree(self._open.temporary, ignore_errors=True)
            self._open = None

    def _enter_log(self) -> None:
        """The entry of the checkpoint that was renamed last; left over when the disk failed after that.

        Its name is seen, so it is what the next one follows, and no entry and no other save comes before the
        name is on disk. A folder that cannot be synced stays so: the file system has given up its journal.
        """
        commit = self._unlogged
        if commit is None:
            return
        durable.fsync_folder(self.run.checkpoints)
        record = record_of(self.run_id, commit.sequence, commit.step, commit.checkpoint, self._bundle_sha256)
        self.head = log.append(self.run.log, record, self.signer, origin_of(self.run_id))
        self.parent, self._unlogged = commit, None
        for notify in self.on_commit:
            notify(commit)

    def _droppable(self) -> list[int]:
        """The steps of the checkpoints that `keep` gives up; reads statements only where it must."""
        if self.keep.newest is None:
            return []
        return dropped(self.keep, self._complete())

    def _complete(self) -> list[Path]:
        return [folder for folder in self.run.complete() if folder.name not in self.set_aside]

    def _free(self, name: str) -> Path:
        """The final path of ``name``, after a damaged namesake has been set aside."""
        final = self.run.checkpoints / name
        if not final.exists():
            return final
        if name not in self.set_aside:
            raise UsageError(
                "a checkpoint of that step exists already, and this run did not write it",
                where=str(final),
                remedy="is another job training in this folder?",
            )
        # Until it has another name it must not pass for a whole one, which `keep` would count.
        final.rename(self.set_aside[name])
        del self.set_aside[name]
        durable.fsync_folder(final.parent)
        return final

    def _nonfinite_name(self, name: str) -> str:
        """Of a state that went wrong; a run that is restarted may fail at the same step again."""
        final, number = f"{layout.NONFINITE}{name}", 2
        while (self.run.checkpoints / final).exists():
            final, number = f"{layout.NONFINITE}{name}-{number}", number + 1
        return final


def dropped(keep: Keep, complete: Sequence[Path]) -> list[int]:
    """The steps of the checkpoints that ``keep`` gives up, of the folders ``complete``, by step; reads their
    statements only where it must."""
    # Every scheme keeps the newest ones, so a run with fewer needs no look into any statement.
    if keep.newest is None or len(complete) <= keep.newest:
        return []
    return keep.dropped({_step(folder): _scores(folder) if keep.best else {} for folder in complete})


def prune(run: RunFolder, steps: Sequence[int]) -> None:
    """Remove the tensors of the checkpoints at ``steps``, and what an earlier pruning has left of others.

    The rename to ``pruned-step-*`` comes first: a crash in the middle leaves no half-empty ``step-*``.
    """
    for step in steps:
        folder = run.checkpoint(step)
        target = folder.with_name(f"{layout.PRUNED}{folder.name}")
        if not target.exists():
            durable_rename(folder, target)
    for folder in run.pruned():
        _drop_payload(folder)


def durable_rename(source: Path, target: Path) -> None:
    """Rename a folder within its parent, and put the change on disk."""
    source.rename(target)
    durable.fsync_folder(target.parent)


def _manifest(folder: Path, files: Mapping[str, bytes], parts: Sequence[Written]) -> Manifest:
    """Write the small files, and list everything that ``folder`` holds now."""
    entries = [entry for part in parts for entry in part.files]
    for path, data in files.items():
        (folder / path).write_bytes(data)
        entries.append(FileEntry(path, len(data), hashlib.sha256(data).hexdigest()))
    tensors = [entry for part in parts for entry in part.tensors]
    return Manifest(
        files=tuple(sorted(entries, key=lambda entry: entry.path)),
        tensors=tuple(sorted(tensors, key=lambda entry: (entry.file, entry.start, entry.name))),
    )


def _drop_payload(folder: Path) -> None:
    kept = {layout.MANIFEST, layout.MODEL_SIGNATURE, layout.PROVENANCE}
    for entry in folder.iterdir():
        if entry.name not in kept:
            with contextlib.suppress(FileNotFoundError):
                entry.unlink()


def _step(folder: Path) -> int:
    step = layout.parse_checkpoint_name(folder.name.removeprefix(layout.PRUNED))
    if step is None:
        raise HarnessError("is no checkpoint's name", where=str(folder))
    return step


def _scores(folder: Path) -> dict[str, float]:
    """The metrics in the statement of a checkpoint that this run has written or has verified at its start."""
    metrics = story.unverified(folder).statement.predicate["metrics"]
    scores = {name: float(value) for name, value in metrics["evaluation"].items()}
    return scores | ({} if metrics["loss"] is None else {"train_loss": float(metrics["loss"])})


def _require_space(folder: Path, step: int, publication: Publication, *, on_disk: bool) -> None:
    payload = publication.size + sum(map(len, publication.files.values())) if on_disk else 0
    needed = payload + _SLACK
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentFault(
            f"no space for the checkpoint of step {step}: "
            f"it needs {human_bytes(needed)}, {human_bytes(free)} are free",
            where=str(folder),
            remedy="free space or set checkpoint.keep, then restart with the same command",
        )
