"""Rows of the ledger, of what each observer has found."""

from __future__ import annotations

from dataclasses import replace

import torch

from harness.determinism import census, codegen, graph, kernels
from harness.determinism.catalogue import STRICT, Entry, catalogue
from harness.determinism.double import Difference
from harness.format.ledger import Row

_ATOMICS = "atomic additions in code that inductor generated"
_TUNING = "inductor chooses the launch of this reduction by timing it, which may end otherwise each time"


def unseen_gradients(walked: graph.Walked, taken: census.Census) -> list[tuple[census.Finding, int]]:
    """Gradients of the graph that the census did not see run: a backward pass outside of the context."""
    seen = {finding.op for finding in taken.findings}
    unseen = []
    for (operator, device, dtype), count in walked.gradients.items():
        entry = _gradient_entry(operator, device)
        if entry is not None and census.spelled(operator) not in seen:
            unseen.append((census.Finding(census.spelled(operator), device, dtype, None, entry), count))
    return unseen


def census_row(finding: census.Finding, count: int, step: int) -> Row:
    """A finding of the census."""
    entry = finding.entry
    return Row(
        op=finding.op,
        kernel=None,
        backend="eager",
        device=finding.device,
        dtype=finding.dtype,
        call_site=finding.call_site,
        evidence=entry.evidence,
        count=count,
        first_step=step,
        last_step=step,
        alternative=entry.alternative,
        source=f"{entry.source}: {entry.name}",
    )


def code_row(finding: codegen.Finding, step: int, *, counted: bool) -> Row:
    """A row of generated code; a file that was counted before only moves the row's last step."""
    return Row(
        op=finding.op,
        kernel=finding.kernel,
        backend="inductor",
        device=finding.device,
        dtype=finding.dtype,
        call_site=None,
        evidence="observed",
        count=finding.places if counted else 0,
        first_step=step,
        last_step=step,
        alternative=STRICT if finding.tuned or finding.op.startswith("aten.") else None,
        source=_TUNING if finding.tuned else _ATOMICS,
    )


def unknown_row(name: str, device: torch.device, step: int) -> Row:
    """An operator that no list knows."""
    return Row(
        op=name,
        kernel=None,
        backend="eager",
        device=device.type,
        dtype="unknown",
        call_site=None,
        evidence="unknown",
        count=1,
        first_step=step,
        last_step=step,
        alternative=None,
        source="no list says anything about it",
    )


def measured_row(difference: Difference, step: int) -> Row:
    """What a double execution has found to differ."""
    return Row(
        op=difference.op,
        kernel=None,
        backend="eager",
        device=difference.device,
        dtype=difference.dtype,
        call_site=difference.call_site,
        evidence="measured",
        count=1,
        first_step=step,
        last_step=step,
        alternative=difference.alternative or _alternative(difference),
        source=difference.source,
        module=difference.module,
        ulp=difference.ulp,
    )


def refuted_row(suspected: Row, step: int) -> Row:
    """One clean double execution of an operator that ``suspected`` is about."""
    return replace(
        suspected,
        kernel=None,
        call_site=None,
        evidence="refuted",
        count=1,
        first_step=step,
        last_step=step,
        source="double execution: all results had the same bits",
        module=None,
        ulp=None,
    )


def kernel_rows(counts: dict[str, int], device: torch.device, step: int) -> list[Row]:
    """Kernels that the profiler has seen and that are known to have no fixed order; ``counts``: by name."""
    known = [(name, count, kernels.known_kernel(name)) for name, count in counts.items()]
    return [
        Row(
            op=family.op,
            kernel=name,
            backend=device.type,
            device=device.type,
            dtype="unknown",
            call_site=None,
            evidence="observed",
            count=count,
            first_step=step,
            last_step=step,
            alternative=family.alternative,
            source=kernels.PROFILER,
        )
        for name, count, family in known
        if family is not None
    ]


def _gradient_entry(operator: str, device: str) -> Entry | None:
    """The entry of an operator in the backward pass on a device, if it needs no look at the arguments."""
    wanted = {"any", "cpu" if device == "cpu" else "cuda"}
    entries = catalogue().find(operator)
    return next((entry for entry in entries if entry.device in wanted and entry.condition is None), None)


def _alternative(difference: Difference) -> str | None:
    found = _gradient_entry(difference.op, difference.device)
    return None if found is None else found.alternative
