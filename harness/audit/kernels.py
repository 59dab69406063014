"""The nondeterminism ledger for a reader: rows to act on, and what nobody looked at.

Pure: a parsed ledger in, text or plain JSON values out.

- A ledger that no observer filled reads "not observed", never "deterministic".
- What was not looked at is said in every case: steps, ranks, compiled regions, double execution.

Example::

    >>> from harness.format.ledger import Ledger
    >>> not_looked_at(Ledger(mode="off"))[0]
    'not observed: no observer looked at any step (determinism.mode off)'
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from harness.errors import visible
from harness.format.ledger import EVIDENCE, SUSPECTED, Coverage, Ledger, Row
from harness.format.nonfinite import foremost
from harness.words import counted, listed

_SHOWN_NAMES = 8
_ITEMS = {
    "census": "operator call",
    "codegen": "generated file",
    "graph": "graph node",
    "profiler": "kernel call",
    "double": "compared tensor",
}
_MEANING = {
    "measured": "executed twice from the same state with different bits",
    "documented": "on the framework's list of nondeterministic operations, and ran",
    "observed": "known to add in no fixed order, and seen by sampling",
    "unknown": "ran, and no list says anything about it",
    "refuted": "suspected above, and the same bits in every double execution so far",
}


def document(ledger: Ledger) -> dict[str, Any]:
    """The ledger as plain JSON values, with what was not looked at."""
    return {
        **dataclasses.asdict(ledger),
        "observed_anything": ledger.observed_anything,
        "over_budget": None if ledger.budget is None else ledger.budget.reason,
        "not_looked_at": not_looked_at(ledger),
    }


def render(ledger: Ledger) -> str:
    """The ledger as text for a terminal; names come from strangers, so control characters are escaped."""
    return "\n".join(map(visible, _lines(ledger)))


def not_looked_at(ledger: Ledger) -> list[str]:
    """Every gap of the coverage, one line each."""
    return list(_gaps(ledger, {entry.observer: entry for entry in ledger.coverage}))


def _gaps(ledger: Ledger, coverage: dict[str, Coverage]) -> Iterator[str]:
    if not ledger.observed_anything:
        yield f"not observed: no observer looked at any step (determinism.mode {ledger.mode})"
        return
    census = coverage.get("census")
    if census is None:
        yield "operators: no census was taken"
    else:
        took = f"{counted(census.steps, 'step')} between {census.first_step} and {census.last_step}"
        took = f"step {census.first_step}" if census.first_step == census.last_step else took
        yield (
            f"operators: the census took {took} on {_ranks(census)}; other steps and ranks were not looked at"
        )
    if ledger.catalogue is not None and not ledger.catalogue.documented:
        yield "documented operators: torch's list, a docstring, was not there (python -OO drops it)"
    if ledger.compiled_regions:
        yield _compiled_gap(ledger, coverage.get("codegen"))
    if ledger.unreadable:
        yield f"generated code: {counted(ledger.unreadable, 'file')} could not be read"
    if ledger.unclassified:
        yield f"no list says anything about {listed(ledger.unclassified, _SHOWN_NAMES)}"
    if any(row.device not in ("cpu", "meta") for row in ledger.rows) and "profiler" not in coverage:
        yield "kernel names: the profiler did not run"
    yield _double_gap(ledger, coverage.get("double"))


def _double_gap(ledger: Ledger, double: Coverage | None) -> str:
    if double is None:
        why = "; ".join(ledger.not_executed_twice) or "no micro-step was executed twice"
        return f"double execution: {why}, so differences of bits were not looked for"
    pairs = f"{counted(double.steps, 'micro-step')} executed twice on {_ranks(double)}"
    if double.steps <= 3:
        return f"double execution: {pairs}, too few to say how often bits differ"
    return f"double execution: {pairs}; what differs in fewer than {_bound(double.steps)} was likely missed"


def _bound(clean: int) -> str:
    """Largest rate, with 95 % confidence, of what ``clean`` executions did not show: the rule of three."""
    return f"{min(1.0, 3 / clean):.2g} of all"


def _compiled_gap(ledger: Ledger, codegen: Coverage | None) -> str:
    regions = counted(ledger.compiled_regions, "compiled region")
    if codegen is None or not codegen.items:
        return f"{regions}: their generated code was not read"
    return (
        f"{regions}: seen through library calls and {counted(codegen.items, 'file')} of generated code only"
    )


def _lines(ledger: Ledger) -> Iterator[str]:
    yield _headline(ledger)
    for kind in EVIDENCE:
        rows = [row for row in ledger.rows if row.evidence == kind]
        if rows:
            yield ""
            yield f"{kind}: {_MEANING[kind]}"
            for row in rows:
                yield from _row(row)
    if ledger.nonfinite:
        yield ""
        yield f"the run ended: {ledger.nonfinite[0].what}"
        yield from (f"  rank {each.rank}: {each.told}" for each in ledger.nonfinite)
        yield f"  next: {foremost(ledger.nonfinite)[0].remedy}"
    if ledger.mitigated:
        yield ""
        yield "made deterministic by a setting"
        for entry in ledger.mitigated:
            yield f"  {entry.op}  {entry.device}  {entry.by}  seen {counted(entry.count, 'time')}"
    yield ""
    yield "looked at"
    yield from (_coverage(entry) for entry in ledger.coverage)
    if not ledger.coverage:
        yield "  nothing"
    if ledger.budget is not None:
        yield f"  {ledger.budget.words}"
        if ledger.budget.reason is not None:
            yield f"  {ledger.budget.reason}"
    yield "not looked at"
    yield from (f"  {gap}" for gap in not_looked_at(ledger))


def _headline(ledger: Ledger) -> str:
    if not ledger.observed_anything:
        return "not observed"
    if not ledger.rows:
        return "no order-dependent operator or kernel was seen, as far as the coverage below reaches"
    counts = ", ".join(
        f"{sum(row.evidence == kind for row in ledger.rows)} {kind}"
        for kind in EVIDENCE
        if _has(ledger, kind)
    )
    suspected = sum(row.evidence in SUSPECTED for row in ledger.rows)
    return f"{counted(suspected, 'order-dependent operator')}: {counts}"


def _has(ledger: Ledger, kind: str) -> bool:
    return any(row.evidence == kind for row in ledger.rows)


def _row(row: Row) -> Iterator[str]:
    place = f"  {row.call_site}" if row.call_site else ""
    yield f"  {row.op}  {row.backend} {row.device} {row.dtype}{place}"
    if row.kernel:
        yield f"      kernel   {row.kernel}"
    if row.module:
        yield f"      in       {row.module}"
    steps = _steps(row)
    if row.evidence == "refuted":
        rate = f"differs in at most {_bound(row.count)} (95 %)"
        yield f"      clean    {counted(row.count, 'time')}, {steps}: {rate}"
        return
    far = "" if row.ulp is None else f", by up to {counted(row.ulp, 'unit')} in the last place"
    yield f"      seen     {counted(row.count, 'time')}, {steps}{far}"
    yield f"      source   {row.source}"
    yield f"      instead  {row.alternative or 'nothing known'}"


def _coverage(entry: Coverage) -> str:
    seen = counted(entry.items, _ITEMS.get(entry.observer, "item"))
    return (
        f"  {entry.observer}: {counted(entry.steps, 'time')}, {_steps(entry)}, "
        f"{_ranks(entry)}, at most {seen} at a time, {entry.microseconds} µs of its own"
    )


def _steps(entry: Row | Coverage) -> str:
    if entry.first_step == entry.last_step:
        return f"step {entry.first_step}"
    return f"steps {entry.first_step} to {entry.last_step}"


def _ranks(entry: Coverage) -> str:
    return f"rank{'s' * (len(entry.ranks) != 1)} {', '.join(str(rank) for rank in entry.ranks)}"
