"""Run under torchrun by test_sharding: whole tensors to one rank and back, against `DTensor.full_tensor`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from harness.checkpoint import mesh
from harness.workers import Workers

ROWS = (1, 2, 3, 4, 5, 7, 9)
"""Fewer and more rows than ranks, divisible and not: some ranks hold nothing."""


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
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
