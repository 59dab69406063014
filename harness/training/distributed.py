"""How the processes of a launch become `Workers`, and how they part."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist
from accelerate import Accelerator

from harness.training.launch import Launch
from harness.workers import Workers, host_cores


def join(launch: Launch, accelerator: Accelerator) -> Workers:
    """The workers behind ``accelerator``, with a control group of their own."""
    if launch.world_size == 1:
        return Workers.alone(accelerator.device)
    control = dist.new_group(backend="gloo")
    cores = max(1, host_cores() // launch.local_world_size)
    return Workers(launch.rank, launch.world_size, accelerator.device, dist.get_backend(), control, cores)


def beside(workers: Workers) -> Workers:
    """The same ranks over another control group, for a thread that works beside the training thread."""
    if workers.control is None:
        return workers
    return replace(workers, control=dist.new_group(backend="gloo"))


def leave() -> None:
    """Take the process groups down, so that no rank waits for another at exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
