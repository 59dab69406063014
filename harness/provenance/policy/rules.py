"""Who may sign what. A policy comes from its user, never from the folder that it judges.

Either bare keys (`from_keys`), or a YAML file (`harness.provenance.policy.reader`). Rules:

- a key, or whom a certificate speaks of, belongs to one identity only: a threshold counts people, not keys
- an identity signs the kinds of statements that it may, for the runs that it may, at the time that it may
- ``valid`` is compared with the time that the signer states, so it limits honest signers; with ``proven`` a
  signature counts only where a log head that was kept or timestamped shows that it is older than the end
- a revoked key or checkpoint counts for nothing. A key that is revoked from a moment on counts where such a
  head shows that the signature is older: a thief can state any time, and cannot enter an old log
- a key may hand over to the next one by a statement of both (`harness.provenance.policy.rotation`)
- what is required and absent is missing evidence, never a pass
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from types import MappingProxyType

from harness.errors import UsageError
from harness.provenance.signing.keyless import Subject
from harness.provenance.signing.keys import PublicKey
from harness.provenance.transparency.heads import Kept

CHECKPOINT, SLSA, MODEL_SIGNATURE, LOG = "checkpoint", "slsa", "model-signature", "log"
TIMESTAMP = "timestamp"
EXPORT, CORPUS, COUNTERSIGNATURE = "export", "corpus", "countersignature"
_OF_MAKERS = {CHECKPOINT, SLSA, MODEL_SIGNATURE, LOG, EXPORT, CORPUS}
"""Kinds that are signed when they are made."""
GIVEN_KEYS = "the given keys"
"""Name of the one identity of a policy that was made from keys."""

Span = tuple[str | None, str | None]
"""First moment, and first moment that is too late, as ``2026-11-23T20:00:00Z``."""


@dataclass(frozen=True)
class Identity:
    """Somebody with keys, and what these may sign."""

    name: str
    keys: tuple[PublicKey, ...]
    runs: tuple[str, ...] = ("*",)
    """Run names or run ids, with ``*`` and ``?`` as in file names."""
    valid_from: str | None = None
    """First moment, as ``2026-11-23T20:00:00Z``."""
    valid_until: str | None = None
    """First moment that is too late."""
    proven: bool = False
    """Whether a kept or timestamped head must show that a signature is older than ``valid_until``."""
    statements: frozenset[str] | None = None
    """Kinds of statements; None: every kind."""
    spans: Mapping[str, Span] = field(default_factory=lambda: MappingProxyType({}))
    """Key id → when it signs, of keys that took over or were handed over (`policy.rotation`)."""
    subjects: tuple[Subject, ...] = ()
    """Who signs without a key (`signing.keyless`), statements that are added later only."""

    def objection(
        self,
        run_id: str,
        run_name: str,
        created: str | None,
        kind: str,
        proven: str | None = None,
        key_id: str | None = None,
    ) -> str | None:
        """Why this identity may not have signed a statement of that run, time and kind; None when it may.

        ``created``: None for a statement that does not say when it was made. ``proven``: the moment at which
        a kept or timestamped head shows that the signature was there. ``key_id``: of the key that has signed;
        None: of any.
        """
        names = (run_id, run_name)
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.runs):
            return f"{self.name} may not sign for the run {run_name}"
        if self.statements is not None and kind not in self.statements:
            return f"{self.name} may not sign a statement of kind {kind}"
        if self.proven and self.valid_until is not None and (proven is None or proven >= self.valid_until):
            limit = f"{self.name} signed before {self.valid_until}"
            return f"neither a kept head nor a timestamp shows that {limit}"
        if created is None:
            return None
        if self.valid_from is not None and created < self.valid_from:
            return f"{self.name} signed at {created}, valid from {self.valid_from}"
        if self.valid_until is not None and created >= self.valid_until:
            return f"{self.name} signed at {created}, valid until {self.valid_until}"
        start, end = self.spans.get(key_id or "", (None, None))
        # Whoever adds a statement later may sign what is older than their key: a checkpoint, an evaluation.
        if start is not None and created < start and kind in _OF_MAKERS:
            return f"{self.name} signed at {created} with a key that takes over at {start}"
        if end is not None and created >= end:
            return f"{self.name} signed at {created} with a key that was handed over at {end}"
        return None


@dataclass(frozen=True)
class Rotation:
    """A hand-over that both keys have signed (`harness.provenance.policy.rotation`)."""

    payload: bytes
    old: tuple[PublicKey, ...]
    """Ed25519 first, then P-256 if there is one."""
    new: tuple[PublicKey, ...]
    at: str
    """The moment, as ``2026-11-23T20:00:00Z``."""
    reason: str
    file: bytes
    """Both bundles, as `build` wrote them."""

    @property
    def old_id(self) -> str:
        """Key id of the Ed25519 key that hands over."""
        return self.old[0].key_id

    @property
    def new_id(self) -> str:
        """Key id of the Ed25519 key that takes over."""
        return self.new[0].key_id


@dataclass(frozen=True)
class Policy:
    """What a verifier accepts."""

    identities: tuple[Identity, ...]
    required: frozenset[str] = frozenset({CHECKPOINT, SLSA})
    """Kinds of evidence without which nothing is accepted."""
    threshold: int = 1
    """Distinct identities that must have signed a checkpoint's statement."""
    revoked: frozenset[str] = frozenset()
    """Key ids and checkpoint ids, hex sha256."""
    revoked_from: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Those of ``revoked`` whose older signatures count: key id → first moment that does not."""
    log_heads: tuple[Kept, ...] = ()
    """The newest log heads that the user has seen, of one log or several. With any, what has no log of
    theirs is not accepted."""
    max_age: timedelta | None = None
    """How old the newest checkpoint, or whatever is verified, may be."""
    proven: str | None = None
    """The moment that `as_of` was told."""
    witnesses: tuple[PublicKey, ...] = ()
    """Ed25519 keys of those who cosign log heads. With any, a run is not accepted without a kept head that
    ``witness_threshold`` of them have cosigned."""
    witness_threshold: int = 1
    rotations: tuple[Rotation, ...] = ()
    """Hand-overs between keys of ``identities``."""
    authorities: tuple[bytes, ...] = ()
    """Certificates, as DER, of those whose timestamps count, or of those who vouch for them."""
    judges_later: bool = True
    """Whether a statement that was added later must be good; else one that is not plays no part."""
    sigstore: bytes | None = None
    """Trusted root of the instance that certifies the ``subjects`` of identities."""

    @cached_property
    def statement_keys(self) -> tuple[PublicKey, ...]:
        """Keys that may sign statements and log heads."""
        return self._of("ed25519")

    @cached_property
    def model_keys(self) -> tuple[PublicKey, ...]:
        """Keys that may sign model.sig."""
        return self._of("p256")

    @property
    def is_of_keys(self) -> bool:
        """Whether it was made `from_keys`, and its user has no policy."""
        return [each.name for each in self.identities] == [GIVEN_KEYS]

    @property
    def is_of_models_only(self) -> bool:
        """Whether there is no Ed25519 key, revoked or not: nothing but model.sig can then be asked about."""
        return all(key.algorithm == "p256" for identity in self.identities for key in identity.keys)

    def identity(self, key: PublicKey) -> Identity:
        """Whose ``key`` it is. Raises `UsageError` for a key that the policy does not accept."""
        for identity in self.identities:
            if any(own.key_id == key.key_id for own in identity.keys):
                return identity
        raise UsageError("the policy does not know the key", where=key.key_id)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """Who may sign without a key."""
        return tuple(subject for identity in self.identities for subject in identity.subjects)

    def identity_of(self, subject: Subject) -> Identity:
        """Whose ``subject`` it is. Raises `UsageError` for one that the policy does not accept."""
        for identity in self.identities:
            if subject in identity.subjects:
                return identity
        raise UsageError("the policy does not know the identity", where=subject.identity)

    def as_of(self, proven: str | None) -> Policy:
        """The policy for a signature that a kept or timestamped head shows to have been there then."""
        if proven is None:
            return self
        lifted = {key for key, moment in self.revoked_from.items() if proven < moment}
        return replace(self, revoked=self.revoked - lifted, proven=proven)

    def within(self, run_id: str, run_name: str, created: str | None, kind: str) -> Policy:
        """The same policy, with only those identities and keys that may sign that kind, for that run, at that
        time."""
        words = (run_id, run_name, created, kind, self.proven)
        chosen = [one for one in self.identities if one.objection(*words) is None]
        if len(chosen) == len(self.identities) and not any(one.spans for one in chosen):
            return self
        able = (
            [key for key in one.keys if key.key_id not in one.spans or not one.objection(*words, key.key_id)]
            for one in chosen
        )
        kept = zip(chosen, able, strict=True)
        return replace(self, identities=tuple(replace(one, keys=tuple(keys)) for one, keys in kept))

    def without(self, key_ids: Set[str]) -> Policy:
        """The same policy without those keys."""
        left = (
            replace(one, keys=tuple(key for key in one.keys if key.key_id not in key_ids))
            for one in self.identities
        )
        return replace(self, identities=tuple(left))

    def untimed(self) -> Policy:
        """The same policy without the moments at which keys took over or were handed over."""
        return replace(self, identities=tuple(replace(one, spans={}) for one in self.identities))

    def _of(self, algorithm: str) -> tuple[PublicKey, ...]:
        return tuple(
            key
            for identity in self.identities
            for key in identity.keys
            if key.algorithm == algorithm and key.key_id not in self.revoked
        )


def from_keys(keys: Sequence[PublicKey], *, statements: bool = True) -> Policy:
    """The policy that trusts exactly ``keys``, as one identity, for every run.

    With a P-256 key among them model.sig is required. Raises `UsageError` without an Ed25519 key when
    ``statements`` are to be read.
    """
    if statements and not any(key.algorithm == "ed25519" for key in keys):
        raise UsageError(
            "no Ed25519 key was given, and statements are signed with one",
            remedy="add --key NAME.ed25519.pub",
        )
    identity = Identity(GIVEN_KEYS, tuple({key.key_id: key for key in keys}.values()))
    return Policy((identity,), default_requirements([identity]))


def of_own_run(keys: Sequence[PublicKey]) -> Policy:
    """`from_keys`, for a job that goes on with a run of its own: what others have added to a checkpoint is
    left to those who trust them."""
    return replace(from_keys(keys), judges_later=False)


def default_requirements(identities: Sequence[Identity]) -> frozenset[str]:
    """What is required where nothing is said: model.sig as soon as somebody could have signed it."""
    signs_models = any(key.algorithm == "p256" for identity in identities for key in identity.keys)
    return frozenset({CHECKPOINT, SLSA} | ({MODEL_SIGNATURE} if signs_models else set()))
