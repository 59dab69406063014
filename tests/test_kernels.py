"""`harness kernels`: the ledger of a checkpoint, read without torch."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness.audit.kernels import not_looked_at, render
from harness.commands import kernels
from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format import layout, strict_json
from harness.format import ledger as document
from harness.format.budget import Budget
from harness.format.ledger import Catalogue, Coverage, Ledger, Mitigated, Row
from harness.format.manifest import FileEntry, Manifest, state_digest
from harness.provenance.seal import seal
from harness.provenance.signing import keys

ROW = Row(
    op="aten.index_put",
    kernel=None,
    backend="eager",
    device="cpu",
    dtype="float32",
    call_site="model.py:8 forward (backward)",
    evidence="documented",
    count=3,
    first_step=1,
    last_step=100,
    alternative="torch.nn.functional.embedding",
    source="torch.use_deterministic_algorithms",
)
CENSUS = Coverage("census", 3, 1, 100, (0,), 750, 4000)
LEDGER = Ledger(mode="warn", rows=(ROW,), catalogue=Catalogue("0" * 64, "2.13.0", 48, 7), coverage=(CENSUS,))


CURSOR = {"step": 5, "samples": 5, "tokens": 5, "epoch": 0, "position": 5}


def predicate(ledger: bytes, step: int = 5) -> dict:
    """A small predicate that the schema accepts."""
    return {
        "run": {"id": "0" * 32, "name": "tiny", "seed": 0},
        "sequence": 0,
        "steps": {"from": 0, "to": step},
        "parent": "genesis",
        "start": None,
        "segment": {
            "number": 0, "reason": "first launch", "class": "genesis", "differences": [], "accepted": [],
            "skipped": [], "resumed_from": None,
        },
        "launch": {
            "command": ["harness"], "launcher": "bare", "world_size": 1, "nodes": 1,
            "mesh": {"data_parallel": 1}, "precision": "fp32",
            "compile": False, "parallel": "ddp", "backend": "none",
        },
        "config": {"sha256": hashlib.sha256(b"run: {}").hexdigest(), "text": "run: {}"},
        "code": {"harness": "0", "git_commit": None, "dirty": None, "diff_sha256": None, "task": None},
        "data": {"kind": "text", "corpus_sha256": None, "tokenizer_sha256": None, "counts": {}},
        "cursor": CURSOR | {"step": step},
        "environment": {},
        "determinism": {"mode": "warn", "settings": {}, "ledger": document.summary(ledger)},
        "state": {"sha256": state_digest(()), "tensors": 0, "parameters": 0},
        "metrics": {
            "chain": None,
            "loss": None,
            "grad_norm": None,
            "gradients": None,
            "state": None,
            "evaluation": {},
        },
        "log": None,
        "created": "2026-11-23T20:00:00Z",
        "outcome": "ok",
    }  # fmt: skip


def write(root: Path, ledger: bytes, stated: bytes | None = None, step: int = 5) -> Path:
    """A run with one sealed checkpoint whose payload is ledger and trainer.json; returns the checkpoint."""
    folder = layout.RunFolder(root).checkpoint(step)
    folder.mkdir(parents=True)
    trainer = {"step": step, "world_size": 1, "segment": 0, "cursor": CURSOR | {"step": step}}
    payload = {layout.LEDGER: ledger, layout.TRAINER: strict_json.dumps(trainer)}
    for name, data in payload.items():
        (folder / name).write_bytes(data)
    entries = [FileEntry(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in payload.items()]
    manifest = Manifest(tuple(entries), ())
    keys.create(root / "me") if not (root / "me.key").exists() else None
    facts = predicate(stated or ledger, step)
    seal(folder, manifest, folder.name, facts, keys.load_signer(root / "me.key"))
    return folder


def run(path: Path, *key: Path):
    """`harness kernels PATH --key …`."""
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    words = [str(path), *(["--key", *map(str, key)] if key else [])]
    return kernels.run(parser.parse_args(words))


def test_rows_are_printed_with_what_to_act_on(tmp_path):
    """Oracle: op, place, evidence, count and alternative of the row, and the trust in it."""
    outcome = run(write(tmp_path, LEDGER.to_bytes()))
    assert outcome.exit_code == 0
    for words in (
        "aten.index_put",
        "model.py:8 forward",
        "documented",
        "3 times, steps 1 to 100",
        "embedding",
    ):
        assert words in outcome.text
    assert "not verified" in outcome.text
    assert outcome.document["verified"] is False
    assert outcome.document["rows"][0]["op"] == "aten.index_put"
    json.dumps(outcome.document)


def test_what_looking_has_cost_is_told_by_what_it_was_spent_on(tmp_path):
    """Oracle: the numbers; the budget of an earlier version's ledger, which does not tell digests apart."""
    earlier = json.loads(replace(LEDGER, budget=Budget(10_000, 17_000, 400)).to_bytes())
    del earlier["budget"]["digests"]
    budgets = {
        "it cost 1.7 % of the time of 400 steps; the budget is 1 %": (
            Ledger.parse(json.dumps(earlier).encode(), "test").budget,
            None,
        ),
        "it cost 1.7 % of the time of 400 steps, of which step digests 1.2 %; the budget is 1 %": (
            Budget(10_000, 17_000, 400, 12_000),
            "step digests alone take more than the budget",
        ),
        "it cost 1.7 % of the time of 400 steps, of which step digests 0.9 %; the budget is 1 %": (
            Budget(10_000, 17_000, 400, 9_000),
            "the first census and the first double execution come in any case",
        ),
        "it cost 0.9 % of the time of 1 step, of which step digests 0.5 %; the budget is 1 %": (
            Budget(10_000, 9_000, 1, 5_000),
            None,
        ),
    }
    for step, (words, (budget, reason)) in enumerate(budgets.items(), start=1):
        folder = write(tmp_path, replace(LEDGER, budget=budget).to_bytes(), step=step)
        outcome = run(folder, tmp_path / "me.ed25519.pub")
        assert f"  {words}\n" in outcome.text
        assert (outcome.document["over_budget"] or "").startswith(reason or "")
        assert (outcome.document["over_budget"] is None) == (reason is None)
        assert reason is None or reason in outcome.text
    assert "budget_digests_ppm" not in document.flat_coverage(Ledger.parse(json.dumps(earlier).encode(), ""))


def test_a_run_means_its_newest_checkpoint(tmp_path):
    """Oracle: the ledger of the later step."""
    write(tmp_path, Ledger(mode="off").to_bytes(), step=5)
    newest = write(tmp_path, LEDGER.to_bytes(), step=10)
    assert run(tmp_path).document["checkpoint"] == str(newest)


def test_with_the_key_the_ledger_counts_as_verified(tmp_path):
    """Oracle: a checkpoint sealed with that key."""
    outcome = run(write(tmp_path, LEDGER.to_bytes()), tmp_path / "me.ed25519.pub")
    assert outcome.document["verified"] is True
    assert "not verified" not in outcome.text


def test_a_ledger_changed_after_signing_is_refused(tmp_path):
    """Oracle: one row less than was signed."""
    folder = write(tmp_path, LEDGER.to_bytes())
    (folder / layout.LEDGER).write_bytes(replace(LEDGER, rows=()).to_bytes())
    with pytest.raises(VerificationFailed, match=r"ledger\.json"):
        run(folder, tmp_path / "me.ed25519.pub")


def test_a_statement_about_another_ledger_is_refused(tmp_path):
    """Oracle: the manifest lists one ledger, the predicate summarises another."""
    folder = write(tmp_path, LEDGER.to_bytes(), stated=Ledger(mode="warn").to_bytes())
    with pytest.raises(VerificationFailed):
        run(folder, tmp_path / "me.ed25519.pub")


def test_another_key_is_refused(tmp_path):
    """Oracle: a key that did not sign."""
    folder = write(tmp_path, LEDGER.to_bytes())
    keys.create(tmp_path / "other")
    with pytest.raises(VerificationFailed):
        run(folder, tmp_path / "other.ed25519.pub")


def test_without_coverage_it_reads_not_observed_and_cannot_tell(tmp_path):
    """Oracle: exit code 4, and no word of being deterministic."""
    outcome = run(write(tmp_path, Ledger(mode="off").to_bytes()))
    assert outcome.exit_code == 4
    assert "not observed" in outcome.text
    assert "deterministic" not in outcome.text.replace("nondeterministic", "")
    assert outcome.document["observed_anything"] is False


def test_a_scan_that_found_no_generated_code_is_no_observation():
    """Oracle: coverage of a scan with nothing in it."""
    scan = Coverage("codegen", 1, 1, 1, (0,), 0, 5)
    assert not Ledger(mode="warn", coverage=(scan,)).observed_anything


def test_a_checkpoint_without_a_ledger_cannot_tell(tmp_path):
    """Oracle: EvidenceIncomplete, which exits 4."""
    folder = write(tmp_path, LEDGER.to_bytes())
    (folder / layout.LEDGER).unlink()
    with pytest.raises(EvidenceIncomplete):
        run(folder)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(EvidenceIncomplete):
        run(tmp_path / "empty")


def test_no_row_with_coverage_says_how_far_it_reaches():
    """Oracle: the steps and the rank of the census are named."""
    text = render(replace(LEDGER, rows=()))
    assert "no order-dependent operator or kernel was seen" in text
    assert "3 steps between 1 and 100 on rank 0" in text


def test_what_was_not_looked_at_is_always_said():
    """Oracle: one gap for each thing that this ledger lacks."""
    gaps = not_looked_at(
        replace(
            LEDGER,
            rows=(replace(ROW, device="cuda"),),
            compiled_regions=2,
            unreadable=1,
            unclassified=("mine.op",),
            mitigated=(Mitigated("aten.index_put", "cpu", "determinism.mode=strict", 2),),
            catalogue=Catalogue("0" * 64, "2.13.0", 0, 7),
        )
    )
    for words in (
        "documented operators: torch's list",
        "other steps and ranks",
        "2 compiled regions: their generated code was not read",
        "1 file could not be read",
        "mine.op",
        "the profiler did not run",
        "no micro-step was executed twice",
    ):
        assert any(words in gap for gap in gaps), words


def test_the_verb_needs_neither_torch_nor_numpy(tmp_path):
    """Oracle: sys.modules of a process that ran it."""
    folder = write(tmp_path, LEDGER.to_bytes())
    code = (
        "import argparse, sys; from harness.commands import kernels; p = argparse.ArgumentParser()\n"
        "kernels.add_arguments(p); kernels.run(p.parse_args(sys.argv[1:]))\n"
        "print([name for name in ('torch', 'numpy', 'pydantic', 'accelerate') if name in sys.modules])"
    )
    words = [str(folder), "--key", str(tmp_path / "me.ed25519.pub")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_from_strangers_cannot_command_the_terminal():
    """Oracle: an escape sequence and a line break in an op's name are shown, not obeyed."""
    text = render(replace(LEDGER, rows=(replace(ROW, op="\x1b[2J\ndeterministic"),)))
    assert "\x1b" not in text
    assert r"\x1b[2J\ndeterministic" in text


def test_a_ledger_with_floats_cannot_be_written():
    """Oracle: a float where a count belongs is refused when it is read."""
    value = strict_json.loads(LEDGER.to_bytes(), where="test")
    value["rows"][0]["count"] = 1.5
    with pytest.raises(VerificationFailed):
        Ledger.parse(json.dumps(value).encode(), "test")
