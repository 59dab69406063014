"""The digests of a step's gradients and of the state after it, over all ranks.

Each rank sums what it holds: its shards under FSDP2, its share of the tensors where every rank holds all of
them (buffers, which may differ, are rank 0's, as in a checkpoint). One all-reduce of a few hundred integers
makes the vector that `harness.determinism.bit_sums` digests. Nothing waits for the device: `Readback` takes
the vector to the host together with the loss.

What a replica of DDP holds is looked at by one rank only, so a replica that went astray shows in the step in
which its own share differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import perf_counter_ns

import torch.distributed as dist
from torch import Tensor

from harness.checkpoint import mesh
from harness.checkpoint.shards import deal
from harness.checkpoint.state import TrainingState, model_tensors, optimizer_tensors
from harness.determinism.bit_sums import FORMAT, LARGE, Piece, Plan
from harness.format import chain
from harness.settings import Settings
from harness.workers import Workers


def recorded(settings: Settings) -> dict[str, str]:
    """What the statement's ``determinism.settings`` say of the digests: the definition of those it has."""
    return {chain.DEFINITION: FORMAT} if settings.determinism.step_digests else {}


@dataclass(frozen=True)
class Sums:
    """The sums of all ranks, still on the device."""

    plan: Plan
    vector: Tensor
    """Int64, one of each slot of the plan."""

    def digest(self, vector: Tensor | None = None) -> bytes:
        """SHA-256 of the sums; ``vector`` is their copy in host memory, where they are on a device."""
        return self.plan.digest(self.vector if vector is None else vector)


class StepDigests:
    """Sums the gradients and the state of one rank's training state. Collective: every rank calls alike."""

    def __init__(self, workers: Workers, state: TrainingState, large: int = LARGE) -> None:
        """``large``: see `Plan`; 0 gives every tensor a sum of its own."""
        self._workers = workers
        # The loss scale is left out: reading it waits for the device, and it shows in the gradients.
        self._state = replace(state, scaler=None)
        self._large = large
        names = {id(parameter): name for name, parameter in state.model.named_parameters()}
        self._parameters = [each for group in state.optimizer.param_groups for each in group["params"]]
        self._names = [names[id(each)] for each in self._parameters]
        self._shared = set(names.values())
        self._plans: dict[tuple[str, ...], Plan] = {}
        self.spent_ns = 0
        """What summing has cost the host."""

    def gradients(self) -> Sums:
        """Of the parameters that have a gradient, as they are now."""
        named = zip(self._names, self._parameters, strict=True)
        return self._sums({name: each.grad for name, each in named if each.grad is not None}, "gradient")

    def state(self) -> Sums:
        """Of parameters, buffers, averages and the optimizer's tensors."""
        model, _ = model_tensors(self._state.model)
        tensors = {f"model.{name}": tensor for name, tensor in model.items()}
        tensors |= optimizer_tensors(self._state)
        # By name: a resume fills the optimizer in another order than its first step does.
        return self._sums(dict(sorted(tensors.items())), "state")

    def _sums(self, tensors: Mapping[str, Tensor], kind: str) -> Sums:
        started = perf_counter_ns()
        key = (kind, *tensors)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = Plan(self._pieces(tensors), self._large)
        local = [mesh.local_part(name, each)[0] for name, each in tensors.items()]
        vector = plan.sums(local)
        self.spent_ns += perf_counter_ns() - started
        if self._workers.world_size > 1:
            dist.all_reduce(vector)
        return Sums(plan, vector)

    def _pieces(self, tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
        """What this rank sums of each; of a tensor that is not cut, one rank sums all."""
        whole = [name for name, each in tensors.items() if mesh.local_part(name, each)[0] is each]
        fixed = {at: 0 for at, name in enumerate(whole) if not self._is_shared(name)}
        sizes = [tensors[name].numel() * tensors[name].element_size() for name in whole]
        owners = dict(zip(whole, deal(sizes, self._workers.world_size, fixed), strict=True))
        pieces = {}
        for name, tensor in tensors.items():
            local, begin = mesh.local_part(name, tensor)
            owned = owners.get(name, self._workers.rank) == self._workers.rank
            pieces[name] = Piece(local, tensor.numel(), begin, tuple(tensor.shape), owned)
        return pieces

    def _is_shared(self, name: str) -> bool:
        """Whether every rank has the same: a parameter, its gradient, average or optimizer state."""
        known = name.removeprefix("model.").removeprefix("ema.")
        return name.startswith("optimizer.") or known in self._shared or name in self._shared
