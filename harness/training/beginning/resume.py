"""What a launch continues from, and under which name: exact, same-data, accepted, or refused.

Rank 0 opens the run folder, finds the newest checkpoint that verifies and compares the facts that its signed
statement holds with the facts of this launch. What differs decides the class (README, "Resume"):

- nothing, or the world size of an elastic run: ``exact``, every later checkpoint has the bits of the
  uninterrupted run
- stack, world size, or a setting that only changes the order of additions: ``same-data``
- config, corpus, tokenizer, code, the policy that the run is made under: refused, unless ``--accept`` names
  it; then ``accepted``, and signed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import config, environment
from harness.checkpoint.candidates import Found, Skipped
from harness.checkpoint.publisher import Commit
from harness.errors import (
    EnvironmentFault,
    EvidenceIncomplete,
    ResumeRefused,
    TrainingFailed,
    VerificationFailed,
)
from harness.format import files as durable
from harness.format import layout, leftovers, strict_json
from harness.format.layout import RunFolder
from harness.provenance import log_record
from harness.provenance.policy import canonical
from harness.provenance.policy import rules as policy
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import keys
from harness.provenance.signing.keys import PublicKey, Signer
from harness.provenance.transparency import log
from harness.settings import Settings
from harness.training.beginning import folder_lock
from harness.training.beginning import own_policy as own_policies
from harness.training.beginning.own_policy import End, OwnPolicy
from harness.training.statement.record import Difference, RunFacts, Segment, in_words

ACCEPTABLE = ("config", "data", "tokenizer", "code", "policy", "metrics", "checkpoints")
"""What ``--accept`` can name."""

_RESTORE = "restore log/ from a copy of this run, or begin another run with the checkpoint (start.checkpoint)"
"""What is left when the log is lost: nothing else says that no checkpoint is missing."""


@dataclass(frozen=True)
class HeldRun:
    """A run folder that this job holds; on rank 0."""

    folder: RunFolder
    lock: int
    """Descriptor whose lock says that this job trains here; held until the process ends."""
    key: Path
    """The file of the signing key."""
    signer: Signer
    signer_reason: str
    own_policy: OwnPolicy | None = None
    """What the run is made under; nothing is verified with it."""
    cleared: tuple[str, ...] = ()
    """What cut-off saves and fetches had left, and is removed now."""

    @property
    def policy(self) -> Policy:
        """Who may have signed what this run continues from: its own key. What others add is theirs."""
        return policy.of_own_run(keys.public_keys(self.signer))


@dataclass(frozen=True)
class OpenRun:
    """A run folder and what it has to continue from, as rank 0 sees it."""

    held: HeldRun
    found: Found
    head: log.Head | None
    logged_run: str | None
    """The run id in the log, when there is a log."""
    set_aside: Mapping[str, Path]
    policy_end: End | None = None
    """When the run's own policy ceases to accept what it signs."""

    @property
    def folder(self) -> RunFolder:
        """Where the run lies."""
        return self.held.folder

    @property
    def parent(self) -> Commit | None:
        """The commit that the next checkpoint follows."""
        loaded, statement = self.found.loaded, self.found.statement
        if loaded is None or statement is None:
            return None
        return Commit(loaded.folder.name, statement.step_to, statement.sequence, loaded.checkpoint)


def hold(settings: Settings, say: Callable[[str], None]) -> HeldRun:
    """Lock the run folder, and clear what a cut-off save has left; ``say`` tells what is waited for.

    Raises `EnvironmentFault` when another job trains in the folder or it cannot be written, `UsageError` when
    it lies among files that are signed, and as `harness.training.beginning.own_policy.load`.
    """
    folder = RunFolder(settings.run.dir)
    layout.require_unsigned(folder.root)
    own_policy = own_policies.load(settings)
    lock = folder_lock.take(folder.root, say)
    path, reason = keys.signing_key_path(settings.signing.key, folder.root)
    signer = keys.load_signer(path)
    return HeldRun(folder, lock, path, signer, reason, own_policy, leftovers.clear(folder))


def log_origin(held: HeldRun) -> str | None:
    """Which run the folder's log is of; None without a log. One that is damaged, or signed with another key,
    says nothing here: `open_run` refuses it."""
    try:
        note = durable.read_limited(held.folder.log / log.HEAD, log.NOTE_LIMIT)
        return log.open_note(note, keys.public_keys(held.signer), where=str(held.folder.log)).origin
    except (VerificationFailed, EvidenceIncomplete):
        return None


def open_run(held: HeldRun | None, found: Found, accept: Sequence[str]) -> OpenRun:
    """What ``found`` means for the run: its log, its id, and where damaged checkpoints go.

    Raises `ResumeRefused` when the folder holds checkpoints and none verifies, unless ``accept`` names
    ``checkpoints``; and as `harness.training.beginning.own_policy.require_satisfiable`, before anything is
    signed.
    """
    if held is None:
        raise TrainingFailed("only rank 0 opens a run")
    folder, signer = held.folder, held.signer
    if found.loaded is None and found.skipped and "checkpoints" not in accept:
        first = found.skipped[0]
        raise ResumeRefused(
            f"resume refused, none of the {len(found.skipped)} checkpoints verifies; "
            f"{first.name}: {first.reason}",
            where=str(folder.checkpoints),
            remedy=f"signed with another key than {held.key}? "
            "Start again from step 0 with --accept checkpoints",
        )
    aside = _set_aside(folder, found.skipped)
    entries = _read_log(folder, found, keys.public_keys(signer))
    read = entries.records if entries else ()
    records = [log_record.parse_record(record, where=str(folder.log)) for record in read]
    commits = [record for record in records if log_record.is_commit(record)]
    run_id = str(records[0]["run"]) if records else None
    known = run_id if found.statement is None else found.statement.run_id
    end = own_policies.require_satisfiable(held.own_policy, signer, known, entries)
    if found.loaded is not None and found.loaded.checkpoint not in {each["checkpoint"] for each in commits}:
        return OpenRun(held, found, _log_tip(folder, found, signer, records), run_id, aside, end)
    found = Found(found.loaded, found.opened, (*found.skipped, *_lost(found, commits)))
    return OpenRun(held, found, entries.head if entries else None, run_id, aside, end)


def classify(
    before: Mapping[str, Any], facts: RunFacts, accept: Sequence[str]
) -> tuple[str, list[Difference]]:
    """The class of a resume and what differs, from the predicate ``before`` and the ``facts`` of this launch.

    Raises `ResumeRefused` with the differences that ``accept`` does not cover, and as `require_readable_code`
    does.
    """
    found = list(changes(before, facts))
    refused = [difference for kind, difference in found if kind in ACCEPTABLE and kind not in accept]
    if refused:
        require_readable_code(refused)
        kinds = sorted({kind for kind, _ in found if kind in ACCEPTABLE and kind not in accept})
        raise ResumeRefused(
            f"resume refused, the folder holds another run: {in_words(refused)}",
            where=str(facts.run["name"]),
            remedy=f"use another run.dir, or continue and sign why: --accept {','.join(kinds)} --reason TEXT",
        )
    differences = [difference for _, difference in found]
    if any(kind in ACCEPTABLE for kind, _ in found):
        return "accepted", differences
    return ("same-data" if differences else "exact"), differences


def segment(
    run: OpenRun,
    facts: Callable[[Segment], RunFacts],
    accept: Sequence[str],
    reason: str | None,
    first: Callable[[Segment], Segment] = lambda segment: segment,
) -> tuple[Segment, RunFacts]:
    """This launch's segment and its facts; ``first`` adds what is to be said of a run that begins.

    Raises `ResumeRefused` as `classify` does.
    """
    statement, loaded = run.found.statement, run.found.loaded
    accepted = tuple(f"{kind}: {reason or 'no reason given'}" for kind in accept)
    if statement is None or loaded is None:
        genesis = first(Segment(0, "genesis", accepted=accepted, skipped=run.found.skipped))
        return genesis, facts(genesis)
    number = int(statement.predicate["segment"]["number"]) + 1
    kind, differences = classify(statement.predicate, facts(Segment(number, "exact")), accept)
    this = Segment(
        number,
        kind,
        tuple(differences),
        accepted,
        run.found.skipped,
        (loaded.checkpoint, statement.step_to),
    )
    return this, facts(this)


def changed_files(path: Path, now: Mapping[str, str]) -> list[Difference]:
    """Which files of the corpus differ from those that corpus.json names."""
    try:
        before = strict_json.loads(path.read_bytes(), where=str(path))["files"]
    except (FileNotFoundError, KeyError):
        return []
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return [
        Difference(f"file {name}", _short(before.get(name, "absent")), _short(now.get(name, "absent")))
        for name in names
    ]


def changed_rules(run: OpenRun) -> list[str]:
    """Which rules of the policy differ from those of the policy that the newest checkpoint names, where
    policy.json is still that."""
    own, statement, path = run.held.own_policy, run.found.statement, run.folder.policy
    if own is None or statement is None or statement.policy is None:
        return []
    try:
        copy = durable.read_limited(path, canonical.LIMIT)
    except (VerificationFailed, EvidenceIncomplete):
        return []
    named = canonical.digest(copy) == statement.policy["sha256"]
    return canonical.changed(copy, own.copy) if named else []


def changes(before: Mapping[str, Any], facts: RunFacts) -> Iterator[tuple[str, Difference]]:
    """Every difference of a launch to the predicate ``before``, with its kind: one of `ACCEPTABLE`, or
    ``same-data``."""
    old = config.parse(before["config"]["text"], "the checkpoint's config")
    new = config.parse(str(facts.config["text"]), "this launch's config")
    # Of an elastic run with the same shards, nothing depends on who computes them, nor on how they are cut.
    elastic = old.determinism.elastic and new.determinism.elastic
    for item in config.compare(old, new):
        if item.effect != "operational" and not (elastic and item.key == "parallel"):
            effect = "config" if item.effect == "another-run" else item.effect
            yield effect, Difference(item.key, str(item.before), str(item.after))
    kinds = {
        "kind": "data",
        "corpus_sha256": "data",
        "template_sha256": "data",
        "tokenizer_sha256": "tokenizer",
    }
    for name, kind in kinds.items():
        yield from _compared(kind, f"data.{name}", before["data"].get(name), facts.data.get(name))
    for name in sorted({*before["code"], *facts.code}):
        yield from _compared("code", f"code.{name}", before["code"].get(name), facts.code.get(name))
    policies = ["none" if each is None else each["sha256"] for each in (before.get("policy"), facts.policy)]
    yield from _compared("policy", "policy", *policies)
    for name in () if elastic else ("world_size", "backend"):
        yield from _compared(
            "same-data", f"launch.{name}", before["launch"].get(name), facts.launch.get(name)
        )
    stack, stack_now = before["environment"].get("stack", {}), facts.environment.get("stack", {})
    for name in sorted({*stack, *stack_now}):
        yield from _compared("same-data", f"stack.{name}", stack.get(name), stack_now.get(name))


def require_readable_code(refused: Sequence[Difference]) -> None:
    """Raise `EnvironmentFault` when the commit is among ``refused`` because git does not say which one it is:
    the checkout belongs to somebody else."""
    commit = [each for each in refused if each.what == "code.git_commit" and each.after == str(None)]
    checkout = environment.refused_checkout() if commit else None
    if checkout is not None:
        raise EnvironmentFault(
            "git refuses to read this checkout, which belongs to another user, so its commit is not known",
            where=checkout,
            remedy=f"start as that user, or trust it: git config --global --add safe.directory {checkout}",
        )


def _compared(kind: str, what: str, before: Any, after: Any) -> Iterator[tuple[str, Difference]]:
    if before != after:
        yield kind, Difference(what, _short(before), _short(after))


def _short(value: Any) -> str:
    """A digest by its first digits, anything else as it is."""
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def _read_log(folder: RunFolder, found: Found, publics: Sequence[PublicKey]) -> log.Log | None:
    """The run's log; None when a crash came before its first head was on disk."""
    begun = found.statement is not None and found.statement.sequence > 0
    if not begun and not (folder.log / log.HEAD).exists():
        return None
    try:
        return log.read(folder.log, publics)
    except (VerificationFailed, EvidenceIncomplete) as error:
        error.remedy = error.remedy or _RESTORE
        raise


def _log_tip(
    folder: RunFolder, found: Found, signer: Signer, records: Sequence[Mapping[str, Any]]
) -> log.Head:
    """Enter the newest checkpoint into the log of ``records``: a crash came between its rename and its entry.

    Raises `VerificationFailed` when the log is not the one that the checkpoint saw when it was signed.
    """
    if found.opened is None:
        remedy = "bring the checkpoints back, or choose another run.dir"
        raise ResumeRefused(
            "there is no checkpoint to enter into the log", where=str(folder.log), remedy=remedy
        )
    opened, statement = found.opened, found.opened.statement
    seen = 0 if statement.predicate["log"] is None else int(statement.predicate["log"]["size"])
    if seen > len(records) or any(map(log_record.is_commit, records[seen:])):
        raise VerificationFailed(
            f"the log has {len(records)} records, and {opened.folder.name} was signed when it had {seen}",
            where=str(folder.log),
            remedy=_RESTORE,
        )
    record = log_record.record_of(
        statement.run_id,
        statement.sequence,
        statement.step_to,
        opened.checkpoint_id,
        opened.bundle_sha256,
    )
    # The save may have ended because this sync failed.
    durable.fsync_folder(folder.checkpoints)
    return log.append(folder.log, record, signer, log_record.origin_of(statement.run_id))


def _lost(found: Found, records: Sequence[Mapping[str, Any]]) -> list[Skipped]:
    """What the log names after the checkpoint that was found, and the folder does not have."""
    ids = [record["checkpoint"] for record in records]
    after = ids.index(found.loaded.checkpoint) + 1 if found.loaded is not None else 0
    known = {item.name for item in found.skipped}
    return [
        Skipped(name, "is in the log, not in the folder", record["checkpoint"])
        for record in records[after:]
        if (name := layout.checkpoint_name(record["step"])) not in known
    ]


def _set_aside(folder: RunFolder, skipped: Sequence[Skipped]) -> dict[str, Path]:
    """Where each skipped folder goes when a checkpoint of its name is written again."""
    return {item.name: folder.free_aside(item.name) for item in skipped}
