"""Runs that differ in nothing but their seed, as one arm of a comparison."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from harness.report import facts
from harness.report.runs import Run

_Told = TypeVar("_Told")

APART = (
    "run.",
    "checkpoint.",
    "track.",
    "signing.",
    "train.log_every",
    "train.peer_timeout",
    "train.data_workers",
)
"""Settings that change no number of a run."""


_LONGEST = 60
"""Characters of settings that still make a name."""
_NAMED = 3


@dataclass(frozen=True)
class Arm:
    """Runs of one config."""

    label: str
    """The settings that no other arm has, or ``all runs``; its runs' names where they are many."""
    runs: tuple[Run, ...]


def chosen(runs: Sequence[Run], settings: Mapping[str, Any]) -> Arm:
    """The runs whose config has ``settings``."""
    label = ", ".join(f"{name} {facts.shown(value)}" for name, value in settings.items())
    return Arm(label or "all runs", tuple(run for run in runs if _has(run, settings)))


def _has(run: Run, settings: Mapping[str, Any]) -> bool:
    table = facts.settings(run.config_text, str(run.root))
    return all(name in table and table[name] == value for name, value in settings.items())


def group(runs: Sequence[Run]) -> list[Arm]:
    """The arms, in the order of their first run."""
    tables = [_kept(run) for run in runs]
    members: dict[str, list[Run]] = {}
    settings: dict[str, Mapping[str, Any]] = {}
    for run, table in zip(runs, tables, strict=True):
        key = json.dumps(table, sort_keys=True, default=str)
        members.setdefault(key, []).append(run)
        settings[key] = table
    varying = [name for name, _ in facts.differing_settings(runs) if any(name in table for table in tables)]
    labels = {
        key: ", ".join(f"{name} {facts.shown(table.get(name, '—'))}" for name in varying)
        for key, table in settings.items()
    }
    return [Arm(_label(labels[key], found), tuple(found)) for key, found in members.items()]


def _label(settings: str, runs: Sequence[Run]) -> str:
    """The settings that tell the arm from others; where they are many, its runs: a table says the rest."""
    return listed([run.name for run in runs]) if len(settings) > _LONGEST else settings or "all runs"


def listed(names: Sequence[str]) -> str:
    """Up to three names, or how many there are and some of them."""
    if len(names) <= _NAMED:
        return ", ".join(names)
    return f"{len(names)} runs ({names[0]}, {names[1]} … {names[-1]})"


def alike(told: Iterable[tuple[_Told, str]]) -> list[tuple[_Told, list[str]]]:
    """What is told of each name, once, with all the names that it is told of."""
    found: list[tuple[_Told, list[str]]] = []
    for what, name in told:
        same = next((names for known, names in found if known == what), None)
        if same is None:
            found.append((what, [name]))
        else:
            same.append(name)
    return found


def seeds_named(seeds: Iterable[int]) -> str:
    """``seed 3``, ``the seeds 1, 4``, or ``the seeds 0 to 4``."""
    found = sorted(seeds)
    if len(found) == 1:
        return f"seed {found[0]}"
    whole = found[-1] - found[0] == len(found) - 1 and len(found) > 2
    return f"the seeds {found[0]} to {found[-1]}" if whole else f"the seeds {', '.join(map(str, found))}"


def _kept(run: Run) -> dict[str, Any]:
    table = facts.settings(run.config_text, str(run.root))
    return {name: value for name, value in table.items() if not name.startswith(APART)}
