"""``harness replay --floor``: the executions from which `harness.audit.replay.noise_floor` measures a floor.

Perturbations of one process follow each other in it; an instruction set is chosen by variables that libraries
read when they are loaded, so each takes a process of its own. One that changes no bit here does not count.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from typing import Any

from harness.audit.replay import noise_floor
from harness.audit.replay.noise_floor import Execution, Measured, Scale
from harness.audit.replay.segment import Segment
from harness.commands import reexecute
from harness.errors import EvidenceIncomplete, UsageError

ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    "torch's kernels for AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "torch's kernels without vector instructions": {"ATEN_CPU_CAPABILITY": "default"},
    "oneDNN for AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
}
"""Of a processor; each changes bits on one with AVX-512, where the model uses that library."""
_CUDA_ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    "cuBLASLt": {"TORCH_BLAS_PREFER_CUBLASLT": "1"},
    "a small cuBLAS workspace": {"CUBLAS_WORKSPACE_CONFIG": ":16:8"},
}


def check(chosen: Segment) -> None:
    """Raise `UsageError` unless the end of ``chosen`` has tensors to measure a distance to."""
    end = chosen.end
    if chosen.last != end.statement.step_to:
        raise UsageError(
            f"--floor measures at checkpoints, and step {chosen.last} has none",
            where=str(chosen.run.root),
            remedy=f"use --to {end.statement.step_to}",
        )
    if end.kind != "complete":
        raise UsageError(
            f"the tensors of {end.folder.name} are not there, and --floor measures the distance to them",
            where=str(chosen.run.root),
            remedy="choose a --to whose checkpoint is complete",
        )


def measured(chosen: Segment, arguments: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """The field ``floor`` of the statement, from executions on this machine."""
    stack = chosen.facts["environment"].get("stack", {})
    perturbed, changed = perturbations(int(stack.get("threads") or 1)), _changes(chosen)
    passes = [*perturbed, *(fields for _, _, fields in changed)]
    environments = _CUDA_ENVIRONMENTS if stack.get("device") else ENVIRONMENTS
    with tempfile.TemporaryDirectory(prefix="harness-floor-") as folder:
        end = [str(chosen.end.folder), chosen.end.checkpoint_id]
        lines = _executed(chosen, arguments, ranks, {"folder": folder, "end": end, "passes": passes}, {})
        for name, environ in environments.items():
            one = {"folder": folder, "end": None, "passes": [{"name": name}]}
            lines += _executed(chosen, arguments, ranks, one, environ)
    plain = next((each for each in lines if each["kind"] == "plain"), None)
    if plain is None:
        raise EvidenceIncomplete("the plain execution wrote nothing down", where=str(chosen.run.root))
    found = {
        each["name"]: Execution(each["name"], each["bits"], each["gaps"])
        for each in lines
        if each["kind"] == "pass"
    }
    return noise_floor.document(
        Measured(
            precision=str(chosen.facts["launch"]["precision"]),
            steps=(chosen.first, chosen.last),
            bits=plain["bits"],
            scales={name: Scale(**fields) for name, fields in plain["scales"].items()},
            recorded=plain["recorded"],
            perturbed=[found[name] for name in (*(each["name"] for each in perturbed), *environments)],
            changed=[(what, size, found[fields["name"]]) for what, size, fields in changed],
        )
    )


def perturbations(threads: int) -> list[dict[str, Any]]:
    """Passes of `harness.training.replay.perturbed` that compute the same in other roundings."""
    other = 1 if threads > 1 else 2
    return [
        {"name": "the same again"},  # bits of its own where a kernel adds atomically
        {"name": f"threads {other}", "threads": other},
        {"name": "micro-batches added backwards", "reverse": True},
        *({"name": f"gradients rounded otherwise, draw {seed}", "rounding": seed} for seed in (1, 2, 3)),
    ]


def _changes(chosen: Segment) -> list[tuple[str, str, dict[str, Any]]]:
    """What is changed, by how much, and the pass that does it."""
    middle = (chosen.first + chosen.last + 1) // 2
    value = ("one value of one sample", "1", {"name": "value", "value": middle})
    rates = [
        ("learning rate", share, {"name": f"rate {share}", "rate": 1 + float(share)})
        for share in noise_floor.RATES
    ]
    return [*rates, value]


def _executed(
    chosen: Segment,
    arguments: argparse.Namespace,
    ranks: int,
    more: Mapping[str, Any],
    environ: Mapping[str, str],
) -> list[Mapping[str, Any]]:
    # Another instruction set is another stack, and meant to be.
    differences = bool(environ) or arguments.stack_differs
    count = len(more["passes"])
    return reexecute.executed(
        chosen,
        arguments,
        ranks,
        "perturbed",
        environ=environ,
        count=count,
        differences=differences,
        more=more,
    )
