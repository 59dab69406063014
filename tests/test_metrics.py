"""metrics.jsonl continues at the checkpoint's step; what came after moves to events/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import ResumeRefused
from harness.training.telemetry.metrics import Events, MetricsLog, read_steps, rewind


def write(folder: Path, count: int, tail: bytes = b"") -> Path:
    log = MetricsLog(folder / "metrics.jsonl")
    for step in range(1, count + 1):
        log.write({"step": step, "loss": 1.0 / step})
    log.close()
    with open(folder / "metrics.jsonl", "ab") as stream:
        stream.write(tail)
    return folder / "metrics.jsonl"


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_after_the_checkpoint_move_to_events_unchanged(tmp_path: Path) -> None:
    """Oracle: conservation; every line is in one of the two files."""
    path = write(tmp_path, 10, tail=b'{"step": 11, "lo')
    before = path.read_text().splitlines()
    events = Events(tmp_path / "events" / "rank-00000.jsonl")
    assert rewind(path, 6, events) == 5
    events.close()
    moved = [json.loads(line)["line"] for line in events.path.read_text().splitlines()]
    assert path.read_text().splitlines() + moved == before
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_a_missing_line_of_the_checkpoint_step_is_refused_unless_accepted(tmp_path: Path) -> None:
    """Oracle: a gap in the truth must not appear silently."""
    path = write(tmp_path, 4)
    events = Events(tmp_path / "events" / "rank-00000.jsonl")
    with pytest.raises(ResumeRefused, match="ends at step 4, the checkpoint is of step 6"):
        rewind(path, 6, events)
    assert steps(path) == [1, 2, 3, 4]
    assert rewind(path, 6, events, accept_gap=True) == 0
    events.close()


def test_a_new_run_needs_no_metrics_file(tmp_path: Path) -> None:
    """Oracle: nothing is written before the first step."""
    events = Events(tmp_path / "events" / "rank-00000.jsonl")
    assert rewind(tmp_path / "metrics.jsonl", 0, events) == 0
    events.close()
    assert not (tmp_path / "metrics.jsonl").exists()


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 12), step=st.integers(0, 12), tail=st.binary(max_size=20))
def test_rewinding_keeps_exactly_the_steps_up_to_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, count: int, step: int, tail: bytes
) -> None:
    """Oracle: the list of steps, cut by hand; the torn tail is never kept."""
    folder = tmp_path_factory.mktemp("run")
    path = write(folder, count, tail=tail.replace(b"\n", b" "))
    events = Events(folder / "events" / "rank-00000.jsonl")
    if step > count:
        with pytest.raises(ResumeRefused):
            rewind(path, step, events)
    else:
        rewind(path, step, events)
        assert steps(path) == list(range(1, step + 1))
    events.close()


def test_read_steps_gives_the_lines_between_two_steps(tmp_path: Path) -> None:
    """Oracle: the half-open interval of its docstring."""
    path = write(tmp_path, 9)
    assert [line["step"] for line in read_steps(path, 3, 6)] == [4, 5, 6]


def test_an_event_after_a_torn_line_is_a_line_of_its_own(tmp_path: Path) -> None:
    """Oracle: the torn bytes are kept, and the next event parses."""
    path = tmp_path / "events" / "rank-00000.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"event": "sav')
    for _ in range(2):
        events = Events(path)
        events.write("launch")
        events.close()
    torn, *whole = path.read_text().splitlines()
    assert torn == '{"event": "sav'
    assert [json.loads(line)["event"] for line in whole] == ["launch", "launch"]
