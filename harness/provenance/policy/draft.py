"""A policy file made from public keys, every rule with its reason beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from harness import strict_yaml
from harness.errors import UsageError, VerificationFailed, visible
from harness.format import files, moments, strict_json
from harness.provenance.policy import policy_schema, reader
from harness.provenance.policy import rules as policy
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import keyless
from harness.provenance.signing.keyless import Subject
from harness.provenance.signing.keys import PublicKey, load_public
from harness.provenance.transparency import authorities, heads
from harness.provenance.transparency.heads import Kept

_ROOT = "application/vnd.dev.sigstore.trustedroot"
_ENDING = re.compile(r"(\.(ed25519|p256))?\.pub$")


@dataclass(frozen=True)
class Draft:
    """A policy file, not written yet."""

    text: str
    policy: Policy
    reasons: tuple[tuple[str, str], ...]
    """(rule, why it is so)."""


@dataclass(frozen=True)
class Wish:
    """What the user said; None and empty: nothing."""

    keys: Sequence[Path]
    runs: Sequence[str] = ()
    until: str | None = None
    threshold: int | None = None
    max_age: str | None = None
    head: Path | None = None
    authorities: Sequence[Path] = ()
    """Files with certificates of time-stamping authorities."""
    keyless: Sequence[tuple[str, Subject]] = ()
    """(name, whom a certificate speaks of) of those who sign without a key, one name several times."""
    trusted_root: Path | None = None
    """Of the sigstore instance that certifies them."""
    folder: Path = Path()
    """Where the file is to lie, which names the trusted root from there."""


def draft(wish: Wish, now: datetime) -> Draft:
    """The policy of ``wish``; keys whose files have the same name before ``.ed25519.pub`` are one identity's.

    Keys are written into the file: a key file that is replaced later changes nothing. Raises `UsageError`
    without keys and for no trusted root, `ConfigError` for a wish that makes no policy.
    """
    if not wish.keys:
        raise UsageError("whom to trust is not said", remedy="give --key NAME.ed25519.pub NAME.p256.pub")
    people = _people(wish.keys)
    given = [key for keys in people.values() for key in keys]
    kept = None if wish.head is None else heads.load(wish.head, given)
    reasons = _reasons(wish, people, kept)
    certificates = [_certificate(path) for path in wish.authorities]
    lines = [
        "# Made by `harness policy new`. Check it after a change: harness policy check FILE",
        f"format: {policy_schema.FORMAT}",
        "identities:",
        *(line for name, keys in people.items() for line in _identity(name, keys, wish)),
        *(line for name, subjects in _keyless(wish).items() for line in _certified(name, subjects, wish)),
        *(line for rule, text, reason in reasons for line in _rule(rule, text, reason, now)),
        *_timestamps(certificates),
    ]
    text = "\n".join(lines) + "\n"
    read = reader.parse(text, where="the draft", folder=wish.folder)
    told = [("identities", f"{name}: {', '.join(map(_told, keys))}") for name, keys in people.items()]
    told += [
        ("identities", f"{name}: {', '.join(f'{each.identity} by {each.issuer}' for each in subjects)}")
        for name, subjects in _keyless(wish).items()
    ]
    told += [(rule, f"{text}  ({reason})") for rule, text, reason in reasons]
    told += [("timestamps", authorities.name_of(each)) for each in certificates]
    return Draft(text, read, tuple(told))


def _certificate(path: Path) -> bytes:
    remedy = "give a certificate in PEM or DER"
    data = files.read_given(path, "the certificate", authorities.FILE_LIMIT, remedy)
    try:
        return authorities.parse(data, where=str(path))
    except VerificationFailed as error:
        raise UsageError(f"the certificate {error.what}", where=str(path), remedy=remedy) from error


def _timestamps(certificates: Sequence[bytes]) -> list[str]:
    if not certificates:
        return []
    lines = ["# their timestamps count, and those of whom they vouch for", "timestamps:", "  certificates:"]
    for each in certificates:
        pem = authorities.pem_of(each)
        lines += [f"    # {visible(authorities.name_of(each))}", "    - |"]
        lines += [f"      {line}" for line in pem.splitlines()]
    return lines


def _people(files: Sequence[Path]) -> dict[str, list[PublicKey]]:
    people: dict[str, list[PublicKey]] = {}
    for file in files:
        people.setdefault(_ENDING.sub("", file.name) or file.name, []).append(load_public(file))
    return people


def _reasons(wish: Wish, people: dict[str, list[PublicKey]], kept: Kept | None) -> list[tuple[str, str, str]]:
    """(rule, its value as YAML, why), in the order of the file."""
    identities = [policy.Identity(name, tuple(keys)) for name, keys in people.items()]
    wanted = policy.default_requirements(identities) | ({policy.LOG} if kept else set())
    required = sorted(wanted | ({policy.TIMESTAMP} if wish.authorities else set()))
    why = ["without these nothing is accepted"]
    why += ["a P-256 key is there, so model.sig must be"] if policy.MODEL_SIGNATURE in required else []
    why += ["a head of the log was given, so a log must be"] if kept else []
    why += ["authorities were given, so timestamps must be"] if wish.authorities else []
    found = [("required", f"[{', '.join(required)}]", "; ".join(why))]
    threshold = 1 if wish.threshold is None else wish.threshold
    said = "as said" if wish.threshold is not None else "one signature suffices; --threshold asks for more"
    found.append(("threshold", str(threshold), said))
    if wish.max_age is not None:
        found.append(("max_age", wish.max_age, "as said: an older state is refused, however authentic"))
    if kept is not None:
        head = f"origin: {strict_yaml.write(kept.head.origin)}, size: {kept.head.size}"
        text = f"{{{head}, root: {strict_yaml.write(kept.head.root.hex())}, seen: NOW}}"
        found.append(("log_head", text, "the run must continue it; it was there when this file was made"))
    if wish.keyless or wish.trusted_root is not None:
        found.append(
            ("sigstore", strict_yaml.write(_trusted_root(wish)), "certifies who signs without a key")
        )
    return found


def _rule(rule: str, text: str, reason: str, now: datetime) -> list[str]:
    return [f"# {reason}", f"{rule}: {text.replace('NOW', moments.text(now))}"]


def _keyless(wish: Wish) -> dict[str, list[Subject]]:
    people: dict[str, list[Subject]] = {}
    for name, subject in wish.keyless:
        people.setdefault(name, []).append(subject)
    return people


def _trusted_root(wish: Wish) -> str:
    """Its path from the policy's folder, once it is a trusted root of sigstore's protobuf-specs."""
    remedy = "give the trusted_root.json of the sigstore instance (docs/keys.md)"
    if wish.trusted_root is None:
        what = "an identity is keyless, and no trusted root is named"
        raise UsageError(what, where="--keyless", remedy=f"--trusted-root FILE: {remedy}")
    data = files.read_given(wish.trusted_root, "the trusted root", keyless.ROOT_LIMIT, remedy)
    try:
        document = strict_json.loads(data, where=str(wish.trusted_root), limit=keyless.ROOT_LIMIT)
    except VerificationFailed as error:
        raise UsageError(f"the trusted root {error.what}", where=error.where, remedy=remedy) from error
    if not isinstance(document, dict) or not str(document.get("mediaType")).startswith(_ROOT):
        raise UsageError("is no trusted root", where=str(wish.trusted_root), remedy=remedy)
    return os.path.relpath(files.real(wish.trusted_root), files.real(wish.folder))


def _certified(name: str, subjects: Sequence[Subject], wish: Wish) -> list[str]:
    lines = [
        *_limits(name, wish),
        "    # signs by sigstore what is added to a checkpoint later",
        "    keyless:",
    ]
    for each in subjects:
        lines.append(f"      - issuer: {strict_yaml.write(each.issuer)}")
        lines.append(f"        identity: {strict_yaml.write(each.identity)}")
    return lines


def _limits(name: str, wish: Wish) -> list[str]:
    lines = [f"  - name: {strict_yaml.write(name)}"]
    if wish.runs:
        lines.append(f"    runs: {strict_yaml.write(list(wish.runs))}")
    if wish.until is not None:
        lines.append(f"    valid: {{until: {wish.until}}}")
    return lines


def _identity(name: str, keys: Sequence[PublicKey], wish: Wish) -> list[str]:
    lines = [*_limits(name, wish), "    keys:"]
    for key in keys:
        lines += [f"      # {_told(key)}", "      - |"]
        lines += [f"        {line}" for line in key.pem.decode().splitlines()]
    return lines


def _told(key: PublicKey) -> str:
    return f"{key.algorithm} {key.key_id}"
