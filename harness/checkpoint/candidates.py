"""The way back through the checkpoints of a run, to the newest that verifies; every rank goes along.

`harness.audit.folders.opening.open_checkpoint` checks signatures, statements, the exact file set, headers and
the manifest on rank 0, which also hashes the files that are not tensors
(`harness.checkpoint.restore.check_rest`). A disk that cannot be read ends the search.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.audit.folders.opening import OpenedCheckpoint, open_checkpoint
from harness.checkpoint import restore
from harness.checkpoint.restore import Loaded, check_rest
from harness.errors import EnvironmentFault, EvidenceIncomplete, HarnessError, VerificationFailed
from harness.format import layout
from harness.format.layout import RunFolder
from harness.provenance import log_record
from harness.provenance.policy.rules import Policy
from harness.provenance.statements import CheckpointStatement
from harness.workers import Workers


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that a resume could not use."""

    name: str
    reason: str
    checkpoint: str | None = None
    """Its id, where a log or a manifest tells."""


@dataclass(frozen=True)
class Found:
    """What a run folder has to continue from."""

    loaded: Loaded | None
    opened: OpenedCheckpoint | None
    """On rank 0."""
    skipped: tuple[Skipped, ...]
    """Newer checkpoints that do not verify, newest first; on rank 0."""

    @property
    def statement(self) -> CheckpointStatement | None:
        """What the checkpoint says of itself; on rank 0."""
        return None if self.opened is None else self.opened.statement


class Candidates:
    """The way back through the checkpoints of a run, newest first; every rank has one and goes along."""

    def __init__(
        self,
        workers: Workers,
        run: RunFolder,
        policy: Policy | None,
        wanted: Callable[[str], bool],
        origin: str | None = None,
    ) -> None:
        """``policy``: rank 0's, which opens; the others take the manifest with the id that rank 0 names, so
        they need no key. ``wanted`` names the small files that this rank keeps. ``origin``: of the run's log;
        checkpoints of other runs are passed over. None: whatever is there is of the run."""
        self._workers = workers
        self._run = run
        self._policy = policy
        self._wanted = wanted
        self._origin = origin
        self._folders: Iterator[Path] = iter(reversed(run.complete())) if policy is not None else iter(())
        self._opened: OpenedCheckpoint | None = None
        self._skipped: list[Skipped] = []

    def next(self) -> Found:
        """The newest checkpoint that opens, of those that this has not returned yet.

        Raises `EnvironmentFault` when a file cannot be read: a disk that fails now may work later, so it is
        no reason to go back in the run's history.
        """
        while agreed := json.loads(self._workers.agree(self._advance)):
            folder = self._run.checkpoints / agreed["name"]
            loaded = self._workers.together(partial(self._load, folder, agreed["checkpoint"]))
            problems = self._workers.gather_bytes(loaded.encode() if isinstance(loaded, str) else b"")
            if not any(problems) and not isinstance(loaded, str):
                return Found(loaded, self._opened, tuple(self._skipped))
            reason = next(problem for problem in problems if problem).decode()
            self._skipped.append(Skipped(folder.name, reason, agreed["checkpoint"]))
        return Found(None, None, tuple(self._skipped))

    def reject(self, loaded: Loaded, reason: str) -> None:
        """What `next` has returned turned out to be damaged."""
        self._skipped.append(Skipped(loaded.folder.name, reason, loaded.checkpoint))

    def _advance(self) -> bytes:
        """On rank 0: the next checkpoint that opens, as JSON with its name and id; null after the last."""
        if self._policy is None:
            raise HarnessError("only rank 0 opens checkpoints")
        for folder in self._folders:
            try:
                opened = open_checkpoint(folder, self._policy)
                self._require_own(opened)
                check_rest(folder, opened.manifest)
            except EnvironmentFault:
                raise
            except HarnessError as error:
                self._skipped.append(Skipped(folder.name, str(error), _claimed_id(folder)))
                continue
            self._opened = opened
            return json.dumps({"name": folder.name, "checkpoint": opened.checkpoint_id}).encode()
        return b"null"

    def _require_own(self, opened: OpenedCheckpoint) -> None:
        run = opened.statement.run_id
        if self._origin is not None and log_record.origin_of(run) != self._origin:
            raise VerificationFailed(
                f"belongs to the run {run}, and the log to another", where=str(opened.folder)
            )

    def _load(self, folder: Path, checkpoint: str) -> Loaded | str:
        """What this rank needs of a checkpoint besides tensors, or why it is not to be used."""
        try:
            return restore.load(self._workers, folder, checkpoint, self._wanted)
        except (VerificationFailed, EvidenceIncomplete) as error:
            return str(error)


def open_elsewhere(
    workers: Workers, opening: Callable[[], OpenedCheckpoint], wanted: Callable[[str], bool]
) -> tuple[Loaded, OpenedCheckpoint | None]:
    """The checkpoint of another run that rank 0 opens by ``opening``, verified as the own ones are.

    Only rank 0 gets the opened one. Raises on every rank what is wrong with it.
    """

    def opened_whole() -> OpenedCheckpoint:
        opened = opening()
        check_rest(opened.folder, opened.manifest)
        return opened

    opened = workers.first_only(opened_whole)
    named = {} if opened is None else {"folder": str(opened.folder), "checkpoint": opened.checkpoint_id}
    agreed = json.loads(workers.broadcast_bytes(json.dumps(named).encode()))
    folder, identity = Path(agreed["folder"]), agreed["checkpoint"]
    return workers.together(lambda: restore.load(workers, folder, identity, wanted)), opened


def _claimed_id(folder: Path) -> str | None:
    try:
        return hashlib.sha256((folder / layout.MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None
