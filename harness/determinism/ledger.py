"""The nondeterminism ledger of a training process: what ran, how it was seen, and what was not looked at.

    ledger = Ledger(mode="warn", census_every=50, rank=0, device=torch.device("cpu"))
    with ledger.observe(step):          # forward, backward and optimizer of an update
        loss = ...
        ledger.walk(loss)               # before backward; does nothing on a step that is not due
        loss.backward()
    ledger.scan(step)                   # after the first step and at each save
    payload = ledger.to_bytes()         # ledger.json of a checkpoint

- Nothing that the ledger does changes a bit of the run: no `warn_only`, no operator executed twice, compiled
  regions stay compiled (`harness.determinism.census`).
- A step is due when it is the first of a launch, and when its number is a multiple of ``census_every``: the
  same steps whether or not the run was interrupted.
- ``strict`` makes operators of the list deterministic; those are counted as mitigated and are no rows.
- Mode ``off`` looks at nothing, and the document says so: it has no coverage.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor

from harness.determinism import census, codegen, graph, kernels
from harness.determinism.catalogue import catalogue
from harness.determinism.double import Checked
from harness.determinism.rows import (
    census_row,
    code_row,
    kernel_rows,
    measured_row,
    refuted_row,
    unknown_row,
    unseen_gradients,
)
from harness.determinism.settings import Mode
from harness.format import ledger as document
from harness.format.budget import Budget
from harness.format.ledger import Catalogue, Coverage, Mitigated, Row, Source
from harness.format.ledger_merge import merge, merge_rows
from harness.format.nonfinite import NonFinite

_NEVER = sys.maxsize
_IDLE: AbstractContextManager[None] = nullcontext()
_STRICT_SETTING = "determinism.mode=strict"
_REFUTABLE = ("documented", "observed", "unknown")


class Ledger:
    """Collects findings over the steps of one launch, on top of those of the launches before it.

    ``census_every`` counts optimizer steps; ``device`` is the one that the model trains on. `load` before the
    first step continues the counts of a checkpoint; only one rank of a run should, or its past counts twice.
    """

    def __init__(self, mode: Mode, census_every: int, rank: int, device: torch.device) -> None:
        self._mode: Mode = mode
        self._every = census_every
        self._rank = rank
        self._device = device
        self._next_step = _NEVER if mode == "off" else -1
        self._wanted = True
        self._profiled = False
        self._sample: _Sample | None = None
        self._compilations = codegen.compilations()
        self._scanned: dict[str, codegen.Scanned | None] = {}
        self._findings = document.Ledger(mode=mode)
        self.spent_ns = 0
        """What looking has cost in this launch, all of it."""
        self.census_ns = 0
        """What the last census has."""
        self.affords: Callable[[int], bool] = lambda step: True
        """Whether a census in a step is within the budget; the first of a launch and after a recompilation is
        taken anyway."""

    @property
    def looks(self) -> bool:
        """Whether anything is looked at."""
        return self._mode != "off"

    @property
    def compiled(self) -> bool:
        """Whether dynamo has compiled anything since the step that is observed began."""
        return self._mode != "off" and codegen.compilations() != self._compilations

    def look_again(self, step: int) -> None:
        """After update ``step``, in which something was compiled: read it, and take a census of the next."""
        if self._mode != "off":
            self.scan(step)
            self._next_step, self._wanted = step + 1, True

    def observe(self, step: int) -> AbstractContextManager[None]:
        """A context around the forward, backward and optimizer work of update ``step``.

        On a step that is not due it costs two look-ups and a comparison.
        """
        self._compilations = codegen.compilations()
        if step < self._next_step:
            return _IDLE
        return self._observe(step)

    def _observe(self, step: int) -> AbstractContextManager[None]:
        self._next_step = step + self._every - step % self._every
        if not self._wanted and not self.affords(step):
            return _IDLE
        self._wanted = False
        catalogue(), census.way_ns(1)  # made outside of the step that is timed
        return _Sample(self, step, self._recorder())

    def _recorder(self) -> kernels.KernelRecorder | None:
        """The profiler for the first due step of a launch on CUDA: it costs a third of a second."""
        if self._profiled or self._device.type != "cuda" or not kernels.available():
            return None
        self._profiled = True
        return kernels.KernelRecorder()

    def walk(self, loss: Tensor) -> None:
        """Look at the autograd graph of ``loss`` when the step is due; call it before the backward pass.

        Only the first loss of a step is walked: the others have the same graph.
        """
        if self._sample is not None:
            self._sample.walk(loss)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around work inside of `observe` that is no part of the step: it is not counted."""
        sample = self._sample
        if sample is None:
            yield
            return
        sample.census.paused = True
        try:
            yield
        finally:
            sample.census.paused = False

    def scan(self, step: int) -> None:
        """Read the code that inductor has generated so far; new files only."""
        if self._mode != "off":
            with self._spending():
                self._scan(step)

    def _scan(self, step: int) -> None:
        started = perf_counter_ns()
        modules = codegen.loaded_modules()
        rows: list[Row] = []
        for module in modules:
            name = module.__file__ or module.__name__
            new = name not in self._scanned
            scanned = self._scanned.setdefault(name, codegen.scan_module(module) if new else None)
            if scanned is not None:
                rows += [code_row(finding, step, counted=new) for finding in scanned.findings]
        files = [scanned for scanned in self._scanned.values() if scanned is not None]
        self._add(
            rows=rows,
            sources=tuple(Source(scanned.sha256, scanned.atomics) for scanned in files),
            unreadable=len(self._scanned) - len(files),
            coverage=(self._covered("codegen", step, len(modules), perf_counter_ns() - started),),
        )

    def doubled(self, step: int, checked: Checked) -> None:
        """Add what a double execution in update ``step`` has shown."""
        self.spent_ns += checked.nanoseconds
        with self._spending():
            if checked.refused:
                self._add(rows=[], not_executed_twice=checked.refused)
                return
            named = self._suspected() if checked.clean else {}
            self._add(
                rows=[
                    *(measured_row(each, step) for each in checked.differences),
                    *(refuted_row(named[op], step) for op in sorted(checked.operators & named.keys())),
                ],
                coverage=(self._covered("double", step, checked.tensors, checked.nanoseconds),),
            )

    def _suspected(self) -> dict[str, Row]:
        """A row of each operator that something speaks against, or that nobody knows."""
        return {row.op: row for row in self._findings.rows if row.evidence in _REFUTABLE}

    def ended(self, found: NonFinite) -> None:
        """What executing the update again has shown that was not finite; the run ends with it."""
        self._add(rows=[], nonfinite=(found,))

    def budgeted(self, budget: Budget) -> None:
        """What looking may cost, and has cost."""
        self._findings = replace(self._findings, budget=budget)

    def rows(self) -> tuple[Row, ...]:
        """Every finding so far, sorted."""
        return self._findings.rows

    def coverage(self) -> dict[str, str | int | bool]:
        """What was looked at so far, as a statement says it; ``observed`` is False when nothing was."""
        return document.flat_coverage(self._findings)

    def to_bytes(self) -> bytes:
        """The `ledger.json` of a checkpoint."""
        with self._spending():
            return self._findings.to_bytes()

    def load(self, data: bytes) -> None:
        """Continue an earlier launch's counts; raises `VerificationFailed` when ``data`` is no ledger."""
        earlier = document.Ledger.parse(data, "ledger.json")
        self._findings = merge([earlier, self._findings])

    def _keep(self, sample: _Sample) -> None:
        """Add what a sampled step showed."""
        step, taken, walked = sample.step, sample.census, sample.walked
        found = [*taken.findings.items(), *unseen_gradients(walked, taken)]
        mitigated = [
            finding for finding, _ in found if self._mode == "strict" and _made_deterministic(finding)
        ]
        self._add(
            rows=[
                *(census_row(finding, count, step) for finding, count in found if finding not in mitigated),
                *kernel_rows(sample.kernels, self._device, step),
                *(
                    unknown_row(name, self._device, step)
                    for name in sorted({*taken.unclassified, *walked.custom_functions})
                ),
            ],
            mitigated=tuple(
                Mitigated(finding.op, finding.device, _STRICT_SETTING, count)
                for finding, count in found
                if finding in mitigated
            ),
            unclassified=(*taken.unclassified, *walked.custom_functions),
            compiled_regions=walked.compiled_regions,
            coverage=self._sample_coverage(sample),
        )

    def _sample_coverage(self, sample: _Sample) -> tuple[Coverage, ...]:
        step, taken = sample.step, sample.census
        looked = [self._covered("census", step, taken.operators, sample.census_ns)]
        if sample.walked.nodes:
            looked.append(self._covered("graph", step, sample.walked.nodes, sample.walk_ns))
        if sample.recorder is not None:
            looked.append(self._covered("profiler", step, sum(sample.kernels.values()), sample.profiler_ns))
        return tuple(looked)

    @contextmanager
    def _spending(self) -> Iterator[None]:
        """Work of the ledger's own."""
        started = perf_counter_ns()
        try:
            yield
        finally:
            self.spent_ns += perf_counter_ns() - started

    def _covered(self, observer: str, step: int, items: int, nanoseconds: int) -> Coverage:
        return Coverage(observer, 1, step, step, (self._rank,), items, nanoseconds // 1000)

    def _add(self, *, rows: Iterable[Row], **found: Any) -> None:
        """Merge findings into those so far; ``found`` are further fields of the document."""
        known = catalogue()
        news = document.Ledger(
            mode=self._mode,
            rows=merge_rows(rows),
            catalogue=Catalogue(
                known.sha256, known.torch, known.count("documented"), known.count("observed")
            ),
            **found,
        )
        self._findings = merge([self._findings, news])


class _Sample(AbstractContextManager[None]):
    """A step that is looked at."""

    def __init__(self, ledger: Ledger, step: int, recorder: kernels.KernelRecorder | None) -> None:
        self.step = step
        self.census = census.take_census()
        self.walked = graph.Walked()
        self.walk_ns = 0
        self.kernels: dict[str, int] = {}
        self.recorder = recorder
        self.profiler_ns = 0
        self._ledger = ledger

    @property
    def census_ns(self) -> int:
        """What the census has cost, the way to it included."""
        return self.census.nanoseconds + census.way_ns(self.census.operators)

    def walk(self, loss: Tensor) -> None:
        """Walk the graph of the first loss."""
        if not self.walked.nodes:
            started = perf_counter_ns()
            self.walked = graph.walk(loss)
            self.walk_ns = perf_counter_ns() - started

    def __enter__(self) -> None:
        self._ledger._sample = self
        if self.recorder is not None:
            started = perf_counter_ns()
            if not self.recorder.start():
                self.recorder = None
            self.profiler_ns = perf_counter_ns() - started
        self.census.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self.census.__exit__(*error)  # type: ignore[no-untyped-call]
        self._ledger._sample = None
        if self.recorder is not None:
            started = perf_counter_ns()
            self.kernels = self.recorder.stop()
            self.profiler_ns += perf_counter_ns() - started
        before = self._ledger.spent_ns
        self._ledger.spent_ns += self.census_ns + self.walk_ns + self.profiler_ns
        with self._ledger._spending():
            self._ledger._keep(self)
        self._ledger.census_ns = self._ledger.spent_ns - before


def _made_deterministic(finding: census.Finding) -> bool:
    return finding.entry.strict == "deterministic"
