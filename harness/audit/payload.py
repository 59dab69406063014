"""Hashing payload files: the whole file and each of its tensors in one pass, on all cores.

A wrong byte is located: the tensor and its byte range, else the header. Each file is opened once, without
following links, read into two alternating buffers, and its status compared before and after: a file that
changes meanwhile is a failure.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from harness.errors import VerificationFailed
from harness.format import files
from harness.format.manifest import FileEntry, Manifest, TensorEntry
from harness.format.tensor_digests import TensorDigests
from harness.provenance.findings import Findings
from harness.terminal import Progress

CHUNK = 8 << 20
"""Bytes of one read; large enough that hashing dominates."""
_ALONE = 1 << 20
"""Bytes below which a second thread costs more than it saves."""


@dataclass(frozen=True)
class Job:
    """One payload file to hash."""

    path: Path
    entry: FileEntry
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file, or that it cannot be read."""

    what: str
    missing: bool = False


def jobs(folder: Path, manifest: Manifest, present: Iterable[str]) -> list[Job]:
    """The files of ``manifest`` that are ``present`` in ``folder``."""
    there = set(present)
    tensors: dict[str, list[TensorEntry]] = {}
    for tensor in manifest.tensors:
        tensors.setdefault(tensor.file, []).append(tensor)
    return [
        Job(folder / entry.path, entry, tuple(tensors.get(entry.path, ())))
        for entry in manifest.files
        if entry.path in there
    ]


def check(work: Sequence[Job], findings: Findings, bar: Progress) -> int:
    """Hash every file of ``work``; returns the bytes hashed. Failures go to ``findings``, in order."""
    counter = _Counter(bar)
    # A file with tensors keeps two cores busy: one hashes the file, one its tensors.
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    with ThreadPoolExecutor(threads, "hash") as pool:
        largest_first = sorted(work, key=lambda job: -job.entry.size)
        running = {job.path: pool.submit(_problems, job, counter) for job in largest_first}
        problems = {path: future.result() for path, future in running.items()}
    for job in work:
        for problem in problems[job.path]:
            report = findings.missing if problem.missing else findings.bad
            report("payload", problem.what, str(job.path))
    if work and not any(problems.values()):
        findings.passed.append("payload")
    return counter.total


class _Counter:
    """Adds up bytes from several threads."""

    def __init__(self, bar: Progress) -> None:
        self.total = 0
        self._bar = bar
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.total += count
            self._bar.advance(count)


def _problems(job: Job, counter: _Counter) -> list[Problem]:
    try:
        descriptor = os.open(job.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _hash(descriptor, job, counter)
        finally:
            os.close(descriptor)
    except OSError as error:
        return [Problem(f"cannot be read: {error.strerror or error}", missing=True)]
    except VerificationFailed as error:
        return [Problem(error.what)]


def _hash(descriptor: int, job: Job, counter: _Counter) -> list[Problem]:
    before = os.fstat(descriptor)
    files.check_regular(before, str(job.path))
    if before.st_size != job.entry.size:
        return []  # the file set says so, and no digest can agree
    tensors = sorted(job.tensors, key=lambda entry: (entry.start, entry.end))
    digest, found = _read_and_hash(descriptor, job, TensorDigests(tensors), counter)
    after = os.fstat(descriptor)
    if (before.st_size, before.st_mtime_ns, before.st_ctime_ns) != (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    ):
        return [Problem("changed while it was read")]
    wrong = [entry for entry, each in zip(tensors, found, strict=True) if entry.digest != each]
    return _located(job, digest == job.entry.sha256, wrong)


def _read_and_hash(
    descriptor: int, job: Job, tensors: TensorDigests, counter: _Counter
) -> tuple[str, list[str]]:
    whole = hashlib.sha256()
    size = job.entry.size
    spare = bytearray(min(CHUNK, max(size, 1)))
    buffers = deque([memoryview(spare), memoryview(bytearray(len(spare) if size > CHUNK else 0) or spare)])
    with ThreadPoolExecutor(1, "hash-file") as helper:
        offset = 0
        pending: Future[None] | None = None
        while offset < size:
            buffer = buffers[0]
            buffers.rotate(1)
            count = os.readv(descriptor, [buffer])
            if not count:
                raise VerificationFailed(f"ends after {offset} of {size} bytes", where=str(job.path))
            view = buffer[:count]
            if pending is not None:
                pending.result()
            pending = _update(helper, whole, view, job)
            tensors.update(offset, view)
            offset += count
            counter.add(count)
        if pending is not None:
            pending.result()
    return whole.hexdigest(), tensors.finish()


def _update(
    helper: ThreadPoolExecutor, whole: hashlib._Hash, view: memoryview, job: Job
) -> Future[None] | None:
    if job.tensors and job.entry.size > _ALONE:
        return helper.submit(whole.update, view)
    whole.update(view)
    return None


def _located(job: Job, same: bool, wrong: Sequence[TensorEntry]) -> list[Problem]:
    """Where the bytes differ from the manifest, as narrow as its digests can say."""
    if wrong:
        reason = "has other bytes than were signed" if not same else "has another digest in the manifest"
        return [
            Problem(f"tensor `{each.name}` (bytes {each.start} to {each.end}) {reason}") for each in wrong
        ]
    if same:
        return []
    if job.tensors:
        first = min(entry.start for entry in job.tensors)
        return [Problem(f"the header (bytes 0 to {first}) has other bytes than were signed")]
    return [Problem("has other bytes than were signed (sha256)")]
