"""What a run prints is not worth the run."""

from __future__ import annotations

import os
import sys

import pytest

from harness.training.telemetry.screen import Screen


@pytest.mark.parametrize("behind", ["a full disk", "a pipe that nobody reads"])
def test_a_run_goes_on_when_its_screen_is_gone(
    behind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: no exception, one line on stderr unless the reader has left; what came after goes nowhere."""
    if behind == "a full disk":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        unread, descriptor = os.pipe()
        os.close(unread)
    with open(descriptor, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        screen = Screen(visible=True)
        screen.say("lost")
        screen.say("after")
        screen.step(1, 0.5, 1.0, None, {"accuracy": 0.5})
    assert capsys.readouterr().err.count("the run goes on") == (behind == "a full disk")


def test_what_lies_in_a_run_folder_cannot_speak_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: one line a row, of characters that a terminal shows: a skipped folder has a stranger's name."""
    Screen(visible=True).table([("skipped", "step-\x1b[2J\ncomplete: \u202e", "left\rwhere it is")])
    (line,) = capsys.readouterr().out.split("\n")[:-1]
    assert line.isprintable()
