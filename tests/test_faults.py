"""Faults in the write path: a sample of scripts/bench/faults.py, which goes through every call.

Oracle: the run without a fault, `harness verify`, and the exit codes of `harness.errors`. A saver that
writes to the final name is there to show that the check can fail.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench"
FINAL_NAME = "torch.save to the final name"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_PRELOAD and /proc")
def test_a_fault_in_the_write_path_is_survived_or_told(tmp_path: Path) -> None:
    """Every 599th fault: nothing lost, torn, unsaid, stuck or other."""
    out = tmp_path / "out.json"
    words = [sys.executable, BENCH / "faults.py", "--only", "harness", "--sample", "599", "--json", out]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environ, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(out.read_text())["outcomes"]["harness"]
    outcomes = {key.split("\t")[2] for key in counted}
    assert outcomes <= {"absorbed", "went on", "stopped"}
    assert "stopped" in outcomes
    assert sum(counted.values()) >= 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_PRELOAD and /proc")
def test_a_saver_that_writes_to_the_final_name_is_found_out(tmp_path: Path) -> None:
    """A disk that fills up in the middle leaves what does not load under the name of the newest."""
    out = tmp_path / "out.json"
    words = [sys.executable, BENCH / "faults.py", "--only", FINAL_NAME, "--json", out]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environ, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(out.read_text())["outcomes"][FINAL_NAME]
    assert counted.get("write\tfull\tstuck", 0) > 0
    assert any(key.endswith("\tabsorbed") for key in counted)
