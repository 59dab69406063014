"""How the processes of a launch become `Workers`, and how they part."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.rendezvous import rendezvous

from harness.cores import process_cpu_count
from harness.training.ranks.launch import Launch
from harness.workers import Workers

_PATIENCE = timedelta(days=1)
"""Of the control groups: a rank may wait long for what another one writes, uploads or fetches; whether that
one still lives is the watchdog's question."""
_LEFT: list[dist.ProcessGroup] = []
"""Groups that this process has left; see `leave`."""


def connect(launch: Launch) -> None:
    """Make the process group that carries gradients: NCCL between GPUs, else gloo.

    torchrun 2.13 gives ranks that it restarts (``--max-restarts``) the store of those before them, with their
    addresses in it: left to accelerate, the new ranks call the dead ones, and hang. So each attempt has keys
    of its own.
    """
    if launch.world_size == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
    store, rank, world_size = next(rendezvous("env://"))
    own = dist.PrefixStore(f"{attempt()}/", store)  # type: ignore[attr-defined]
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size)


def attempt() -> str:
    """Which start of the ranks by the launcher this is."""
    return f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def join(launch: Launch, accelerator: Accelerator) -> Workers:
    """The workers behind ``accelerator``, with a control group of their own."""
    if launch.world_size == 1:
        return Workers.alone(accelerator.device)
    control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    cores = max(1, process_cpu_count() // launch.local_world_size)
    return Workers(launch.rank, launch.world_size, accelerator.device, dist.get_backend(), control, cores)


def beside(workers: Workers) -> Workers:
    """The same ranks over another control group, for a thread that works beside the training thread."""
    if workers.control is None:
        return workers
    return replace(workers, control=dist.new_group(backend="gloo", timeout=_PATIENCE))


def leave() -> None:
    """Take the process groups down, so that no rank waits for another at exit.

    The group of the gradients stays alive as an object until the process ends. DDP's reducer would be its
    last owner, which torch 2.13 frees under the interpreter lock: the destructor joins gloo's threads, one of
    which may still wait for that lock to let go of the tensor it reduced last, and the rank never ends.
    """
    if dist.is_available() and dist.is_initialized():
        _LEFT.append(dist.distributed_c10d._get_default_group())
        dist.destroy_process_group()
