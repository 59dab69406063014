"""The tiers: every rule of `harness.audit.tiers.rules` in the order of its docstring, then the verbs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import later_facts
import pytest
import run_folder

from harness import cli
from harness.audit import attest
from harness.audit.folders import opening
from harness.audit.tiers import rules
from harness.audit.tiers.rules import Claim, Evidence, Replay, compute
from harness.format.ledger import Ledger, Row
from harness.provenance import later
from harness.provenance.policy import rules as policy
from harness.provenance.signing import keys

ROW = Row("aten.index_put", None, "eager", "cpu", "float32", None, "documented", 3, 12, 18, None, "torch")
WORLD = {"what": "launch.world_size", "before": "1", "after": "2"}


def replay(name: str = "replay-0", *, digests: bool = True, processes: int = 1, **changes: Any) -> Replay:
    """A replay of steps 10 to 20, equal on the signed stack unless ``changes`` say otherwise."""
    compared = [
        {"what": what, "count": 10, "equal": True, "recorded": None, "replayed": None}
        for what in (["gradients", "state"] if digests else ["loss", "grad_norm"])
    ]
    replayer = {"harness": "0.1.0", "environment": {"world_size": processes}}
    facts = later_facts.replay() | {"compared": compared, "replayer": replayer} | changes
    return Replay(f"step-00000020/{name}", "auditor", False, 1, facts)


def evidence(*replays: Replay, **changes: Any) -> Evidence:
    """Three segments of ten steps and a ledger without rows."""
    segments = ((0, 10), (10, 20), (20, 30))
    return Evidence(segments=segments, ledger=Ledger("warn"), replays=replays, **changes)


def differing(*differences: Mapping[str, str]) -> dict[str, Any]:
    """The fingerprint of a replay where these things were other ones."""
    return {"fingerprint": {"same": not differences, "differences": list(differences)}}


def floor(**changes: Any) -> dict[str, Any]:
    """A noise floor that holds, with ``changes``."""
    facts = {
        "measure": "|w - w'| / |update|", "precision": "fp32", "weak": False, "measured": "1e-6",
        "bound": "3e-6", "distance": "2e-6", "samples": 5, "source": "measured",
        "tensors": [{"name": "embed.weight", "floor": "1e-6", "distance": "2e-6"}],
        "detectable": {"what": "learning rate", "least": "1e-5"},
    }  # fmt: skip
    return {"verdict": "within floor", "floor": {**facts, **changes}}


def held(told: rules.Tiers) -> list[str]:
    """The names of the tiers that hold."""
    return [each.name for each in told.tiers if each.held]


def test_nothing_counts_when_no_signature_was_checked() -> None:
    """Oracle: the rule; the replay would be enough for tier 1a."""
    told = compute(evidence(replay(), nothing=rules.NOT_SIGNED))
    assert (told.headline, held(told)) == ("none: not observed", [])
    assert held(compute(evidence(replay()))) == ["1a"]


def test_without_evidence_the_answer_is_not_observed() -> None:
    """Oracle: the words; a ledger without rows is no evidence."""
    told = compute(evidence())
    assert (told.headline, held(told)) == ("none: not observed", [])
    assert told.next is not None
    assert "a replay" in told.next.missing[0]


def test_a_replay_that_compared_only_losses_and_norms_is_no_evidence() -> None:
    """Oracle: the same replay with digests is tier 1a."""
    told = compute(evidence(replay(digests=False)))
    assert (told.headline, held(told)) == ("none: not observed", [])
    assert "digests of gradients or state" in told.tiers[0].missing[0]


def test_a_replay_that_is_outside_contradicts_every_tier_and_an_inconclusive_one_says_nothing() -> None:
    """Oracle: the rule, beside evidence that is enough for tiers 1a and 3."""
    claim = Claim("wider is better", 5, 2)
    good = evidence(replay(), claims=(claim,))
    assert held(compute(good)) == ["1a", "3"]
    outside = replace(good, replays=(replay(), replay("replay-1", verdict="outside")))
    assert held(compute(outside)) == []
    assert compute(outside).headline == "none: contradicted by step-00000020/replay-1"
    unclear = replace(good, replays=(replay(), replay("replay-1", verdict="inconclusive")))
    assert held(compute(unclear)) == ["1a", "3"]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ["1a"]),
        ({"steps": {"from": 0, "to": 30}}, ["1a"]),
        ({"steps": {"from": 11, "to": 20}}, []),
        ({"steps": {"from": 10, "to": 19}}, []),
        (differing({"what": "stack.torch", "before": "2.12", "after": "2.13"}), []),
        ({**differing(WORLD), "processes": 2}, ["1b"]),
        ({"fingerprint": {"same": False, "differences": []}}, []),
    ],
)
def test_tier_1a_takes_an_equal_replay_of_a_whole_segment_on_the_signed_stack(
    changes: dict[str, Any], wanted: list[str]
) -> None:
    """Oracle: the rule, at both ends of the segment from 10 to 20."""
    assert held(compute(evidence(replay(**changes)))) == wanted


def test_an_operator_that_was_measured_to_differ_is_in_the_way_of_tier_1a() -> None:
    """Oracle: the operator is named, although a replay was equal."""
    told = compute(replace(evidence(replay()), ledger=Ledger("warn", (replace(ROW, evidence="measured"),))))
    assert held(told) == []
    assert "aten.index_put" in told.tiers[0].missing[0]


@pytest.mark.parametrize("kind", ["documented", "observed", "unknown"])
def test_other_rows_are_in_the_way_unless_refuted_or_at_work_in_steps_found_equal(kind: str) -> None:
    """Oracle: the rule; the replay holds steps 11 to 20, a row was seen from 12 to 18 or from 22 to 28."""
    inside, outside = replace(ROW, evidence=kind), replace(ROW, evidence=kind, first_step=22, last_step=28)
    base = evidence(replay())
    assert held(compute(replace(base, ledger=Ledger("warn", (inside,))))) == ["1a"]
    assert held(compute(replace(base, ledger=Ledger("warn", (outside,))))) == []
    for clean, held_then in ((29, []), (30, ["1a"])):
        refuted = replace(outside, evidence="refuted", count=clean)
        assert held(compute(replace(base, ledger=Ledger("warn", (outside, refuted))))) == held_then
    assert held(compute(replace(base, ledger=None, unread_rows=1))) == []


def test_how_many_segments_were_replayed_is_told() -> None:
    """Oracle: one of three; ten steps bound the rate at 3/10."""
    reaches = compute(evidence(replay())).tiers[0].reaches
    assert "1 of 3 segments" in reaches[0]
    assert "1/3" in reaches[0]
    assert "30.0%" in reaches[1]


def test_tier_1b_takes_an_equal_replay_with_another_number_of_processes_and_not_tier_1a() -> None:
    """Oracle: the rule; a stack that differs as well is not enough, nor is part of a segment, nor one beside
    an operator that was measured to differ or was at work in none of the replayed steps."""
    other = replay("replay-1", processes=2, **differing(WORLD))
    assert held(compute(evidence(replay(), other))) == ["1a", "1b"]
    assert "1, 2 processes" in compute(evidence(replay(), other)).tiers[1].reaches[0]
    assert held(compute(evidence(other))) == ["1b"]
    assert compute(evidence(other)).headline == "tier 1b"
    for rows in (replace(ROW, evidence="measured"), replace(ROW, first_step=22, last_step=28)):
        assert held(compute(replace(evidence(other), ledger=Ledger("warn", (rows,))))) == []
    part = replay("replay-1", processes=2, steps={"from": 11, "to": 20}, **differing(WORLD))
    assert held(compute(evidence(part))) == []
    both = replay(
        "replay-1", processes=2, **differing(WORLD, {"what": "stack.torch", "before": "", "after": ""})
    )
    assert held(compute(evidence(replay(), both))) == ["1a"]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ["2"]),
        ({"samples": 4}, []),
        ({"distance": None}, []),
        ({"distance": "3.1e-6"}, []),
        ({"tensors": [{"name": "head.bias", "floor": "1e-9", "distance": "4e-9"}]}, []),
        ({"detectable": {"what": "learning rate", "least": None}}, []),
    ],
)
def test_tier_2_takes_a_distance_within_three_floors_of_five_perturbations(
    changes: dict[str, Any], wanted: list[str]
) -> None:
    """Oracle: the numbers; the verdict's word is the same in every case."""
    assert held(compute(evidence(replay(**floor(**changes))))) == wanted


def test_a_wide_floor_is_called_weak_and_the_least_change_is_told() -> None:
    """Oracle: the words on the screen."""
    told = compute(evidence(replay(**floor(precision="bf16", weak=True)))).tiers[2].evidence[0]
    assert "weak, since bf16" in told
    assert "would have found learning rate 1e-5" in told


@pytest.mark.parametrize(("seeds", "stacks", "wanted"), [(5, 2, ["3"]), (4, 2, []), (5, 1, [])])
def test_tier_3_takes_a_supported_claim_over_five_seeds_and_two_stacks(
    seeds: int, stacks: int, wanted: list[str]
) -> None:
    """Oracle: the two limits."""
    assert held(compute(evidence(claims=(Claim("wider is better", seeds, stacks),)))) == wanted


@pytest.fixture
def replayed(tmp_path: Path) -> Callable[[str], Path]:
    """A run folder whose checkpoint 20 has an equal replay, signed by the identity of that name."""

    def build(who: str) -> Path:
        signer = run_folder.identity(tmp_path / "me")
        other = signer if who == "me" else run_folder.identity(tmp_path / who)
        root = run_folder.build(tmp_path / "run", signer)
        checkpoint = run_folder.checkpoint(root, 20)
        opened = opening.open_checkpoint(checkpoint, policy.from_keys(keys.public_keys(signer)))
        attest.add(opened, later.REPLAY, replay().predicate, other)
        return root

    return build


@pytest.mark.parametrize("verb", ["verify", "show", "report"])
def test_the_tier_is_shown_by_every_verb_to_whom_trusts_the_replayer(
    verb: str, replayed: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: tier 1a with the run's keys, nothing without; both outputs of each verb."""
    root = replayed("me")
    target = run_folder.checkpoint(root, 20) if verb == "show" else root
    words = [verb, str(target), *(["--out", str(tmp_path / "out")] if verb == "report" else [])]
    trust = ["--key", str(tmp_path / "me.ed25519.pub"), str(tmp_path / "me.p256.pub")]
    cli.main([*words, *trust])
    text = capsys.readouterr().out + "".join(path.read_text() for path in tmp_path.glob("out/report.md"))
    assert "tier 1a: the same bits again" in text
    cli.main([*words, *trust, "--json"])
    found = json.loads(capsys.readouterr().out)
    found = found["runs"][0] if verb == "report" else found
    assert found["repeatability"]["verdict"] == "tier 1a"
    if verb != "verify":
        cli.main([*words, "--json"])
        found = json.loads(capsys.readouterr().out)
        found = found["runs"][0] if verb == "report" else found
        assert found["repeatability"]["verdict"] == "none: not observed"


def test_a_replay_under_a_key_that_is_not_trusted_is_no_evidence(
    replayed: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: no tier without the stranger's key, tier 1a with it, whose name is told."""
    root = replayed("stranger")
    trust = ["--key", str(tmp_path / "me.ed25519.pub"), str(tmp_path / "me.p256.pub")]
    cli.main(["verify", str(root), *trust, "--json"])
    assert json.loads(capsys.readouterr().out)["repeatability"]["tiers"][0]["held"] is False
    cli.main(["verify", str(root), *trust, str(tmp_path / "stranger.ed25519.pub"), "--json"])
    found = json.loads(capsys.readouterr().out)["repeatability"]
    assert found["verdict"] == "tier 1a"
    assert "own key" not in found["tiers"][0]["evidence"][0]


def test_what_a_rerun_takes_says_how_far_it_would_repeat(
    replayed: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: `show --rerun` names the steps that were executed again."""
    checkpoint = run_folder.checkpoint(replayed("me"), 20)
    trust = ["--key", str(tmp_path / "me.ed25519.pub"), str(tmp_path / "me.p256.pub")]
    cli.main(["show", str(checkpoint), "--rerun", str(tmp_path / "again"), *trust, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["repeatability"]["verdict"] == "tier 1a"
    assert any("1 of 1 segment between checkpoints" in each for each in found["could_vary"])
