"""Writing behind the training loop: every rank its files, hashed while they are written; rank 0 publishes.

- `CheckpointWriter.save` takes images in host memory and returns; a thread does the rest. A second save waits
  for the first and returns how long it waited: at most one save is in flight, the arena is never overwritten.
- The digests in the manifest are of the bytes in memory, while they are written; nothing is read back.
- The threads of all ranks keep in step over a control group of their own, beside the training threads. A
  failure on one rank ends the save on all, and rank 0 removes what was written of it.
- A failure is raised in the training thread by the next `check`, `save` or `wait`.
- With a store, every rank sends its files from the same memory: after they are on disk, or instead.

What makes a checkpoint whole, signed and visible is rank 0's `harness.checkpoint.publisher`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from harness.audit.folders import file_set, payload
from harness.checkpoint import disk, mirror
from harness.checkpoint.publisher import Destination, Publication, Publisher, Written
from harness.checkpoint.snapshot import FileImage
from harness.errors import EnvironmentFault, HarnessError, Interrupted, UsageError, storage_fault
from harness.format.layout import RunFolder
from harness.format.manifest import FileEntry, Manifest, TensorEntry
from harness.format.tensor_digests import TensorDigests
from harness.provenance.findings import Findings
from harness.stores.client import ObjectStore
from harness.workers import Workers

_PIECE = 1 << 18
"""Bytes that are hashed twice while they are in the processor's cache."""
_WRITERS = 4
"""Files written at once, at most."""
NICENESS = 19
"""Of the writing threads of a writer that steps back: on two cores that also train, the step after a save
took 0.5 s longer at 0, and 0.1 s at 19."""

T = TypeVar("T")


@dataclass(frozen=True)
class Save:
    """What this rank contributes to a checkpoint."""

    step: int
    images: Sequence[FileImage]
    """The files that this rank writes."""
    publication: Publication | None = None
    """The rest of the checkpoint; on rank 0."""


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time; every rank has one and saves at the same steps."""

    def __init__(
        self,
        run: RunFolder,
        workers: Workers,
        publisher: Publisher | None,
        *,
        store: ObjectStore | None = None,
        step_back: bool = False,
    ) -> None:
        """``workers``: over a control group that only this writer uses. ``publisher``: on rank 0. ``store``:
        on every rank, when the run has one.

        ``step_back``: leave the cores to other threads that want them, for training on a CPU; on a GPU only
        the loader would be in the way, and a save must not starve.
        """
        self._run = run
        self._workers = workers
        self._publisher = publisher
        self._store = store
        self._step_back = step_back
        self._thread: threading.Thread | None = None
        self._failure: HarnessError | None = None
        self._given_up = threading.Event()
        if publisher is not None and publisher.mirror is not None:
            publisher.mirror.proceed = self._proceed if publisher.mirror.only else self._proceed_upload

    def save(self, save: Save) -> float:
        """Begin to write; returns the seconds spent waiting for a save still in flight."""
        started = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - started
        self._thread = threading.Thread(target=self._work, args=(save,), name="checkpoint-writer")
        self._thread.start()
        return waited

    def give_up(self) -> None:
        """End the save in flight, and every later one, as soon as the running calls to the disk return.

        What was written of it is removed; `wait` raises `Interrupted`. May be called from any thread.
        """
        self._given_up.set()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether a background save went wrong; `wait` raises the reason."""
        return self._failure is not None

    @property
    def contested(self) -> bool:
        """Whether it went wrong because another job writes to the same place, which no later save mends."""
        return self._failure is not None and self._failure.exit_code == UsageError.exit_code

    def check(self) -> None:
        """Raise the failure of a background save, if there was one."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Until nothing is in flight; raises what went wrong."""
        self.join()
        self.check()

    def join(self) -> None:
        """Until nothing is in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self, save: Save) -> None:
        if self._step_back and sys.platform.startswith("linux"):
            # Niceness belongs to a thread on Linux, and the threads that it starts inherit it.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self._guarded(lambda: self._commit(save))
        except HarnessError as error:
            self._failure = error

    def _commit(self, save: Save) -> None:
        """Every rank writes its files; rank 0 begins before, publishes after, and rotates when all agree."""
        own: list[Written] = []

        def write() -> bytes:
            folder = self._run.checkpoints / place.folder if place.on_disk else None
            own.append(write_images(folder, save.images, self._workers.cores, self._proceed))
            return _encoded(own[0])

        def send() -> None:
            """Every rank its files, once rank 0 has seen that nobody else writes there."""
            if self._store is not None:
                store, digests = self._store, {entry.path: entry.sha256 for entry in own[0].files}
                proceed = self._proceed_upload if place.on_disk else self._proceed
                sending = partial(mirror.upload, store, place.name, save.images, digests, proceed)
                self._agreed(lambda publisher, _: publisher.enter_store(), save)
                self._workers.together(lambda: self._guarded(sending))

        def read_back() -> None:
            verify_written(self._run.checkpoints / final.decode(), own[0])

        try:
            begun = self._agreed(lambda publisher, rest: _packed(publisher.begin(save.step, rest)), save)
            place = Destination(**json.loads(begun))
            parts = self._workers.collected(lambda: self._guarded(write))
            written = [_decoded(part) for part in parts]
            if not place.on_disk:
                send()
            final = self._agreed(lambda publisher, rest: publisher.publish(rest, written).encode(), save)
        except BaseException:
            if self._publisher is not None:
                self._publisher.abandon()
            raise
        if final:
            self._workers.together(lambda: self._guarded(read_back))
            self._agreed(lambda publisher, _: publisher.rotate().encode(), save)
        if self._store is not None:
            if place.on_disk:
                send()
            self._agreed(lambda publisher, rest: publisher.mirrored(rest).encode(), save)

    def _proceed(self) -> None:
        if self._given_up.is_set():
            raise Interrupted(
                "the checkpoint was given up at its deadline, unfinished",
                where=str(self._run.checkpoints),
                remedy="restart with the same command; the run continues from the checkpoint before",
            )

    def _proceed_upload(self) -> None:
        if self._given_up.is_set():
            raise Interrupted(
                "the upload of the newest checkpoint was given up at its deadline",
                where="" if self._store is None else self._store.url,
                remedy="restart with the same command, in the same run.dir: the upload is completed first",
            )

    def _agreed(self, function: Callable[[Publisher, Publication], bytes], save: Save) -> bytes:
        def first() -> bytes:
            if self._publisher is None or save.publication is None:
                raise HarnessError("rank 0 has nothing to publish")
            publisher, publication = self._publisher, save.publication
            return self._guarded(lambda: function(publisher, publication))

        return self._workers.agree(first)

    def _guarded(self, function: Callable[[], T]) -> T:
        """``function``, with every exception as an error that the other ranks can be told."""
        try:
            return function()
        except HarnessError:
            raise
        except OSError as error:
            raise storage_fault(error, "writing a checkpoint", self._run.checkpoints) from error
        except Exception as error:
            raise HarnessError(f"writing a checkpoint failed: {type(error).__name__}: {error}") from error


def write_images(
    folder: Path | None, images: Sequence[FileImage], threads: int, may_go_on: Callable[[], None]
) -> Written:
    """Write ``images`` into ``folder``, where there is one, and hash them, in up to ``threads`` threads.

    ``may_go_on`` is called between pieces and may raise to end the work. Raises `OSError` as the file system
    does; what was written so far is left behind.
    """
    ended = threading.Event()

    def proceed() -> None:
        may_go_on()
        if ended.is_set():
            raise InterruptedError("another file of the checkpoint could not be written")

    largest_first = sorted(images, key=lambda image: -image.size)
    with (
        ThreadPoolExecutor(_WRITERS, "checkpoint-write") as writers,
        ThreadPoolExecutor(max(1, threads), "checkpoint-hash") as hashers,
    ):
        hashes = [hashers.submit(_hash, image, proceed) for image in largest_first]
        to_write = [(folder, image) for image in largest_first] if folder is not None else []
        writes = [writers.submit(_write, place, image, proceed) for place, image in to_write]
        try:
            went_directly = [write.result() for write in writes]
            hashed = [each.result() for each in hashes]
        except BaseException:
            ended.set()
            raise
    return Written(
        files=tuple(entry for entry, _ in hashed),
        tensors=tuple(tensor for _, tensors in hashed for tensor in tensors),
        direct=sum(image.size for (_, image), direct in zip(to_write, went_directly, strict=True) if direct),
    )


def _write(folder: Path, image: FileImage, proceed: Callable[[], None]) -> bool:
    return disk.write(folder / image.path, image.data, aligned=image.aligned, proceed=proceed)


def verify_written(folder: Path, written: Written) -> None:
    """Read the files of a published checkpoint back from the disk, before anything older is removed.

    Raises `HarnessError` for other bytes than were written.
    """
    manifest = Manifest(written.files, written.tensors)
    findings = Findings()
    there = payload.stamps(manifest, file_set.listing(folder, findings))
    for entry in written.files:
        if entry.path not in there:
            findings.bad("payload", f"has not the {entry.size} bytes", str(folder / entry.path))
    payload.check(payload.jobs(folder, manifest, there), findings)
    if findings.failed:
        first = findings.failed[0].error
        raise EnvironmentFault(
            f"the disk does not give back what was written: {first.what}",
            where=first.where,
            remedy="check the disk; older checkpoints were left as they are",
        )


def _hash(image: FileImage, proceed: Callable[[], None]) -> tuple[FileEntry, list[TensorEntry]]:
    """The file's sha256 and its tensors' digests, in one pass over the memory."""
    whole = hashlib.sha256()
    tensors = TensorDigests(image.spans)
    for offset in range(0, image.size, _PIECE):
        proceed()
        piece = image.data[offset : offset + _PIECE]
        # BLAKE3 first: it fetches from memory at several times the speed of sha256, which then finds the
        # piece in the cache. The other way round, in pieces of 1 MiB, both take 1.4 times as long.
        tensors.update(offset, piece)
        whole.update(piece)
    entries = [
        TensorEntry(span.name, image.path, span.dtype, tuple(span.shape), span.start, span.end, digest)
        for span, digest in zip(image.spans, tensors.finish(), strict=True)
    ]
    return FileEntry(image.path, image.size, whole.hexdigest()), entries


def _packed(place: Destination) -> bytes:
    return json.dumps(asdict(place)).encode()


def _encoded(written: Written) -> bytes:
    return json.dumps([written.files, written.tensors, written.direct]).encode()


def _decoded(data: bytes) -> Written:
    files, tensors, direct = json.loads(data)
    entries = (TensorEntry(*entry) for entry in tensors)
    return Written(
        files=tuple(FileEntry(*entry) for entry in files),
        tensors=tuple(entry._replace(shape=tuple(entry.shape)) for entry in entries),
        direct=direct,
    )
