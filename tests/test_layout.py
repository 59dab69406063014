"""`harness.format.layout`: which names mean what."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UsageError
from harness.format import layout
from harness.format.layout import RunFolder


@given(st.integers(0, 10**12))
def test_a_step_is_read_back_from_its_name(step: int) -> None:
    """Oracle: the number itself."""
    assert layout.parse_checkpoint_name(layout.checkpoint_name(step)) == step


@given(st.text("step-0123456789 \n.A٣", max_size=16))
def test_a_name_has_one_spelling(name: str) -> None:
    """Oracle: what is accepted is what `checkpoint_name` writes; no other digits, no more zeros."""
    step = layout.parse_checkpoint_name(name)
    assert step is None or layout.checkpoint_name(step) == name


@pytest.mark.parametrize(
    "name",
    ["step-20", "step-000000020", "step-00000020 ", "step-00000020\n", "Step-00000020", "step-٠٠٠٠٠٠٢٠"],
)
def test_a_near_miss_is_no_checkpoint_name(name: str) -> None:
    """Oracle: `step-` and exactly eight digits, more only when the number needs them."""
    assert layout.parse_checkpoint_name(name) is None


def test_the_contract_names_are_these() -> None:
    """Oracle: docs/architecture.md; other tools rely on them."""
    run = RunFolder(Path("R"))
    assert run.run_config == Path("R/run.yaml")
    assert run.metrics == Path("R/metrics.jsonl")
    assert run.log == Path("R/log")
    assert run.events(3) == Path("R/events/rank-00003.jsonl")
    assert run.checkpoint(500) == Path("R/checkpoints/step-00000500")
    assert layout.CHECKPOINT_BUNDLE == "provenance/checkpoint.sigstore.json"
    assert layout.SLSA_BUNDLE == "provenance/slsa.sigstore.json"
    assert (layout.MANIFEST, layout.MODEL_SIGNATURE) == ("MANIFEST.json", "model.sig")


def test_checkpoints_are_listed_by_step_and_the_rest_is_set_aside(tmp_path: Path) -> None:
    """Oracle: numbers, not names, decide the order; every entry is in exactly one list."""
    names = ["step-00000100", "step-100000000", "step-00000020", "pruned-step-00000010"]
    odd = [".tmp-step-00000030", "damaged-step-00000020-1", "nonfinite-step-00000040", "step-20"]
    for name in names + odd:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    run = RunFolder(tmp_path)
    assert [path.name for path in run.complete()] == ["step-00000020", "step-00000100", "step-100000000"]
    assert [path.name for path in run.pruned()] == ["pruned-step-00000010"]
    assert [path.name for path in run.aside()] == sorted(odd)


def test_a_run_without_checkpoints_has_empty_lists(tmp_path: Path) -> None:
    """Oracle: nothing is there."""
    run = RunFolder(tmp_path)
    assert run.complete() == run.pruned() == run.aside() == []


def test_a_folder_is_a_run_or_a_checkpoint_or_neither(tmp_path: Path) -> None:
    """Oracle: a run has checkpoints/, a checkpoint a manifest, statements or its name."""
    (tmp_path / "run" / "checkpoints" / "step-00000010").mkdir(parents=True)
    (tmp_path / "moved" / "provenance").mkdir(parents=True)
    assert layout.kind_of(tmp_path / "run") == "run"
    assert layout.kind_of(tmp_path / "run" / "checkpoints" / "step-00000010") == "checkpoint"
    assert layout.kind_of(tmp_path / "moved") == "checkpoint"
    for path, reason in ((tmp_path, "is neither"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UsageError, match=reason):
            layout.kind_of(path)
