"""Whether what somebody is about to sign can satisfy a policy, by what is known before the work is done.

`later_objection` is asked by whoever adds a statement to a checkpoint: its signer is known, not revoked, and
may sign that kind, for that run, at that time.

A run signs checkpoints, SLSA statements and the log's head with one Ed25519 key, and model.sig with a P-256
key if it has one, from now on. Rules:

- each of its keys is known, not revoked, and may sign what it signs, for this run, now; a P-256 key that is
  not known matters as soon as the policy would look at model.sig
- what is required and a run makes itself, it makes: model.sig, timestamps
- what is required and others add later, somebody may add: enough countersignatures for the threshold, and a
  statement of each required kind
- a log head that binds the policy to one log is of this run's log

A window that needs a proof, a cosigned head, an age and a head of this run among those of several can be
satisfied later, and are no objection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from harness.provenance.log_record import origin_of
from harness.provenance.policy import rules as policy
from harness.provenance.policy.rules import Policy
from harness.provenance.signing.keyless import Subject
from harness.provenance.signing.keys import PublicKey

_OF_RUNS = {
    "ed25519": (policy.CHECKPOINT, policy.SLSA, policy.LOG),
    "p256": (policy.MODEL_SIGNATURE,),
}
"""What a run signs with which key."""
_OWN = {*_OF_RUNS["ed25519"], *_OF_RUNS["p256"], policy.TIMESTAMP}
"""Required kinds of which a run has to take care itself."""


@dataclass(frozen=True)
class Maker:
    """A run that is about to sign."""

    keys: Sequence[PublicKey]
    """Ed25519 first, then P-256 if there is one."""
    run_name: str
    run_id: str | None
    """None for a run that has none yet."""
    stamps: bool
    """Whether it asks for timestamps."""

    @property
    def names(self) -> tuple[str, str]:
        """Id and name, as rules are asked about them; no rule but ``*`` speaks of an id that is to come."""
        return self.run_id or "", self.run_name


def of_any_run(rules: Policy) -> Policy:
    """``rules`` as if each identity might sign for every run: for a run that is not known yet."""
    return replace(rules, identities=tuple(replace(each, runs=("*",)) for each in rules.identities))


def objections(rules: Policy, maker: Maker, now: str) -> Iterator[str]:
    """Why what ``maker`` signs from ``now`` on (UTC, as statements write it) could never satisfy ``rules``.

    Hand-overs of the run's key in its log count where ``rules`` has them (`harness.audit.run.handover`).
    """
    rules = rules.as_of(now)
    # Both keys of an identity may have the same reason.
    yield from dict.fromkeys(each for key in maker.keys for each in _of_own_key(rules, maker, key, now))
    if policy.MODEL_SIGNATURE in rules.required and not any(key.algorithm == "p256" for key in maker.keys):
        yield "it requires model.sig, and the signing key has no P-256 half"
    if policy.TIMESTAMP in rules.required and not maker.stamps:
        yield "it requires timestamps, and signing.timestamp names no authority"
    yield from _of_others(rules, maker, now)
    yield from _of_heads(rules, maker)


def end(rules: Policy, maker: Maker, now: str) -> tuple[str, list[str]] | None:
    """The first moment after ``now`` from which on there are `objections`, and these; None when time alone
    brings none."""
    moments = {each.valid_until for each in rules.identities} | {*rules.revoked_from.values()}
    moments |= {over for each in rules.identities for _, over in each.spans.values()}
    for moment in sorted(each for each in moments if each is not None and each > now):
        found = list(objections(rules, maker, moment))
        if found:
            return moment, found
    return None


def later_objection(
    rules: Policy, signer: PublicKey | Subject, names: tuple[str, str], kind: str, created: str, now: str
) -> str | None:
    """Why ``rules`` would not accept a statement of ``kind`` that ``signer`` signs ``now`` about a checkpoint
    of the run ``names`` (id, name), and that says it was made at ``created``; None when they would."""
    if isinstance(signer, PublicKey):
        return next(_of_key(rules.as_of(now), signer, names, (kind,), created, now), None)
    if signer not in rules.subjects:
        return f"it does not know {signer.identity}, whom {signer.issuer} vouches for"
    return rules.identity_of(signer).objection(*names, now, kind, now)  # its certificate says when, not it


def _of_own_key(rules: Policy, maker: Maker, key: PublicKey, now: str) -> Iterator[str]:
    if key.algorithm == "p256" and not rules.model_keys and policy.MODEL_SIGNATURE not in rules.required:
        return  # model.sig is not looked at
    yield from _of_key(rules, key, maker.names, _OF_RUNS[key.algorithm], now, now)


def _of_key(
    rules: Policy, key: PublicKey, names: tuple[str, str], kinds: Sequence[str], created: str, now: str
) -> Iterator[str]:
    """What ``rules``, as of ``now``, have against statements of ``kinds`` by ``key``."""
    if key.key_id in rules.revoked:
        yield f"the {key.algorithm} key {key.key_id[:16]}… is revoked"
    elif not any(own.key_id == key.key_id for each in rules.identities for own in each.keys):
        yield f"it does not know the {key.algorithm} key {key.key_id[:16]}…"
    else:
        whose = rules.identity(key)
        found = (whose.objection(*names, created, kind, now, key.key_id) for kind in kinds)
        yield from (each for each in found if each is not None)


def _of_others(rules: Policy, maker: Maker, now: str) -> Iterator[str]:
    """What others are to add later."""
    own = maker.keys[0].key_id
    signs = {each.name for each in rules.identities if own in {key.key_id for key in each.keys}}
    able = signs | _able(rules, maker, policy.COUNTERSIGNATURE, now)
    if len(able) < rules.threshold:
        counted = f"{len(able)} of its identities may sign for this run now"
        yield f"it wants {rules.threshold} people to have signed, and {counted}"
    for kind in sorted(rules.required - _OWN):
        # When they were made is not asked of these, but of a countersignature, which states the checkpoint's.
        if not _able(rules, maker, kind, now if kind == policy.COUNTERSIGNATURE else None):
            yield f"it requires a statement of kind {kind}, and nobody may sign one for this run"


def _able(rules: Policy, maker: Maker, kind: str, created: str | None) -> set[str]:
    """Names of the identities that may add a statement of ``kind``; with a key, one that says ``created``."""
    keyed = {
        each.name
        for each in rules.within(*maker.names, created, kind).identities
        if any(key.algorithm == "ed25519" and key.key_id not in rules.revoked for key in each.keys)
    }
    keyless = {each.name for each in rules.within(*maker.names, None, kind).identities if each.subjects}
    return keyed | keyless


def _of_heads(rules: Policy, maker: Maker) -> Iterator[str]:
    own = None if maker.run_id is None else origin_of(maker.run_id)
    for each in rules.log_heads:
        if each.binding and each.head.origin != own:
            yield f"its log_head is of the log {each.head.origin!r}, which is not this run's"
