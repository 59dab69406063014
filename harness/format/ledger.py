"""The document `ledger.json`: which order-dependent kernels a run was seen to use, and what was looked at.

Strict JSON without floats. Evidence kinds are kept apart:

- ``documented``: an operator of the framework's own list of nondeterministic operations ran.
- ``observed``: a kernel or backend known to be order-dependent ran, seen by sampling.
- ``measured``: the same micro-step was executed twice from the same state and bits differed; ``count`` pairs.
- ``refuted``: an operator that one of the rows above or below is about came out alike in ``count`` double
  executions; it differs in at most 3/count of all, with 95 % confidence (the rule of three).
- ``unknown``: an operator that no list says anything about ran.

``nonfinite`` is in the ledger of a run that ended at a loss or gradient norm which was not finite: what came
of executing that update again, on each rank, and where the value began.

A document without rows says "deterministic" only as far as its ``coverage`` reaches; without coverage it
says nothing. Counts are what the observers saw, not what the run executed: a census looks at one step in
many, a scan of generated code counts places in the code.

Example::

    >>> Ledger(mode="warn").observed_anything
    False
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import Any

from harness.errors import VerificationFailed
from harness.format import records, strict_json
from harness.format.budget import Budget
from harness.format.nonfinite import AGAIN, NonFinite, foremost

FORMAT = "harness-ledger/1"
EVIDENCE = ("measured", "documented", "observed", "unknown", "refuted")
"""From what was seen to differ to what was seen not to."""
SUSPECTED = ("measured", "documented", "observed")
"""Those that say that an operator has no fixed order."""
MODES = ("off", "warn", "strict")
MAX_ROWS = 100_000

_LATER = frozenset({"module", "ulp", "budget", "digests", "not_executed_twice", "nonfinite"})


@dataclass(frozen=True)
class Row:
    """One finding. Steps are optimizer steps; ``count`` is the number of sightings."""

    op: str
    """Operator (`aten.index_put`), collective (`c10d.allreduce_`) or autograd node."""
    kernel: str | None
    """Name of the kernel, where an observer sees kernels."""
    backend: str
    """`eager`, `inductor`, `autograd`, `cuda` (the profiler) …"""
    device: str
    dtype: str
    call_site: str | None
    """`module:line function`, with `(backward)` when the gradient of that call is meant."""
    evidence: str
    count: int
    first_step: int
    last_step: int
    alternative: str | None
    """What to use instead."""
    source: str
    """Who says that it is nondeterministic."""
    module: str | None = None
    """Name of the module that called it, or of the parameter whose gradient it is; of measured rows."""
    ulp: int | None = None
    """Largest difference that was measured, in units in the last place; of measured rows."""

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows the same finding: everything but count and steps."""
        shown = dataclasses.replace(self, count=0, first_step=0, last_step=0, ulp=None)
        return tuple(str(value) for value in dataclasses.astuple(shown))


@dataclass(frozen=True)
class Mitigated:
    """An operator of the list that a setting made deterministic, so that it is no row."""

    op: str
    device: str
    by: str
    count: int


@dataclass(frozen=True)
class Source:
    """A file of generated code: sha256 of its text, and how many atomic additions it holds."""

    sha256: str
    atomics: int


@dataclass(frozen=True)
class Coverage:
    """What one observer looked at: ``steps`` times, between two steps, on which ranks, at what own cost."""

    observer: str
    steps: int
    first_step: int
    last_step: int
    ranks: tuple[int, ...]
    items: int
    """Operators, graph nodes, generated files or kernels seen."""
    microseconds: int


@dataclass(frozen=True)
class Catalogue:
    """Which list of nondeterministic operators was used: its digest and its sizes."""

    sha256: str
    torch: str
    documented: int
    curated: int


@dataclass(frozen=True)
class Ledger:
    """The whole document."""

    mode: str
    rows: tuple[Row, ...] = ()
    mitigated: tuple[Mitigated, ...] = ()
    unclassified: tuple[str, ...] = ()
    """Operators that no list says anything about: custom operators, custom autograd functions."""
    compiled_regions: int = 0
    """Most compiled graphs seen in one step; a census sees only the library calls inside them."""
    unreadable: int = 0
    """Generated sources that were loaded and could not be read."""
    sources: tuple[Source, ...] = ()
    catalogue: Catalogue | None = None
    coverage: tuple[Coverage, ...] = field(default=())
    budget: Budget | None = None
    """None when nothing limits what looking costs."""
    not_executed_twice: tuple[str, ...] = ()
    """Why no micro-step could be executed twice."""
    nonfinite: tuple[NonFinite, ...] = ()
    """Of each rank, when the run ended at a value that was not finite."""

    @property
    def observed_anything(self) -> bool:
        """Whether any observer looked at anything; a scan that found no generated code did not."""
        return any(entry.steps and entry.items for entry in self.coverage)

    def to_bytes(self) -> bytes:
        """The file's bytes: strict JSON, the same for the same findings."""
        return strict_json.dumps({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def parse(cls, data: bytes, where: str) -> Ledger:
        """Read ``data``; raises `VerificationFailed` naming ``where`` when it is not such a document."""
        value = strict_json.loads(data, where=where)
        if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
            raise VerificationFailed(f"not a `{FORMAT}` document", where=where)
        ledger = records.read(cls, value, where, _LATER)
        _check(ledger, where)
        return ledger


def summary(data: bytes, where: str = "ledger.json") -> dict[str, Any]:
    """What a checkpoint statement says of a ledger: digest, number of rows of each kind, flat coverage."""
    return {"sha256": hashlib.sha256(data).hexdigest(), **counts(Ledger.parse(data, where))}


def counts(ledger: Ledger) -> dict[str, Any]:
    """Number of rows, in all and of each kind, and flat coverage."""
    kinds = {kind: sum(row.evidence == kind for row in ledger.rows) for kind in EVIDENCE}
    return {"rows": len(ledger.rows), **kinds, "coverage": flat_coverage(ledger)}


def flat_coverage(ledger: Ledger) -> dict[str, str | int | bool]:
    """Coverage in one level: ``census_steps``, ``census_microseconds`` …; ``observed`` says whether any."""
    flat: dict[str, str | int | bool] = {
        "observed": ledger.observed_anything,
        "compiled_regions": ledger.compiled_regions,
        "unclassified_operators": len(ledger.unclassified),
        "unreadable_sources": ledger.unreadable,
    }
    if ledger.catalogue is not None:
        flat["catalogue_sha256"] = ledger.catalogue.sha256
    if ledger.budget is not None:
        flat |= {"budget_limit_ppm": ledger.budget.limit, "budget_spent_ppm": ledger.budget.spent}
        if ledger.budget.digests is not None:
            flat["budget_digests_ppm"] = ledger.budget.digests
    if ledger.not_executed_twice:
        flat["not_executed_twice"] = "; ".join(ledger.not_executed_twice)
    if ledger.nonfinite:
        flat["nonfinite"] = "; ".join(f"{each.what}; {each.told}" for each in foremost(ledger.nonfinite))
    for entry in ledger.coverage:
        flat[f"{entry.observer}_steps"] = entry.steps
        flat[f"{entry.observer}_first_step"] = entry.first_step
        flat[f"{entry.observer}_last_step"] = entry.last_step
        flat[f"{entry.observer}_items"] = entry.items
        flat[f"{entry.observer}_microseconds"] = entry.microseconds
        flat[f"{entry.observer}_ranks"] = ",".join(str(rank) for rank in entry.ranks)
    return flat


def _check(ledger: Ledger, where: str) -> None:
    if ledger.mode not in MODES:
        raise VerificationFailed(f"unknown determinism mode `{ledger.mode}`", where=where)
    if len(ledger.rows) > MAX_ROWS:
        raise VerificationFailed(f"more than {MAX_ROWS} rows", where=where)
    for row in ledger.rows:
        if row.evidence not in EVIDENCE:
            raise VerificationFailed(f"unknown evidence `{row.evidence}`", where=where)
    for one in ledger.nonfinite:
        if one.again not in AGAIN:
            raise VerificationFailed(f"unknown outcome `{one.again}` of a second execution", where=where)
    for name in [source.sha256 for source in ledger.sources]:
        if len(name) != 64 or set(name) - set("0123456789abcdef"):
            raise VerificationFailed(f"`{name[:80]}` is not a sha256", where=where)
