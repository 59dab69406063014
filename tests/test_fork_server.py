"""A fork of `fork_server` is what `python -m harness train` would be."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import fork_server
import orjson
import pytest
from conftest import Place, finish
from test_train import PAUSED, predicate
from toy_task import config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not fork_server.possible, reason="every process is a fresh one here"),
]


def told(run: Path) -> tuple[list[Any], dict[str, Any]]:
    """The metrics and the statement of four steps, without what no two launches share."""
    lines = [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    statement: Any = predicate(run / "checkpoints" / "step-00000004")
    for line in lines:
        del line["time"], line["samples_per_s"]
    del statement["created"], statement["metrics"]["lines"], statement["run"]["id"]
    coverage = statement["determinism"].pop("ledger")["coverage"]
    timed = [name for name in coverage if name.endswith(("_microseconds", "_ppm"))]
    return lines, {**statement, "coverage": {name: coverage[name] for name in coverage if name not in timed}}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_fork_makes_the_run_of_a_fresh_process(place: Place, processes: int) -> None:
    """Oracle: the same command in fresh processes: every digest of every step, and all that is signed about
    stack, settings, packages, variables, command line and launch."""
    train = "{steps: 4, global_batch: 12, micro_batch: 2}"
    place.write("toy.yaml", config(place.run, train=train, checkpoint="{every: 4}"))
    made = []
    for fresh in (True, False):
        done = place.harness("train", "toy.yaml", processes=processes, fresh=fresh)
        assert done.code == 0, done.err
        made.append(told(place.run))
        place.run.rename(place.root / f"{fresh}")
    assert made[0] == made[1]


def test_a_fork_ends_as_a_process_does(place: Place) -> None:
    """Oracle: exit codes of `subprocess`, and the streams apart."""
    place.write("toy.yaml", config(place.run, task=PAUSED))
    refused = place.harness("train", "toy.yaml", "train.steps=none")
    assert (refused.code, refused.out) == (2, "")
    assert "train.steps" in refused.last_line
    place.hold("metrics.jsonl")
    running = place.start(["train", "toy.yaml"])
    place.wait_for(running, "metrics.jsonl")
    running.send_signal(signal.SIGKILL)
    assert finish(running).code == -signal.SIGKILL


def test_a_variable_that_an_import_reads_is_read_by_another_server(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: which servers are asked for, with a thread more, and with another home."""
    asked = []

    def server(environ: tuple[tuple[str, str], ...], modules: tuple[str, ...]) -> Any:
        asked.append(environ)
        raise InterruptedError

    monkeypatch.setattr(fork_server, "_server", server)
    for more in ({}, {"HOME": "/"}, {"OMP_NUM_THREADS": "2"}):
        with pytest.raises(InterruptedError):
            place.start(["train"], environ=more)
    assert asked[0] == asked[1] != asked[2]
