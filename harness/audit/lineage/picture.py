"""The lineage of a folder: its statements read and, with a policy, authenticated; then their graph.

With a policy the signatures, statements, manifests and file sets of every checkpoint are checked and the
lineage between them (`harness.provenance.history`); a folder that fails is drawn by its name only, and
nothing that it says is believed. Not checked here are payload bytes, the log and the metrics: that is
`harness verify`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness.audit.folders import exported, prepared, story
from harness.audit.folders.story import Story
from harness.audit.run import handover, seen, undisturbed
from harness.audit.run.seen import Seen
from harness.errors import EvidenceIncomplete, HarnessError
from harness.format import files, layout
from harness.format.layout import RunFolder
from harness.provenance import history
from harness.provenance.findings import Finding, Findings
from harness.provenance.history import Entry
from harness.provenance.lineage import Corpus, Export, Graph, Member, Unreadable, graph
from harness.provenance.policy import rotation
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import envelope
from harness.provenance.statements import parse_checkpoint

_VERIFIED = "verified: signatures, statements, file sets, parents; not payload, log, metrics (harness verify)"
_FAILED = "FAILED: the graph below holds only what could be authenticated"
_COMMITS = ("complete", "pruned", "elsewhere")
_INCOMPLETE = "cannot tell: evidence is missing"


@dataclass(frozen=True)
class Picture:
    """A graph and how far it can be believed."""

    path: Path
    graph: Graph
    checked: bool
    """Whether a policy was given."""
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    exit_code: int

    @property
    def verified(self) -> bool:
        """Whether a policy was given and nothing was found against it."""
        return self.checked and not self.findings

    @property
    def trust(self) -> str:
        """One line for the reader."""
        if not self.checked:
            return story.NOT_VERIFIED
        return {0: _VERIFIED, 1: _FAILED}.get(self.exit_code, _INCOMPLETE)

    def document(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return {
            "path": str(self.path),
            "verified": self.verified,
            "trust": self.trust,
            "nodes": [asdict(node) for node in self.graph.nodes],
            "edges": [asdict(edge) for edge in self.graph.edges],
            "findings": [
                {
                    "check": each.check,
                    "what": each.what,
                    "where": each.where,
                    "remedy": each.remedy,
                    "missing": each.missing,
                }
                for each in self.findings
            ],
            "notes": list(self.notes),
        }


def read(path: Path, policy: Policy | None, beside: Sequence[Path] = ()) -> Picture:
    """The lineage of a run folder, of an exported folder, or of one checkpoint folder, whose parent is then a
    node that is absent.

    ``beside``: exported folders, prepared corpora, and those of the runs that it and they began with; with
    any run, each start must be among them.

    Raises `UsageError` when ``path`` is neither, `EvidenceIncomplete` for a run without any checkpoint,
    `EnvironmentFault` for a disk that cannot be read.
    """

    def failures(picture: Picture) -> list[Hashable]:
        broken = (node.key for node in picture.graph.nodes if node.state == "unreadable")
        return [*picture.findings, *broken]

    return undisturbed.read(path, partial(_read, path, policy, beside), failures)


def _read(path: Path, policy: Policy | None, beside: Sequence[Path]) -> Picture:
    findings = Findings()
    paths = [path, *beside]
    sealed = [_sealed(each, policy, findings) for each in paths if _is_sealed(each)]
    own = [] if _is_sealed(path) else _told(path, policy, findings)
    if not own and not _is_sealed(path):
        raise EvidenceIncomplete("the run holds no checkpoint", where=str(path))
    others = [other for other in beside if not _is_sealed(other)]
    found = [*own, *(each for other in others for each in _told(other, policy, findings))]
    stories = [each for each in found if isinstance(each, Story)]
    if policy is not None:
        entries = history.in_order([_entry(each) for each in stories if each.kind in _COMMITS])
        history.check_starts(entries, (), findings, wanted=bool(others))
    members = [_member(each) for each in stories]
    unreadable = [each for each in (*found, *sealed) if isinstance(each, Unreadable)]
    drawn = graph(
        members,
        unreadable,
        [each for each in sealed if isinstance(each, Export)],
        [each for each in sealed if isinstance(each, Corpus)],
    )
    return Picture(
        path, drawn, policy is not None, tuple(findings.ordered), tuple(findings.notes), findings.exit_code
    )


def _is_sealed(path: Path) -> bool:
    """Whether it is no run and no checkpoint: an exported folder or a prepared corpus."""
    return exported.is_export(path) or prepared.is_corpus(path)


def _sealed(folder: Path, policy: Policy | None, findings: Findings) -> Corpus | Export | Unreadable:
    """What an exported folder or a prepared corpus says; with a policy every check but that of payload bytes
    is made."""
    name, before = layout.name_of(folder), len(findings.failed)
    corpus = prepared.is_corpus(folder)
    if policy is not None:
        (prepared if corpus else exported).examine(folder, policy, findings)
        if len(findings.failed) > before:
            return _unreadable(name, findings.failed[before].what)
    try:
        return Corpus(name, prepared.claimed(folder)) if corpus else Export(name, exported.claimed(folder))
    except HarnessError as error:
        return _unreadable(name, error.what)


def _told(path: Path, policy: Policy | None, findings: Findings) -> list[Story | Unreadable]:
    """What the checkpoints of one folder say, and the lineage between them."""
    alone = layout.kind_of(path) == "checkpoint"
    shown = Seen() if policy is None else seen.beside(path, policy)
    if policy is not None:
        trust = findings.attempt(rotation.CHECK, handover.trust, path, policy, shown)
        policy = policy if trust is None else trust.policy
    folders = [path] if alone else list(_folders(RunFolder(path), findings))
    found = [_read_folder(folder, policy, findings, shown.bundles) for folder in folders]
    if policy is not None and not alone:
        _check_lineage([each for each in found if isinstance(each, Story)], findings)
    return found


def _folders(run: RunFolder, findings: Findings) -> Iterator[Path]:
    yield from (*run.complete(), *run.pruned())
    for path in run.aside():
        if path.name.startswith((layout.NONFINITE, layout.DAMAGED)):
            yield path
        else:
            findings.note(f"not drawn: {path.name}")


def _read_folder(
    folder: Path, policy: Policy | None, findings: Findings, shown: Mapping[str, str]
) -> Story | Unreadable:
    name = layout.name_of(folder)
    if policy is None:
        try:
            return story.unverified(folder)
        except HarnessError as error:
            return _unreadable(name, error.what)
    if name.startswith(layout.DAMAGED):
        return _damaged(folder, name, policy)
    before = len(findings.failed)
    told = story.examined(folder, policy, findings, shown)
    if len(findings.failed) == before and told is not None:
        return told
    reasons = [each.what for each in findings.failed[before:]]
    return _unreadable(name, reasons[0] if reasons else "could not be examined")


def _damaged(folder: Path, name: str, policy: Policy) -> Story | Unreadable:
    """A resume has set it aside for what is wrong in it; its statement may still be authentic."""
    path = folder / layout.CHECKPOINT_BUNDLE
    try:
        data = files.read_limited(path, envelope.LIMIT)
        opened = envelope.open_bundle(data, policy.statement_keys, where=str(path))
        statement = parse_checkpoint(opened.payload, where=str(path))
    except HarnessError as error:
        return _unreadable(name, error.what)
    signer = policy.identity(opened.key).name
    return Story(folder, statement, "damaged", "", (signer,), opened.key.key_id)


def _unreadable(name: str, reason: str) -> Unreadable:
    return Unreadable(name, reason, "damaged" if name.startswith(layout.DAMAGED) else "unreadable")


def _member(told: Story) -> Member:
    return Member(layout.name_of(told.folder), told.kind, told.statement)


def _check_lineage(stories: Sequence[Story], findings: Findings) -> None:
    """Parents and sequence numbers, by the rules of `harness.provenance.history`."""
    good = [_entry(each) for each in stories if each.kind in _COMMITS]
    entries = history.in_order(good)
    history.check_lineage(entries, findings)
    for each in stories:
        if each.kind == "nonfinite":
            history.check_set_aside(_entry(each), entries, None, findings)


def _entry(told: Story) -> Entry:
    return Entry(str(told.folder), told.statement, told.statement.subject_id, told.bundle_sha256)
