"""Hashing payload files: the whole file and each of its tensors in one pass, on all cores.

A wrong byte is located: the tensor and its byte range, else the header. Each file is opened once, without
following links, and read once. Its status is compared with that at which its name, size and header were
checked, before and after: a file that changes meanwhile, or is exchanged, is a failure.

A core takes a file at a time, in pieces that both digests find in its cache. A file that is more than one
core's share of all the bytes would be the last to end, so two cores take it: one reads it and digests its
tensors, the other its sha256, which is the slower one and cannot be divided.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from harness.cores import process_cpu_count
from harness.errors import EnvironmentFault, EvidenceIncomplete, VerificationFailed
from harness.format import files
from harness.format.manifest import FileEntry, Manifest, TensorEntry
from harness.format.tensor_digests import TensorDigests
from harness.provenance.findings import Findings
from harness.terminal import Progress, progress

_PIECE = 1 << 18
"""Bytes that are read and hashed twice while they are in the cache of one core."""
_SHARED = 1 << 20
"""The same where two cores take turns; handing a piece over costs more than a small one saves."""
_BUFFERS = 3
"""Pieces on their way from the core that reads to the one that digests the file."""


@dataclass(frozen=True)
class Job:
    """One payload file to hash."""

    path: Path
    entry: FileEntry
    stamp: files.Stamp
    """Of the file whose name, size and header were checked."""
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file, or that it is missing."""

    what: str
    missing: bool = False
    remedy: str | None = None


_CHANGED = Problem("changed while it was verified", remedy="verify a copy that nobody else writes to")


def stamps(manifest: Manifest, present: Mapping[str, os.stat_result]) -> dict[str, files.Stamp]:
    """The files of ``manifest`` that are ``present`` in the size that it lists; others are a finding of the
    file set."""
    return {
        entry.path: files.stamp(present[entry.path])
        for entry in manifest.files
        if entry.path in present and present[entry.path].st_size == entry.size
    }


def jobs(folder: Path, manifest: Manifest, there: Mapping[str, files.Stamp]) -> list[Job]:
    """The files of ``manifest`` in ``folder`` that are ``there``, as `stamps` has found them."""
    tensors: dict[str, list[TensorEntry]] = {}
    for tensor in manifest.tensors:
        tensors.setdefault(tensor.file, []).append(tensor)
    return [
        Job(folder / entry.path, entry, there[entry.path], tuple(tensors.get(entry.path, ())))
        for entry in manifest.files
        if entry.path in there
    ]


def check(work: Sequence[Job], findings: Findings, *, quiet: bool = True) -> int:
    """Hash every file of ``work``; returns the bytes hashed. Failures go to ``findings``, in order; ``quiet``
    hides the progress bar.

    Raises `EnvironmentFault` for a file that the machine does not let it read.
    """
    cores = process_cpu_count()
    total = sum(job.entry.size for job in work)
    with (
        progress(total, "B", "verify", quiet=quiet) as bar,
        ThreadPoolExecutor(cores, "hash") as pool,
    ):
        counter = _Counter(bar)
        largest_first = sorted(work, key=lambda job: -job.entry.size)
        running = {}
        for job in largest_first:
            large = job.entry.size > max(_SHARED, total / cores)
            divided = cores > 1 and bool(job.tensors) and large
            running[job.path] = pool.submit(_problems, job, counter, divided)
        try:
            problems = {path: future.result() for path, future in running.items()}
        except EnvironmentFault:
            pool.shutdown(cancel_futures=True)
            raise
    for job in work:
        for problem in problems[job.path]:
            report = findings.missing if problem.missing else findings.bad
            report("payload", problem.what, str(job.path), problem.remedy)
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


def _problems(job: Job, counter: _Counter, divided: bool) -> list[Problem]:
    try:
        with files.open_regular(job.path) as stream:
            return _hash(stream.fileno(), job, counter, divided)
    except OSError as error:
        raise files.unreadable(error, str(job.path)) from error
    except (VerificationFailed, EvidenceIncomplete) as error:
        return [Problem(error.what, missing=isinstance(error, EvidenceIncomplete))]


def _hash(descriptor: int, job: Job, counter: _Counter, divided: bool) -> list[Problem]:
    if files.stamp(os.fstat(descriptor)) != job.stamp:
        return [_CHANGED]
    tensors = sorted(job.tensors, key=lambda entry: (entry.start, entry.end))
    digests, whole = TensorDigests(tensors), hashlib.sha256()
    read = _hash_divided if divided else _hash_alone
    read(descriptor, job, digests, whole, counter)
    if files.stamp(os.fstat(descriptor)) != job.stamp:
        return [_CHANGED]
    wrong = [entry for entry, each in zip(tensors, digests.finish(), strict=True) if entry.digest != each]
    return _located(job, whole.hexdigest() == job.entry.sha256, wrong)


def _hash_alone(
    descriptor: int, job: Job, tensors: TensorDigests, whole: hashlib._Hash, counter: _Counter
) -> None:
    for offset, piece in _pieces(descriptor, job, [bytearray(_PIECE)], counter):
        # BLAKE3 first: it fetches from memory at several times the speed of sha256.
        tensors.update(offset, piece)
        whole.update(piece)


def _hash_divided(
    descriptor: int, job: Job, tensors: TensorDigests, whole: hashlib._Hash, counter: _Counter
) -> None:
    behind: deque[Future[None]] = deque()
    buffers = [bytearray(_SHARED) for _ in range(_BUFFERS)]
    with ThreadPoolExecutor(1, "hash-file") as helper:
        for offset, piece in _pieces(descriptor, job, buffers, counter):
            behind.append(helper.submit(whole.update, piece))
            tensors.update(offset, piece)
            if len(behind) == _BUFFERS:
                behind.popleft().result()  # its buffer is the next to be read into
        for each in behind:
            each.result()


def _pieces(
    descriptor: int, job: Job, buffers: Sequence[bytearray], counter: _Counter
) -> Iterator[tuple[int, memoryview]]:
    """Offset and bytes of each piece of a file, in ``buffers`` by turns."""
    offset, size = 0, job.entry.size
    for buffer in itertools.cycle(buffers):
        if offset >= size:
            return
        count = os.readv(descriptor, [buffer])
        if not count:
            raise VerificationFailed(f"ends after {offset} of {size} bytes", where=str(job.path))
        yield offset, memoryview(buffer)[:count]
        offset += count
        counter.add(count)


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
