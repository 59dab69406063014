"""`harness show --rerun`: following what it prints makes the same tensors again."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import fake_runs
import pytest
import run_folder
import toy_task
from compare import differing
from conftest import Place

from harness.audit import rerun
from harness.commands import show
from harness.provenance.statements import CheckpointStatement


@pytest.mark.slow
def test_the_script_that_is_printed_makes_the_same_tensors_again(place: Place) -> None:
    """Oracle: the checkpoints of the first run, tensor by tensor; the first was killed and resumed. The
    script's own launch is torchrun's."""
    train = {"train": "{steps: 12, global_batch: 4, micro_batch: 2}", "checkpoint": "{every: 4}"}
    place.write("toy.yaml", toy_task.config(place.run, **train))
    place.kill_at(place.start(["train", "toy.yaml"], 2), "checkpoints/step-00000004")
    assert place.harness("train", "toy.yaml", processes=2).code == 0
    out = place.root / "again"
    shown = place.harness("show", str(place.run), "--rerun", str(out), "--json")
    assert shown.code == 0, shown.err
    document: dict[str, Any] = json.loads(shown.out)
    assert document["expected"]["step"] == 12
    assert document["steps"][-1]["command"].endswith("rerun.sh")
    script = ["bash", str(out / "rerun.sh")]
    done = subprocess.run(
        script, cwd=place.root, env=place.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "equal: step 12, every tensor"
    assert differing(place.run, out / "run", after=4) == []
    assert place.harness("show", str(place.run), "--rerun", str(out)).code == 2  # never over something


def test_the_tier_to_expect_is_said_with_what_the_next_one_lacks(tmp_path: Path) -> None:
    """Oracle: a run that nobody has executed again, with its key and without; the verdict of the JSON."""
    signer = run_folder.identity(tmp_path / "me")
    folder = run_folder.checkpoint(run_folder.build(tmp_path / "run", signer), 30)
    keys = ["--key", f"{tmp_path}/me.ed25519.pub", f"{tmp_path}/me.p256.pub"]
    parser = argparse.ArgumentParser()
    show.add_arguments(parser)
    for number, words in enumerate(([], keys)):
        out = str(tmp_path / f"again-{number}")
        found = show.run(parser.parse_args([str(folder), "--rerun", out, *words]))
        verdict = found.document["repeatability"]["verdict"]
        assert f"\nexpect tier {verdict}" in found.text
        assert ("\ntier 1a needs: " in found.text) == ("not observed" in verdict), found.text


def told(**changes: Any) -> rerun.Rerun:
    """The instructions for a statement with ``changes`` in some of its sections."""
    facts = fake_runs.predicate("a", 20)
    for section, values in changes.items():
        facts[section].update(values)
    return rerun.rerun(CheckpointStatement("step-00000020", "0" * 64, "h1:", facts))


def test_a_record_that_is_whole_lacks_nothing() -> None:
    """Oracle: a clean commit, known packages, one launch."""
    found = told()
    assert found.lacking == ()
    assert found.steps[0][1] == f"git checkout {'d' * 40}"
    assert found.files["requirements.txt"] == "torch==2.13.0\n"
    assert "torchrun --nproc-per-node 2 -m harness train" in found.files["rerun.sh"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"code": {"git_commit": None, "dirty": None}}, "the git commit"),
        ({"code": {"dirty": True, "diff_sha256": "9" * 64}}, "uncommitted changes (sha256 999"),
        ({"environment": {"packages": {}}}, "the versions of the packages"),
        ({"launch": {"nodes": 2}}, "the addresses of its 2 nodes"),
    ],
)
def test_what_is_not_on_record_is_said_first(changes: dict[str, Any], said: str) -> None:
    """Oracle: the one thing that was taken away."""
    assert any(said in text for text in told(**changes).lacking)


def test_nothing_in_a_statement_becomes_a_command(tmp_path: Path) -> None:
    """Oracle: bash itself; a hostile config path and variable stay one quoted word."""
    hostile = {
        "launch": {"command": ["harness", "train", "x/$(touch owned);a.yaml"]},
        "environment": {"variables": {"OMP_NUM_THREADS": "1; touch owned"}},
    }
    script = told(**hostile).files["rerun.sh"]
    harmless = script.replace("torchrun", "true").replace("python -m harness", "true").replace("cp ", "true ")
    subprocess.run(["bash", "-c", harmless], cwd=tmp_path, capture_output=True, check=False)
    assert not (tmp_path / "owned").exists()
