"""The live view: one frame from files that somebody else is writing."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import fake_runs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import cli
from harness.commands.watch import Follower
from harness.format.json_lines import Tail
from harness.report import frame

NOW = fake_runs.START + 30.5


# lines


def test_a_tail_gives_each_line_once(tmp_path: Path) -> None:
    """Oracle: what was appended between two looks."""
    path = tmp_path / "m"
    tail = Tail(path)
    assert tail.read().lines == ()
    path.write_text('{"step":1}\n')
    assert tail.read().lines == ({"step": 1},)
    with open(path, "a") as stream:
        stream.write('{"step":2}\n{"st')
    second = tail.read()
    assert (second.lines, second.partial) == (({"step": 2},), True)
    with open(path, "a") as stream:
        stream.write('ep":3}\n')
    assert tail.read().lines == ({"step": 3},)
    assert tail.read().lines == ()


@given(
    # Of 64 bits, as all of a run are: beyond them orjson reads a float.
    st.lists(st.dictionaries(st.text(max_size=3), st.integers(-(2**63), 2**64 - 1), max_size=2), max_size=8),
    st.lists(st.integers(0, 60), max_size=6),
)
def test_any_way_of_cutting_the_writes_gives_the_same_lines(
    made: list[dict[str, int]], cuts: list[int]
) -> None:
    """Oracle: the lines that were written, however the writes fell between the looks."""
    data = "".join(json.dumps(line) + "\n" for line in made).encode()
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        tail, seen = Tail(path), []
        for start, end in pairwise(places):
            with open(path, "ab") as stream:
                stream.write(data[start:end])
            seen += tail.read().lines
    assert seen == made


def test_a_file_that_a_resume_cut_is_read_again_from_its_start(tmp_path: Path) -> None:
    """Oracle: other lines of the same length in the same place, as after a rewind."""
    path = tmp_path / "m"
    path.write_text('{"step":1,"x":1}\n{"step":2,"x":1}\n{"step":3,"x":1}\n')
    tail = Tail(path)
    tail.read()
    path.write_text('{"step":1,"x":1}\n{"step":2,"x":9}\n{"step":3,"x":9}\n{"step":4,"x":9}\n')
    again = tail.read()
    assert again.restarted
    assert [line["x"] for line in again.lines] == [1, 9, 9, 9]


# frame


def view_of(root: Path, now: float = NOW) -> frame.View:
    """What one look at ``root`` gives."""
    return Follower(root).look(now)


def running(root: Path) -> Path:
    """A run at step 30 of 60, its last line still being written."""
    fake_runs.finished(root)
    fake_runs.write_metrics(root, fake_runs.lines(30), '{"step": 31, "los')
    return root


def test_a_frame_has_what_a_person_looks_for(tmp_path: Path) -> None:
    """Oracle: step, loss, speed, time left and checkpoint of a run that was written by hand."""
    text = "\n".join(frame.draw(view_of(running(tmp_path / "a")), 100))
    assert "step 30 of 60  running" in text
    assert "loss        3.2030" in text
    assert "bits_per_byte" in text
    assert "2,048 tokens/s" in text
    assert "500.0 ms a step  15 s left" in text
    assert "checkpoint  step 60" in text


def test_a_run_whose_last_line_is_old_is_not_called_running(tmp_path: Path) -> None:
    """Oracle: ten minutes of silence; no time left is promised."""
    text = "\n".join(frame.draw(view_of(running(tmp_path / "a"), NOW + 600), 100))
    assert "quiet for 10 min" in text
    assert "left" not in text


def test_a_folder_without_a_step_gives_a_frame_all_the_same(tmp_path: Path) -> None:
    """Oracle: an empty folder, as in the first seconds of a run."""
    text = "\n".join(frame.draw(view_of(tmp_path), 80))
    assert "no step recorded yet" in text
    assert "none yet" in text


def test_lines_that_are_none_are_counted(tmp_path: Path) -> None:
    """Oracle: two lines of garbage before whole ones."""
    root = running(tmp_path / "a")
    metrics = root / "metrics.jsonl"
    metrics.write_bytes(b"\0\0\0\n{\n" + metrics.read_bytes())
    text = "\n".join(frame.draw(view_of(root), 100))
    assert "step 30 of 60" in text
    assert "unreadable  2 lines of metrics.jsonl" in text


def test_the_newest_warnings_are_shown(tmp_path: Path) -> None:
    """Oracle: an error of another rank."""
    root = running(tmp_path / "a")
    event = {"time": NOW - 5, "level": "error", "event": "failure", "error": "rank 3 ran out of memory"}
    fake_runs.write_events(root, [event], rank=3)
    assert any(
        "rank 3, 5 s ago: failure: error rank 3 ran" in line for line in frame.draw(view_of(root), 100)
    )


def test_the_pause_before_a_resume_does_not_stretch_the_time_left(tmp_path: Path) -> None:
    """Oracle: an hour between two lines, half a second between all others."""
    made = fake_runs.lines(30)
    for line in made[15:]:
        line["time"] += 3600
    assert frame.seconds_a_step(made) == pytest.approx(0.5)


@given(st.lists(st.floats(width=32), max_size=300), st.integers(1, 120))
def test_a_sparkline_fits_and_marks_what_is_not_finite(values: list[float], width: int) -> None:
    """Oracle: its length and its letters."""
    line = frame.sparkline(values, width)
    assert len(line) == min(width, len(values))
    assert set(line) <= set("▁▂▃▄▅▆▇█×")


def test_a_falling_loss_falls() -> None:
    """Oracle: eight values, eight bars."""
    assert frame.sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"


@given(st.integers(10, 120))
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    """Oracle: the length of every line."""
    view = frame.View("a" * 50, 60, fake_runs.lines(30), 0, (20, NOW), 1, (), NOW)
    assert all(len(line) <= width for line in frame.draw(view, width))


# the command


def test_without_a_terminal_one_frame_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the command returns, and printed the frame once."""
    assert cli.main(["watch", str(running(tmp_path / "a"))]) == 0
    assert capsys.readouterr().out.count("step 30 of 60") == 1


def test_the_json_of_the_command_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a JSON parser."""
    assert cli.main(["watch", str(running(tmp_path / "a")), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["planned"], told["last"]["step"], told["checkpoint"]) == (60, 30, 60)


@pytest.mark.parametrize("words", [["no/such/folder"], ["."], [".", "--every", "0"], [".", "--every", "nan"]])
def test_a_wrong_call_is_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: exit code 2 and one line."""
    assert cli.main(["watch", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
