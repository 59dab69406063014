"""Which runs a sweep has: every seed of every variant, each in a folder of its own.

Example::

    >>> parse_seeds("0..2,7")
    (0, 1, 2, 7)
    >>> [member.name for member in members(Path("runs/tiny-seeds"), (0, 1), BASE)]
    ['seed-0', 'seed-1']
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import config, strict_yaml
from harness.errors import ConfigError, UsageError
from harness.format import layout

BASE: Mapping[str, tuple[str, ...]] = {"": ()}
"""The variants of a sweep that has none: the config as it is."""
MOST_SEEDS = 10_000

_RANGE = re.compile(r"(\d{1,19})(?:\.\.(\d{1,19}))?")
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OWN = ("run.dir", "run.name", "run.seed")
"""Keys that the sweep itself sets."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    """``seed-3``, or ``wide-seed-3`` for the variant ``wide``."""
    variant: str
    seed: int
    folder: Path
    changes: tuple[str, ...]
    """The variant's ``key=value`` overrides."""

    @property
    def overrides(self) -> tuple[str, ...]:
        """What makes the config this member's."""
        folder = strict_yaml.write(str(self.folder)).strip()
        return (*self.changes, f"run.seed={self.seed}", f"run.dir={folder}", "run.name=null")


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds of ``0..4`` (both ends included), ``1,5,9`` or both. Raises `UsageError`."""
    seeds: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise UsageError(f"{part!r} is no seed", where="--seeds", remedy="write 0..4 or 1,5,9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MOST_SEEDS:
            raise UsageError(f"{part!r} is empty or too long", where="--seeds", remedy="write 0..4 or 1,5,9")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"{text!r} names a seed twice", where="--seeds")
    return tuple(seeds)


def parse_variants(given: Sequence[Sequence[str]]) -> Mapping[str, tuple[str, ...]]:
    """Name → overrides of ``--variant NAME key=value …``; `BASE` when there is none. Raises `UsageError`."""
    variants: dict[str, tuple[str, ...]] = {}
    for name, *overrides in given:
        if not _VARIANT.fullmatch(name):
            remedy = "a name of letters, digits, _ . and -, then key=value …"
            raise UsageError(f"{name!r} is no name for a variant", where="--variant", remedy=remedy)
        if name in variants:
            raise UsageError(f"the variant {name} is given twice", where="--variant")
        variants[name] = tuple(overrides)
    if len(set(variants.values())) < len(variants):
        raise UsageError("two variants have the same overrides", where="--variant")
    return variants or BASE


def members(
    folder: Path, seeds: Sequence[int], variants: Mapping[str, Sequence[str]], shared: Sequence[str] = ()
) -> list[Member]:
    """The runs, seed by seed, so that a sweep that is cut short has every variant of the first seeds.

    ``shared``: overrides that all have.
    """
    return [
        Member(name, variant, seed, folder / name, (*shared, *changes))
        for seed in seeds
        for variant, changes in variants.items()
        for name in [f"{variant}-seed-{seed}" if variant else f"seed-{seed}"]
    ]


def resolved(path: Path, member: Member) -> config.Loaded:
    """The config of ``member``. Raises `ConfigError` for one that is wrong or that sets what a sweep sets."""
    for text in member.changes:
        if text.split("=", 1)[0].strip() in _OWN:
            remedy = f"a sweep sets {', '.join(_OWN)} itself; use --seeds and --out"
            raise ConfigError("an override that a sweep cannot have", where=text, remedy=remedy)
    return config.load(path, member.overrides)


def shared_text(loaded: config.Loaded) -> str:
    """The resolved config without what differs from seed to seed: what all seeds of a variant have."""
    run = loaded.settings.run.model_copy(update={"dir": Path("member"), "name": None, "seed": 0})
    return config.resolved_text(loaded.settings.model_copy(update={"run": run}))


def reached(member: Member) -> int:
    """The step of the newest complete checkpoint, by its name; 0 when there is none."""
    complete = layout.RunFolder(member.folder).complete()
    return layout.step_of(complete[-1].name) if complete else 0
