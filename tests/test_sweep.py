"""Sweeps: members that are killed or stopped end as if nothing had happened, and plans stay on record."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import toy_task
from compare import differing
from conftest import Place, finish

from harness import cli
from harness.errors import UsageError
from harness.provenance.signing import keys as signing
from harness.sweeps import members, processes, register
from harness.sweeps.processes import Ended, Job

SECTIONS = {"train": "{steps: 12, global_batch: 4, micro_batch: 2}", "checkpoint": "{every: 4}"}


def member_of(process: int, folder: str) -> int:
    """The process that trains in ``folder``."""
    for child in psutil.Process(process).children(recursive=True):
        if any(folder in word for word in child.cmdline()):
            return child.pid
    raise AssertionError("no such member")


@pytest.mark.slow
def test_members_that_are_killed_and_a_sweep_that_is_stopped_end_like_a_plain_run(place: Place) -> None:
    """Oracle: `harness train` of the seed that was killed, uninterrupted, tensor by tensor."""
    place.write("toy.yaml", toy_task.config(place.root / "toy", **SECTIONS))
    words = ["sweep", "toy.yaml", "--seeds", "0..1", "--out", str(place.root / "sweep")]
    place.run = place.root / "sweep" / "seed-0"
    place.hold("checkpoints/step-00000004")
    first = place.start(words)
    place.wait_for(first, "checkpoints/step-00000004")
    os.kill(member_of(first.pid, str(place.run)), signal.SIGKILL)
    place.run = place.root / "sweep" / "seed-1"
    place.hold("metrics.jsonl")
    place.wait_for(first, "metrics.jsonl")
    first.send_signal(signal.SIGTERM)
    place.go_on()
    stopped = finish(first)
    assert "seed-0: killed by SIGKILL; started again" in stopped.out
    assert stopped.code == 75
    assert "restart with the same command" in stopped.err
    done = place.harness(*words, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert [one["failure"] for one in document["members"]] == [None, None]
    assert document["members"][0]["attempts"] == 0
    assert [one["verification"].split(": ")[1] for one in document["report"]["runs"]] == ["verified"] * 2
    assert place.harness("train", "toy.yaml", "run.seed=0", f"run.dir={place.root / 'plain'}").code == 0
    assert differing(place.root / "plain", place.root / "sweep" / "seed-0") == []


@pytest.mark.slow
def test_a_member_that_fails_is_named_and_the_others_go_on(place: Place) -> None:
    """Oracle: a loss that becomes NaN with one variant; exit code 1, and the report lists it."""
    place.write("toy.yaml", toy_task.config(place.root / "toy", **SECTIONS))
    bad = ["--variant", "bad", "task.options.poison=9", "--variant", "good", "task.options.width=8"]
    done = place.harness("sweep", "toy.yaml", "--seeds", "3", *bad)
    assert done.code == 1
    assert "bad-seed-3" in done.last_line
    page = (place.root / "toy-seeds" / "report" / "report.md").read_text()
    assert "bad-seed-3: loss or gradients were not finite" in page.replace("\\", "")
    assert (place.root / "toy-seeds" / "good-seed-3" / "checkpoints" / "step-00000012").is_dir()


def test_a_sweep_of_which_no_member_could_begin_says_why(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 1 and the reason of the first member; there is nothing to report on."""
    monkeypatch.chdir(place.root)
    config = place.write("toy.yaml", toy_task.config(place.run))
    monkeypatch.setenv("HARNESS_SIGNING_KEY", str(signing.create(place.root / "me").private))

    def failed(jobs: Sequence[Job], **_: object) -> list[Ended]:
        return [Ended(job.member, 1, "exit code 3: no space left") for job in jobs]

    monkeypatch.setattr(processes, "run", failed)
    assert cli.main(["sweep", str(config), "--seeds", "0..1"]) == 1
    said = capsys.readouterr().out
    assert "2 of 2 members are not complete: seed-0, exit code 3: no space left" in said
    assert "no report: no member of the sweep has begun" in said


@pytest.mark.parametrize(
    ("text", "seeds"), [("0..3", (0, 1, 2, 3)), ("5", (5,)), ("1,7..8", (1, 7, 8)), ("0..0", (0,))]
)
def test_seeds_are_ranges_with_both_ends_and_lists(text: str, seeds: tuple[int, ...]) -> None:
    """Oracle: the contract, `--seeds 0..4` for several seeds."""
    assert members.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "3..1", "a", "1,1", "0..3,2", "-1", "0..99999999"])
def test_seeds_that_mean_nothing_are_refused(text: str) -> None:
    """Oracle: the error tree."""
    with pytest.raises(UsageError):
        members.parse_seeds(text)


def planned(place: Place, *words: str) -> int:
    """Enter a sweep into its register without running it: a member that does not exist is refused last."""
    config = str(place.write("toy.yaml", toy_task.config(place.root / "toy", task='{kind: "toy_task:Toy"}')))
    return cli.main(["sweep", config, *words, "--member", "99", "--out", str(place.root / "sweep")])


def test_seeds_that_are_added_later_stay_on_record(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: both plans in sweep.json, and the members of the second."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place.root / "config"))
    assert planned(place, "--seeds", "0..1") == 2
    assert planned(place, "--seeds", "0..1") == 2
    assert planned(place, "--seeds", "0..2") == 2
    found = register.read(place.root / "sweep")
    assert found is not None
    assert [plan.seeds for plan in found.plans] == [(0, 1), (0, 1, 2)]
    assert found.names == ["seed-0", "seed-1", "seed-2"]


def test_a_variant_that_became_another_one_is_refused_and_says_where(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the key that was changed; an operational one may change."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place.root / "config"))
    planned(place, "--seeds", "0", "--variant", "a", "optimizer.lr=1e-3")
    planned(place, "--seeds", "0", "--variant", "a", "optimizer.lr=1e-3", "checkpoint.every=3")
    capsys.readouterr()
    assert planned(place, "--seeds", "0", "--variant", "a", "optimizer.lr=2e-3") == 2
    assert "optimizer.lr: 0.001 → 0.002" in capsys.readouterr().err


def test_a_variant_may_not_set_what_the_sweep_sets(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the seed of every member is the sweep's."""
    assert planned(place, "--seeds", "0", "--variant", "a", "run.seed=4") == 2
    assert "run.seed=4" in capsys.readouterr().err


def test_a_register_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    """Oracle: a path in the name of a variant, which would lead out of the folder."""
    from harness.errors import VerificationFailed

    text = {"format": register.FORMAT, "variants": {"../x": ""}, "plans": []}
    text["plans"] = [{"created": "", "seeds": [0], "variants": ["../x"], "finished": 0, "claims": None}]
    (tmp_path / register.NAME).write_text(json.dumps(text))
    with pytest.raises(VerificationFailed, match="name of a variant"):
        register.read(tmp_path)
