"""Who may sign what. A policy comes from its user, never from the folder that it judges.

Either bare keys (`from_keys`), or a YAML file (`load`), strictly read::

    format: harness-policy/1
    identities:
      - name: alice
        keys: [alice.ed25519.pub, alice.p256.pub]   # path beside this file, PEM text, or an OpenSSH line
        runs: ["tiny", "gpt-*"]                     # run names or ids; * matches; default: every run
        valid: {from: 2026-01-01, until: 2027-01-01}
    required: [checkpoint, slsa, model-signature, log]
    threshold: 1                                    # distinct identities that must have signed a checkpoint
    revoked: ["<64 hex digits>"]                    # key ids or checkpoint ids
    log_head: tiny.head      # the newest log head that you have seen: a file of `harness head`, or
                             # {origin: harness/run/…, size: 12, root: "<64 hex digits>"}, or a list

- an unknown, missing or repeated key is an error with its line, so a misspelt rule never means "no rule"
- a key belongs to one identity only: a threshold counts people, not keys
- ``valid`` is compared with the time that the signer states, so it limits honest signers; a stolen key can
  state any time and belongs in ``revoked``
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import ConfigError, EvidenceIncomplete, UsageError, VerificationFailed
from harness.provenance import heads
from harness.provenance.heads import Kept
from harness.provenance.keys import PublicKey, expanded, load_public, parse_public
from harness.provenance.log import Head

FORMAT = "harness-policy/1"
CHECKPOINT, SLSA, MODEL_SIGNATURE, LOG = "checkpoint", "slsa", "model-signature", "log"
GIVEN_KEYS = "the given keys"
"""Name of the one identity of a policy that was made from keys."""

_FILE_LIMIT = 256 << 10
_HEX = re.compile(r"[0-9a-f]{64}")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_KIND = re.compile(r"[a-z][a-z-]*")


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

    def objection(self, run_id: str, run_name: str, created: str | None) -> str | None:
        """Why this identity may not have signed a statement of that run and time; None when it may.

        ``created``: None for a statement that does not say when it was made.
        """
        names = (run_id, run_name)
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.runs):
            return f"{self.name} may not sign for the run {run_name}"
        if created is None:
            return None
        if self.valid_from is not None and created < self.valid_from:
            return f"{self.name} signed at {created}, valid from {self.valid_from}"
        if self.valid_until is not None and created >= self.valid_until:
            return f"{self.name} signed at {created}, valid until {self.valid_until}"
        return None


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
    log_heads: tuple[Kept, ...] = ()
    """The newest log heads that the user has seen, of one log or several. With any, what has no log of
    theirs is not accepted."""

    @property
    def statement_keys(self) -> tuple[PublicKey, ...]:
        """Keys that may sign statements and log heads."""
        return self._of("ed25519")

    @property
    def model_keys(self) -> tuple[PublicKey, ...]:
        """Keys that may sign model.sig."""
        return self._of("p256")

    def identity(self, key: PublicKey) -> Identity:
        """Whose ``key`` it is. Raises `UsageError` for a key that the policy does not accept."""
        for identity in self.identities:
            if any(own.key_id == key.key_id for own in identity.keys):
                return identity
        raise UsageError("the policy does not know the key", where=key.key_id)

    def within(self, run_id: str, run_name: str, created: str | None = None) -> Policy:
        """The same policy, with only those identities that may sign for that run, and at that time."""
        chosen = tuple(one for one in self.identities if one.objection(run_id, run_name, created) is None)
        return replace(self, identities=chosen)

    def _of(self, algorithm: str) -> tuple[PublicKey, ...]:
        return tuple(
            key
            for identity in self.identities
            for key in identity.keys
            if key.algorithm == algorithm and key.key_id not in self.revoked
        )


def from_keys(keys: Sequence[PublicKey]) -> Policy:
    """The policy that trusts exactly ``keys``, as one identity, for every run.

    With a P-256 key among them model.sig is required. Raises `UsageError` without an Ed25519 key.
    """
    if not any(key.algorithm == "ed25519" for key in keys):
        raise UsageError(
            "no Ed25519 key was given, and statements are signed with one",
            remedy="add --key NAME.ed25519.pub",
        )
    identity = Identity(GIVEN_KEYS, tuple({key.key_id: key for key in keys}.values()))
    return Policy((identity,), _default_requirements([identity]))


def load(path: Path) -> Policy:
    """The policy in the YAML file ``path``. Raises `ConfigError` with file and line."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(_FILE_LIMIT + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"the policy cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError("the policy is not UTF-8", where=str(path)) from error
    return parse(text, where=str(path), folder=path.parent)


def parse(text: str, *, where: str, folder: Path) -> Policy:
    """The policy in ``text``; key files are looked up in ``folder``. Raises `ConfigError`."""
    # YAML is needed only here, and costs verify's start-up 20 ms.
    from harness import strict_yaml

    document = strict_yaml.read(text, where)
    reader = _Reader(where, document.lines, folder)
    known = ("format", "identities", "required", "threshold", "revoked", "log_head")
    value = reader.mapping(document.value, "the policy", known, needed=("format", "identities"))
    if value["format"] != FORMAT:
        reader.fail(f"format is {value['format']!r}, not {FORMAT}", "format")
    identities = [reader.identity(item) for item in reader.items(value["identities"], "identities")]
    _refuse_shared(identities, reader)
    required = _default_requirements(identities)
    if "required" in value:
        required = frozenset(map(reader.kind, reader.items(value["required"], "required"))) | {CHECKPOINT}
    policy = Policy(
        tuple(identities),
        required,
        reader.threshold(value.get("threshold", 1), len(identities)),
        reader.revoked(value["revoked"]) if "revoked" in value else frozenset(),
    )
    if not policy.statement_keys:
        reader.fail("no identity has an Ed25519 key that is not revoked", "identities")
    if MODEL_SIGNATURE in policy.required and not policy.model_keys:
        reader.fail("model-signature is required and no identity has a P-256 key", "required")
    kept = reader.heads(value["log_head"], policy.statement_keys) if "log_head" in value else ()
    return replace(policy, log_heads=kept)


def _default_requirements(identities: Sequence[Identity]) -> frozenset[str]:
    signs_models = any(key.algorithm == "p256" for identity in identities for key in identity.keys)
    return frozenset({CHECKPOINT, SLSA} | ({MODEL_SIGNATURE} if signs_models else set()))


def _refuse_shared(identities: Sequence[Identity], reader: _Reader) -> None:
    owners: dict[str, str] = {}
    names: set[str] = set()
    for identity in identities:
        if identity.name in names:
            reader.fail(f"two identities are called {identity.name}", "identities")
        names.add(identity.name)
        for key in identity.keys:
            owner = owners.setdefault(key.key_id, identity.name)
            if owner != identity.name:
                reader.fail(f"{owner} and {identity.name} have the same key", "identities")


@dataclass(frozen=True)
class _Reader:
    """Checks values of one file; errors name the line of the top-level key."""

    where: str
    lines: Mapping[tuple[str, ...], int]
    folder: Path

    def fail(self, what: str, key: str) -> NoReturn:
        line = self.lines.get((key,), 1)
        raise ConfigError(what, where=f"{self.where}:{line}", remedy="see docs/verify.md, Policy")

    def mapping(
        self, value: Any, what: str, known: Sequence[str], *, needed: Sequence[str] = (), key: str = "format"
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(f"{what} is no mapping", key)
        for name in value:
            if name not in known:
                self.fail(f"{what} has the unknown key `{name}`; known: {', '.join(known)}", name)
        for name in needed:
            if name not in value:
                self.fail(f"{what} has no `{name}`", key)
        return dict(value)

    def items(self, value: Any, key: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            self.fail(f"{key} is no list, or an empty one", key)
        return list(value)

    def identity(self, value: Any) -> Identity:
        known = ("name", "keys", "runs", "valid")
        fields = self.mapping(value, "an identity", known, needed=("name", "keys"), key="identities")
        name, runs = fields["name"], fields.get("runs", ["*"])
        if not isinstance(name, str) or not name:
            self.fail("an identity has a name that is no text", "identities")
        if not isinstance(runs, list) or not runs or not all(isinstance(run, str) for run in runs):
            self.fail(f"runs of {name} is no list of names", "identities")
        valid = self.mapping(fields.get("valid", {}), f"valid of {name}", ("from", "until"), key="identities")
        start, end = (self.moment(valid[key]) if key in valid else None for key in ("from", "until"))
        if start is not None and end is not None and start >= end:
            self.fail(f"{name} is never valid: from {start} until {end}", "identities")
        keys = [self.key(item) for item in self.items(fields["keys"], "identities")]
        return Identity(name, tuple(keys), tuple(runs), start, end)

    def key(self, value: Any) -> PublicKey:
        if not isinstance(value, str):
            self.fail("a key is no text", "identities")
        if value.startswith(("-----BEGIN", "ssh-")):
            return parse_public(value.encode(), where=self.where)
        return load_public(self.folder / expanded(Path(value)))

    def moment(self, value: Any) -> str:
        written = f"{value}T00:00:00Z" if isinstance(value, str) and _DATE.fullmatch(value) else value
        if not isinstance(written, str) or not _TIME.fullmatch(written) or not _exists(written):
            self.fail(f"{value!r} is neither 2026-01-31 nor 2026-01-31T12:00:00Z", "identities")
        return written

    def kind(self, value: Any) -> str:
        if not isinstance(value, str) or not _KIND.fullmatch(value):
            self.fail(f"required names {value!r}, no kind of statement", "required")
        return str(value)

    def threshold(self, value: Any, identities: int) -> int:
        if type(value) is not int or not 1 <= value <= identities:
            self.fail(f"threshold is {value!r}, not 1 to {identities}, the number of identities", "threshold")
        return int(value)

    def revoked(self, value: Any) -> frozenset[str]:
        if not isinstance(value, list):
            self.fail("revoked is no list", "revoked")
        return frozenset(self.digest(item, "revoked") for item in value)

    def digest(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not _HEX.fullmatch(value):
            self.fail(f"{key} has {value!r}, not 64 hex digits", key)
        return str(value)

    def heads(self, value: Any, keys: Sequence[PublicKey]) -> tuple[Kept, ...]:
        several = isinstance(value, list)
        listed = self.items(value, "log_head") if several else [value]
        found = [self.head(each, keys) for each in listed]
        return tuple(replace(each, binding=not several) for each in found)

    def head(self, value: Any, keys: Sequence[PublicKey]) -> Kept:
        if isinstance(value, str):
            path = self.folder / expanded(Path(value))
            try:
                return heads.load(path, keys)
            except (VerificationFailed, EvidenceIncomplete) as error:
                self.fail(f"log_head {error.what}: {path}", "log_head")
        known = ("origin", "size", "root")
        fields = self.mapping(value, "log_head", known, needed=known, key="log_head")
        if type(fields["size"]) is not int or fields["size"] < 0:
            self.fail(f"log_head has the size {fields['size']!r}", "log_head")
        if not isinstance(fields["origin"], str) or not fields["origin"]:
            self.fail("log_head has an origin that is no text", "log_head")
        root = bytes.fromhex(self.digest(fields["root"], "log_head"))
        return Kept(Head(fields["size"], root, fields["origin"]), "the head in the policy")


def _exists(moment: str) -> bool:
    """Whether the calendar has it; a date that never comes would be a rule that never applies."""
    try:
        datetime.fromisoformat(moment)
    except ValueError:
        return False
    return True
