"""Log heads that somebody outside has kept, and the proofs that a log continues one.

A log in a folder can be replaced as a whole by whoever has its key, but not a head that was kept elsewhere:
in a file, a policy, a git tag. Rules for a kept head and a log:

- both have the same origin, so a head of one run says nothing about another
- the log has at least as many records, else it was rolled back
- a consistency proof leads from the head's root to the log's, else its history was rewritten

Example::

    kept = heads.load(Path("tiny.head"), policy.statement_keys)
    heads.check(log.read(folder, policy.statement_keys), [kept], findings, str(folder))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UsageError, VerificationFailed
from harness.format import files
from harness.provenance.checks import Check
from harness.provenance.findings import Findings
from harness.provenance.signing.keys import PublicKey
from harness.provenance.transparency import log, witness
from harness.provenance.transparency.log import Head, Log
from harness.provenance.transparency.merkle import consistency_proof, node_hash, root_hash

CHECK: Check = "log head"
"""Name of the check."""


@dataclass(frozen=True)
class Kept:
    """A head that the auditor brings along."""

    head: Head
    source: str
    """As messages name it: ``the head in tiny.head``."""
    seen: str | None = None
    """The moment at which it was there, proven or by the auditor's own word, as ``2026-11-23T20:00:00Z``."""
    binding: bool = True
    """Whether the log must be the one of this head; one of several in a policy may be another run's."""


def load(
    path: Path, keys: Sequence[PublicKey], witnesses: Sequence[PublicKey] = (), threshold: int = 1
) -> Kept:
    """The head in the signed note ``path``, as `harness head` writes it. With ``witnesses``, at least
    ``threshold`` of them have cosigned it, and it was there at the moment that they state.

    Raises `UsageError` when there is no such file or it is no log head, `VerificationFailed` when no Ed25519
    key of ``keys`` has signed it or too few witnesses have, `EnvironmentFault` when it cannot be read.
    """
    remedy = "give a file that harness head RUN --out FILE has written"
    note = files.read_given(path, "the kept head", log.NOTE_LIMIT, remedy)
    try:
        log.claimed(note, where=str(path))
    except VerificationFailed as error:
        raise UsageError(f"the kept head {error.what}", where=str(path), remedy=remedy) from error
    head = log.open_note(note, keys, where=str(path))
    seen = witness.seen(note, witnesses, threshold, where=str(path)) if witnesses else None
    return Kept(head, f"the head in {path.name}", seen)


def check(book: Log, kept: Sequence[Kept], findings: Findings, where: str) -> bool:
    """Whether ``book`` continues the heads of ``kept`` that are of its origin; failures are findings."""
    before = len(findings.failed)
    own = [each for each in kept if each.head.origin == book.head.origin]
    for each in kept:
        if each.binding and each not in own:
            what = f"is that of {book.head.origin!r}, {each.source} is of {each.head.origin!r}"
            findings.bad(CHECK, what, where, "verify the run that the head belongs to")
    if kept and not own and not any(each.binding for each in kept):
        what = f"is that of {book.head.origin!r}, and the policy has heads of other logs only"
        findings.bad(CHECK, what, where, "add the head of this log: harness head RUN")
    for each in own:
        _continues(book, each, findings, where)
    if kept and len(findings.failed) == before:
        findings.passed.append(CHECK)
    return len(findings.failed) == before


def seen_before(book: Log, kept: Sequence[Kept]) -> list[tuple[int, str]]:
    """(size, moment): the first ``size`` records of ``book`` were there at that moment.

    A head proves this by itself: whoever has signed the head of ``book`` does not matter.
    """
    return [
        (each.head.size, each.seen)
        for each in kept
        if each.seen is not None
        and each.head.origin == book.head.origin
        and each.head.size <= book.head.size
        and book.root_of_prefix(each.head.size) == each.head.root
    ]


def _continues(book: Log, kept: Kept, findings: Findings, where: str) -> None:
    head = kept.head
    if head.size > book.head.size:
        what = f"has {book.head.size} records, {kept.source} has {head.size}: it was rolled back"
        findings.bad(CHECK, what, where, "get the newest state of the run from its maker")
        return
    proof = consistency_proof(book.leaves, head.size)
    if not consistent(head.size, book.head.size, proof, head.root, book.head.root):
        what = f"does not continue {kept.source} ({head.size} records): its history was rewritten"
        findings.bad(CHECK, what, where, "ask its maker; one of the two histories is not what was trained")


def consistent(first: int, second: int, proof: Sequence[bytes], old: bytes, new: bytes) -> bool:
    """Whether ``proof`` shows that the tree of ``first`` leaves under ``old`` is a prefix of the tree of
    ``second`` leaves under ``new`` (RFC 9162 section 2.1.4.2)."""
    if first == 0:
        return second >= 0 and not proof and old == root_hash([]) and (second > 0 or new == old)
    if first == second:
        return first > 0 and not proof and old == new
    if not 0 < first < second:
        return False
    path = list(proof) if first & (first - 1) else [old, *proof]
    if not path:
        return False
    node, last = first - 1, second - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    before = after = path[0]
    for each in path[1:]:
        if last == 0:
            return False
        if node & 1 or node == last:
            before, after = node_hash(each, before), node_hash(each, after)
            while node and not node & 1:
                node, last = node >> 1, last >> 1
        else:
            after = node_hash(after, each)
        node, last = node >> 1, last >> 1
    return last == 0 and (before, after) == (old, new)
