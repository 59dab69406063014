"""What a fetch has brought and has not put in place yet: a run folder of its own, in that of the run.

Log, metrics and small files lie there as they are to be, and so do the statements of checkpoints, each as a
folder ``pruned-NAME``. So what the run would be can be verified before any of it is put in its place. What an
interrupted fetch has left of statements and payload is used again, if the store still says the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format import files as durable
from harness.format import layout
from harness.format.layout import RunFolder
from harness.provenance import later, log_record
from harness.provenance.transparency import log, tiles, timestamp
from harness.stores import metrics
from harness.stores.client import ObjectStore
from harness.stores.contents import Contents

SMALL_FILES = (layout.RUN_CONFIG, layout.POLICY, layout.CORPUS, layout.TRACKING)
"""Files of a run that are replaced as a whole."""
LIMIT = 64 << 20
"""Largest small object, in bytes."""
AT_ONCE = 4
"""Objects that are read at a time."""


@dataclass
class Staged:
    """A fetch into ``run`` that is under way, for whoever holds its lock."""

    store: ObjectStore
    run: RunFolder
    contents: Contents = field(init=False)
    """Of the store, as it was after its log was read: whatever that names was there by then."""
    superseded: list[Path] = field(default_factory=list)
    """Checkpoints of the run that the store's log tells otherwise."""
    statements: list[str] = field(default_factory=list)
    """Names of the checkpoints whose statements were brought."""
    _added: list[tuple[Path, Path]] = field(default_factory=list)
    """Statements that were added to checkpoints of the run: where they lie, and where they go."""
    _metrics: bool = False
    """Whether metrics.jsonl was brought."""
    _files: list[str] = field(default_factory=list)
    """Paths of the small files and timestamps that were brought, relative to the run."""
    _log: dict[str, bytes] = field(default_factory=dict, repr=False)
    _theirs: Sequence[bytes] = ()
    _ours: Sequence[bytes] = ()

    @property
    def folder(self) -> RunFolder:
        """Where all of it lies."""
        return RunFolder(self.run.root / layout.FETCHED)

    @property
    def ahead(self) -> bool:
        """Whether the store's log goes further than the run's."""
        return len(self._theirs) > len(self._ours)

    @property
    def behind(self) -> tuple[int, int] | None:
        """The records of the store's log and of the run's, where the run's goes further."""
        sizes = len(self._theirs), len(self._ours)
        return sizes if sizes[0] < sizes[1] else None

    @property
    def payload(self) -> Path:
        """Where checkpoints become whole."""
        return self.folder.root / "payload"

    @property
    def logged(self) -> Path:
        """The folder of the log that goes further."""
        return self.folder.log if self.ahead else self.run.log

    @cached_property
    def told(self) -> Mapping[str, str]:
        """Name of each checkpoint that the longer log names → the digest of its statement's bundle; the one
        that was entered last comes last."""
        found: dict[str, str] = {}
        for record in self._theirs if self.ahead else self._ours:
            fields = log_record.parse_record(record, where=self.store.url)
            if log_record.is_commit(fields):
                name = layout.checkpoint_name(fields["step"])
                found.pop(name, None)
                found[name] = str(fields["bundle_sha256"])
        return found

    def read_log(self) -> None:
        """The store's log, then what the store holds. Raises `VerificationFailed` for another history than
        that of the run."""
        store, prefix = self.store, f"{layout.LOG}/"
        self.__dict__.pop("told", None)
        shutil.rmtree(self.folder.log, ignore_errors=True)
        head = self._head(prefix + log.HEAD)
        if head is not None:
            size = log.claimed_size(head, where=store.at(prefix + log.HEAD))
            # The head last, as an append does; it names what the other files hold.
            parts = {path: store.get(prefix + path, LIMIT) for path in tiles.paths(size)}
            self._log = {**parts, log.HEAD: head}
        self.contents = Contents(store.objects())
        try:
            for path, data in self._log.items():
                durable.write_durable(self.folder.log / path, data)
            self._compare_logs()
        except VerificationFailed:
            shutil.rmtree(self.folder.log, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.root.rmdir()
            raise

    def _head(self, path: str) -> bytes | None:
        try:
            return self.store.get(path, LIMIT)
        except EvidenceIncomplete:
            return None  # a run whose first checkpoint is on its way

    def _compare_logs(self) -> None:
        """One of both must continue the other."""
        ours = self.run.log
        self._theirs = log.read_claimed(self.folder.log).records if self._log else ()
        self._ours = log.read_claimed(ours).records if (ours / log.HEAD).exists() else ()
        pairs = enumerate(zip(self._ours, self._theirs, strict=False))
        different = next((number for number, (our, their) in pairs if our != their), None)
        if different is not None:
            raise VerificationFailed(
                "the store holds another history than this folder",
                where=f"{ours}, record {different}",
                remedy="move this folder away to go on from the store, or choose another checkpoint.store",
            )

    def bring(self, without: Collection[str] = ()) -> None:
        """Everything but payload, of the checkpoints that are not among ``without``."""
        run, contents = self.run, self.contents
        for folder in run.pruned():
            _remove_copy(folder, run.checkpoints / folder.name.removeprefix(layout.PRUNED))
        self.superseded = list(self._superseded())
        here = {*run.complete(), *run.pruned()} - set(self.superseded)
        known = {folder.name.removeprefix(layout.PRUNED) for folder in here}
        self.statements = [name for name in contents.all if name not in known and name not in without]
        _keep_only(self.folder.checkpoints, {f"{layout.PRUNED}{name}" for name in self.statements})
        with ThreadPoolExecutor(AT_ONCE, "fetch") as pool:
            for _ in pool.map(self._bring_statements, self.statements):
                pass
        for folder in here:
            self._bring_added(folder)
        target = self.folder.metrics
        self._metrics = metrics.bring(self.store, contents, target, run.metrics, without, ahead=self.ahead)
        small = [name for name in SMALL_FILES if name in contents.objects]
        small = [name for name in small if self.ahead or not (run.root / name).exists()]
        self._files = [*small, *self._timestamps()]  # a timestamp may come after the log that it is of
        for path in self._files:
            limit = LIMIT if path in small else timestamp.LIMIT
            durable.write_durable(self.folder.root / path, self.store.get(path, limit))

    def _bring_added(self, folder: Path) -> None:
        """What was added to a checkpoint of the run after its statements were brought."""
        name = folder.name.removeprefix(layout.PRUNED)
        source, target = self.source_of(name), self.folder.checkpoints / f"{layout.PRUNED}{name}"
        for path in self.contents.of(source):
            if later.name_of(path) is not None and not (folder / path).exists():
                data = self.store.get(f"{layout.CHECKPOINTS}/{source}/{path}", later.LIMIT)
                durable.write_durable(target / path, data)
                self._added.append((target / path, folder / path))

    def place_statements(self) -> None:
        """Set aside what the store's log tells otherwise, and put the new statements in place."""
        checkpoints = self.run.checkpoints
        for source, target in self._added:
            source.replace(target)
            durable.fsync_folder(target.parent)
        if not (self.superseded or self.statements):
            return
        durable.make_folder(checkpoints)
        for folder in self.superseded:
            folder.rename(self.run.free_aside(folder.name))
        for name in self.statements:
            pruned = f"{layout.PRUNED}{name}"
            durable.rename_synced(self.folder.checkpoints / pruned, checkpoints / pruned)
        durable.fsync_folder(checkpoints)

    def place_rest(self) -> None:
        """The same for metrics and small files, then for the log."""
        if self._metrics:
            metrics.place(self.folder.metrics, self.run)
        for path in self._files:
            durable.make_folder((self.run.root / path).parent)
            (self.folder.root / path).replace(self.run.root / path)
        durable.fsync_folder(self.run.root)
        if self.drops_policy:
            self.run.policy.unlink(missing_ok=True)
        for path, data in self._log.items() if self.ahead else ():
            durable.write_durable(self.run.log / path, data)

    @property
    def drops_policy(self) -> bool:
        """Whether the run went on without the policy that is there."""
        return self.ahead and layout.POLICY not in self.contents.objects

    def told_of(self, where: str) -> str:
        """``where``, a path in `folder`, as the store or the run calls what lies there."""
        inside = where.removeprefix(f"{self.folder.root}/")
        if inside == where:
            return where
        top, _, rest = inside.partition("/")
        name = rest.partition("/")[0].removeprefix(layout.PRUNED)
        brought = self.ahead if top == layout.LOG else self._metrics if top == layout.METRICS else None
        if name in self.statements:
            return self.store.at(inside.replace(f"{layout.PRUNED}{name}", self.source_of(name), 1))
        here = not (top in self._files if brought is None else brought)
        return str(self.run.root / inside) if here else self.store.at(inside)

    def clear(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder.root, ignore_errors=True)

    def _superseded(self) -> Iterator[Path]:
        """Checkpoints of the folder that the store's log tells otherwise; only where it is ahead."""
        for folder in [*self.run.complete(), *self.run.pruned()] if self.ahead else ():
            told = self.told.get(folder.name.removeprefix(layout.PRUNED))
            bundle = folder / layout.CHECKPOINT_BUNDLE
            if told is not None and bundle.is_file() and _digest(bundle) != told:
                yield folder

    def source_of(self, name: str) -> str:
        """The folder of the store that holds the checkpoint."""
        whole = f"{layout.CHECKPOINTS}/{name}/{layout.MANIFEST}" in self.contents.objects
        return name if whole else f"{layout.PRUNED}{name}"

    def _bring_statements(self, name: str) -> None:
        """Statements of a checkpoint that the run does not have, as they are."""
        target = self.folder.checkpoints / f"{layout.PRUNED}{name}"
        source = self.source_of(name)
        wanted = {path: size for path, size in self.contents.of(source).items() if is_signature(path)}
        if target.is_dir():
            found = {path: (target / path).stat().st_size for path in wanted if (target / path).is_file()}
            bundle = target / layout.CHECKPOINT_BUNDLE
            if found == wanted and bundle.is_file() and _digest(bundle) == self.told.get(name):
                return
            shutil.rmtree(target)
        temporary = target.with_name(f"{layout.TEMPORARY}{target.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / layout.PROVENANCE).mkdir(parents=True)
        for path in wanted:
            data = self.store.get(f"{layout.CHECKPOINTS}/{source}/{path}", LIMIT)
            (temporary / path).write_bytes(data)
        temporary.rename(target)

    def _timestamps(self) -> Iterator[str]:
        """Paths of those of the longer log that the run lacks; the store may have some that came after it."""
        records, prefix = max(len(self._ours), len(self._theirs)), f"{layout.LOG}/"
        for path in self.contents.objects:
            size = timestamp.size_of(path.removeprefix(prefix)) if path.startswith(prefix) else None
            if size is not None and size <= records and not (self.run.root / path).exists():
                yield path


def is_signature(path: str) -> bool:
    """Whether ``path``, relative to a checkpoint folder, is of what stays without the payload."""
    fixed = (layout.MANIFEST, layout.MODEL_SIGNATURE, layout.CHECKPOINT_BUNDLE, layout.SLSA_BUNDLE)
    return path in fixed or later.name_of(path) is not None


def files_in(folder: Path) -> list[Path]:
    """The files of a folder of our own and of those in it; none of one that is not there."""
    return [path for path in folder.rglob("*") if path.is_file()]


def _keep_only(checkpoints: Path, names: Collection[str]) -> None:
    """Remove what an interrupted fetch of another state of the store has left."""
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if path.name not in names:
            shutil.rmtree(path)


def _remove_copy(statements: Path, whole: Path) -> None:
    """Remove what a fetch that was cut off has left beside the checkpoint that it had made ``whole``."""
    if not whole.is_dir():
        return
    for path in files_in(statements):
        inside = path.relative_to(statements)
        copy = whole / inside
        if not (
            is_signature(inside.as_posix()) and copy.is_file() and copy.read_bytes() == path.read_bytes()
        ):
            return
    shutil.rmtree(statements)


def _digest(bundle: Path) -> str:
    return hashlib.sha256(durable.read_limited(bundle, LIMIT)).hexdigest()
