"""Bringing a run, or what of it is missing, from a store into a run folder.

A checkpoint is in the store once its MANIFEST.json is; that is written last (`harness.checkpoint.mirror`).
Log, metrics and the statements of all checkpoints come first (`harness.stores.staged`). They are put in place
together, the log last, and before that an auditor's policy judges them (`harness.stores.judged`); without one
**nobody's signature is looked at here**: `harness verify` does that, and a resume does. Payload is hashed on
the way in and compared with the manifest, so that no transfer error reaches the folder.

The log decides who is ahead: the store's must continue the folder's, or the other way round. When the store
is ahead, a checkpoint of the folder that the log of the store does not know is set aside, never overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import EvidenceIncomplete, HarnessError, VerificationFailed, storage_fault
from harness.format import files as durable
from harness.format import layout, leftovers
from harness.format.layout import RunFolder
from harness.format.manifest import FileEntry, Manifest
from harness.provenance.transparency import log
from harness.stores.client import ObjectStore
from harness.stores.contents import Contents, Selection, newest
from harness.stores.judged import Judge
from harness.stores.staged import AT_ONCE, LIMIT, Staged, files_in
from harness.terminal import Progress, progress

_READINGS = 5
"""Times that a store is read which a job changes meanwhile."""


@dataclass
class Fetched:
    """What a fetch has brought."""

    checkpoints: list[str] = field(default_factory=list)
    """With payload."""
    statements: list[str] = field(default_factory=list)
    """Manifest, signatures and statements only."""
    superseded: list[str] = field(default_factory=list)
    """Checkpoints of the folder that were set aside, since the store's history goes another way."""
    left_out: list[str] = field(default_factory=list)
    """Checkpoints that the store's log does not name yet; of a fetch that is judged."""
    size: int = 0
    """Bytes of payload."""
    cleared: tuple[str, ...] = ()
    """What other fetches and saves had left unfinished, and is removed."""
    judged: Mapping[str, Any] | None = None
    """What was found good under the policy; None when there was none."""

    @property
    def nothing(self) -> bool:
        """Whether the folder is as it was."""
        return not (self.checkpoints or self.statements or self.superseded or self.cleared)


def fetch(
    store: ObjectStore,
    run: RunFolder,
    wanted: Selection = newest,
    *,
    judge: Judge | None = None,
    quiet: bool = False,
) -> Fetched:
    """Bring what ``run`` lacks: payload of the ``wanted`` ones of the complete checkpoints (names by step),
    statements of all, log and metrics. What an interrupted fetch has brought is not brought again; of others
    than the ``wanted`` ones it is removed. With ``judge``, nothing that it refuses is put in place.

    Raises `VerificationFailed` when store and folder hold different histories, a byte is wrong or the policy
    refuses, `EvidenceIncomplete` when the store lacks something that its manifest or the policy names, or
    everything, or is changed over and over, `EnvironmentFault` for a store or a disk that does not work, or
    while a job is at work in the folder.
    """
    fetched = Fetched()
    before = store.objects()
    if not Contents(before).all:
        raise EvidenceIncomplete(
            "holds no checkpoint of a run", where=store.url, remedy="check the bucket, the prefix and AWS_*"
        )
    with _writing(run), _made(run.root), durable.locked(run.root, wait=False):
        for reading in range(_READINGS):
            try:
                _fetch(Staged(store, run), wanted, judge, fetched, quiet)
                break
            except (EvidenceIncomplete, VerificationFailed):
                now = store.objects()
                if now == before or reading == _READINGS - 1:
                    raise
                before = now  # a job has written there meanwhile, or has pruned what was to be read
        fetched.cleared = leftovers.clear(run)
    return fetched


def _fetch(staged: Staged, wanted: Selection, judge: Judge | None, fetched: Fetched, quiet: bool) -> None:
    """One reading of the store; what it puts in place is added to ``fetched``."""
    run = staged.run
    staged.read_log()
    left_out = []
    if judge is not None:
        with _cleared(staged):
            left_out = judge.left_out(staged)
    complete = [name for name in staged.contents.complete if name not in left_out]
    chosen = [name for name in wanted(complete) if not (run.checkpoints / name).is_dir()]
    staged.bring(left_out)
    if judge is not None:
        with _cleared(staged):
            judge.examine(staged)
    staged.place_statements()
    staged.place_rest()
    fetched.superseded += [folder.name for folder in staged.superseded]
    fetched.statements += staged.statements
    fetched.left_out = left_out
    fetched.judged = None if judge is None else judge.document
    with progress(_size(staged.contents, chosen), "B", "fetch", quiet=quiet) as bar:
        for name in chosen:
            _fetch_checkpoint(staged, name, bar, judge)
            fetched.checkpoints.append(name)
            fetched.size += _size(staged.contents, [name])
            fetched.statements = [each for each in fetched.statements if each != name]
    staged.clear()


def fetch_newest(
    store: ObjectStore,
    run: RunFolder,
    check: Callable[[Path, Path], object],
    report: Callable[[str, HarnessError], None],
    trust: Callable[[Path], object] | None = None,
) -> Fetched:
    """`fetch` for a resume: of the checkpoints newer than those of ``run``, the newest that is in order.

    ``check`` raises for a folder of statements that are not; it gets the folder of the log as well, which is
    not that of ``run`` yet. ``report`` gets the name of each newer one that is not in order, and what is
    wrong with it. ``trust`` raises for the folder of a log whose head is signed by nobody who may: such a one
    neither takes the place of that of ``run``, nor tells which checkpoints are to be set aside. Raises as
    `fetch`, and `VerificationFailed` when none is in order and ``run`` has none either.
    """
    staged, fetched = Staged(store, run), Fetched()
    with _writing(run), _cleared(staged):
        staged.read_log()
        if staged.ahead and trust is not None and (run.log / log.HEAD).exists():
            trust(staged.folder.log)
        staged.bring()
        staged.place_statements()
        fetched.superseded = [folder.name for folder in staged.superseded]
        fetched.checkpoints = _newest_in_order(staged, check, report)
        fetched.size = _size(staged.contents, fetched.checkpoints)
        fetched.statements = [each for each in staged.statements if each not in fetched.checkpoints]
        staged.place_rest()
        staged.clear()
    return fetched


def _newest_in_order(
    staged: Staged, check: Callable[[Path, Path], object], report: Callable[[str, HarnessError], None]
) -> list[str]:
    """The name of the one that was made whole; nothing where there was no newer one."""
    run, contents = staged.run, staged.contents
    here = [folder.name for folder in run.complete()]
    newer = [
        name for name in contents.complete if not here or layout.step_of(name) > layout.step_of(here[-1])
    ]
    for name in reversed(newer):
        try:
            check(run.checkpoints / f"{layout.PRUNED}{name}", staged.logged)
            with progress(_size(contents, [name]), "B", f"fetch {name}") as bar:
                _fetch_checkpoint(staged, name, bar)
            return [name]
        except (VerificationFailed, EvidenceIncomplete) as error:
            shutil.rmtree(staged.payload / name, ignore_errors=True)
            report(name, error)
    if newer and not here:
        raise VerificationFailed(
            f"none of the {len(newer)} checkpoints is in order",
            where=staged.store.url,
            remedy="signed with another key? Else repair it, or use another run.dir and checkpoint.store",
        )
    return []


@contextmanager
def _writing(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_fault(error, "fetching a run", run.root) from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """``folder``, which is removed again when it is new and nothing was put in it."""
    new = not folder.exists()
    durable.make_folder(folder)
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _cleared(staged: Staged) -> Iterator[None]:
    """Nothing is left of what is refused in the block."""
    try:
        yield
    except (EvidenceIncomplete, VerificationFailed):
        staged.clear()
        raise


def _size(contents: Contents, names: Sequence[str]) -> int:
    return sum(sum(contents.of(name).values()) for name in names)


def _fetch_checkpoint(staged: Staged, name: str, bar: Progress, judge: Judge | None = None) -> None:
    """The payload of a checkpoint whose statements are in place."""
    run, sizes = staged.run, staged.contents.of(name)
    statements, temporary = run.checkpoints / f"{layout.PRUNED}{name}", staged.payload / name
    where = str(statements / layout.MANIFEST)
    manifest = Manifest.parse(durable.read_limited(statements / layout.MANIFEST, LIMIT), where=where)
    _remove_others(temporary, {entry.path for entry in manifest.files})
    for path in files_in(statements):
        target = temporary / path.relative_to(statements)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)  # copytree's own error would not say that the disk is full
    with ThreadPoolExecutor(AT_ONCE, "fetch") as pool:
        running = [
            pool.submit(_fetch_file, staged.store, name, temporary, entry, sizes.get(entry.path), bar)
            for entry in manifest.files
        ]
        try:
            for each in running:
                each.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if judge is not None:
        judge.examine_payload(temporary)
    durable.publish(temporary, run.checkpoints / name)
    shutil.rmtree(statements)


def _remove_others(folder: Path, payload: Collection[str]) -> None:
    """What an interrupted fetch of another state of the store has left."""
    for path in files_in(folder):
        if path.relative_to(folder).as_posix() not in payload:
            path.unlink()


def _fetch_file(
    store: ObjectStore, name: str, folder: Path, entry: FileEntry, size: int | None, bar: Progress
) -> None:
    source = f"{layout.CHECKPOINTS}/{name}/{entry.path}"
    if size is None:
        raise EvidenceIncomplete("is in the manifest, not in the store", where=store.at(source))
    if size != entry.size:
        raise VerificationFailed(f"does not have {entry.size} bytes", where=store.at(source))
    target = folder / entry.path
    if _is_here(target, entry):
        bar.advance(size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with open(target, "wb") as stream:
        for piece in store.pieces(source, size):
            digest.update(piece)
            stream.write(piece)
            bar.advance(len(piece))
    if digest.hexdigest() != entry.sha256:
        raise VerificationFailed("the sha256 is not the one in MANIFEST.json", where=store.at(source))


def _is_here(path: Path, entry: FileEntry) -> bool:
    """Whether a fetch that was interrupted has brought the file, whole."""
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == entry.sha256
