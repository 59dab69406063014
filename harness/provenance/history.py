"""The rules between the checkpoints of one run: lineage and log. Statements and records in, findings out.

- every checkpoint belongs to the same run, names the checkpoint before it as its parent by id and step, and
  has the next sequence number; the first one is genesis
- it names the same start as the checkpoint before: what other run's checkpoint this run began with, if any
- it names the same policy as the checkpoint before, unless it is of another launch, which accepted a change
- its launch is that of the checkpoint before, or the next one, which says that it resumed from there
- the log holds one record for each commit, in order; what a checkpoint saw of the log when it was signed is
  the log before its own record, statements apart that others entered while it was being written
- a statement that was added later and entered is there, the same bytes, as long as its checkpoint is; one
  that is there and not entered is told, since nobody would miss it
- a record whose checkpoint is not there is a failure, unless a later signed statement says that a resume
  skipped it; a run that begins again after that may make the same checkpoint, bit for bit, a second time
- when the checkpoint that a run began with is at hand, it is of the run and step that the run's statements
  name, and carries the statement that they name by digest
- where the log records that the signing key was handed over, the checkpoints before it are not signed by the
  new key, and those after it not by the old one
- only the newest checkpoint may lack its record, since a crash can come between its rename and its entry;
  that is evidence still to come, not a good run
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.errors import VerificationFailed
from harness.format import layout, strict_json
from harness.provenance.checks import Check
from harness.provenance.findings import Findings
from harness.provenance.log_record import ROTATION, commit, is_commit, is_statement, origin_of, parse_record
from harness.provenance.policy.rules import Rotation
from harness.provenance.statements import CheckpointStatement
from harness.provenance.transparency import log

LINEAGE: Check = "lineage"
LOG: Check = "log"
START: Check = "start"
POLICY = "policy"
"""What a resume accepts that goes on under another policy."""
_UNLOGGED = "is not in the log yet: its writer stopped between the rename and the entry"


@dataclass(frozen=True)
class Entry:
    """An authentic checkpoint of the run."""

    where: str
    statement: CheckpointStatement
    checkpoint_id: str
    bundle_sha256: str
    """Of provenance/checkpoint.sigstore.json."""
    later: Mapping[str, str] = field(default_factory=dict)
    """Name → hex sha256 of the statements that were added afterwards."""
    signer: str = ""
    """Key id of the key that signed provenance/checkpoint.sigstore.json; empty when none was checked."""


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """``entries`` from genesis on."""
    return sorted(entries, key=lambda entry: (entry.statement.sequence, entry.statement.step_to))


def check_lineage(entries: Sequence[Entry], findings: Findings) -> None:
    """``entries``: every complete and pruned checkpoint of the run, `in_order`."""
    findings.all_of(LINEAGE, _breaks(entries))


def check_set_aside(entry: Entry, entries: Sequence[Entry], book: log.Log | None, findings: Findings) -> None:
    """A non-finite state follows a checkpoint of the same run, or is its genesis; the log knows none."""
    findings.all_of(LINEAGE, _orphaned(entry, entries))
    if book is not None:
        findings.all_of(LOG, _misseen(entry, _seen_size(entry), book))


def check_starts(
    entries: Sequence[Entry], others: Sequence[Entry], findings: Findings, *, wanted: bool
) -> None:
    """What the runs of ``entries`` began with, looked up among ``entries`` and ``others``.

    ``wanted``: a start that is not among them is missing evidence; otherwise it is only said.
    """
    known = {(each.statement.run_id, each.checkpoint_id): each for each in (*entries, *others)}
    asked = {each.statement.run_id: each for each in reversed((*entries, *others)) if each.statement.start}
    for entry in asked.values():
        start = entry.statement.start
        if start is None:
            continue
        parent = known.get((start["run"], start["checkpoint"]))
        told = f"step {start['step']} of the run {start['name']} (checkpoint {start['checkpoint']})"
        if parent is not None:
            findings.all_of(START, _misnamed(start, parent, entry.where))
        elif wanted:
            what = f"began with {told}, which is not in what --with names"
            findings.missing(START, what, entry.where, "add its run folder to --with")
        else:
            findings.note(f"began with {told}: not at hand, so not checked (--with ITS_RUN)")


def _misnamed(start: Mapping[str, Any], parent: Entry, where: str) -> Iterator[tuple[str, str]]:
    now = parent.statement
    if (now.step_to, now.run_name) != (start["step"], start["name"]):
        yield (
            f"began with step {start['step']} of {start['name']}, "
            f"and that checkpoint is step {now.step_to} of {now.run_name}",
            where,
        )
    if parent.bundle_sha256 != start["bundle_sha256"]:
        yield f"began with a checkpoint whose statement was another one than that in {parent.where}", where
    if now.predicate["outcome"] != "ok":
        yield f"began with the state of a run that became non-finite: {parent.where}", where


def check_log(
    entries: Sequence[Entry],
    book: log.Log,
    findings: Findings,
    where: str,
    aside: Sequence[Entry] = (),
    rotations: Sequence[Rotation] = (),
) -> None:
    """``entries`` as for `check_lineage`, against an authentic log; ``aside``: non-finite states;
    ``rotations``: the hand-overs that the policy accepts, in the order of their records."""
    expected = {strict_json.rewritten(fields): fields for fields in map(_expected, entries)}
    try:
        # Nearly every record is what a checkpoint makes it be, and need not be parsed to see that.
        records = [expected.get(data) or parse_record(data, where=where) for data in book.records]
    except VerificationFailed as error:
        findings.bad(LOG, error.what, where)
        return
    places = {each["checkpoint"]: number for number, each in enumerate(records) if is_commit(each)}
    newest = entries[-1] if entries else None
    for entry in entries:
        if entry.checkpoint_id not in places and entry is newest and _saw_last_commit(entry, records):
            findings.missing(LOG, _UNLOGGED, entry.where, "start the run again, which completes the log")
    findings.all_of(LOG, _departures(entries, records, places, book, where))
    findings.all_of(LOG, _lost_statements([*entries, *aside], entries, records, places, where))
    findings.all_of(LOG, _misrotated(entries, records, places, rotations, where))
    _tell_unlogged([*entries, *aside], records, findings)


def _breaks(entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    before: Entry | None = None
    for entry in entries:
        now = entry.statement
        if before is not None and now.run_id != before.statement.run_id:
            yield f"belongs to the run {now.run_id[:12]}…, the one before to another", entry.where
        if before is None and now.parent_id is not None:
            yield f"its parent {now.parent_id[:12]}… (step {now.parent_step}) is not here", entry.where
        elif before is not None and now.sequence == before.statement.sequence:
            yield f"has the sequence number {now.sequence} of {before.statement.name}", entry.where
        elif before is not None and (now.parent_id, now.parent_step, now.sequence - 1) != (
            before.checkpoint_id,
            before.statement.step_to,
            before.statement.sequence,
        ):
            parent = "genesis" if now.parent_id is None else f"{now.parent_id[:12]}… (step {now.parent_step})"
            yield f"its parent is {parent}, not {before.statement.name} before it", entry.where
        elif before is not None and now.start != before.statement.start:
            yield f"names another start of the run than {before.statement.name} before it", entry.where
        elif before is not None and not _continues(before, now.segment):
            yield f"its launch does not continue that of {before.statement.name} before it", entry.where
        elif before is not None and not _keeps_policy(before.statement, now):
            what = f"names another policy than {before.statement.name} before it, and no resume accepted that"
            yield what, entry.where
        before = entry


def _continues(before: Entry, segment: Mapping[str, Any]) -> bool:
    """Whether ``segment`` is the launch of ``before``, or the next one and resumed from there."""
    known = before.statement.segment
    source = {"checkpoint": before.checkpoint_id, "step": before.statement.step_to}
    return segment == known or (segment["number"], segment["resumed_from"]) == (known["number"] + 1, source)


def _keeps_policy(before: CheckpointStatement, now: CheckpointStatement) -> bool:
    """Whether ``now`` is made under the policy of ``before``, or by a launch that accepted another one."""
    one, other = (None if each.policy is None else each.policy["sha256"] for each in (before, now))
    accepted = (each.partition(":")[0] for each in now.segment["accepted"])
    return one == other or (now.segment["number"] > before.segment["number"] and POLICY in accepted)


def _orphaned(entry: Entry, entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    parents = {other.checkpoint_id: other for other in entries}
    now = entry.statement
    parent = parents.get(now.parent_id or "")
    if now.parent_id is not None and parent is None:
        yield f"its parent {now.parent_id[:12]}… (step {now.parent_step}) is not here", entry.where
    if parent is not None and parent.statement.run_id != now.run_id:
        yield "belongs to another run than its parent", entry.where
    if parent is not None and parent.statement.start != now.start:
        yield "names another start of the run than its parent", entry.where
    if parent is not None and not _keeps_policy(parent.statement, now):
        yield "names another policy than its parent, and no resume accepted that", entry.where


def _departures(
    entries: Sequence[Entry],
    records: Sequence[Mapping[str, Any]],
    places: Mapping[str, int],
    book: log.Log,
    where: str,
) -> Iterator[tuple[str, str]]:
    for entry in entries:
        place = places.get(entry.checkpoint_id)
        if book.head.origin != origin_of(entry.statement.run_id):
            yield f"belongs to another run than the log of {book.head.origin!r}", entry.where
        if place is None:
            if entry is not entries[-1] or not _saw_last_commit(entry, records):
                yield "is not in the log", entry.where
        elif records[place] != _expected(entry):
            yield f"record {place} of the log says something else about it", entry.where
        place = len(records) if place is None else place
        seen = _seen_size(entry)
        between = any(map(is_commit, records[seen:place]))
        yield from _misseen(entry, place if between or seen > place else seen, book)
    here = {entry.checkpoint_id for entry in entries}
    for number, record in enumerate(records):
        if not is_commit(record):
            continue
        newest = places[record["checkpoint"]] == number
        if (newest and record["checkpoint"] in here) or _skipped_later(record, number, entries, places):
            continue
        name = layout.checkpoint_name(record["step"])
        gone = f"record {number} names {name} ({record['checkpoint'][:12]}…), which is not here"
        yield gone if newest else "has two records of the same checkpoint", where


def _lost_statements(
    holders: Sequence[Entry],
    entries: Sequence[Entry],
    records: Sequence[Mapping[str, Any]],
    places: Mapping[str, int],
    where: str,
) -> Iterator[tuple[str, str]]:
    """Later statements that the log names, and that are gone or have other bytes than were entered."""
    known = {entry.checkpoint_id: entry for entry in holders}
    named: set[tuple[str, str]] = set()
    commits: dict[str, int] = {}
    for number, record in enumerate(records):
        if record["kind"] == ROTATION:
            continue
        identity = record["checkpoint"]
        if is_commit(record):
            commits[identity] = number
            continue
        name, holder, commit = record["name"], known.get(identity), commits.get(identity)
        set_aside = holder is None or commit != places.get(identity)
        if commit is not None and set_aside and _skipped_later(records[commit], commit, entries, places):
            continue
        if (identity, name) in named:
            yield f"has a second record of the statement {name} of {identity[:12]}…", where
        named.add((identity, name))
        if holder is None:
            yield f"record {number} names {name} of {identity[:12]}…, which is not here", where
        elif record["run"] != holder.statement.run_id or places.get(identity, -1) > number:
            yield f"record {number} of the log enters {name} for another run or too early", holder.where
        elif name not in holder.later:
            yield f"its statement {name} is record {number} of the log, and is not here", holder.where
        elif holder.later[name] != record["bundle_sha256"]:
            yield f"its statement {name} has other bytes than record {number} of the log says", holder.where


def _misrotated(
    entries: Sequence[Entry],
    records: Sequence[Mapping[str, Any]],
    places: Mapping[str, int],
    rotations: Sequence[Rotation],
    where: str,
) -> Iterator[tuple[str, str]]:
    """Hand-overs that are none, and checkpoints on the other side of one than their signer's key."""
    run_id = entries[0].statement.run_id if entries else None
    numbers = [number for number, record in enumerate(records) if record["kind"] == ROTATION]
    if len(numbers) != len(rotations):
        yield f"has {len(numbers)} hand-overs of its key, and {len(rotations)} that count", where
        return
    for number, rotation in zip(numbers, rotations, strict=True):
        if run_id is not None and records[number]["run"] != run_id:
            yield f"record {number} of the log is a hand-over for another run", where
        old, new = ({key.key_id for key in keys} for keys in (rotation.old, rotation.new))
        for entry in entries:
            place = places.get(entry.checkpoint_id, len(records))
            if place > number and entry.signer in old:
                yield f"is signed by the key that record {number} of the log handed over", entry.where
            if place < number and entry.signer in new:
                yield f"is signed by the key that record {number} of the log hands over to", entry.where


def _tell_unlogged(
    holders: Sequence[Entry], records: Sequence[Mapping[str, Any]], findings: Findings
) -> None:
    logged = {(each["checkpoint"], each["name"]) for each in records if is_statement(each)}
    for holder in holders:
        for name in holder.later:
            if (holder.checkpoint_id, name) not in logged:
                where = holder.statement.name
                findings.note(f"{where} {name}: not in the log, so its removal would not be noticed")


def _expected(entry: Entry) -> dict[str, Any]:
    """The fields of its record."""
    now = entry.statement
    return commit(now.run_id, now.sequence, now.step_to, entry.checkpoint_id, entry.bundle_sha256)


def _seen_size(entry: Entry) -> int:
    seen = entry.statement.predicate["log"]
    return 0 if seen is None else int(seen["size"])


def _saw_last_commit(entry: Entry, records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether ``entry`` was signed after every commit in the log; later statements may have come since."""
    seen = _seen_size(entry)
    return seen <= len(records) and not any(map(is_commit, records[seen:]))


def _misseen(entry: Entry, place: int, book: log.Log) -> Iterator[tuple[str, str]]:
    """The head that the checkpoint saw is that of the log up to its own record."""
    seen = entry.statement.predicate["log"]
    size = _seen_size(entry)
    if size > len(book.records):
        yield f"was signed when the log had {size} records, and it has {len(book.records)}", entry.where
    elif size != place:
        yield f"was signed when the log had {size} records, and is its record {place}", entry.where
    elif seen is not None and book.root_of_prefix(size).hex() != seen["root"]:
        yield f"saw another log of {size} records when it was signed", entry.where


def _skipped_later(
    record: Mapping[str, Any], number: int, entries: Sequence[Entry], places: Mapping[str, int]
) -> bool:
    """Whether a statement that was signed after ``record`` says that a resume skipped its checkpoint."""
    name = layout.checkpoint_name(record["step"])
    for entry in entries:
        if places.get(entry.checkpoint_id, number + 1) > number:
            for item in entry.statement.segment["skipped"]:
                # The id of a skipped folder is what its manifest claimed, and that may be what was damaged.
                if item["checkpoint"] == record["checkpoint"] or item["name"] == name:
                    return True
    return False
