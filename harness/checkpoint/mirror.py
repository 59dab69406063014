"""A run's second place, or its only one: an object store that holds what the run folder holds.

Everything lies under the same names as in the folder; metrics.jsonl in the parts that each checkpoint has
added. The order makes every state of the store a good one for a reader:

1. payload, the metrics part, then model.sig and statements, which must not be there yet
2. MANIFEST.json, which must not be there yet either: with it the checkpoint is there
3. statements that were added to earlier ones, the log's tiles, then its head, in place of the head that was
   read
4. rotation: statements under ``pruned-NAME``, then MANIFEST.json goes, then the rest

Any of it may be cut off; the next `Mirror.sync` completes it, without sending again what has arrived.

Of two writers one wins: each looks at the log's head before it sends anything (`Mirror.alone`), then makes
``claims/NAME``, which must not be there yet, before the first byte of payload; and what is made or replaced
in 1 to 3 must be what this writer knows. The other one gets `ObjectExistsError` and has sent nothing. A claim
goes once its manifest is there. One that was there when this launch began is of an upload that was cut off,
and is taken over; whoever loses a claim in that way finds out before the manifest.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.audit.folders import story
from harness.audit.run import stamps
from harness.checkpoint.snapshot import FileImage
from harness.errors import EvidenceIncomplete, HarnessError, VerificationFailed
from harness.format import files as durable
from harness.format import layout
from harness.format.layout import RunFolder
from harness.format.manifest import FileEntry, Manifest
from harness.format.metrics_line import step_of
from harness.provenance import later
from harness.provenance.transparency import log, tiles, timestamp
from harness.stores.client import PIECE, ObjectExistsError, ObjectStore, pieces_of
from harness.stores.contents import Contents
from harness.stores.staged import SMALL_FILES

_LIMIT = 64 << 20
_HEAD = f"{layout.LOG}/{log.HEAD}"
_CLAIMS = "claims"
"""Folder in the store of what is being sent: NAME → a number that this launch has drawn."""


def upload(
    store: ObjectStore,
    name: str,
    images: Sequence[FileImage],
    digests: Mapping[str, str],
    proceed: Callable[[], None],
) -> None:
    """Send a rank's files of the checkpoint ``name`` from memory; ``digests``: path → hex sha256."""
    for image in images:
        path = f"{layout.CHECKPOINTS}/{name}/{image.path}"
        if not store.holds(path, digests[image.path]):
            store.put_large(path, pieces_of(image.data), image.size, digests[image.path], proceed)


@dataclass
class Mirror:
    """Keeps a store like the run folder; on rank 0, which is the only one that decides what is there."""

    store: ObjectStore
    run: RunFolder
    only: bool
    """Whether the store is the only place of payload; the folder then keeps statements."""
    dropped: Callable[[Sequence[Path]], Sequence[int]]
    """Which of the checkpoints (folders that hold their statements, by step) lose their payload: steps."""
    warn: Callable[[str], None]
    proceed: Callable[[], None] = lambda: None
    """Called between pieces; may raise to give up."""
    _objects: dict[str, int] = field(default_factory=dict, repr=False)
    _tag: str | None = None
    """Version of the log's head that the store has."""
    _launch: bytes = field(default_factory=lambda: secrets.token_hex(16).encode(), repr=False)
    _left: dict[str, str] = field(default_factory=dict, repr=False)
    """Claims that were there when this launch began, by path → version tag."""
    _claimed: dict[str, str] = field(default_factory=dict, repr=False)
    """The same of this launch."""
    _small: dict[str, bytes] = field(default_factory=dict, repr=False)
    _damaged: set[str] = field(default_factory=set, repr=False)
    _metrics_end: tuple[int, int] = (0, 0)
    """A step, and where its line ends in metrics.jsonl."""

    def begin(self, step: int) -> list[str]:
        """See what is there, and set aside what goes on after ``step``, from which this launch continues;
        returns the names of the complete ones that are left.

        Raises `EnvironmentFault` for a store that does not answer, `ObjectExistsError` when its log is longer
        than the folder's.
        """
        self._objects = self.store.objects()
        if _HEAD in self._objects:
            note, self._tag = self.store.get_tagged(_HEAD, _LIMIT)
            if log.claimed_size(note, where=self.store.at(_HEAD)) > self._own_size():
                raise self.store.conflict(_HEAD)
        claims = [path for path in self._objects if path.startswith(f"{_CLAIMS}/")]
        self._left = {path: tag for path in claims if (tag := self.store.tag(path)) is not None}
        for name in self._contents.names:
            number = layout.parse_checkpoint_name(name.removeprefix(layout.PRUNED))
            if number is not None and number > step:
                self._begin_again(name)
        return self._contents.complete

    def alone(self) -> None:
        """Raise `ObjectExistsError` when somebody else has written to the store's log meanwhile."""
        if self.store.tag(_HEAD) != self._tag:
            raise self.store.conflict(_HEAD)

    def enter(self, name: str) -> None:
        """Become the one that sends the checkpoint ``name``. Raises `ObjectExistsError` when another does."""
        self.alone()
        self._claim(name)

    def sync(self, without: Collection[str] = ()) -> None:
        """Send what the store lacks, and remove there what `checkpoint.keep` does not want.

        ``without``: checkpoints of the folder that are known to be damaged.

        Raises `EnvironmentFault` when the store fails, `ObjectExistsError` when somebody else writes there.
        """
        there = {*self._contents.complete, *self._damaged, *without}
        for folder in self.run.complete():
            if folder.name not in there:
                self._send_older(folder)
        known = {*self._contents.complete, *self._contents.pruned}
        for folder in self.run.pruned():
            if folder.name.removeprefix(layout.PRUNED) not in known:
                self._send_statements(folder, folder.name)
        self._send_log()
        self._send_timestamps()
        self._send_small()
        self._rotate()

    def add_timestamps(self) -> None:
        """Send the timestamps that came after the last `sync`; a store that fails is told, since the next
        launch sends them."""
        try:
            self._send_timestamps()
        except HarnessError as error:
            self.warn(f"the newest timestamp is not in the store yet: {error}")

    def send(self, folder: Path, name: str) -> None:
        """Make the checkpoint in ``folder`` whole in the store, as ``name``; its manifest comes last.

        What a file lacks here must be there. Raises `VerificationFailed` when a file here is not the one
        that the manifest names, `EvidenceIncomplete` when it is nowhere.
        """
        data = durable.read_limited(folder / layout.MANIFEST, _LIMIT)
        manifest = Manifest.parse(data, where=str(folder / layout.MANIFEST))
        there = f"{layout.CHECKPOINTS}/{name}/"
        claim = self._claim(name)
        self._objects.update(self.store.objects(there))
        for entry in manifest.files:
            self._send_file(folder / entry.path, there + entry.path, entry)
        if layout.parse_checkpoint_name(name) is not None:
            statement = story.unverified(folder).statement
            lines = self._metrics(statement.step_from, statement.step_to)
            self._put(f"{layout.METRICS_PARTS}/{name}.jsonl", lines)
        if self.store.tag(claim) != self._claimed[claim]:
            raise self.store.conflict(claim)
        for path in [*_statements(folder), layout.MANIFEST]:
            self._create(there + path, durable.read_limited(folder / path, _LIMIT))
        self._release(claim)

    @property
    def complete(self) -> list[str]:
        """Names of the checkpoints that the store holds with payload, by step."""
        return self._contents.complete

    @property
    def _contents(self) -> Contents:
        return Contents(self._objects)

    def _send_older(self, folder: Path) -> None:
        try:
            self.send(folder, folder.name)
        except VerificationFailed as damaged:
            self._damaged.add(folder.name)
            self._release(self._claim(folder.name))
            self._send_statements(folder, f"{layout.PRUNED}{folder.name}")
            self.warn(f"{folder.name} is damaged, and only its statements went to the store: {damaged}")

    def _metrics(self, after: int, through: int) -> bytes:
        """The lines of metrics.jsonl of the steps ``after < step <= through``."""
        start = self._metrics_end[1] if self._metrics_end[0] == after else 0
        lines = []
        with open(self.run.metrics, "rb") as stream:
            stream.seek(start)
            for line in stream:
                step = step_of(line)
                if step is None or step > through:
                    break
                start += len(line)
                if step > after:
                    lines.append(line)
        self._metrics_end = through, start
        return b"".join(lines)

    def _send_file(self, source: Path, path: str, entry: FileEntry) -> None:
        if self._objects.get(path) == entry.size and self.store.holds(path, entry.sha256):
            return
        if not source.is_file():
            raise EvidenceIncomplete("is neither here nor in the store", where=str(source))
        self.store.put_large(path, _verified(source, entry), entry.size, entry.sha256, self.proceed)
        self._objects[path] = entry.size

    def _claim(self, name: str) -> str:
        """The path of this launch's claim on ``name``, made where it is not made yet."""
        path = f"{_CLAIMS}/{name}"
        if path in self._claimed:
            return path
        self.proceed()
        tag = self._left.pop(path, None)
        self._claimed[path] = self._ours(
            path,
            self._launch,
            lambda: (
                self.store.create(path, self._launch)
                if tag is None
                else self.store.replace(path, self._launch, tag)
            ),
        )
        return path

    def _release(self, claim: str) -> None:
        self._delete([claim])
        del self._claimed[claim]

    def _create(self, path: str, data: bytes) -> str:
        """Store ``data`` under a new name; returns its tag."""
        self.proceed()
        return self._ours(path, data, lambda: self.store.create(path, data))

    def _ours(self, path: str, data: bytes, attempt: Callable[[], str]) -> str:
        """The tag of ``data`` at ``path`` after ``attempt``, which may have been repeated after an answer was
        lost: then the data that it finds in its way is its own."""
        try:
            tag = attempt()
        except ObjectExistsError as conflict:
            try:
                found, tag = self.store.get_tagged(path, _LIMIT)
            except EvidenceIncomplete:
                raise conflict from None
            if found != data:
                raise
        self._objects[path] = len(data)
        return tag

    def _own_size(self) -> int:
        """Records in the folder's log."""
        head = self.run.log / log.HEAD
        return log.claimed_size(durable.read_limited(head, _LIMIT), where=str(head)) if head.exists() else 0

    def _send_statements(self, folder: Path, name: str) -> None:
        there = f"{layout.CHECKPOINTS}/{name}/"
        self._send_part(name.removeprefix(layout.PRUNED))
        for path in [*_statements(folder), layout.MANIFEST]:
            self._put(there + path, durable.read_limited(folder / path, _LIMIT))

    def _send_part(self, name: str) -> None:
        """The lines of metrics.jsonl from the checkpoint before ``name`` on, unless they are there: whoever
        fetches the run joins the parts of all, also of one that never was whole in the store."""
        path, step = f"{layout.METRICS_PARTS}/{name}.jsonl", layout.parse_checkpoint_name(name)
        if path in self._objects or step is None:
            return
        folders = [*self.run.complete(), *self.run.pruned()]
        steps = (layout.step_of(folder.name.removeprefix(layout.PRUNED)) for folder in folders)
        self._put(path, self._metrics(max((each for each in steps if each < step), default=0), step))

    def _send_added(self) -> None:
        """Statements that were added to checkpoints after these were sent: the log may name them."""
        contents = self._contents
        whole, pruned = set(contents.complete), set(contents.pruned)
        for folder in [*self.run.complete(), *self.run.pruned()]:
            name = folder.name.removeprefix(layout.PRUNED)
            if (name in whole or name in pruned) and (folder / layout.PROVENANCE).is_dir():
                self._send_part(name)
                source = name if name in whole else f"{layout.PRUNED}{name}"
                for path in _statements(folder):
                    target = f"{layout.CHECKPOINTS}/{source}/{path}"
                    if later.name_of(path) is not None and target not in self._objects:
                        self._put(target, durable.read_limited(folder / path, later.LIMIT))

    def _send_log(self) -> None:
        head = self.run.log / log.HEAD
        if not head.exists():
            return
        with durable.locked(self.run.log):  # an append removes the tiles that it replaces
            note = durable.read_limited(head, _LIMIT)
            if self._small.get(_HEAD) == note:
                return
            # A full tile never changes; a partial one may be left of an append that was cut off.
            wanted = {
                f"{layout.LOG}/{path}": durable.read_limited(self.run.log / path, _LIMIT)
                for path in tiles.paths(log.claimed_size(note, where=str(head)))
                if tiles.is_partial(path) or f"{layout.LOG}/{path}" not in self._objects
            }
        self._send_added()
        for target, data in wanted.items():
            self._put(target, data)
        tag = self._tag
        self._tag = self._ours(
            _HEAD,
            note,
            lambda: self.store.create(_HEAD, note) if tag is None else self.store.replace(_HEAD, note, tag),
        )
        self._small[_HEAD] = note

    def _send_timestamps(self) -> None:
        for size in stamps.sizes(self.run.log):
            path = f"{layout.LOG}/{timestamp.path_of(size)}"
            if path not in self._objects:
                self._put(path, durable.read_limited(self.run.root / path, timestamp.LIMIT))

    def _send_small(self) -> None:
        for name in SMALL_FILES:
            path = self.run.root / name
            data = durable.read_limited(path, _LIMIT) if path.is_file() else None
            if data is None and name in self._objects:
                self._delete([name])  # policy.json of a run that goes on without a policy
            elif data is not None and self._small.get(name) != data:
                self._put(name, data)
                self._small[name] = data

    def _rotate(self) -> None:
        here = {
            folder.name.removeprefix(layout.PRUNED): folder
            for folder in [*self.run.pruned(), *self.run.complete()]
        }
        complete = [here[name] for name in self._contents.complete if name in here]
        for name in map(layout.checkpoint_name, self.dropped(complete)):
            self._send_statements(here[name], f"{layout.PRUNED}{name}")
        # Also what an earlier rotation has left, and uploads that nobody is going to finish.
        for name in [*self._contents.pruned, *self._contents.unfinished]:
            manifest = f"{layout.CHECKPOINTS}/{name}/{layout.MANIFEST}"
            rest = [f"{layout.CHECKPOINTS}/{name}/{path}" for path in self._contents.of(name)]
            self._delete(sorted(rest, key=lambda path: path != manifest))

    def _begin_again(self, name: str) -> None:
        """Make room for another checkpoint of ``name``: a whole one is set aside; of others the payload
        stays, since the same bits may come again."""
        found = self._contents.of(name)
        if layout.MANIFEST not in found:
            signed = [path for path in found if path.startswith((layout.PROVENANCE, layout.MODEL_SIGNATURE))]
            self._delete([f"{layout.CHECKPOINTS}/{name}/{path}" for path in signed])
            return
        taken, number = self._contents.names, 1
        while (target := f"{layout.DAMAGED}{name}-{number}") in taken:
            number += 1
        # The manifest first: without it, nobody takes the rest for a checkpoint.
        for path in sorted(found, key=lambda path: path != layout.MANIFEST):
            source, aside = f"{layout.CHECKPOINTS}/{name}/{path}", f"{layout.CHECKPOINTS}/{target}/{path}"
            self.store.move(source, aside, self._objects[source])
            self._objects[aside] = self._objects.pop(source)

    def _put(self, path: str, data: bytes) -> None:
        self.proceed()
        self.store.put(path, data)
        self._objects[path] = len(data)

    def _delete(self, paths: Sequence[str]) -> None:
        self.store.delete(paths)
        for path in paths:
            del self._objects[path]


def _statements(folder: Path) -> list[str]:
    """Signatures and statements of a checkpoint folder, the manifest aside."""
    found = sorted(f"{layout.PROVENANCE}/{path.name}" for path in (folder / layout.PROVENANCE).iterdir())
    if (folder / layout.MODEL_SIGNATURE).exists():
        found.append(layout.MODEL_SIGNATURE)
    return found


def _verified(path: Path, entry: FileEntry) -> Iterator[memoryview]:
    """The bytes of a file; raises at their end, before the store takes them, when they are other ones."""
    digest = hashlib.sha256()
    with durable.open_regular(path) as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
            yield memoryview(piece)
    if digest.hexdigest() != entry.sha256:
        raise VerificationFailed("the sha256 is not the one in MANIFEST.json", where=str(path))
