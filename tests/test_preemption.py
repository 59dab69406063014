"""What a cluster does to a job: ranks that are killed or hang, restarts by the launcher, little time."""

from __future__ import annotations

import signal

import psutil
import pytest
from compare import differing
from conftest import Place, Process, finish, stop_rank
from test_train import PAUSED, keys, workers
from toy_task import config

pytestmark = pytest.mark.slow


def worker(process: Process, rank: int) -> psutil.Process:
    """The worker of ``rank``."""
    return next(child for each, child in workers(process) if each == rank)


def at_six(place: Place, processes: int, torchrun: list[str] | None = None) -> Process:
    """A launch that waits in the steps after its first checkpoint, until `Place.go_on`."""
    place.hold("checkpoints/step-00000006")
    process = place.start(["train", "toy.yaml"], processes, torchrun=torchrun)
    place.wait_for(process, "checkpoints/step-00000006")
    return process


@pytest.mark.parametrize(("rank", "processes"), [(0, 2), (2, 3)])
def test_a_killed_rank_is_named_by_the_others(place: Place, rank: int, processes: int) -> None:
    """Oracle: the rank that this test has killed, 0 under torchrun, 2 without; the others end."""
    place.write("toy.yaml", config(place.run, task=PAUSED))
    process = at_six(place, processes, None if rank else [])
    worker(process, rank).kill()
    place.go_on()
    done = finish(process)
    assert done.code == 1
    line = f"harness: rank {rank} gave no sign of life for 3 s: killed, or its host is lost; restart"
    assert done.err.count(line) == 1, done.err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_lost_after_the_timeout(place: Place, rank: int) -> None:
    """Oracle: the rank that this test has stopped; rank 0 under torchrun, and rank 1 without it."""
    train = "{steps: 24, global_batch: 12, micro_batch: 2, peer_timeout: 4}"
    place.write("toy.yaml", config(place.run, task=PAUSED, train=train))
    process = at_six(place, 2, None if rank else [])
    worker(process, rank).suspend()
    place.go_on()
    done = stop_rank(worker(process, rank), worker(process, 1 - rank), process)
    assert f"rank {rank} gave no sign of life for 4 s" in done.err
    assert place.harness("train", "toy.yaml").code == 0


def test_torchrun_restarts_the_ranks_and_the_run_goes_on(place: Place) -> None:
    """Oracle: the twin, tensor by tensor; one command, both ranks killed one after the other, no hand."""
    place.write("toy.yaml", config(place.run, task=PAUSED))
    place.write("twin.yaml", config(place.root / "twin"))
    process = at_six(place, 2, ["--max-restarts=2"])
    worker(process, 1).kill()
    place.hold("checkpoints/step-00000012")
    place.wait_for(process, "checkpoints/step-00000012")
    worker(process, 0).kill()
    place.go_on()
    done = finish(process)
    assert done.code == 0, done.err
    assert done.out.count("exact: same stack and world size") == 2
    assert place.harness("train", "twin.yaml", processes=2).code == 0
    assert place.steps() == list(range(1, 25))
    assert differing(place.run, place.root / "twin") == []
    assert place.harness("verify", str(place.run), *keys(place)).code == 0


SLOW_DISK = """
import time
from harness.checkpoint import disk
write = disk.write
def slow(path, data, *, aligned, proceed):
    for _ in range(4000 if (path.parent.parent / "step-00000006").is_dir() else 0):
        proceed()
        time.sleep(0.05)
    return write(path, data, aligned=aligned, proceed=proceed)
disk.write = slow
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_with_a_deadline_gives_the_checkpoint_up_cleanly(place: Place, processes: int) -> None:
    """Oracle: a file that takes minutes is not waited for, nothing is half-written, and the run goes on from
    the checkpoint before."""
    (place.root / "slow_disk.py").write_text(SLOW_DISK)
    (place.root / "toy_task.py").write_text((place.root / "toy_task.py").read_text() + "\nimport slow_disk\n")
    place.write("toy.yaml", config(place.run, task=PAUSED, checkpoint="{every: 6, deadline: 2}"))
    process = at_six(place, processes)
    (psutil.Process(process.pid) if processes == 1 else worker(process, 1)).send_signal(signal.SIGUSR1)
    place.go_on()
    done = finish(process)
    assert done.code == (75 if processes == 1 else 1)
    assert "the checkpoint was given up at its deadline, unfinished" in done.err
    assert [path.name for path in (place.run / "checkpoints").iterdir()] == ["step-00000006"]
    assert place.harness("verify", str(place.run), *keys(place)).code == 0
    if processes == 1:
        (place.root / "slow_disk.py").write_text("")
        again = place.harness("train", "toy.yaml")
        assert again.code == 0, again.err
        assert "exact: same stack" in again.out
