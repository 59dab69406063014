"""Single values of a policy's file, each checked by itself: moments, digests, keys, files that it names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import ConfigError, UsageError, VerificationFailed
from harness.format import files
from harness.provenance.policy.policy_schema import AGE, DATE, KIND
from harness.provenance.schema import Schema
from harness.provenance.signing.keys import PublicKey, expanded, load_public, parse_public
from harness.provenance.transparency import authorities

Place = tuple[str, ...]
"""Keys, and numbers of items, from the top of the file down to a value."""


@dataclass(frozen=True)
class Fields:
    """Checks values of one file. Each method raises `ConfigError` with the line of the key or the item."""

    where: str
    lines: Mapping[Place, int]
    folder: Path
    """Where the files lie that it names."""

    def fail(self, what: str, *place: str, remedy: str = "see docs/verify.md, Policy") -> NoReturn:
        """Raise for ``place``, or for the nearest one above that has a line."""
        found = (self.lines.get(place[:length]) for length in range(len(place), 0, -1))
        line = next((each for each in found if each is not None), 1)
        raise ConfigError(what, where=f"{self.where}:{line}", remedy=remedy)

    def mapping(self, value: Any, what: str, schema: Schema, place: Place) -> dict[str, Any]:
        """``value``, whose keys are those that ``schema`` knows and wants."""
        if not isinstance(value, dict):
            self.fail(f"{what} is no mapping", *place)
        known = list(schema["properties"])
        for name in value:
            if name not in known:
                close = get_close_matches(name, known, n=1, cutoff=0.5)
                remedy = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"
                self.fail(f"{what} has the unknown key `{name}`", *place, name, remedy=remedy)
        for name in schema["required"]:
            if name not in value:
                self.fail(f"{what} has no `{name}`", *place)
        return dict(value)

    def items(self, value: Any, what: str, *place: str) -> list[Any]:
        """``value``, a list of something."""
        if not isinstance(value, list) or not value:
            self.fail(f"{what} is no list, or an empty one", *place)
        return list(value)

    def moment(self, value: Any, *place: str) -> str:
        """A moment, as ``2026-01-31T12:00:00Z``; a date alone is its first moment."""
        date_only = isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII)
        written = f"{value}T00:00:00Z" if date_only else value
        good = isinstance(written, str) and re.fullmatch(DATE.strip("^$"), written, re.ASCII)
        if not good or not _exists(written):
            self.fail(f"{value!r} is neither 2026-01-31 nor 2026-01-31T12:00:00Z", *place)
        return str(written)

    def kinds(self, value: Any, place: Place) -> list[str]:
        """A list of kinds of statements."""
        found = self.items(value, place[-1], *place)
        for number, kind in enumerate(found):
            if not isinstance(kind, str) or not re.fullmatch(KIND.strip("^$"), kind, re.ASCII):
                self.fail(f"{place[-1]} names {kind!r}, no kind of statement", *place, str(number))
            if kind in found[:number]:
                self.fail(f"{place[-1]} names {kind} twice", *place, str(number))
        return found

    def digest(self, value: Any, what: str, *place: str) -> str:
        """64 hex digits."""
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            self.fail(f"{what} has {value!r}, not 64 hex digits", *place)
        return str(value)

    def age(self, value: Any) -> timedelta:
        """How long ``30d`` or ``12h`` is."""
        if not isinstance(value, str) or not re.fullmatch(AGE.strip("^$"), value, re.ASCII):
            self.fail(f"max_age is {value!r}, neither days like 30d nor hours like 12h", "max_age")
        return timedelta(**{"days" if value[-1] == "d" else "hours": int(value[:-1])})

    def contents(self, value: str, what: str, limit: int, *place: str) -> bytes:
        """What a rule holds as JSON text, or names by a file beside this one."""
        return value.encode() if value.startswith("{") else self.file(value, what, limit, *place)

    def path(self, value: str) -> Path:
        """Where a file lies that the policy names."""
        return self.folder / expanded(Path(value))

    def file(self, value: str, what: str, limit: int, *place: str) -> bytes:
        """The bytes of the file that ``value`` names, at most ``limit``."""
        try:
            return files.read_given(self.path(value), what, limit, "")
        except UsageError as error:
            self.fail(f"{error.what}: {error.where}", *place)

    def keys(self, value: Any, name: str, place: Place) -> tuple[PublicKey, ...]:
        """A list of keys, each once, of whoever ``name`` says."""
        found: list[PublicKey] = []
        for number, item in enumerate(self.items(value, f"keys of {name}", *place)):
            found.append(self.key(item, *place, str(number)))
            if found[-1].key_id in [each.key_id for each in found[:-1]]:
                self.fail(f"{name} has the same key twice", *place, str(number))
        return tuple(found)

    def key(self, value: Any, *place: str) -> PublicKey:
        """A key as PEM text, as an OpenSSH line, or in a file."""
        if not isinstance(value, str):
            self.fail("a key is no text", *place)
        if value.startswith(("-----BEGIN", "ssh-")):
            return parse_public(value.encode(), where=self.where)
        return load_public(self.path(value))

    def certificate(self, value: Any, *place: str) -> bytes:
        """PEM text, or a file in PEM or DER, with one certificate."""
        if not isinstance(value, str) or not value:
            self.fail("a certificate is no text", *place)
        inline = value.startswith("-----BEGIN")
        what = "a certificate of timestamps"
        data = value.encode() if inline else self.file(value, what, authorities.FILE_LIMIT, *place)
        where = self.where if inline else str(self.path(value))
        try:
            return authorities.parse(data, where=where)
        except VerificationFailed as error:
            self.fail(f"{what} {error.what}: {where}", *place)


def _exists(moment: str) -> bool:
    """Whether the calendar has it; a date that never comes would be a rule that never applies."""
    try:
        datetime.fromisoformat(moment)
    except ValueError:
        return False
    return True
