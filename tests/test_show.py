"""`harness show`: what made a checkpoint, in one screen."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import run_folder

from harness import cli
from harness.audit import show as screen
from harness.commands import Outcome, show
from harness.errors import EvidenceIncomplete, UsageError, VerificationFailed
from harness.format import layout
from harness.provenance.signing import keys
from harness.provenance.signing.keys import Signer


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    """An identity in tmp_path/me.*."""
    return run_folder.identity(tmp_path / "me")


@pytest.fixture
def root(tmp_path: Path, signer: Signer) -> Path:
    """A run with checkpoints 10, 20, 30, resumed at 20."""
    return run_folder.build(tmp_path / "run", signer, resumes={20: "same-data"})


def shown(path: Path, *words: str) -> Outcome:
    """`harness show PATH WORDS`."""
    parser = argparse.ArgumentParser()
    show.add_arguments(parser)
    return show.run(parser.parse_args([str(path), *words]))


def key_words(root: Path) -> list[str]:
    """``--key`` with both public halves of the run's signer."""
    return ["--key", str(root.parent / "me.ed25519.pub"), str(root.parent / "me.p256.pub")]


def test_every_fact_of_the_statement_that_a_reader_asks_for_is_on_the_screen(root: Path) -> None:
    """Oracle: the values that the sample run was made with."""
    text = shown(run_folder.checkpoint(root, 30)).text
    for words in (
        "step-00000030", "sample", "seed 3", "updates 21 to 30", "step 20", "same-data from step 20", "bare",
        "1 process on 1 node", "ddp", "fp32", "harness train toy.yaml", "d" * 40, "clean", "toy_task:Toy",
        "e" * 64, "50 samples", "240 samples", "3.11.7", "torch 2.13.0", "mode warn", "not observed",
        "15 parameters", "accuracy 0.5", "2026-11-23T20:00:00Z",
    ):  # fmt: skip
        assert words in text, words


def test_the_screen_has_at_most_40_lines_of_100_columns(tmp_path: Path, signer: Signer) -> None:
    """Oracle: counting, on a statement whose every list and string is long."""

    def lengthen(step: int, predicate: run_folder.Predicate) -> None:
        item = {"what": "world_size " * 30, "before": "1" * 200, "after": "2" * 200}
        predicate["segment"] = predicate["segment"] | {
            "differences": [item] * 50, "accepted": ["code " * 9] * 50,
            "skipped": [{"name": "step-00000010" * 9, "reason": "bytes " * 90, "checkpoint": None}] * 50,
        }  # fmt: skip
        predicate["launch"]["command"] = ["word"] * 500
        predicate["metrics"]["evaluation"] = {f"metric {number}": "0.5" for number in range(100)}
        predicate["data"]["counts"] = {f"count {number}": number for number in range(100)}

    root = run_folder.build(tmp_path / "run", signer, steps=(10,), tweak=lengthen)
    lines = shown(root).text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= screen.WIDTH == 100


def test_without_a_key_the_first_line_says_not_verified(root: Path) -> None:
    """Oracle: the first line and the flag in the document."""
    outcome = shown(root)
    assert outcome.text.splitlines()[0].startswith("not verified")
    assert outcome.document["verified"] is False
    assert outcome.document["signers"] == []


def test_with_the_key_it_names_the_signer_and_says_that_payload_was_not_hashed(root: Path) -> None:
    """Oracle: the key id of the key that signed."""
    outcome = shown(root, *key_words(root))
    first = outcome.text.splitlines()[0]
    assert keys.load_public(root.parent / "me.ed25519.pub").key_id[:16] in first
    assert "payload bytes not hashed" in first
    assert outcome.document["verified"] is True
    assert outcome.document["payload_hashed"] is False


def test_a_key_that_did_not_sign_shows_nothing(root: Path, tmp_path: Path) -> None:
    """Oracle: VerificationFailed, which exits 1."""
    run_folder.identity(tmp_path / "other")
    with pytest.raises(VerificationFailed, match="signed by none"):
        shown(root, "--key", str(tmp_path / "other.ed25519.pub"))


def test_a_changed_manifest_is_refused_with_a_key(root: Path) -> None:
    """Oracle: one byte more in MANIFEST.json, which then has another sha256."""
    manifest = run_folder.checkpoint(root, 30) / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    with pytest.raises(VerificationFailed, match="manifest"):
        shown(root, *key_words(root))


def test_a_run_folder_means_its_newest_checkpoint_and_says_so(root: Path) -> None:
    """Oracle: the highest step."""
    outcome = shown(root)
    assert "step-00000030, the newest that is in /" in outcome.text
    assert outcome.document["newest_of"] == str(root)
    assert shown(run_folder.checkpoint(root, 10)).document["newest_of"] is None


def test_a_folder_that_is_neither_run_nor_checkpoint_is_a_usage_error(tmp_path: Path) -> None:
    """Oracle: exit codes 2 and 4 of the contract."""
    with pytest.raises(UsageError):
        shown(tmp_path / "nothing")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(EvidenceIncomplete):
        shown(tmp_path / "empty")


def test_a_pruned_checkpoint_is_shown_as_such(tmp_path: Path, signer: Signer) -> None:
    """Oracle: its name, and that the ledger is gone; with the key its signatures still hold."""
    root = run_folder.build(tmp_path / "run", signer, pruned=(10,))
    pruned = root / "checkpoints" / "pruned-step-00000010"
    for words in ([], key_words(root)):
        text = shown(pruned, *words).text
        assert "PRUNED" in text
        assert "ledger.json is not here" in text


def test_a_ledger_that_is_not_the_signed_one_is_never_used(root: Path) -> None:
    """Oracle: other bytes in ledger.json: named without a key, refused with one."""
    ledger = run_folder.checkpoint(root, 30) / "ledger.json"
    ledger.write_bytes(ledger.read_bytes().replace(b'"warn"', b'"off" '))
    assert "ledger.json cannot be used" in shown(root).text
    with pytest.raises(VerificationFailed, match=r"ledger\.json"):
        shown(root, *key_words(root))


def test_what_could_still_vary_is_said(root: Path) -> None:
    """Oracle: the sample's ledger observed nothing and its mode is warn."""
    reasons = shown(root).document["could_vary"]
    assert any("not observed" in reason for reason in reasons)
    assert any("determinism.mode warn" in reason for reason in reasons)


def test_strings_that_a_terminal_would_obey_are_escaped(tmp_path: Path, signer: Signer) -> None:
    """Oracle: no control character on the screen, the escape visible instead."""

    def poison(step: int, predicate: run_folder.Predicate) -> None:
        predicate["run"]["name"] = "a\x1b[2Jb\nnot verified"
        predicate["launch"]["command"] = ["\x9b31m\u202e"]

    text = shown(run_folder.build(tmp_path / "run", signer, steps=(10,), tweak=poison)).text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert r"a\x1b[2Jb\nnot verified" in text


def test_an_environment_of_other_shapes_than_ours_is_shown_too(tmp_path: Path, signer: Signer) -> None:
    """Oracle: the environment is an open object; odd types and missing names must not break the screen."""

    def other(step: int, predicate: run_folder.Predicate) -> None:
        predicate["environment"] = {"packages": ["torch"], "stack": 5, "cpus": None}
        predicate["determinism"]["settings"] = {"threads": "many"}

    assert "unknown" in shown(run_folder.build(tmp_path / "run", signer, steps=(10,), tweak=other)).text


def test_the_gpus_of_the_stack_are_shown(tmp_path: Path, signer: Signer) -> None:
    """Oracle: names as `harness.determinism.settings.stack` writes them."""

    def gpus(step: int, predicate: run_folder.Predicate) -> None:
        predicate["environment"]["stack"] = {
            "devices": "NVIDIA H200 sm_90",
            "driver": "570.1",
            "cuda": "12.8",
        }

    text = shown(run_folder.build(tmp_path / "run", signer, steps=(10,), tweak=gpus)).text
    assert "GPU NVIDIA H200 sm_90; driver 570.1, cuda 12.8" in text


def test_json_prints_one_object_with_the_whole_predicate(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: json.loads of stdout."""
    assert cli.main(["show", str(root), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["predicate"]["steps"] == {"from": 20, "to": 30}
    assert document["kind"] == "complete"


@pytest.mark.parametrize(
    "place", ["checkpoints/step-00000030/new", "checkpoints/new", "checkpoints/step-00000040"]
)
@pytest.mark.parametrize("verb", ["show", "report", "head"])
def test_nothing_is_written_among_what_is_signed(
    verb: str, place: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2 in one line, and the names in the run as before; beside it, all of them write."""
    words = [verb, str(root), "--rerun" if verb == "show" else "--out"]
    before = sorted(root.rglob("*"))
    assert cli.main([*words, str(root / place)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "which holds what is signed and nothing else" in line
    assert sorted(root.rglob("*")) == before
    assert cli.main([*words, str(root / "new")]) == 0


def test_a_head_is_no_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: exit code 2; 1 would say that evidence is wrong."""
    assert cli.main(["head", str(root), "--out", str(root)]) == 2
    assert "is a folder, and a head is a file" in capsys.readouterr().err


def test_an_export_is_told_from_a_checkpoint_that_is_incomplete(tmp_path: Path) -> None:
    """Oracle: usage; exit code 4 would send its reader to the maker for files that no export has."""
    (tmp_path / layout.EXPORT_BUNDLE).parent.mkdir()
    (tmp_path / layout.EXPORT_BUNDLE).touch()
    with pytest.raises(UsageError, match="is an export, and no checkpoint"):
        shown(tmp_path)


@pytest.mark.parametrize(("each", "said"), [(1, "samples; next"), (16, "tokens; next")])
def test_tokens_are_told_of_a_task_that_has_them(
    each: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the cursor, which counts a sample as one unit where a task has no tokens."""

    def counted(step: int, predicate: run_folder.Predicate) -> None:
        predicate["cursor"]["tokens"] *= each

    root = run_folder.build(tmp_path / "run", run_folder.identity(tmp_path / "me"), tweak=counted)
    assert cli.main(["show", str(root)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cursor")]
    assert said in line
    assert ("tokens" in line) == (each > 1)
