"""What a run finds out before it ends at a NaN or an infinity, and what it leaves of that."""

from __future__ import annotations

import argparse
from pathlib import Path

import nonfinite_tasks
import numpy as np
import pytest
import torch
from conftest import needs_compiler
from nonfinite_tasks import first_seen
from toy_task import config

from harness import config as configs
from harness.audit.folders import story
from harness.checkpoint import rng
from harness.commands import kernels
from harness.errors import TrainingFailed
from harness.format import layout
from harness.format.ledger import Ledger
from harness.format.nonfinite import NonFinite, foremost
from harness.provenance.signing import keys
from harness.report import facts, runs
from harness.training.loop import train
from harness.training.step.remembered import Remembered

SEED = 3


class Ended:
    """A run in this process that has ended at a NaN or an infinity."""

    def __init__(self, root: Path, fault: str, **sections: str) -> None:
        keys.create(root / "me")
        sections = {"evaluate": "{every: 0}", "signing": f"{{key: {root}/me.key}}", **sections}
        task = f'{{kind: "nonfinite_tasks:Ends", options: {{fault: {fault}}}}}'
        (root / "toy.yaml").write_text(config(root / "run", task=task, **sections))
        self.root, self.run = root, root / "run"
        with pytest.raises(TrainingFailed) as raised:
            train(configs.load(root / "toy.yaml"), quiet=True)
        self.error = raised.value
        ((self.step, self.folder),) = layout.RunFolder(self.run).nonfinite()
        self.ledger = Ledger.parse((self.folder / layout.LEDGER).read_bytes(), "ledger.json")

    @property
    def found(self) -> NonFinite:
        """What its only rank has found."""
        (found,) = self.ledger.nonfinite
        return found

    def measured(self) -> list[str]:
        """Operators that were measured to differ."""
        return [row.op for row in self.ledger.rows if row.evidence == "measured"]


@pytest.fixture
def ended(tmp_path: Path, request: pytest.FixtureRequest) -> Ended:
    """A run with the fault that the test names."""
    return Ended(tmp_path, request.param)


CAME_BACK = [
    ("Logarithm", "aten.log", "fault", "changed", "1 of 2 elements are inf, out of finite arguments"),
    ("Root", "aten.div", "fault", "changed (backward)", "16 of 32 elements are nan, out of finite arguments"),
    ("Steep", "gradient", "first.weight", "", "the largest of gradients whose squares add up to inf"),
]


@pytest.mark.parametrize(("ended", "op", "module", "function", "source"), CAME_BACK, indirect=["ended"])
def test_a_value_that_comes_back_is_traced_to_the_operator_that_made_it_of_finite_ones(
    ended: Ended, op: str, module: str, function: str, source: str
) -> None:
    """Oracle: the planted operator, the step and micro-batch in which the order brings the marked sample, and
    that the run was the same twice: no row is measured."""
    step, micro_batch = first_seen(SEED)
    found = ended.found
    assert (found.step, found.micro_batch, found.rank) == (step, micro_batch, 0)
    assert (found.again, found.op, found.module, found.source) == ("same bits", op, module, source)
    assert (found.call_site or "").endswith(function)
    assert ended.measured() == []
    assert ended.step == step - 1
    for words in (
        f"step {step} is",
        op,
        f"`{module}`",
        "with the same bits",
        f"micro-batch {micro_batch} of",
    ):
        assert words in str(ended.error)


NOT_BACK = [("Memory", "aten.empty_like", "uninitialised"), ("Noise", "aten.add", "equal arguments, other")]


@pytest.mark.parametrize(("ended", "op", "words"), NOT_BACK, indirect=["ended"])
def test_what_does_not_repeat_itself_is_measured_and_named(ended: Ended, op: str, words: str) -> None:
    """Oracle: the planted operator; memory that is really left uninitialised may hold a NaN of its own, at
    whatever step and as often as it likes."""
    found = ended.found
    assert (found.op, found.module) == (op, "fault")
    assert found.again in ("finite", "other bits")
    assert words in found.source
    assert "nonfinite_tasks.py:" in (found.call_site or "")
    assert ended.measured() == [op]
    assert f"{op} in `fault`" in str(ended.error)


@pytest.mark.parametrize("ended", ["Once"], indirect=True)
def test_a_nan_that_nothing_explains_is_itself_measured(ended: Ended) -> None:
    """Oracle: the fault is a variable that the sandbox cannot see, and everything that it can is the same:
    dropout too, so the second execution had the generator of before the update."""
    assert (ended.found.again, ended.found.op) == ("finite", None)
    assert ended.measured() == ["loss"]
    assert "nothing that was executed twice differed" in str(ended.error)


@pytest.mark.parametrize("ended", ["Counting"], indirect=True)
def test_what_the_first_execution_has_moved_on_is_named_and_nothing_is_measured(ended: Ended) -> None:
    """Oracle: a counter of the module, which each pass moves on."""
    assert ended.found.again == "finite"
    assert "did not begin as the first had: Counting.calls" in ended.found.source
    assert ended.measured() == []


@pytest.mark.parametrize("ended", ["Raising"], indirect=True)
def test_an_error_in_the_second_execution_loses_neither_the_state_nor_the_reason(ended: Ended) -> None:
    """Oracle: the module raises when its sample comes a second time; the run still ends at its NaN."""
    assert ended.found.again == "not executed"
    assert "ValueError: the fault does not like to be looked at" in str(ended.error)
    assert "the loss of step" in ended.error.what


def test_who_wants_nothing_executed_twice_is_obeyed(tmp_path: Path) -> None:
    """Oracle: budget 0, which keeps side effects of a pass from happening twice."""
    ended = Ended(tmp_path, "Once", determinism="{budget: 0}")
    assert nonfinite_tasks.Once.times == 1
    assert "not executed again: determinism.mode is off, or determinism.budget is 0" in str(ended.error)


@pytest.mark.parametrize("sections", [{"determinism": "{elastic: true}"}, {"precision": "bf16"}])
def test_logical_shards_and_other_precisions_are_executed_again_alike(
    tmp_path: Path, sections: dict[str, str]
) -> None:
    """Oracle: the losses of the run's own execution, bit for bit, with dropout."""
    train = "{steps: 24, global_batch: 16, micro_batch: 2}"
    ended = Ended(tmp_path, "Logarithm", train=train, **sections)
    assert (ended.found.again, ended.found.op) == ("same bits", "aten.log")


@needs_compiler
@pytest.mark.slow
def test_compiled_code_is_executed_eagerly_to_name_the_operator(tmp_path: Path) -> None:
    """Oracle: the planted operator, which inductor fuses with others; what is compiled repeats its bits."""
    found = Ended(tmp_path, "Logarithm", compile="true").found
    assert (found.again, found.op, found.module) == ("same bits", "aten.log", "fault")
    assert found.source.endswith("executed without compiled code")


@pytest.mark.parametrize("ended", ["Logarithm"], indirect=True)
def test_kernels_and_report_show_it_and_the_statement_signs_it(ended: Ended) -> None:
    """Oracle: the sentence of the error, in the text and the JSON of `harness kernels` on the run's folder,
    among the failures of a report, and under the key in the statement."""
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    shown = kernels.run(parser.parse_args([str(ended.run), "--key", f"{ended.root}/me.ed25519.pub"]))
    assert shown.document["verified"]
    assert shown.document["nonfinite"][0]["op"] == "aten.log"
    assert f"the run ended: {ended.found.what}\n  rank 0: {ended.found.told}" in shown.text
    run = runs.read(ended.run)
    assert facts.ending(run).text.endswith(ended.found.told)
    assert facts.newest_ledger(run) == ended.ledger
    signed = run.checkpoints[-1].facts
    assert signed is not None
    assert ended.found.told in signed["determinism"]["ledger"]["coverage"]["nonfinite"]


def test_a_run_that_has_gone_on_since_is_shown_by_its_newest_checkpoint(tmp_path: Path) -> None:
    """Oracle: names alone; a state kept at the newest checkpoint's step is later than it, the second later
    than the first."""
    run = layout.RunFolder(tmp_path)
    names = [
        "step-00000004",
        "nonfinite-step-00000004",
        "nonfinite-step-00000004-2",
        "nonfinite-step-00000002",
    ]
    for name in names:
        (run.checkpoints / name).mkdir(parents=True)
    assert story.last(tmp_path).name == "nonfinite-step-00000004-2"
    run.checkpoint(6).mkdir()
    assert story.last(tmp_path) == run.checkpoint(6)
    assert story.last(run.checkpoints / names[1]) == run.checkpoints / names[1]


def told(rank: int, again: str, op: str | None = None) -> NonFinite:
    """What a rank has found."""
    return NonFinite(9, "the loss of step 9 is nan", rank, again, None, op, None, None, "because")


@pytest.mark.parametrize(
    ("found", "ranks"),
    [
        ([told(0, "elsewhere"), told(1, "same bits", "aten.log")], [1]),
        ([told(0, "same bits", "collective"), told(1, "same bits", "aten.log")], [1]),
        ([told(0, "elsewhere"), told(1, "not executed")], [1]),
        ([told(0, "finite"), told(1, "finite", "aten.add")], [1]),
        ([told(0, "finite"), told(1, "finite")], [0, 1]),
    ],
)
def test_the_rank_on_which_it_began_has_the_word(found: list[NonFinite], ranks: list[int]) -> None:
    """Oracle: the ranks that have something of their own to say."""
    assert [each.rank for each in foremost(found)] == ranks


def test_the_generators_that_are_remembered_are_those_before_the_update() -> None:
    """Oracle: their states as they were captured; numpy's, which has moved on since, is not known."""
    torch.manual_seed(0)
    remembered, own = Remembered(), {"noise": torch.Generator(), "other": np.random.default_rng(0)}
    first = rng.capture(own)
    for update in range(3):
        before = rng.capture(own)
        assert remembered.begin(update, lambda: own) == []
        torch.rand(1), torch.rand(1, generator=own["noise"])
        remembered.rng_digest()
    at_first, unknown = remembered.generators(0, own)
    assert unknown == []
    assert all(torch.equal(state, first[name]) for name, state in at_first.items())
    known, unknown = remembered.generators(2, own)
    assert known.keys() == before.keys()
    assert all(torch.equal(state, before[name]) for name, state in known.items())
    assert unknown == []
    np.random.rand(), own["other"].random()
    assert remembered.generators(2, own)[1] == ["numpy", "other"]
    assert remembered.losses(7) is None
