"""How far two executions of the same steps ended apart: 2-norms of every tensor of the state, over all ranks.

Each rank looks at what it holds: its shards under FSDP2; of a tensor that every rank holds, rank 0 counts.
Collective: every rank calls alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.checkpoint import mesh
from harness.checkpoint.state import TrainingState, model_tensors, optimizer_tensors
from harness.workers import Workers


@dataclass(frozen=True)
class Ended:
    """What a rank holds of the state at some step, in host memory."""

    tensors: Mapping[str, Tensor]
    counted: frozenset[str]
    """Those that this rank counts."""
    bits: str
    """Digest of the bytes of all ranks."""


def ended(workers: Workers, state: TrainingState) -> Ended:
    """A copy of parameters, buffers, averages and the optimizer's tensors as they are now."""
    model, _ = model_tensors(state.model)
    # As in the step digests, the loss scale shows in the rest.
    named = {f"model.{name}": each for name, each in model.items()}
    named |= optimizer_tensors(replace(state, scaler=None))
    tensors, counted, digest = dict[str, Tensor](), set[str](), hashlib.sha256()
    for name, each in sorted(named.items()):
        local = mesh.local_part(name, each)[0]
        if workers.first or local is not each:
            counted.add(name)
        tensors[name] = local.detach().to("cpu", copy=True).contiguous()
        digest.update(name.encode() + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    told = workers.gather_bytes(digest.digest())
    return Ended(tensors, frozenset(counted), hashlib.sha256(b"".join(told)).hexdigest())


def gaps(workers: Workers, one: Ended, other: Ended) -> dict[str, float]:
    """Tensor → 2-norm of the difference; a tensor that ``other`` does not have yet counts as zeros."""
    found = {name: _apart(tensor, other.tensors.get(name)) for name, tensor in one.tensors.items()}
    return _norms(workers, found, one.counted)


def scales(workers: Workers, before: Ended, after: Ended) -> dict[str, dict[str, float]]:
    """What `harness.audit.replay.noise_floor.Scale` holds, for each tensor."""
    update = gaps(workers, after, before)
    size = _norms(workers, {name: each.double() for name, each in after.tensors.items()}, after.counted)
    return {
        name: {"update": update[name], "size": size[name], "roundoff": size[name] * _roundoff(tensor)}
        for name, tensor in after.tensors.items()
    }


def _apart(one: Tensor, other: Tensor | None) -> Tensor:
    return one.double() if other is None else one.double() - other.double()


def _roundoff(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps / 2 if tensor.is_floating_point() else 0.0


def _norms(workers: Workers, found: Mapping[str, Tensor], counted: frozenset[str]) -> dict[str, float]:
    squares = [
        each.square().sum() if name in counted else torch.zeros((), dtype=torch.float64)
        for name, each in found.items()
    ]
    vector = torch.stack(squares).to(workers.device)
    if workers.world_size > 1:
        dist.all_reduce(vector)
    roots: list[Any] = vector.sqrt().tolist()
    return dict(zip(found, roots, strict=True))
