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
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from harness.errors import VerificationFailed
from harness.format import strict_json
from harness.format.budget import Budget

FORMAT = "harness-ledger/1"
EVIDENCE = ("measured", "documented", "observed", "unknown", "refuted")
"""From what was seen to differ to what was seen not to."""
SUSPECTED = ("measured", "documented", "observed")
"""Those that say that an operator has no fixed order."""
MODES = ("off", "warn", "strict")
MAX_ROWS = 100_000

Record = TypeVar("Record")

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


AGAIN = ("same bits", "other bits", "finite", "elsewhere", "not executed")
"""What a rank's second execution of an update gave that was not finite: that again, with the losses it had or
with others; finite numbers; finite numbers on this rank and not on another; or none was made."""


COMPILED, COLLECTIVE = "compiled region", "collective"
UNSEEN = (COMPILED, COLLECTIVE)
"""What stands in place of an operator when none that could be seen has made a value that is not finite."""


@dataclass(frozen=True)
class NonFinite:
    """A loss or gradient norm that was not finite, and what a rank's second execution has shown."""

    step: int
    what: str
    """``the loss of step 9 is nan``."""
    rank: int
    again: str
    """One of `AGAIN`."""
    micro_batch: int | None
    """Of the rank's, from 0, in which it came back, or that was looked at."""
    op: str | None
    """The first operator that returned it out of finite arguments or, when it did not come back, the one that
    does not repeat its bits; None when neither was found."""
    module: str | None
    call_site: str | None
    source: str
    """How that is known, or why nothing is."""

    @property
    def place(self) -> str | None:
        """``aten.log in `head` at model.py:12 forward``."""
        if self.op is None:
            return None
        inside = "" if self.module is None else f" in `{self.module}`"
        return f"{self.op}{inside}" + ("" if self.call_site is None else f" at {self.call_site}")

    @property
    def told(self) -> str:
        """What the second execution has shown, in one sentence."""
        where = "" if self.micro_batch is None else f" in micro-batch {self.micro_batch} of rank {self.rank}"
        if self.again == "not executed":
            return f"not executed again: {self.source}"
        if self.again == "elsewhere":
            return f"executed again on rank {self.rank} it did not begin there: {self.source}"
        if self.again == "finite":
            but = "" if self.place is None else f"{self.place} does not repeat its bits: "
            return f"executed again{where} it did not come back: {but}{self.source}"
        bits = "the same bits" if self.again == "same bits" else self.again
        place = "" if self.place is None else f" from {self.place}"
        return f"executed again{where} it came back with {bits}{place}: {self.source}"

    @property
    def remedy(self) -> str:
        """What to do next."""
        if self.op is not None and ("uninitialised" in self.source or self.again == "finite"):
            return (
                "repair it, or use what `harness kernels` there names instead; then the same command goes on"
            )
        if self.op is not None:
            return "look at what it is given; lower optimizer.lr or change the data, in a new run.dir"
        return "look there; lower optimizer.lr or change the data, in a new run.dir"


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
        ledger = _record(cls, value, where)
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


def foremost(found: Sequence[NonFinite]) -> list[NonFinite]:
    """Those of the ranks on which the value began, at an operator that was seen if there is one."""
    here = [each for each in found if each.again != "elsewhere"]
    named = [each for each in here if each.op is not None]
    seen = [each for each in named if each.op not in UNSEEN]
    return seen or named or here or list(found)


def merge(ledgers: Sequence[Ledger]) -> Ledger:
    """One ledger of several ranks or launches: counts add up, step ranges and sets unite.

    Modes and catalogues are those of the last ledger, which is the newest launch.
    """
    return Ledger(
        mode=ledgers[-1].mode,
        rows=merge_rows(row for ledger in ledgers for row in ledger.rows),
        mitigated=_merge_mitigated(entry for ledger in ledgers for entry in ledger.mitigated),
        unclassified=tuple(sorted({name for ledger in ledgers for name in ledger.unclassified})),
        compiled_regions=max(ledger.compiled_regions for ledger in ledgers),
        unreadable=max(ledger.unreadable for ledger in ledgers),
        sources=_merge_sources(source for ledger in ledgers for source in ledger.sources),
        catalogue=next((entry.catalogue for entry in reversed(ledgers) if entry.catalogue), None),
        coverage=merge_coverage(entry for ledger in ledgers for entry in ledger.coverage),
        budget=next((entry.budget for entry in reversed(ledgers) if entry.budget), None),
        not_executed_twice=tuple(sorted({why for each in ledgers for why in each.not_executed_twice})),
        nonfinite=tuple(
            sorted({one for each in ledgers for one in each.nonfinite}, key=lambda one: one.rank)
        ),
    )


def unite(ranks: Sequence[Ledger]) -> Ledger:
    """One ledger of ranks that look at the same steps: as `merge`, but a step that all of them looked at is
    one step. The first rank's counts go back to earlier launches."""
    merged = merge(ranks)
    steps = {
        name: max(each.steps for ledger in ranks for each in ledger.coverage if each.observer == name)
        for name in {each.observer for each in merged.coverage}
    }
    coverage = tuple(dataclasses.replace(each, steps=steps[each.observer]) for each in merged.coverage)
    return dataclasses.replace(merged, coverage=coverage, budget=_widest(ranks))


def _widest(ranks: Sequence[Ledger]) -> Budget | None:
    """The budget of the rank that has spent most."""
    budgets = [each.budget for each in ranks if each.budget is not None]
    return max(budgets, key=lambda budget: budget.spent, default=None)


def merge_rows(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows of the same finding added up, sorted. An operator that was measured to differ is not refuted."""
    merged: dict[tuple[str, ...], Row] = {}
    for row in rows:
        known = merged.get(row.key)
        merged[row.key] = row if known is None else _add(known, row)
    differ = {row.op for row in merged.values() if row.evidence == "measured"}
    chosen = (merged[key] for key in sorted(merged))
    return tuple(row for row in chosen if row.evidence != "refuted" or row.op not in differ)


def merge_coverage(entries: Iterable[Coverage]) -> tuple[Coverage, ...]:
    """Coverage of the same observer added up, sorted by observer."""
    merged: dict[str, Coverage] = {}
    for entry in entries:
        known = merged.get(entry.observer)
        merged[entry.observer] = entry if known is None else _widen(known, entry)
    return tuple(merged[name] for name in sorted(merged))


def _add(one: Row, other: Row) -> Row:
    return dataclasses.replace(
        one,
        count=one.count + other.count,
        first_step=min(one.first_step, other.first_step),
        last_step=max(one.last_step, other.last_step),
        ulp=max((each for each in (one.ulp, other.ulp) if each is not None), default=None),
    )


def _widen(one: Coverage, other: Coverage) -> Coverage:
    return Coverage(
        observer=one.observer,
        steps=one.steps + other.steps,
        first_step=min(one.first_step, other.first_step),
        last_step=max(one.last_step, other.last_step),
        ranks=tuple(sorted({*one.ranks, *other.ranks})),
        items=max(one.items, other.items),
        microseconds=one.microseconds + other.microseconds,
    )


def _merge_mitigated(entries: Iterable[Mitigated]) -> tuple[Mitigated, ...]:
    counts: dict[tuple[str, str, str], int] = {}
    for entry in entries:
        key = (entry.op, entry.device, entry.by)
        counts[key] = counts.get(key, 0) + entry.count
    return tuple(Mitigated(*key, counts[key]) for key in sorted(counts))


def _merge_sources(sources: Iterable[Source]) -> tuple[Source, ...]:
    return tuple(sorted(set(sources), key=lambda source: (source.sha256, source.atomics)))


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


_hints: dict[type, Mapping[str, Any]] = {}
"""Names and types of the fields of a class, worked out once."""


def _record(kind: type[Record], value: Any, where: str) -> Record:
    """A ``kind`` from a JSON object that has exactly its fields, each of its type.

    Fields of a later version, those of `_LATER`, may be absent.
    """
    if not isinstance(value, Mapping):
        raise VerificationFailed(f"`{kind.__name__.lower()}` is not an object", where=where)
    hints = _hints.get(kind) or _hints.setdefault(kind, get_type_hints(kind))
    odd_ones = set(value) ^ (set(hints) - (_LATER - set(value)))
    if odd_ones:
        odd = ", ".join(sorted(odd_ones))[:200]
        raise VerificationFailed(
            f"missing or unknown fields in `{kind.__name__.lower()}`: {odd}", where=where
        )
    given = {name: hint for name, hint in hints.items() if name in value}
    return kind(**{name: _value(hint, value[name], f"{where} {name}") for name, hint in given.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        inner = next(argument for argument in get_args(hint) if argument is not type(None))
        return None if value is None else _value(inner, value, where)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise VerificationFailed("not a list", where=where)
        return tuple(_value(get_args(hint)[0], item, where) for item in value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _record(hint, value, where)
    check = _CHECKS[hint]
    if not check(value):
        raise VerificationFailed(f"not a {'count' if hint is int else 'text'}", where=where)
    return value


_CHECKS: Mapping[type, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str),
    int: lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
}
