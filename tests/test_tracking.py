"""Trackers see each committed step once, whatever interrupts the run."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, Place
from toy_task import config

from harness.errors import ConfigError
from harness.settings import Track
from harness.tracking import Tracking, build


@pytest.mark.slow
def test_an_own_tracker_sees_every_step_once_across_a_kill(place: Place) -> None:
    """Oracle: metrics.jsonl, whose steps and losses the diary repeats line by line."""
    environ = {"DIARY": str(place.root / "diary")}
    shutil.copy(TESTS / "diary.py", place.root)
    paused = '{kind: "toy_task:Toy", options: {pause: 15}}'
    place.write("toy.yaml", config(place.run, task=paused, track='{trackers: ["diary:Diary"]}'))
    place.start_and_kill("checkpoints/step-00000012", ["train", "toy.yaml"], environ=environ)
    again = place.harness("train", "toy.yaml", environ=environ)
    assert again.code == 0, again.err
    lines = [json.loads(line) for line in (place.root / "diary").read_text().splitlines()]
    told = [(line["step"], line["loss"]) for line in lines if "step" in line]
    truth = [json.loads(line) for line in (place.run / "metrics.jsonl").read_text().splitlines()]
    assert told == [(line["step"], line["loss"]) for line in truth]
    assert len({line["run"] for line in lines if "run" in line}) == 1


@pytest.mark.slow
def test_wandb_offline_continues_one_curve_across_a_kill(place: Place) -> None:
    """Oracle: wandb's own record type: one run id, every step exactly once in the newest offline folder."""
    pytest.importorskip("wandb")
    paused = '{kind: "toy_task:Toy", options: {pause: 15}}'
    place.write("toy.yaml", config(place.run, task=paused, track="{wandb: offline}"))
    place.start_and_kill("checkpoints/step-00000012", ["train", "toy.yaml"])
    again = place.harness("train", "toy.yaml")
    assert again.code == 0, again.err
    files = sorted((place.run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1
    assert wandb_steps(files[-1]) == list(range(1, 25))


def wandb_steps(path: Path) -> list[int]:
    """The ``step`` of every history record in an offline file."""
    from wandb.proto import wandb_internal_pb2

    steps = []
    for data in leveldb_records(path.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            if (item.key or item.nested_key[0]) == "step":
                steps.append(int(json.loads(item.value_json)))
    return steps


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Whole records of a log in blocks of 32 KiB (github.com/google/leveldb, doc/log_format.md).

    wandb's own header of 7 bytes counts towards the first block.
    """
    record, offset = b"", 0
    while offset + 7 <= len(data):
        left = 32768 - (offset + 7) % 32768
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        record += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # full, last
            yield record
            record = b""


def test_a_step_is_handed_over_once_and_only_when_committed(tmp_path: Path) -> None:
    """Oracle: the steps themselves, over two launches that share tracking.json."""
    seen: list[int] = []

    class Collector:
        def start(self, run_id: str, name: str, folder: Path, config: Mapping[str, Any]) -> int | None: ...

        def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
            seen.extend(line["step"] for line in lines)

        def finish(self) -> None: ...

    def read(after: int, through: int) -> list[dict[str, Any]]:
        return [{"step": step} for step in range(after + 1, through + 1)]

    first = Tracking(tmp_path, read)
    first.add(Collector(), None)
    first.advance(4)
    first.advance(4)
    second = Tracking(tmp_path, read)
    second.add(Collector(), None)
    second.advance(2)
    second.advance(6)
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("path", ["nowhere:Tracker", "json:Nothing", "json"])
def test_a_tracker_that_cannot_be_imported_is_a_config_error(path: str) -> None:
    """Oracle: the error names the key and the path."""
    with pytest.raises(ConfigError, match=r"no such tracker `.*track\.trackers"):
        build(Track(trackers=[path]))


def test_wandb_is_not_imported_when_it_is_off(place: Place) -> None:
    """Oracle: sys.modules of a process that has built the trackers."""
    code = (
        "import sys\nfrom harness.tracking import build\nfrom harness.settings import Track\nbuild(Track())\n"
    )
    code += "sys.exit('wandb' in sys.modules)"
    import subprocess
    import sys

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
