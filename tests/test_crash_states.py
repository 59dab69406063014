"""What a crash in a save may leave: a sample of scripts/bench/crash_states.py, which goes through all of it.

Oracle: the run that nobody interrupted, and `harness verify`; the record of the operations is itself checked
by rebuilding the folder from it. A saver that syncs nothing is there to show that the check can fail.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TIMEOUT

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench"


def verdicts(tmp_path: Path, saver: str, sample: int) -> dict[str, dict[str, int]]:
    """Verdict → number of states, by crash model."""
    out = tmp_path / "out.json"
    words = [
        sys.executable,
        BENCH / "crash_states.py",
        "--only",
        saver,
        "--sample",
        str(sample),
        "--json",
        out,
    ]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environ, timeout=TIMEOUT)
    assert out.exists(), done.stdout + done.stderr
    found: dict[str, dict[str, int]] = json.loads(out.read_text())["verdicts"][saver]
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_PRELOAD and /proc")
def test_a_crash_in_a_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    """Every 67th state: none is stuck, lost or other than one that was saved."""
    found = verdicts(tmp_path, "harness", 67)
    assert {name for counts in found.values() for name in counts} == {"old", "new"}
    assert sum(sum(counts.values()) for counts in found.values()) > 30


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_PRELOAD and /proc")
def test_a_saver_that_syncs_nothing_is_found_out(tmp_path: Path) -> None:
    """A rename without a sync survives a kill, and no power cut."""
    found = verdicts(tmp_path, "torch.save and rename", 10)
    assert set(found["kill"]) <= {"old", "new"}
    assert found["ext4"].get("stuck", 0) + found["posix"].get("stuck", 0) > 0
