"""Run on several ranks by test_sharding: whole tensors to one rank and back, against `DTensor.full_tensor`;
step digests of a model that is cut, of replicas, and of one process, against each other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from harness.checkpoint import mesh
from harness.checkpoint.state import TrainingState
from harness.training.step.digests import StepDigests
from harness.workers import Workers

ROWS = (1, 2, 3, 4, 5, 7, 9)
"""Fewer and more rows than ranks, divisible and not: some ranks hold nothing."""


def digests(workers: Workers, *, cut: bool) -> tuple[bytes, bytes]:
    """Of gradients and a state whose bits do not depend on how the model is cut."""
    torch.manual_seed(0)
    # Shards that begin within a word and within a row, and one that is summed by itself (`LARGE`).
    model = nn.Sequential(nn.Linear(131, 203), nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(1, 1))
    gradients = {name: torch.randn_like(each) for name, each in model.named_parameters()}
    if cut:
        fully_shard(model)
    elif workers.rank:
        model[2].running_mean += 1  # buffers are rank 0's
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for name, each in model.named_parameters():
        each.grad = distribute(gradients[name], each) if cut else gradients[name]
        # Not by a step: the arithmetic of a shard's last elements may round otherwise than the whole's.
        optimizer.state[each] = {"step": torch.tensor(3.0), "exp_avg": each.grad * 2}
    made = StepDigests(workers, TrainingState(model, optimizer))
    return made.gradients().digest(), made.state().digest()


def distribute(whole: torch.Tensor, like: DTensor) -> DTensor:
    """``whole`` cut as ``like``."""
    return distribute_tensor(whole, like.device_mesh, like.placements)


def main() -> None:
    """Every parameter, gathered to every rank in turn and scattered from it; asserts equality of bits."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    control = dist.new_group(backend="gloo")
    workers = Workers(rank, size, torch.device("cpu"), "gloo", control, 1)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(3, rows) for rows in ROWS])
    fully_shard(model)
    model[0].register_buffer("count", torch.tensor(float(7 + rank)))
    for owner in range(size):
        for name, tensor in model.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            target = torch.empty(tensor.shape) if rank == owner else None
            with torch.no_grad():
                mesh.collect(workers, name, tensor, owner, target)
                if target is not None:
                    assert torch.equal(target, whole), name
                    target += owner + 1
                mesh.spread(workers, name, tensor, owner, target)
            again = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            expected = [torch.empty(tensor.shape) if target is None else target]
            dist.broadcast(expected[0], owner)
            assert torch.equal(again, expected[0]), name
    alone = Workers(0, 1, torch.device("cpu"), "none", None, 1)
    expected_digests = digests(alone, cut=False)
    assert digests(workers, cut=False) == digests(workers, cut=True) == expected_digests
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
