"""Bringing a run, or what of it is missing, from a store into a run folder.

A checkpoint is in the store once its MANIFEST.json is; that is written last (`harness.checkpoint.mirror`).
Statements come first, as a folder ``pruned-NAME``; payload is then hashed on the way in and compared with
the manifest there, so that no transfer error reaches the folder. **Who made it is not checked here**: a
resume and `harness verify` do that.

The log decides who is ahead: the store's must continue the folder's, or the other way round. When the store
is ahead, a checkpoint of the folder that the log of the store does not know is set aside, never overwritten.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import EvidenceIncomplete, HarnessError, VerificationFailed, storage_fault
from harness.format import files as durable
from harness.format import layout, leftovers
from harness.format.layout import RunFolder
from harness.format.manifest import FileEntry, Manifest
from harness.format.metrics_line import step_of
from harness.provenance import later, log_record
from harness.provenance.transparency import log, tiles, timestamp
from harness.stores.client import ObjectStore
from harness.stores.contents import Contents, Selection, newest
from harness.terminal import Progress, progress

SMALL_FILES = (layout.RUN_CONFIG, layout.POLICY, layout.CORPUS, layout.TRACKING)
"""Files of a run that are replaced as a whole."""
_LIMIT = 64 << 20
"""Largest small object, in bytes."""
_METRICS_LIMIT = 1 << 34
"""Of the lines that one checkpoint has added, in bytes."""
_AT_ONCE = 4


@dataclass(frozen=True)
class Fetched:
    """What a fetch has brought."""

    checkpoints: tuple[str, ...]
    """With payload."""
    statements: tuple[str, ...]
    """Manifest, signatures and statements only."""
    superseded: tuple[str, ...]
    """Checkpoints of the folder that were set aside, since the store's history goes another way."""
    size: int
    """Bytes of payload."""
    cleared: tuple[str, ...] = ()
    """What other fetches and saves had left unfinished, and is removed."""

    @property
    def nothing(self) -> bool:
        """Whether the folder is as it was."""
        return not (self.checkpoints or self.statements or self.superseded or self.cleared)


def fetch(store: ObjectStore, run: RunFolder, wanted: Selection = newest, *, quiet: bool = False) -> Fetched:
    """Bring what ``run`` lacks: payload of the ``wanted`` ones of the complete checkpoints (names by step),
    statements of all, log and metrics. What an interrupted fetch has brought is not brought again; of others
    than the ``wanted`` ones it is removed.

    Raises `VerificationFailed` when store and folder hold different histories or a byte is wrong,
    `EvidenceIncomplete` when the store lacks something that its manifest names, or everything,
    `EnvironmentFault` for a store or a disk that does not work, or while a job is at work in the folder.
    """

    def payload(contents: Contents, logged: Path) -> list[str]:
        chosen = [name for name in wanted(contents.complete) if not (run.checkpoints / name).is_dir()]
        with progress(_size(contents, chosen), "B", "fetch", quiet=quiet) as bar:
            for name in chosen:
                _fetch_checkpoint(store, run, name, contents.of(name), bar)
        return chosen

    contents = Contents(store.objects())
    if not (contents.complete or contents.pruned):
        raise EvidenceIncomplete(
            "holds no checkpoint of a run", where=store.url, remedy="check the bucket, the prefix and AWS_*"
        )
    with _writing(run):
        durable.make_folder(run.root)
        with durable.locked(run.root, wait=False):
            return replace(_fetch(store, run, contents, payload), cleared=leftovers.clear(run))


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

    def payload(contents: Contents, logged: Path) -> list[str]:
        here = [folder.name for folder in run.complete()]
        newer = [name for name in contents.complete if not here or _step(name) > _step(here[-1])]
        for name in reversed(newer):
            try:
                check(run.checkpoints / f"{layout.PRUNED}{name}", logged)
                with progress(_size(contents, [name]), "B", f"fetch {name}") as bar:
                    _fetch_checkpoint(store, run, name, contents.of(name), bar)
                return [name]
            except (VerificationFailed, EvidenceIncomplete) as error:
                shutil.rmtree(run.checkpoints / _temporary(name), ignore_errors=True)
                report(name, error)
        if newer and not here:
            raise VerificationFailed(
                f"none of the {len(newer)} checkpoints is in order",
                where=store.url,
                remedy="signed with another key? Else repair it, or use another run.dir and checkpoint.store",
            )
        return []

    contents = Contents(store.objects())
    with _writing(run):
        return _fetch(store, run, contents, payload, trust)


@contextmanager
def _writing(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_fault(error, "fetching a run", run.root) from error


def _size(contents: Contents, names: Sequence[str]) -> int:
    return sum(sum(contents.of(name).values()) for name in names)


def _fetch(
    store: ObjectStore,
    run: RunFolder,
    contents: Contents,
    payload: Callable[[Contents, Path], Sequence[str]],
    trust: Callable[[Path], object] | None = None,
) -> Fetched:
    with _log_of(store, run, contents, trust) as (records, ahead, logged):
        superseded = list(_set_aside(store, run, contents, records if ahead else ()))
        statements = list(_fetch_statements(store, run, contents))
        names = payload(contents, logged)
        if names or statements or ahead:
            _fetch_metrics(store, run, contents, ahead=ahead)
        for name in SMALL_FILES:
            if name in contents.objects and (ahead or not (run.root / name).exists()):
                durable.write_durable(run.root / name, store.get(name, _LIMIT))
        if ahead and layout.POLICY not in contents.objects:
            run.policy.unlink(missing_ok=True)  # the run went on without a policy
    _fetch_timestamps(store, run, contents)
    statements = [name for name in statements if name not in names]
    return Fetched(tuple(names), tuple(statements), tuple(superseded), _size(contents, names))


@contextmanager
def _log_of(
    store: ObjectStore, run: RunFolder, contents: Contents, trust: Callable[[Path], object] | None
) -> Iterator[tuple[Sequence[bytes], bool, Path]]:
    """The store's records, whether they are ahead of the folder's, and a folder with the longer log of the
    two. A log that is ahead is put in its place on exit, when everything that it names is there."""
    prefix, temporary, parts = f"{layout.LOG}/", run.root / f"{layout.TEMPORARY}{layout.LOG}", {}
    if prefix + log.HEAD in contents.objects:
        head = store.get(prefix + log.HEAD, _LIMIT)
        size = log.claimed_size(head, where=store.at(prefix + log.HEAD))
        # The head last, as an append does; it names what the other files hold.
        parts = {path: store.get(prefix + path, _LIMIT) for path in tiles.paths(size)} | {log.HEAD: head}
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for path, data in parts.items():
            durable.write_durable(temporary / path, data)
        theirs = log.read_claimed(temporary).records if parts else ()
        ours = log.read_claimed(run.log).records if (run.log / log.HEAD).exists() else ()
        common = min(len(ours), len(theirs))
        if ours[:common] != theirs[:common]:
            raise VerificationFailed(
                "the store holds another history than this folder",
                where=f"{run.log}, record {_first_difference(ours, theirs)}",
                remedy="move this folder away to go on from the store, or choose another checkpoint.store",
            )
        ahead = len(theirs) > len(ours)
        if ahead and ours and trust is not None:
            trust(temporary)
        yield theirs, ahead, temporary if ahead else run.log
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if ahead:
        for path, data in parts.items():
            durable.write_durable(run.log / path, data)


def _fetch_timestamps(store: ObjectStore, run: RunFolder, contents: Contents) -> None:
    """Those of the log that is here now; the store may have some that came after its log was read."""
    head, prefix = run.log / log.HEAD, f"{layout.LOG}/"
    records = log.claimed_size(durable.read_limited(head, _LIMIT), where=str(head)) if head.exists() else 0
    for path in contents.objects:
        size = timestamp.size_of(path.removeprefix(prefix)) if path.startswith(prefix) else None
        if size is not None and size <= records and not (run.root / path).exists():
            durable.write_durable(run.root / path, store.get(path, timestamp.LIMIT))


def _first_difference(ours: Sequence[bytes], theirs: Sequence[bytes]) -> int:
    return next(index for index, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])


def _set_aside(
    store: ObjectStore, run: RunFolder, contents: Contents, records: Collection[bytes]
) -> Iterator[str]:
    """Checkpoints of the folder that the store's log tells otherwise; only where it is ahead."""
    told = {}
    for record in records:
        fields = log_record.parse_record(record, where=store.url)
        if log_record.is_commit(fields):
            told[layout.checkpoint_name(fields["step"])] = fields["bundle_sha256"]
    for folder in [*run.complete(), *run.pruned()]:
        name = folder.name.removeprefix(layout.PRUNED)
        bundle = folder / layout.CHECKPOINT_BUNDLE
        if name not in told or not bundle.is_file():
            continue
        if hashlib.sha256(durable.read_limited(bundle, _LIMIT)).hexdigest() != told[name]:
            folder.rename(run.free_aside(folder.name))
            durable.fsync_folder(run.checkpoints)
            yield folder.name


def _fetch_checkpoint(
    store: ObjectStore, run: RunFolder, name: str, sizes: Mapping[str, int], bar: Progress
) -> None:
    """The payload of a checkpoint whose statements are here."""
    statements, temporary = run.checkpoints / f"{layout.PRUNED}{name}", run.checkpoints / _temporary(name)
    where = str(statements / layout.MANIFEST)
    manifest = Manifest.parse(durable.read_limited(statements / layout.MANIFEST, _LIMIT), where=where)
    _remove_others(temporary, {entry.path for entry in manifest.files})
    shutil.copytree(statements, temporary, dirs_exist_ok=True)
    with ThreadPoolExecutor(_AT_ONCE, "fetch") as pool:
        running = [
            pool.submit(_fetch_file, store, name, temporary, entry, sizes.get(entry.path), bar)
            for entry in manifest.files
        ]
        try:
            for each in running:
                each.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    durable.publish(temporary, run.checkpoints / name)
    shutil.rmtree(statements)


def _temporary(name: str) -> str:
    return f"{layout.TEMPORARY}{name}"


def _remove_others(folder: Path, payload: Collection[str]) -> None:
    """What an interrupted fetch of another state of the store has left."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in payload:
            path.unlink()


def _is_signature(path: str) -> bool:
    fixed = (layout.MANIFEST, layout.MODEL_SIGNATURE, layout.CHECKPOINT_BUNDLE, layout.SLSA_BUNDLE)
    return path in fixed or later.name_of(path) is not None


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


def _fetch_statements(store: ObjectStore, run: RunFolder, contents: Contents) -> Iterator[str]:
    """Statements of the checkpoints that the folder does not have at all, as they are."""
    known = {folder.name.removeprefix(layout.PRUNED) for folder in [*run.complete(), *run.pruned()]}
    sources = {name: f"{layout.PRUNED}{name}" for name in contents.pruned}
    sources |= {name: name for name in contents.complete}
    for name, source in sorted(sources.items()):
        if name not in known:
            target = run.checkpoints / f"{layout.PRUNED}{name}"
            temporary = run.checkpoints / _temporary(target.name)
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / layout.PROVENANCE).mkdir(parents=True)
            for path in filter(_is_signature, contents.of(source)):
                data = store.get(f"{layout.CHECKPOINTS}/{source}/{path}", _LIMIT)
                (temporary / path).write_bytes(data)
            durable.publish(temporary, target)
            yield name


def _fetch_metrics(store: ObjectStore, run: RunFolder, contents: Contents, *, ahead: bool) -> None:
    """metrics.jsonl, from the parts that the checkpoints have added, unless the folder's own goes further."""
    names = sorted({*contents.complete, *contents.pruned}, key=_step)
    before = run.metrics.read_bytes() if run.metrics.exists() else b""
    if not names or (not ahead and _last_step(before) >= _step(names[-1])):
        return
    data = b"".join(store.get(f"{layout.METRICS_PARTS}/{name}.jsonl", _METRICS_LIMIT) for name in names)
    if before and not data.startswith(before):
        aside = run.root / layout.EVENTS
        aside.mkdir(exist_ok=True)
        number = 1
        while (target := aside / f"superseded-metrics-{number}.jsonl").exists():
            number += 1
        run.metrics.rename(target)
    if before != data:
        durable.write_durable(run.metrics, data)


def _step(name: str) -> int:
    return layout.parse_checkpoint_name(name) or 0


def _last_step(lines: bytes) -> int:
    steps = (step_of(line) for line in reversed(lines.splitlines(keepends=True)))
    return next((step for step in steps if step is not None), 0)
