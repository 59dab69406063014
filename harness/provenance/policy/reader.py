"""A policy as a YAML file, strictly read, so that a misspelt rule never means "no rule"::

    format: harness-policy/1
    identities:
      - name: alice
        keys: [alice.ed25519.pub, alice.p256.pub]   # path beside this file, PEM text, or an OpenSSH line
        runs: ["tiny", "gpt-*"]                     # run names or ids; * matches; default: every run
        statements: [checkpoint, slsa, model-signature, log]   # default: every kind
        valid: {from: 2026-01-01, until: 2027-01-01}
      - name: ci                                    # signs without a key, what is added later
        keyless: [{issuer: "https://token.example.org", identity: "https://example.org/eval.yml@main"}]
        statements: [test-result]
    sigstore: trusted_root.json                     # of the instance that certifies them: a file, or its text
    required: [checkpoint, slsa, model-signature, log]
    threshold: 1                                    # distinct identities that must have signed a checkpoint
    revoked: ["<64 hex digits>", {id: "<64 hex digits>", from: 2026-06-01, reason: stolen laptop}]
    witnesses: {keys: [w1.pub, w2.pub], threshold: 2}   # who must have cosigned each kept head
    timestamps: {certificates: [tsa-root.pem]}      # whose timestamps count; with timestamp in `required`
    rotations: [alice-2.rotation]   # hand-overs to other keys of the same identity (`harness keys rotate`):
                                    # files, or their text
    log_head: tiny.head      # the newest log head that you have kept: a file of `harness head`, or
                             # {origin: harness/run/…, size: 12, root: "<64 hex digits>"}, or a list
    max_age: 30d

- an unknown key is an error with its line and the nearest name; a repeated one too
- a key that is listed twice, or for two identities, is an error, and so is whom a certificate speaks of
- a threshold that the identities cannot reach, and a rule that could accept nothing, are errors
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.errors import ConfigError, UsageError, VerificationFailed, open_given, unreadable_input
from harness.format import files, layout
from harness.provenance.policy import rotation, rules
from harness.provenance.policy.fields import Fields, Place
from harness.provenance.policy.policy_schema import FORMAT, HEAD, HEAD_FILE, SCHEMA, SUBJECT
from harness.provenance.policy.rotation import Claim
from harness.provenance.policy.rules import CHECKPOINT, COUNTERSIGNATURE, MODEL_SIGNATURE, Identity, Policy
from harness.provenance.signing import keyless
from harness.provenance.signing.keyless import Subject
from harness.provenance.signing.keys import PublicKey
from harness.provenance.transparency import heads
from harness.provenance.transparency.heads import Kept
from harness.provenance.transparency.log import Head

FILE_LIMIT = 256 << 10
"""Bytes of the file."""


def load(path: Path) -> Policy:
    """The policy in the YAML file ``path``. Raises `ConfigError` with file and line, and as `require_own`."""
    require_own(path)
    return parse(read(path), where=str(path), folder=path.parent)


def require_own(path: Path) -> None:
    """Raise `UsageError` for the copy that a run keeps of the policy that it is made under
    (`harness.provenance.policy.canonical`): whoever made the run has written it."""
    real = files.real(path)
    if real.name == layout.POLICY and (real.parent / layout.CHECKPOINTS).is_dir():
        raise UsageError(
            "is a run's own copy of a policy, and nobody is trusted by what a run says",
            where=str(path),
            remedy="use a policy of your own; harness policy check tells what is in this one",
        )


def read(path: Path) -> str:
    """The text of ``path``. Raises `ConfigError` when it is no text, else as `unreadable_input` tells."""
    try:
        with open_given(path) as stream:
            return stream.read(FILE_LIMIT + 1).decode("utf-8")
    except OSError as error:
        raise unreadable_input(
            error, "the policy", path, "check the path, or make one: harness policy new"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError("the policy is not UTF-8", where=str(path)) from error


def parse(text: str, *, where: str, folder: Path) -> Policy:
    """The policy in ``text``; key files are looked up in ``folder``. Raises `ConfigError`."""
    # YAML is needed only here, and costs verify's start-up 20 ms.
    from harness import strict_yaml

    document = strict_yaml.read(text, where)
    reader = _Reader(where, {**document.lines, **document.inside}, folder)
    value = reader.mapping(document.value, "the policy", SCHEMA, ())
    if value["format"] != FORMAT:
        reader.fail(f"format is {value['format']!r}, not {FORMAT}", "format")
    identities = reader.identities(value["identities"])
    required = rules.default_requirements(identities)
    if "required" in value:
        required = frozenset(reader.kinds(value["required"], ("required",))) | {CHECKPOINT}
    revoked, revoked_from = reader.revoked(value.get("revoked", []))
    read = Policy(tuple(identities), required, 1, revoked, revoked_from)
    if "sigstore" in value or read.subjects:
        read = replace(read, sigstore=reader.sigstore(value.get("sigstore"), read))
    if "rotations" in value:
        read = reader.rotations(value["rotations"], read)
    if "timestamps" in value:
        read = replace(read, authorities=reader.authorities(value["timestamps"]))
    reader.acceptable(read)
    if "witnesses" in value:
        read = reader.witnesses(value["witnesses"], read)
    return replace(
        read,
        threshold=reader.threshold(value.get("threshold", 1), read),
        log_heads=reader.heads(value["log_head"], read) if "log_head" in value else (),
        max_age=reader.age(value["max_age"]) if "max_age" in value else None,
    )


class _Reader(Fields):
    """Checks the rules of one file; what is wrong with one is told with its line."""

    def identities(self, value: Any) -> list[Identity]:
        found: list[Identity] = []
        owners: dict[str, str] = {}
        for number, item in enumerate(self.items(value, "identities", "identities")):
            place = ("identities", str(number))
            found.append(self.identity(item, place))
            name = found[-1].name
            if name in [each.name for each in found[:-1]]:
                self.fail(f"two identities are called {name}", *place, "name")
            for index, key in enumerate(found[-1].keys):
                owner = owners.setdefault(key.key_id, name)
                if owner != name:
                    self.fail(f"{owner} and {name} have the same key", *place, "keys", str(index))
            for index, subject in enumerate(found[-1].subjects):
                other = next((each.name for each in found[:-1] if subject in each.subjects), None)
                if other is not None:
                    self.fail(f"{other} and {name} are the same", *place, "keyless", str(index))
        return found

    def identity(self, value: Any, place: Place) -> Identity:
        schema = SCHEMA["properties"]["identities"]["items"]
        fields = self.mapping(value, "an identity", schema, place)
        name = fields["name"]
        if not isinstance(name, str) or not name:
            self.fail("an identity has a name that is no text", *place, "name")
        if name == rules.GIVEN_KEYS:
            self.fail(f"{name!r} is what --key is called, and no name of an identity", *place, "name")
        runs = self.items(fields.get("runs", ["*"]), f"runs of {name}", *place, "runs")
        if not all(isinstance(run, str) for run in runs):
            self.fail(f"runs of {name} is no list of names", *place, "runs")
        if not {"keys", "keyless"} & set(fields):
            self.fail(f"{name} has neither `keys` nor `keyless`", *place)
        kinds = fields.get("statements")
        valid = self.mapping(
            fields.get("valid", {}), f"valid of {name}", schema["properties"]["valid"], (*place, "valid")
        )
        start, end = (
            self.moment(valid[key], *place, "valid", key) if key in valid else None
            for key in ("from", "until")
        )
        if start is not None and end is not None and start >= end:
            self.fail(f"{name} is never valid: from {start} until {end}", *place, "valid")
        proven = valid.get("proven", False)
        if not isinstance(proven, bool) or (proven and end is None):
            self.fail(f"proven of {name} is true or false, and needs `until`", *place, "valid", "proven")
        return Identity(
            name,
            self.keys(fields["keys"], name, (*place, "keys")) if "keys" in fields else (),
            tuple(runs),
            start,
            end,
            proven,
            None if kinds is None else frozenset(self.kinds(kinds, (*place, "statements"))),
            subjects=self.subjects(fields["keyless"], name, (*place, "keyless"))
            if "keyless" in fields
            else (),
        )

    def subjects(self, value: Any, name: str, place: Place) -> tuple[Subject, ...]:
        found: list[Subject] = []
        for number, item in enumerate(self.items(value, f"keyless of {name}", *place)):
            fields = self.mapping(item, f"keyless of {name}", SUBJECT, (*place, str(number)))
            for key, text in fields.items():
                if not isinstance(text, str) or not text:
                    self.fail(f"the {key} of {name} is no text", *place, str(number), key)
            subject = Subject(fields["issuer"], fields["identity"])
            if subject in found:
                self.fail(f"{name} has the same identity twice", *place, str(number))
            found.append(subject)
        return tuple(found)

    def sigstore(self, value: Any, read: Policy) -> bytes:
        if not read.subjects:
            self.fail("sigstore is named, and no identity is keyless", "sigstore")
        if not isinstance(value, str) or not value:
            remedy = "sigstore: trusted_root.json (docs/keys.md)"
            self.fail("an identity is keyless, and sigstore names no trusted root", "sigstore", remedy=remedy)
        root = self.contents(value, "sigstore", keyless.ROOT_LIMIT, "sigstore")
        try:
            root.decode()
        except UnicodeDecodeError:
            self.fail("sigstore names a trusted root that is not UTF-8", "sigstore")
        return root

    def threshold(self, value: Any, read: Policy) -> int:
        count = len(read.identities)
        if type(value) is not int or not 1 <= value <= count:
            self.fail(f"threshold is {value!r}, not 1 to {count}, the number of identities", "threshold")
        able = sum(_may_sign(each, read) for each in read.identities)
        if value > able:
            self.fail(
                f"threshold is {value}, and only {able} of the identities could sign a checkpoint",
                "threshold",
            )
        return int(value)

    def revoked(self, value: Any) -> tuple[frozenset[str], dict[str, str]]:
        if not isinstance(value, list):
            self.fail("revoked is no list", "revoked")
        known = SCHEMA["properties"]["revoked"]["items"]["anyOf"][1]
        found: set[str] = set()
        moments: dict[str, str] = {}
        for number, item in enumerate(value):
            place = ("revoked", str(number))
            given = item if isinstance(item, dict) else {"id": item}
            fields = self.mapping(given, "a revocation", known, place)
            identity = self.digest(fields["id"], "revoked", *place)
            if identity in found:
                self.fail(f"revoked has {identity} twice", *place)
            if not isinstance(fields.get("reason", ""), str):
                self.fail("the reason of a revocation is no text", *place, "reason")
            found.add(identity)
            if "from" in fields:
                moments[identity] = self.moment(fields["from"], *place, "from")
        return frozenset(found), moments

    def rotations(self, value: Any, read: Policy) -> Policy:
        claims = []
        for number, name in enumerate(self.items(value, "rotations", "rotations")):
            if not isinstance(name, str) or not name:
                self.fail("rotations names a file that is no text", "rotations", str(number))
            data = self.contents(name, "rotations", rotation.LIMIT, "rotations", str(number))
            claims.append(Claim(data, self.where if name.startswith("{") else str(self.path(name))))
        try:
            return rotation.extended(read, claims, timed=True)[0]
        except VerificationFailed as error:
            # A revoked key hands nothing over: that the file is older than its revocation, no file can show.
            self.fail(f"rotations: {error.what}: {error.where}", "rotations", remedy=error.remedy or "")

    def witnesses(self, value: Any, read: Policy) -> Policy:
        place = ("witnesses",)
        fields = self.mapping(value, "witnesses", SCHEMA["properties"]["witnesses"], place)
        keys = self.keys(fields["keys"], "witnesses", (*place, "keys"))
        if any(key.algorithm != "ed25519" for key in keys):
            self.fail("witnesses cosign with Ed25519 keys, and one is another", *place, "keys")
        own = {key.key_id for identity in read.identities for key in identity.keys}
        for number, key in enumerate(keys):
            if key.key_id in own:
                self.fail("a witness has the key of an identity", *place, "keys", str(number))
        wanted = fields.get("threshold", 1)
        if type(wanted) is not int or not 1 <= wanted <= len(keys):
            self.fail(f"threshold of witnesses is {wanted!r}, not 1 to {len(keys)}", *place, "threshold")
        return replace(read, witnesses=keys, witness_threshold=wanted)

    def authorities(self, value: Any) -> tuple[bytes, ...]:
        schema = SCHEMA["properties"]["timestamps"]
        fields = self.mapping(value, "timestamps", schema, ("timestamps",))
        place, found = ("timestamps", "certificates"), list[bytes]()
        for number, item in enumerate(self.items(fields["certificates"], "certificates", *place)):
            found.append(self.certificate(item, *place, str(number)))
            if found[-1] in found[:-1]:
                self.fail("timestamps names the same certificate twice", *place, str(number))
        return tuple(found)

    def acceptable(self, read: Policy) -> None:
        """Refuse rules under which nothing could ever be accepted, and those that say nothing."""
        own = {key.key_id for identity in read.identities for key in identity.keys}
        for identity in read.revoked_from.keys() - own:
            self.fail(f"{identity} is revoked from a moment on, and is no key of this policy", "revoked")
        if not any(_has_key(each, read, {CHECKPOINT, COUNTERSIGNATURE}) for each in read.identities):
            self.fail("no identity has an Ed25519 key that is not revoked and may sign", "identities")
        models = [key for each in read.identities for key in each.keys if key.algorithm == "p256"]
        if MODEL_SIGNATURE in read.required and not any(_counts(key, read) for key in models):
            self.fail("model-signature is required and no identity has a P-256 key", "required")
        if rules.TIMESTAMP in read.required and not read.authorities:
            self.fail("timestamp is required, and timestamps names no certificate", "required")

    def heads(self, value: Any, read: Policy) -> tuple[Kept, ...]:
        several = isinstance(value, list)
        listed = self.items(value, "log_head", "log_head") if several else [value]
        found = []
        for number, item in enumerate(listed):
            place = ("log_head", str(number)) if several else ("log_head",)
            found.append(replace(self.head(item, read, place), binding=not several))
        return tuple(found)

    def head(self, value: Any, read: Policy, place: Place) -> Kept:
        if isinstance(value, str):
            value = {"file": value}
        of_file = isinstance(value, dict) and "file" in value
        fields = self.mapping(value, "log_head", HEAD_FILE if of_file else HEAD, place)
        seen = self.moment(fields["seen"], *place, "seen") if "seen" in fields else None
        if of_file:
            found = self.head_file(fields["file"], read.as_of(seen), place)
            return found if seen is None else replace(found, seen=seen)
        if read.witnesses:
            self.fail("log_head is no file, so no witness can have cosigned it", *place)
        if type(fields["size"]) is not int or fields["size"] < 0:
            self.fail(f"log_head has the size {fields['size']!r}", *place, "size")
        if not isinstance(fields["origin"], str) or not fields["origin"]:
            self.fail("log_head has an origin that is no text", *place, "origin")
        root = bytes.fromhex(self.digest(fields["root"], "log_head", *place, "root"))
        return Kept(Head(fields["size"], root, fields["origin"]), "the head in the policy", seen=seen)

    def head_file(self, value: Any, read: Policy, place: Place) -> Kept:
        if not isinstance(value, str) or not value:
            self.fail("log_head names a file that is no text", *place)
        path = self.path(value)
        try:
            return heads.load(path, read.statement_keys, read.witnesses, read.witness_threshold)
        except (VerificationFailed, UsageError) as error:
            self.fail(f"log_head: {error.what}: {path}", *place)


def _may_sign(identity: Identity, read: Policy) -> bool:
    """Whether ``identity`` could sign a checkpoint's statement, or countersign it."""
    if identity.subjects and (identity.statements is None or COUNTERSIGNATURE in identity.statements):
        return True
    return _has_key(identity, read, {CHECKPOINT, COUNTERSIGNATURE})


def _has_key(identity: Identity, read: Policy, kinds: Set[str]) -> bool:
    """Whether ``identity`` has an Ed25519 key that counts and may sign one of ``kinds``."""
    usable = [key for key in identity.keys if key.algorithm == "ed25519" and _counts(key, read)]
    return bool(usable) and (identity.statements is None or bool(kinds & identity.statements))


def _counts(key: PublicKey, read: Policy) -> bool:
    return key.key_id not in read.revoked or key.key_id in read.revoked_from
