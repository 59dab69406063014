"""An error becomes one line with the exit code of its reason, and a full disk does not hide it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import orjson
import pytest

from harness.errors import EnvironmentFault, TrainingFailed
from harness.training.ranks import failure


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINTR, errno.EIO, errno.EROFS]
)
def test_a_disk_that_fails_in_the_training_thread_is_a_fault_of_the_environment(
    tmp_path: Path, number: int
) -> None:
    """Oracle: exit code 3 of `harness.errors`; the place and the system's own words in one line."""
    explained = failure.explain(OSError(number, os.strerror(number)), tmp_path)
    assert isinstance(explained, EnvironmentFault)
    assert explained.exit_code == 3
    assert str(tmp_path) in str(explained)
    assert "\n" not in str(explained)


def test_a_missing_file_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    """Oracle: exit code 1, with the name of the exception."""
    explained = failure.explain(FileNotFoundError(errno.ENOENT, "No such file", "tokens.bin"), tmp_path)
    assert isinstance(explained, TrainingFailed)
    assert "FileNotFoundError" in str(explained)


@pytest.mark.parametrize("name", ["corpus.json", "events"])
def test_what_lies_in_the_place_of_a_file_of_the_run_is_told_as_the_disk_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: exit code 3 with the path, as elsewhere; run.dir may be relative."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(OSError, match="Is a directory") as caught:
        Path("run", name).read_bytes()
    explained = failure.explain(caught.value, Path("run"))
    assert explained.exit_code == 3
    assert f"Is a directory: run/{name}" in str(explained)


def test_the_traceback_goes_to_events_or_where_that_fails_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the text of the raised error, in exactly one of the two places."""
    try:
        raise TrainingFailed("the toy breaks")
    except TrainingFailed as error:
        failure.report(error, tmp_path)
        written = (tmp_path / "events" / "rank-00000.jsonl").read_bytes()
        assert "the toy breaks" in orjson.loads(written)["traceback"]
        assert capsys.readouterr().err == ""
        blocked = tmp_path / "blocked"
        blocked.mkdir()
        (blocked / "events").write_text("a file in the way")
        failure.report(error, blocked)
    assert "TrainingFailed: the toy breaks" in capsys.readouterr().err
    failure.report(EnvironmentFault("the run folder cannot be used"), blocked)
    assert capsys.readouterr().err == ""  # what its one line says is all that there is to say
