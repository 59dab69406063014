"""`harness show --rerun`: following what it prints makes the same tensors again."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fake_runs
import later_facts
import pytest
import run_folder
import toy_task
from compare import differing
from conftest import Place

from harness.audit import rerun
from harness.commands import show
from harness.errors import VerificationFailed
from harness.provenance import later
from harness.provenance.signers import Added
from harness.provenance.statements import CheckpointStatement


@pytest.mark.slow
def test_the_instructions_that_are_printed_make_the_same_tensors_and_measures_again(place: Place) -> None:
    """Oracle: the checkpoints of a child run, tensor by tensor, and its signed evaluation; it was killed and
    resumed. The script's own launch is torchrun's; a parent that is another one stops it before it trains."""
    short = {"train": "{steps: 4, global_batch: 4, micro_batch: 2}", "checkpoint": "{every: 4}"}
    place.write("base.yaml", toy_task.config(place.root / "base", **short))
    assert place.harness("train", "base.yaml").code == 0
    begun = {"start": "{checkpoint: base/checkpoints/step-00000004}", "checkpoint": "{every: 4}"}
    train = {"train": "{steps: 12, global_batch: 4, micro_batch: 2}", **begun}
    place.write("toy.yaml", toy_task.config(place.run, **train))
    place.start_and_kill("checkpoints/step-00000004", ["train", "toy.yaml"], 2)
    assert place.harness("train", "toy.yaml", processes=2).code == 0
    keys = ["--key", *sorted(str(path) for path in (place.root / "config" / "harness").glob("*.pub"))]
    checkpoint = place.run / "checkpoints" / "step-00000012"
    assert place.harness("evaluate", str(checkpoint), "--examples", "7", *keys).code == 0
    out = place.root / "again"
    shown = place.harness("show", str(place.run), "--rerun", str(out), "--json", *keys)
    assert shown.code == 0, shown.err
    document: dict[str, Any] = json.loads(shown.out)
    assert document["expected"]["step"] == 12
    *_, parent, script, evaluation = (each["command"] for each in document["steps"])
    assert parent == "harness verify base/checkpoints/step-00000004 --key PUB"
    done = followed(place, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "equal: step 12, every tensor"
    assert differing(place.run, out / "run", after=4) == []
    asked = shlex.split(evaluation.partition(" harness ")[2].replace("--key PUB", shlex.join(keys)))
    answer = place.harness(*asked, "--json")
    assert answer.code == 0, answer.err
    (expected,) = document["expected"]["evaluations"].values()
    assert {name: repr(value) for name, value in json.loads(answer.out)["metrics"].items()} == expected
    assert place.harness("show", str(place.run), "--rerun", str(out)).code == 2  # never over something
    shutil.rmtree(out / "run")
    shutil.rmtree(place.root / "base")
    refused = followed(place, script)
    assert (refused.returncode, "the checkpoint that it began with is not" in refused.stderr) == (1, True)
    assert not (out / "run").exists()


def followed(place: Place, command: str) -> subprocess.CompletedProcess[str]:
    """``command`` in a shell, with the environment of the place, and this Python, in place of new ones."""
    path = os.pathsep.join([str(Path(sys.executable).parent), place.environ["PATH"]])
    environ, words = {**place.environ, "PATH": path}, ["bash", "-c", command]
    return subprocess.run(words, cwd=place.root, env=environ, capture_output=True, text=True, check=False)


def test_the_tier_to_expect_is_said_with_what_the_next_one_lacks(tmp_path: Path) -> None:
    """Oracle: a run that nobody has executed again, with its key and without; the verdict of the JSON."""
    signer = run_folder.identity(tmp_path / "me")
    folder = run_folder.checkpoint(run_folder.build(tmp_path / "run", signer), 30)
    keys = ["--key", f"{tmp_path}/me.ed25519.pub", f"{tmp_path}/me.p256.pub"]
    parser = argparse.ArgumentParser()
    show.add_arguments(parser)
    for number, (words, lacks) in enumerate(
        (([], "no evidence counts: no signature"), (keys, "tier 1a needs: "))
    ):
        out = str(tmp_path / f"again-{number}")
        found = show.run(parser.parse_args([str(folder), "--rerun", out, *words]))
        assert f"\nexpect tier {found.document['repeatability']['verdict']}" in found.text
        assert lacks in found.text


def told(added: Sequence[Added] = (), **changes: Any) -> rerun.Rerun:
    """The instructions for a statement with ``changes`` in some of its sections."""
    facts = fake_runs.predicate("a", 20)
    for section, values in changes.items():
        facts[section] = {**(facts[section] or {}), **values}
    return rerun.rerun(CheckpointStatement("step-00000020", "0" * 64, "h1:", facts), "again", added)


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


@pytest.mark.parametrize("name", ["a\n--index-url https://example.org\nb", "--pre", "", "a b"])
def test_no_name_of_a_package_becomes_an_option_of_pip(name: str) -> None:
    """Oracle: names that pip would read as something else, in the place of the name and of the version."""
    for packages in ({name: "1.0"}, {"a": name or "-"}):
        with pytest.raises(VerificationFailed, match="names the package"):
            told(environment={"packages": packages})


def test_nothing_in_a_statement_becomes_a_command(tmp_path: Path) -> None:
    """Oracle: bash itself, which runs every line; hostile paths of config, corpus and parent, a variable, a
    version and a suite stay words or a comment."""
    bad = "x/$(touch owned);a"
    config = f"data: {{kind: prepared, files: ['{bad}']}}\nstart: {{checkpoint: '~/{bad}'}}\n"
    hostile = {
        "launch": {"command": ["harness", "train", f"{bad}.yaml"]},
        "environment": {"variables": {"OMP_NUM_THREADS": "1; touch owned"}, "python": "3;touch owned"},
        "code": {"git_commit": "a;touch owned"},
        "config": {"text": config},
    }
    facts = later_facts.test_result()
    facts["harness_evaluation"]["dataset"]["name"] = f"digits\n{bad}"
    facts["harness_evaluation"]["procedure"]["settings"] |= {"limit": bad, "lm_eval": "1"}
    statement = later.Later("test-result-0", later.TEST_RESULT, facts)
    start = {"checkpoint": "1" * 64, "step": 1, "name": bad}
    found = told((Added(statement, "me", "k"),), start=start, **hostile)
    script = "\n".join(
        [found.files["rerun.sh"].replace("exit 1", "true"), *(each for _, each in found.steps)]
    )
    assert "~/" in script
    programs = r"torchrun|python -m harness|harness|cp|git|python3.11|again/venv/bin/pip|ls|bash|sha256sum"
    harmless = re.sub(rf"(?m)(^|\$\(| )({programs}) ", r"\1true ", script).replace("set -euo pipefail", "")
    done = ["bash", "-c", f"{harmless}\ntouch ended"]
    subprocess.run(done, cwd=tmp_path, capture_output=True, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["ended"]
