"""What a killed process leaves under temporary names is removed by the next launch, which says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_resume import SETTINGS

from harness.format import leftovers
from harness.format.layout import RunFolder
from harness.provenance.signing import keys
from harness.settings import Settings
from harness.training.beginning import continuation
from harness.training.telemetry.screen import Screen
from harness.workers import Workers


def test_a_launch_removes_what_is_nobodys_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the names, as cut-off saves, fetches and small files leave them; all others are left alone."""
    run = tmp_path / "run"
    kept = [
        "checkpoints/step-00000006",
        "checkpoints/damaged-step-00000009-1",
        ".tmp-other",
        "log",
    ]
    for name in (*kept, "checkpoints/.tmp-step-00000012", ".tmp-log"):
        (run / name).mkdir(parents=True)
        (run / name / "file").write_bytes(b"x")
    (run / ".tmp-run.yaml").write_bytes(b"half")
    keys.create(tmp_path / "me")
    key = str(tmp_path / "me.key")
    settings = Settings.model_validate({**SETTINGS, "run": {"dir": str(run)}, "signing": {"key": key}})
    held, _ = continuation.hold_run(Workers.alone(), settings, None, Screen(visible=True))
    assert held is not None
    os.close(held.lock)
    said = "removed .tmp-log, .tmp-run.yaml, .tmp-step-00000012: left by a save or a fetch that was cut off\n"
    assert capsys.readouterr().out == said
    assert leftovers.found(RunFolder(run)) == []
    assert all((run / name / "file").exists() for name in kept)
