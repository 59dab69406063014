"""What is odd in a policy that can be read: rules that accept less, or ask for less, than their author means.

- the time of an identity is over, or has not come; all of its keys are revoked
- a threshold that those who may sign now cannot reach, for all runs or for one that is named
- a kind of statement whose name is nearly one of this version's
- a kind that is required and that nobody may sign, or nobody now: the time of all who may is over, or has not
  come, or their keys were handed over
- model.sig is not required though somebody has a key for it, so that its removal would not be noticed
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path

from harness.format import moments
from harness.provenance import later
from harness.provenance.policy import reader, rules
from harness.provenance.policy.rules import Identity, Policy, Span
from harness.provenance.signing.keys import PublicKey

KINDS = (
    rules.CHECKPOINT,
    rules.SLSA,
    rules.MODEL_SIGNATURE,
    rules.LOG,
    rules.TIMESTAMP,
    rules.EXPORT,
    rules.CORPUS,
    rules.COUNTERSIGNATURE,
    *later.SCHEMAS,
)
"""Kinds of statements that this version writes."""
_P256 = frozenset({rules.MODEL_SIGNATURE})
_KEYED = _P256 | {rules.CHECKPOINT, rules.SLSA, rules.LOG, rules.EXPORT, rules.CORPUS}
"""What takes a key to sign."""


@dataclass(frozen=True)
class Oddity:
    """One thing that its author should look at."""

    what: str
    where: str
    """``file:line``."""
    remedy: str


def check(path: Path, now: datetime) -> tuple[Policy, list[Oddity]]:
    """The policy in ``path`` and what is odd in it at ``now`` (UTC).

    Raises `ConfigError` with file and line for a file that is no policy.
    """
    from harness import strict_yaml

    text = reader.read(path)
    read = reader.parse(text, where=str(path), folder=path.parent)
    document = strict_yaml.read(text, str(path))
    linter = _Linter(read, {**document.lines, **document.inside}, str(path), moments.text(now))
    return read, list(linter.oddities(document.value))


@dataclass(frozen=True)
class _Linter:
    read: Policy
    lines: dict[tuple[str, ...], int]
    file: str
    now: str

    def oddities(self, value: dict[str, object]) -> Iterator[Oddity]:
        for number, identity in enumerate(self.read.identities):
            yield from self._identity(identity, ("identities", str(number)))
            listed = sorted(identity.statements or ())
            yield from self._misspelt(listed, ("identities", str(number), "statements"))
        yield from self._misspelt(sorted(self.read.required), ("required",))
        yield from self._threshold()
        late: dict[str, list[str]] = {}
        for kind in sorted(self.read.required - {rules.TIMESTAMP}):  # no identity makes those
            able = [each for each in self.read.identities if self._able(each, kind)]
            if not able:
                what = f"{kind} is required, and no identity may sign it"
                yield self._odd(what, ("required",), "add it to the statements of an identity")
            elif not any(self._able_now(each, kind) for each in able):
                late.setdefault(", ".join(each.name for each in able), []).append(kind)
        for people, kinds in late.items():
            what = f"required, and who may sign it may not now ({people}): {', '.join(kinds)}"
            yield self._odd(
                what, ("required",), "add an identity or a key whose time has come, or move `valid`"
            )
        signs = any(self._able(each, rules.MODEL_SIGNATURE) for each in self.read.identities)
        if "required" in value and signs and rules.MODEL_SIGNATURE not in self.read.required:
            what = "model-signature is not required, so a removed model.sig would not be noticed"
            yield self._odd(what, ("required",), "add model-signature")

    def _identity(self, identity: Identity, place: tuple[str, ...]) -> Iterator[Oddity]:
        if identity.valid_until is not None and identity.valid_until <= self.now:
            what = f"the time of {identity.name} is over since {identity.valid_until}"
            yield self._odd(what, (*place, "valid"), "what is signed from now on does not count")
        if identity.valid_from is not None and identity.valid_from > self.now:
            what = f"the time of {identity.name} begins at {identity.valid_from}"
            yield self._odd(what, (*place, "valid"), "what is signed until then does not count")
        if identity.keys and all(key.key_id in self.read.revoked for key in identity.keys):
            what = f"every key of {identity.name} is revoked"
            yield self._odd(what, place, "remove the identity, or add its new key")

    def _misspelt(self, kinds: list[str], place: tuple[str, ...]) -> Iterator[Oddity]:
        for kind in kinds:
            close = get_close_matches(kind, KINDS, n=1, cutoff=0.7)
            if kind not in KINDS and close:
                yield self._odd(
                    f"{place[-1]} names the unknown kind {kind}", place, f"did you mean {close[0]}?"
                )

    def _threshold(self) -> Iterator[Oddity]:
        wanted = self.read.threshold
        kinds = (rules.CHECKPOINT, rules.COUNTERSIGNATURE)
        now = [each for each in self.read.identities if any(self._able_now(each, kind) for kind in kinds)]
        if len(now) < wanted:
            what = f"threshold is {wanted}, and {len(now)} of the identities may sign now"
            yield self._odd(what, ("threshold",), "add an identity, or lower the threshold")
            return
        named = dict.fromkeys(run for each in now for run in each.runs if not set(run) & set("*?["))
        for run in named:
            able = sum(any(fnmatch.fnmatchcase(run, pattern) for pattern in each.runs) for each in now)
            if able < wanted:
                what = f"threshold is {wanted}, and {able} of the identities may sign for the run {run}"
                yield self._odd(what, ("threshold",), "add the run to another identity")

    def _able(self, identity: Identity, kind: str) -> bool:
        """Whether ``identity`` may sign ``kind`` for some run, at some time."""
        return self._keyless(identity, kind) or bool(self._keys(identity, kind))

    def _able_now(self, identity: Identity, kind: str) -> bool:
        """The same, for what is signed at the time of the check."""
        if not self._now((identity.valid_from, identity.valid_until)):
            return False
        spans = (identity.spans.get(key.key_id, (None, None)) for key in self._keys(identity, kind))
        return self._keyless(identity, kind) or any(map(self._now, spans))

    def _now(self, span: Span) -> bool:
        start, end = span
        return (start is None or start <= self.now) and (end is None or self.now < end)

    def _keyless(self, identity: Identity, kind: str) -> bool:
        """Whether ``identity`` may sign ``kind`` without a key: what is added to a checkpoint later."""
        allowed = identity.statements is None or kind in identity.statements
        return bool(identity.subjects) and allowed and kind not in _KEYED

    def _keys(self, identity: Identity, kind: str) -> list[PublicKey]:
        """The keys that count with which ``identity`` may sign ``kind``."""
        if identity.statements is not None and kind not in identity.statements:
            return []
        algorithm = "p256" if kind in _P256 else "ed25519"
        return [
            key for key in identity.keys if key.algorithm == algorithm and key.key_id not in self.read.revoked
        ]

    def _odd(self, what: str, place: tuple[str, ...], remedy: str) -> Oddity:
        found = (self.lines.get(place[:length]) for length in range(len(place), 0, -1))
        line = next((each for each in found if each is not None), 1)
        return Oddity(what, f"{self.file}:{line}", remedy)
