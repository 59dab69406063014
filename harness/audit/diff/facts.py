"""What two checkpoint statements say differently, sorted by what it means for the training.

Topics: ``config``, ``code``, ``data``, ``environment``, ``launch``, ``determinism``, ``kernels``,
``metrics``, and ``identity`` for what only tells two runs apart and has no part in the result: run id and
name, folders, keys and policy, tracking, the command's words, job numbers, parents, the history of launches,
the log, the clock.

The predicate's claims are compared, signed or not; tensors are compared by their bytes elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import ConfigError
from harness.format.ledger import Ledger, Row

TOPICS = ("config", "code", "data", "environment", "launch", "determinism", "kernels", "metrics", "identity")
"""In the order in which they are shown."""

ABSENT = "(absent)"
"""Stands for a name that one side does not have."""

_IDENTITY_KEYS = re.compile(r"run\.(dir|name)|(signing|track)\..*")
"""Keys of the config that have no part in the training."""
_JOB_VARIABLES = re.compile(r"variables\.(SLURM_JOB_ID|SLURM_RESTART_COUNT|TORCHELASTIC_RESTART_COUNT)")
_AMBIGUOUS = re.compile(r"|null|true|false|-?\d+(\.\d+)?([eE][-+]?\d+)?|[\[{(\"].*", re.DOTALL)
"""Strings that would read as another value."""


@dataclass(frozen=True, order=True)
class Fact:
    """One thing that A and B say differently."""

    topic: str
    name: str
    a: str
    b: str


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], ledgers: tuple[Ledger | None, Ledger | None]
) -> list[Fact]:
    """Everything in which two predicates and their ledgers differ, by topic and name."""
    found = [*_predicates(one, other), *_kernels(*ledgers)]
    return sorted(found, key=lambda fact: (TOPICS.index(fact.topic), fact.name))


def _predicates(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Fact]:
    yield from _config(one["config"], other["config"])
    for name in ("code", "data", "environment", "launch", "metrics"):
        yield from _facts(name, one[name], other[name])
    yield from _facts("data", {"start": one["start"]}, {"start": other["start"]})
    yield from _facts("data", {"cursor": one["cursor"]}, {"cursor": other["cursor"]})
    yield from _facts("metrics", {"outcome": one["outcome"]}, {"outcome": other["outcome"]})
    for name in ("mode", "settings"):
        yield from _facts("determinism", {name: one["determinism"][name]}, {name: other["determinism"][name]})
    run, other_run = ({name: side["run"][name] for name in ("id", "name")} for side in (one, other))
    yield from _facts("identity", {"run": run}, {"run": other_run})
    for name in ("sequence", "steps", "parent", "segment", "log", "created"):
        yield from _facts("identity", {name: one[name]}, {name: other[name]})
    yield from _facts("identity", {"policy": one.get("policy")}, {"policy": other.get("policy")})


def _facts(topic: str, one: Any, other: Any) -> Iterator[Fact]:
    left, right = flat(one), flat(other)
    for name in sorted({*left, *right}):
        a, b = left.get(name, ABSENT), right.get(name, ABSENT)
        if a != b:
            yield Fact(_topic(topic, name), name, a, b)


def _topic(topic: str, name: str) -> str:
    own = {
        "config": _IDENTITY_KEYS.fullmatch(name),
        "environment": _JOB_VARIABLES.fullmatch(name),
        "launch": name.startswith("command"),
        # A digest over what steps took and when.
        "metrics": name == "lines",
    }
    return "identity" if own.get(topic) else topic


def _config(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Fact]:
    """Key by key; as a whole when one of the texts is no config."""
    if one["text"] == other["text"]:
        return
    # YAML costs start-up and is needed only for texts that differ.
    from harness import strict_yaml

    try:
        values = [strict_yaml.read(side["text"], "config").value for side in (one, other)]
    except ConfigError as error:
        yield Fact("config", f"sha256 (not YAML: {error.what})", one["sha256"], other["sha256"])
        return
    found = list(_facts("config", *values))
    yield from found
    if not found:
        yield Fact("identity", "spelling of the config (same values)", one["sha256"], other["sha256"])


def _kernels(one: Ledger | None, other: Ledger | None) -> Iterator[Fact]:
    """Rows of the ledgers that only one side has; counts and steps are sightings and may differ."""
    if one is None or other is None:
        if one is not other:
            names = ["no ledger" if each is None else f"{len(each.rows)} rows" for each in (one, other)]
            yield Fact("kernels", "ledger", *names)
        return
    left, right = ({row.key: row for row in each.rows} for each in (one, other))
    for key in sorted({*left} ^ {*right}):
        row = left.get(key) or right[key]
        yield Fact("kernels", _row(row), *("seen" if key in side else ABSENT for side in (left, right)))
    yield from _facts("kernels", _ledger_facts(one), _ledger_facts(other))


def _ledger_facts(ledger: Ledger) -> dict[str, Any]:
    return {
        "catalogue": None if ledger.catalogue is None else ledger.catalogue.sha256,
        "compiled regions": ledger.compiled_regions,
        "made deterministic": sorted({f"{entry.op} {entry.device} {entry.by}" for entry in ledger.mitigated}),
        "observed anything": ledger.observed_anything,
        "operators on no list": list(ledger.unclassified),
    }


def _row(row: Row) -> str:
    place = "" if row.call_site is None else f" at {row.call_site}"
    return f"{row.evidence} {row.op} ({row.backend}, {row.device}, {row.dtype}){place}"


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """``value`` as dotted name → text, so that different values have different texts."""
    if isinstance(value, Mapping) and (value or not prefix):
        found: dict[str, str] = {}
        for name, inner in value.items():
            found |= flat(inner, f"{prefix}.{name}" if prefix else str(name))
        return found
    return {prefix: _text(value)}


def _text(value: Any) -> str:
    if isinstance(value, str) and not _AMBIGUOUS.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
