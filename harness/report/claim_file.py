"""Claims as a person writes them down, to be held against the runs::

    format: harness-claims/1
    question: Does width pay at equal steps?
    hypothesis: Twice the width lowers the held-out bits per byte.
    claims:
      - name: wider-is-better
        says: The wide model needs fewer bits per byte than the narrow one.
        metric: bits_per_byte              # a figure of an evaluation, or train_loss
        better: lower
        of: {model.width: 128}             # the runs with these settings …
        than: {model.width: 64}            # … against the runs with those
        by: 0.05                           # margin, in units of the metric; 0 when absent
        for: {seeds: any, data: same, stack: same}
      - name: good-enough
        says: The wide model needs at most 3 bits per byte.
        metric: bits_per_byte
        at_most: 3.0                       # or at_least
        of: {model.width: 128}
      - name: it-answers
        says: A fifth of the answers are right, token by token.
        metric: exact_match                # of a signed evaluation (harness evaluate) of the last step
        evaluation: {dataset: chats}       # which one, where there are several
        at_least: 0.2
        of: {model.width: 128}

- ``evaluation`` names a signed evaluation by what it was: ``procedure``, ``version``, ``dataset``,
  ``split``, ``sha256``, ``examples``, ``step``, ``decoding.…`` and ``setting.…``; `harness.report.measured`
  says which one is meant without it
- ``for`` is what the claim speaks about. ``seeds``: ``any`` (the default) or ``these``; ``data`` and
  ``stack``: ``same`` as in the runs (the default) or ``any``
- an unknown, missing or repeated key is an error with its line
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from harness.errors import ConfigError
from harness.format.files import read_given

FORMAT = "harness-claims/1"
TRAIN_LOSS = "train_loss"
_LIMIT = 256 << 10
_NEEDED = ("name", "says", "metric", "of")
_COMPARED, _BOUND = ("better", "than", "by"), ("at_most", "at_least")
_OPTIONAL = ("evaluation", "for")
_SCOPE = {"seeds": ("any", "these"), "data": ("same", "any"), "stack": ("same", "any")}

Direction = Literal["lower", "higher"]
_MEANT: Mapping[str, Direction] = {"at_most": "lower", "at_least": "higher"}

Settings = Mapping[str, Any]
"""Config keys with values: ``{"model.width": 128}``."""


@dataclass(frozen=True)
class Scope:
    """What a claim speaks about."""

    seeds: str = "any"
    data: str = "same"
    stack: str = "same"


@dataclass(frozen=True)
class Claim:
    """One sentence that runs can support or not."""

    name: str
    says: str
    metric: str
    of: Settings
    than: Settings | None
    """The baseline; None for a claim about a level."""
    better: Direction
    """Which direction the claim means; for a level, ``lower`` is ``at_most``."""
    margin: float
    """By how much at least, or the level itself."""
    scope: Scope
    evaluation: Settings | None = None
    """Which signed evaluation is meant, as `harness.report.measured` names them; None for any, or for the one
    while training."""


@dataclass(frozen=True)
class Claims:
    """A whole file."""

    question: str | None
    hypothesis: str | None
    claims: tuple[Claim, ...]
    sha256: str
    """Of the file, hex; a sweep registers it before its first member runs."""


def digest(path: Path) -> str:
    """Hex sha256 of the file. Raises `UsageError` when it cannot be read."""
    return hashlib.sha256(_read(path)).hexdigest()


def load(path: Path) -> Claims:
    """The claims in the YAML file ``path``. Raises `ConfigError` with file and line, `UsageError`."""
    data = _read(path)
    try:
        return parse(data.decode("utf-8"), where=str(path))
    except UnicodeDecodeError as error:
        raise ConfigError("the claims are not UTF-8", where=str(path)) from error


def _read(path: Path) -> bytes:
    return read_given(path, "the file of claims", _LIMIT, "docs/method.md shows one")


def parse(text: str, *, where: str) -> Claims:
    """The claims in ``text``. Raises `ConfigError`."""
    # YAML costs the start-up of every other report 20 ms.
    from harness import strict_yaml

    document = strict_yaml.read(text, where)
    reader = _Reader(where, document.lines)
    known = ("format", "question", "hypothesis", "claims")
    value = reader.mapping(document.value, "the file", known, ("format", "claims"))
    if value["format"] != FORMAT:
        reader.fail(f"format is {value['format']!r}, not {FORMAT}", "format")
    listed = value["claims"]
    if not isinstance(listed, list) or not listed:
        reader.fail("claims is no list, or an empty one", "claims")
    claims = tuple(map(reader.claim, listed))
    names = [claim.name for claim in claims]
    if len(set(names)) < len(names):
        reader.fail("two claims have the same name", "claims")
    question, hypothesis = (
        reader.text(value[key], key) if key in value else None for key in ("question", "hypothesis")
    )
    return Claims(question, hypothesis, claims, hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True)
class _Reader:
    """Checks values of one file; errors name the line of the top-level key."""

    where: str
    lines: Mapping[tuple[str, ...], int]

    def fail(self, what: str, key: str = "claims") -> NoReturn:
        line = self.lines.get((key,), 1)
        raise ConfigError(what, where=f"{self.where}:{line}", remedy="see docs/method.md, Claims")

    def mapping(
        self, value: Any, what: str, known: tuple[str, ...], needed: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(f"{what} is no mapping")
        for name in value:
            if name not in known:
                self.fail(f"{what} has the unknown key `{name}`; known: {', '.join(known)}", name)
        for name in needed:
            if name not in value:
                self.fail(f"{what} has no `{name}`")
        return dict(value)

    def text(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not value.strip():
            self.fail(f"{key} is no text")
        return str(value)

    def number(self, value: Any, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(f"{key} is {value!r}, no number")
        return float(value)

    def claim(self, value: Any) -> Claim:
        fields = self.mapping(value, "a claim", (*_NEEDED, *_COMPARED, *_BOUND, *_OPTIONAL), _NEEDED)
        name = self.text(fields["name"], "name")
        kinds = [key for key in ("than", *_BOUND) if key in fields]
        if len(kinds) != 1:
            self.fail(f"{name} needs exactly one of than, at_most and at_least")
        than: Settings | None = None
        if kinds == ["than"]:
            than = self.settings(fields["than"], f"than of {name}")
            margin = self.number(fields.get("by", 0), f"by of {name}")
            better = self.direction(fields.get("better"), name)
            if margin < 0:
                self.fail(f"by of {name} is negative; turn the claim around")
        else:
            better = _MEANT[kinds[0]]
            margin = self.number(fields[kinds[0]], f"{kinds[0]} of {name}")
            if "better" in fields or "by" in fields:
                self.fail(f"{name} has a level; better and by belong to a comparison")
        of = self.settings(fields["of"], f"of of {name}")
        if of == than:
            self.fail(f"{name} compares runs with themselves")
        says, metric = self.text(fields["says"], "says"), self.text(fields["metric"], "metric")
        scope = self.scope(fields.get("for", {}), name)
        evaluation: Settings | None = None
        if "evaluation" in fields:
            evaluation = self.settings(fields["evaluation"], f"evaluation of {name}", "dataset: chats")
        return Claim(name, says, metric, of, than, better, margin, scope, evaluation)

    def direction(self, value: Any, name: str) -> Direction:
        if value == "lower":
            return "lower"
        if value == "higher":
            return "higher"
        self.fail(f"{name} needs `better: lower` or `better: higher`")

    def settings(self, value: Any, what: str, example: str = "model.width: 128") -> Settings:
        if not isinstance(value, dict) or any(isinstance(inner, dict) for inner in value.values()):
            self.fail(f"{what} is no mapping of keys to values, such as {{{example}}}")
        return dict(value)

    def scope(self, value: Any, name: str) -> Scope:
        fields = self.mapping(value, f"for of {name}", tuple(_SCOPE))
        for key, word in fields.items():
            if word not in _SCOPE[key]:
                self.fail(f"for of {name} has {key}: {word!r}, not {' or '.join(_SCOPE[key])}")
        return Scope(**fields)
