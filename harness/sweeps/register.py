"""``sweep.json``: what a sweep compares, and which seeds were planned when.

The first launch writes it, before any member runs. Later ones may add seeds and variants, and every such
addition stays on record with the time and the number of members that had finished by then: whoever adds seeds
after a look at the results has another chance of finding something, and a report must be able to say so. What
a variant *is* may not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import VerificationFailed
from harness.format import files, strict_json

NAME = "sweep.json"
FORMAT = "harness-sweep/1"
_LIMIT = 16 << 20


@dataclass(frozen=True)
class Plan:
    """A launch that planned something new."""

    created: str
    """UTC, ``2026-11-25T20:00:00Z``."""
    seeds: tuple[int, ...]
    """All seeds that were planned by then."""
    variants: tuple[str, ...]
    finished: int
    """Members that had already finished."""
    claims: str | None
    """Hex sha256 of the claims file that was given; None without one."""


@dataclass(frozen=True)
class Register:
    """The contents of sweep.json."""

    variants: Mapping[str, str]
    """Name → resolved config, without what differs from seed to seed."""
    plans: tuple[Plan, ...]

    @property
    def names(self) -> list[str]:
        """Folder names of all members, in the order in which they run."""
        last = self.plans[-1]
        return [
            f"{name}-seed-{seed}" if name else f"seed-{seed}" for seed in last.seeds for name in last.variants
        ]

    def dumps(self) -> bytes:
        """The file's bytes."""
        plans = [
            {
                "created": plan.created,
                "seeds": list(plan.seeds),
                "variants": list(plan.variants),
                "finished": plan.finished,
                "claims": plan.claims,
            }
            for plan in self.plans
        ]
        return strict_json.dumps({"format": FORMAT, "variants": dict(self.variants), "plans": plans})


def read(folder: Path) -> Register | None:
    """The register in ``folder``; None when it is no sweep. Raises `VerificationFailed` for a broken one."""
    path = folder / NAME
    if not path.exists():
        return None
    return parse(files.read_limited(path, _LIMIT), where=str(path))


def parse(data: bytes, *, where: str) -> Register:
    """The register in ``data``. Raises `VerificationFailed`."""
    document = strict_json.loads(data, where=where)
    try:
        if set(document) != {"format", "variants", "plans"} or document["format"] != FORMAT:
            raise ValueError("format")
        variants = {_text(name): _text(text) for name, text in document["variants"].items()}
        plans = tuple(_plan(each, variants) for each in document["plans"])
        if not plans:
            raise ValueError("plans")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VerificationFailed(f"is no {FORMAT} ({error})", where=where) from error
    return Register(variants, plans)


def _plan(value: Mapping[str, Any], variants: Mapping[str, str]) -> Plan:
    if set(value) != {"created", "seeds", "variants", "finished", "claims"}:
        raise ValueError("plan")
    seeds, names = tuple(map(_natural, value["seeds"])), tuple(map(_text, value["variants"]))
    if not seeds or not names or len(set(seeds)) < len(seeds) or not set(names) <= set(variants):
        raise ValueError("plan")
    if any((name and not name.isprintable()) or "/" in name or name.startswith(".") for name in names):
        raise ValueError("name of a variant")
    claims = None if value["claims"] is None else _text(value["claims"])
    return Plan(_text(value["created"]), seeds, names, _natural(value["finished"]), claims)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("text")
    return value


def _natural(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError("number")
    return value
