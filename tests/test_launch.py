"""How many processes really run, compared with how many were asked for."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch.distributed as dist

from harness.errors import EnvironmentFault
from harness.training.ranks import distributed
from harness.training.ranks.launch import from_environment

TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}


def test_without_a_launcher_it_is_one_bare_process() -> None:
    """Oracle: the contract of a bare `harness train`."""
    launch = from_environment({}, ["bash"], ["python", "-m", "harness"], None)
    assert (launch.launcher, launch.rank, launch.world_size, launch.nodes) == ("bare", 0, 1, 1)


def test_torchrun_is_recognised_with_its_nodes() -> None:
    """Oracle: the variables that torchrun documents."""
    launch = from_environment(TORCHRUN, ["torchrun"], ["python"], None)
    assert (launch.launcher, launch.rank, launch.world_size, launch.nodes) == ("torchrun", 1, 4, 2)


def test_accelerate_that_starts_fewer_processes_than_asked_is_an_error() -> None:
    """Oracle: `accelerate launch --cpu --num_processes 2` starts one process (accelerate 1.15)."""
    parent = ["python", "accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "harness"]
    with pytest.raises(EnvironmentFault, match="asked for 2 processes and started 1"):
        from_environment({"ACCELERATE_MIXED_PRECISION": "no"}, parent, ["python"], None)
    equals = [*parent[:4], "--num_processes=2"]
    with pytest.raises(EnvironmentFault, match="asked for 2"):
        from_environment({"ACCELERATE_MIXED_PRECISION": "no"}, equals, ["python"], None)


def test_a_world_size_other_than_the_config_asks_for_is_an_error() -> None:
    """Oracle: train.world_size of the config."""
    assert from_environment(TORCHRUN, [], ["python"], 4).world_size == 4
    with pytest.raises(EnvironmentFault, match=r"train.world_size is 8, but 4 process"):
        from_environment(TORCHRUN, [], ["python"], 8)


def test_srun_tasks_that_do_not_know_of_each_other_are_an_error() -> None:
    """Oracle: several tasks of one Slurm step without a rendezvous would write one run folder."""
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}
    with pytest.raises(EnvironmentFault, match="srun started 4 tasks"):
        from_environment(slurm, [], ["python"], None)
    assert from_environment({**slurm, "SLURM_NTASKS": "1"}, [], ["python"], None).world_size == 1


def test_the_command_line_names_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: statements must not leak home paths."""
    monkeypatch.setenv("HOME", "/home/ada")
    launch = from_environment({}, [], ["/home/ada/venv/bin/python", "-m", "harness"], None)
    assert launch.command == ("~/venv/bin/python", "-m", "harness")


def test_a_group_that_was_left_outlives_every_model_on_it() -> None:
    """Oracle: the object itself, of which DDP's reducer must not be the last owner (see `leave`)."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    group = weakref.ref(dist.distributed_c10d._get_default_group())
    distributed.leave()
    gc.collect()
    assert not dist.is_initialized()
    assert group() is not None
