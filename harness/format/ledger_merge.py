"""Ledgers of several ranks or launches as one (`harness.format.ledger`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from harness.format.budget import Budget
from harness.format.ledger import Coverage, Ledger, Mitigated, Row, Source


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
        coverage=_merge_coverage(entry for ledger in ledgers for entry in ledger.coverage),
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


def unite_files(ranks: Iterable[bytes]) -> bytes:
    """One `ledger.json` of those of several ranks, as `unite` makes it. Raises `VerificationFailed`."""
    return unite([Ledger.parse(data, f"ledger of rank {rank}") for rank, data in enumerate(ranks)]).to_bytes()


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


def _merge_coverage(entries: Iterable[Coverage]) -> tuple[Coverage, ...]:
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
