"""Double execution in runs: what a planted fault leaves in the ledger, that no bit changes, what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import torch
from conftest import Place
from planted_models import Sound, micro_step
from test_train import keys, predicate
from toy_task import config

from harness.determinism import ledger as ledgers
from harness.determinism.double import Checked
from harness.determinism.ledger import Ledger
from harness.format import ledger as document
from harness.format.budget import percent
from harness.training.step.doubling import AGAIN, FIRST, MOST_PAIRS, SECOND, Doubling
from harness.workers import Workers

RESTLESS = """
import os

import torch
from toy_task import Toy


@torch.library.custom_op("planted::restless", mutates_args=())
def restless(x: torch.Tensor) -> torch.Tensor:
    made = x.clone()
    # About half of the elements: a single one could lie where the activation hides it.
    made.view(-1).view(torch.int32)[:] ^= torch.tensor([byte & 1 for byte in os.urandom(made.numel())])
    return made


restless.register_autograd(lambda context, gradient: gradient)
restless.register_fake(torch.empty_like)


class Layer(torch.nn.Module):
    def forward(self, x):
        return restless(x)


class Restless(Toy):
    def build_model(self):
        first, last = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
        return torch.nn.Sequential(first, Layer(), torch.nn.ReLU(), last)
"""


def instead_of_executing(doubling: Doubling, clock: Clock, cost: int, tell: Callable[[], None]) -> None:
    """Every double execution takes ``cost`` nanoseconds of ``clock``, finds nothing, and is told."""

    def check(*_: object, **__: object) -> Checked:
        tell()
        clock.now += cost
        return Checked(True, (), frozenset(), 1, cost)

    ledgers.catalogue()  # made once in a process, by the real clock
    doubling._double.check = check  # type: ignore[method-assign]


@pytest.mark.slow
def test_an_operator_that_differs_is_measured_on_all_ranks_named_and_signed(place: Place) -> None:
    """Oracle: the planted operator flips last bits, by chance, in the layer named 1; two ranks."""
    (place.root / "restless_task.py").write_text(RESTLESS)
    task = '{kind: "restless_task:Restless"}'
    place.write("toy.yaml", config(place.run, task=task))
    assert (done := place.harness("train", "toy.yaml", processes=2)).code == 0, done.err
    whom = keys(place)
    shown = json.loads(place.harness("kernels", str(place.run), *whom, "--json").out)
    rows = {each["evidence"]: each for each in shown["rows"] if each["op"] == "planted.restless"}
    assert rows.keys() == {"measured", "unknown"}
    assert (rows["measured"]["module"], rows["measured"]["ulp"]) == ("1", 1)
    assert rows["measured"]["call_site"].startswith("restless_task.py:")
    assert rows["measured"]["call_site"].endswith("forward")
    double = next(each for each in shown["coverage"] if each["observer"] == "double")
    assert double["ranks"] == [0, 1]
    assert double["steps"] >= 1
    assert shown["budget"]["limit"] == 10_000
    stated = predicate(place.run / "checkpoints" / "step-00000024")["determinism"]["ledger"]  # type: ignore[index]
    counted = {kind: sum(row["evidence"] == kind for row in shown["rows"]) for kind in document.EVIDENCE}
    assert {kind: stated[kind] for kind in document.EVIDENCE} == counted  # type: ignore[index]
    text = place.harness("kernels", str(place.run), *whom).out
    assert "by up to 1 unit in the last place" in text
    assert place.harness("verify", str(place.run), *whom).code == 0


@pytest.mark.slow
def test_step_digests_over_the_budget_are_told_wherever_the_budget_is(place: Place) -> None:
    """Oracle: a budget that nothing can keep. The screen tells it once, with what to do, and so do ledger,
    kernels, show and report of one run; digests are a part of what was spent, the rest is looking."""
    place.write("toy.yaml", config(place.run, determinism="{budget: 0.0001}"))
    done = place.harness("train", "toy.yaml")
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if "step digests take" in line]
    assert line.startswith("step 21: ")
    assert "determinism.budget is 0.01 %" in line
    assert "determinism.gradients_every and determinism.state_every" in line
    events = (place.run / "events" / "rank-00000.jsonl").read_text()
    assert events.count('"event":"over budget"') == 1
    newest = place.run / "checkpoints" / "step-00000024"
    budget = json.loads((newest / "ledger.json").read_bytes())["budget"]
    assert budget["limit"] == 100 < budget["digests"] < budget["spent"]
    stated = predicate(newest)["determinism"]["ledger"]["coverage"]  # type: ignore[index]
    assert stated["budget_digests_ppm"] == budget["digests"]
    shown = json.loads(place.harness("kernels", str(place.run), *keys(place), "--json").out)
    assert shown["over_budget"].startswith("step digests alone take more than the budget")
    text = place.harness("kernels", str(place.run)).out
    assert f"of which step digests {percent(budget['digests'])}" in text
    assert f"step digests alone {percent(budget['digests'])}" in place.harness("show", str(newest)).out
    assert place.harness("report", str(place.run), "--out", "report", *keys(place)).code == 0
    assert shown["over_budget"] in (place.root / "report" / "report.md").read_text().replace("\\", "")


SHARDED = '{kind: "toy_task:Toy", options: {sharded: true}}'


def chain(run: Path) -> list[str]:
    """The chain of a run: every loss, norm, gradient, state and generator."""
    return [orjson.loads(line)["chain"] for line in (run / "metrics.jsonl").read_bytes().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (1, {}),
        (2, {}),
        (2, {"parallel": "fsdp2", "task": SHARDED, "evaluate": "{every: 1, batches: 1}"}),
    ],
)
def test_a_run_has_the_same_bits_with_and_without_it(
    place: Place, processes: int, more: dict[str, str]
) -> None:
    """Oracle: the run in which nothing is looked at; dropout, batch statistics, five generators. On one
    thread every operator of it has a fixed order, so none may be measured to differ; after an evaluation,
    which changes what FSDP2 gathers ahead, as little as after an update."""
    looked, measured = 0, []
    for name, section in (("off", "{mode: off}"), ("half", "{budget: 0.5}")):
        run = place.root / name
        place.write(f"{name}.yaml", config(run, determinism=section, **more))
        assert (done := place.harness("train", f"{name}.yaml", processes=processes)).code == 0, done.err
        ledger = json.loads((run / "checkpoints" / "step-00000024" / "ledger.json").read_bytes())
        looked += sum(each["steps"] for each in ledger["coverage"] if each["observer"] == "double")
        measured += [row for row in ledger["rows"] if row["evidence"] == "measured"]
    assert looked >= 1
    assert measured == []
    assert chain(place.root / "off") == chain(place.root / "half")


GROWING = """
import torch
from toy_task import Toy


class Last(torch.nn.Linear):
    def forward(self, x):
        return torch.relu(super().forward(x))


class Indexed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.ones(3, 8))
        self.compiled = Last(8, 4)
        self.compiled.compile(backend="eager", dynamic=False)

    def forward(self, x):
        rows = self.table[torch.zeros(len(x), dtype=torch.long)]
        return self.compiled(x + rows)


class Growing(Toy):
    made = 0  # one of them for evaluations

    def build_model(self):
        return Indexed()

    def batch(self, indices, epochs):
        self.made += 1
        x, y = super().batch(indices, epochs)
        return (x, y) if self.made <= 21 else (x.repeat(2, 1), y.repeat(2))
"""


def test_a_recompilation_is_followed_by_a_census_and_what_is_doubled_is_not_counted(place: Place) -> None:
    """Oracle: batches have another shape from step 11 on; two micro-batches a step, each with one gradient of
    indexing, in two steps with a census. In the second of them one is executed twice besides, if paid for."""
    (place.root / "growing_task.py").write_text(GROWING)
    task = '{kind: "growing_task:Growing", options: {plain: true}}'
    train = "{steps: 20, global_batch: 4, micro_batch: 2}"
    place.write("toy.yaml", config(place.run, task=task, train=train, evaluate="{every: 0}"))
    assert (done := place.harness("train", "toy.yaml")).code == 0, done.err
    ledger = json.loads((place.run / "checkpoints" / "step-00000020" / "ledger.json").read_bytes())
    steps = {
        each["observer"]: (each["first_step"], each["steps"], each["last_step"])
        for each in ledger["coverage"]
    }
    assert steps["double"][0] == FIRST
    assert steps["census"] == (1, 2, 12)
    (row,) = (
        each for each in ledger["rows"] if each["op"] == "aten.index_put" and each["evidence"] == "documented"
    )
    assert row["count"] == 4


BETWEEN = """
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from toy_task import Toy


class Between(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
        self.compile(backend="eager", dynamic=False)

    def forward(self, x):
        x = self.first(x)
        if ASKS:
            x = x / 2
        return self.last(x)


class Told(Toy):
    def build_model(self):
        return Between()

    def batch(self, indices, epochs):
        Path("compiled").write_text(str(counters["frames"]["total"]))
        return super().batch(indices, epochs)
"""


def between(place: Place, asks: str, processes: int) -> list[dict[str, object]]:
    """Rows of the ledger of a model of two compiled halves that ``asks`` a tensor something between them."""
    (place.root / "between_task.py").write_text(BETWEEN.replace("ASKS", asks))
    task = '{kind: "between_task:Told", options: {plain: true}}'
    train = f"{{steps: 8, global_batch: {processes}, micro_batch: 1}}"
    place.write("toy.yaml", config(place.run, task=task, train=train, evaluate="{every: 0}"))
    assert (done := place.harness("train", "toy.yaml", processes=processes)).code == 0, done.err
    ledger = json.loads((place.run / "checkpoints" / "step-00000008" / "ledger.json").read_bytes())
    assert {"census", "double"} <= {each["observer"] for each in ledger["coverage"] if each["steps"]}
    return ledger["rows"]  # type: ignore[no-any-return]


def test_what_looks_at_operators_between_compiled_graphs_is_not_compiled_itself(place: Place) -> None:
    """Oracle: dynamo's own count of what it compiled: two halves of the model, around what it asks a tensor.

    The operator that answers runs while dynamo is on, which would compile the Python that looks at it too.
    """
    between(place, "x.isnan().any()", 1)
    assert (place.root / "compiled").read_text() == "2"


@pytest.mark.slow
def test_a_step_that_is_executed_twice_and_compiles_is_not_measured_to_differ(place: Place) -> None:
    """Oracle: operators with a fixed order. The second half is compiled anew for each number that it is
    given, at every step, and what dynamo does for DDP then runs operators of its own."""
    assert between(place, "x.sum().item() > 1e9", 2) == []
    assert int((place.root / "compiled").read_text()) > 2


def test_recompilations_without_end_are_not_all_looked_at() -> None:
    """Oracle: double executions whose steps are written down; pairs after three recompilations, then none."""
    model, taken, clock = Sound(), [], Clock()
    doubling = Doubling(
        Ledger("warn", 50, 0, torch.device("cpu")),
        Workers.alone(),
        model,
        model,
        {},
        (),
        start=0,
        steps=10**12,
        budget=1e-9,
        clock=clock,
    )
    doubling._double.check = lambda _, fine: (
        taken.append((step, fine)) or Checked(fine, (), frozenset(), 1, 10**9)
    )  # type: ignore[assignment,func-returns-value,misc]
    for step in range(1, 200):
        doubling.look(step, micro_step(model))
        clock.now += 10**9
        if step % 20 == 0:
            doubling.look_again(step)
    again = [(20 * number + each, each == 1) for number in range(1, MOST_PAIRS + 1) for each in AGAIN]
    assert taken == [(FIRST, True), (SECOND, False), *again]


def test_digests_are_paid_before_double_executions() -> None:
    """Oracle: a clock of its own: steps of 10 ms, of which digests take 0.5 %, and executions of 25 ms."""
    clock, steps, budget = Clock(), 4000, 0.01
    model, taken, digests = Sound(), [], 0
    ledger = Ledger("warn", 50, 0, torch.device("cpu"))
    doubling = Doubling(
        ledger,
        Workers.alone(),
        model,
        model,
        {},
        (),
        start=0,
        steps=steps,
        budget=budget,
        digest_ns=lambda: digests,
        clock=clock,
    )
    instead_of_executing(doubling, clock, 25_000_000, lambda: taken.append(step))
    for step in range(1, steps + 1):
        doubling.look(step, micro_step(model))
        clock.now += 10_000_000
        digests += 50_000
    assert 0.9 * budget <= (len(taken) * 25 + digests / 1e6) / (steps * 10) <= 1.01 * budget
    told = doubling.spent(steps)
    assert told.digests == pytest.approx(5_000, rel=0.01)
    assert told.spent - told.digests == pytest.approx(len(taken) * 25 / (steps * 10) * 1e6, rel=0.1)


@pytest.mark.parametrize(("steps", "second"), [(200, False), (1000, True)])
def test_the_second_look_of_a_start_comes_if_the_launch_can_pay_for_it(steps: int, second: bool) -> None:
    """Oracle: a clock of its own: steps of 10 ms, digests of 0.05 ms and executions of 20 ms. 0.05 ms a step
    are left, 10 ms in 200 steps and 50 ms in 1,000."""
    clock, model, taken, digests = Clock(), Sound(), [], 0
    doubling = Doubling(
        Ledger("warn", 50, 0, torch.device("cpu")), Workers.alone(), model, model, {}, (),
        start=0, steps=steps, budget=0.01, digest_ns=lambda: digests, clock=clock,
    )  # fmt: skip
    instead_of_executing(doubling, clock, 20_000_000, lambda: taken.append(step))
    for step in range(1, 101):
        doubling.look(step, micro_step(model))
        clock.now += 10_050_000
        digests += 50_000
    assert taken == [FIRST, SECOND][: 1 + second]


def test_where_digests_take_the_budget_all_else_waits() -> None:
    """Oracle: a clock of its own: of steps of 10 ms digests take 1.2 %, from step 300 on 0.2 %."""
    clock, model, taken, digests = Clock(), Sound(), [], 0
    ledger = Ledger("warn", 50, 0, torch.device("cpu"))
    doubling = Doubling(
        ledger, Workers.alone(), model, model, {}, (),
        start=0, steps=3000, budget=0.01, digest_ns=lambda: digests, clock=clock,
    )  # fmt: skip
    instead_of_executing(doubling, clock, 20_000_000, lambda: taken.append(step))
    censuses = []
    for step in range(1, 3001):
        if ledger.observe(step) is not ledgers._IDLE:
            censuses.append(step)
        doubling.look(step, micro_step(model))
        own = 120_000 if step < 300 else 20_000
        clock.now += 10_000_000 + own
        digests += own
        spent = len(taken) * 20_000_000 + digests
        if step >= 1000:
            assert spent <= 0.0101 * clock.now
    assert taken[0] == FIRST
    assert taken[1] > 300
    assert len(taken) > 5
    assert censuses[0] == 1
    assert censuses[1] > 300


class Clock:
    """Nanoseconds that pass as a test wants."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.mark.parametrize("budget", [0.01, 0.1])
def test_what_it_costs_stays_within_the_budget(budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a clock of its own: steps of 10 ms and executions of 25 ms, and the sum at every step."""
    clock, steps = Clock(), 3000
    model = Sound()
    ledger = Ledger("warn", 50, 0, torch.device("cpu"))
    doubling = Doubling(
        ledger, Workers.alone(), model, model, {}, (), start=0, steps=steps, budget=budget, clock=clock
    )
    execute = micro_step(model)
    checked = doubling._double.check(execute, fine=True)
    taken = []

    def check(*_: object, **__: object) -> object:
        taken.append(step)
        clock.now += 25_000_000
        return type(checked)(True, (), frozenset(), 1, 25_000_000)

    monkeypatch.setattr(doubling._double, "check", check)
    for step in range(1, steps + 1):
        doubling.look(step, execute)
        clock.now += 10_000_000
        if step > 1000:
            assert len(taken) * 25 <= budget * step * 10 * 1.01
    assert taken[:2] == [FIRST, SECOND]
    assert len(taken) * 25 >= budget * steps * 10 * 0.9
    doubling.settle(steps)
    assert ledger._findings.budget == doubling.spent(steps)
    told = document.Ledger.parse(ledger.to_bytes(), "test").budget
    assert told is not None
    assert told.steps == steps
    assert told.spent <= told.limit == round(budget * 1_000_000)
    assert (told.digests, told.reason) == (0, None)


def test_clean_executions_refute_a_suspicion() -> None:
    """Oracle: a row of the documented index_put, then fine executions of it on one thread."""
    table = torch.nn.Parameter(torch.randn(6, 4))
    model = torch.nn.Module()
    model.table = table
    tokens = torch.tensor([1, 2, 2])

    def execute() -> torch.Tensor:
        loss = table[tokens].pow(2).sum()
        loss.backward()
        return loss.detach()

    ledger = Ledger("warn", 50, 0, torch.device("cpu"))
    with ledger.observe(1):
        execute()
    table.grad = None
    doubling = Doubling(ledger, Workers.alone(), model, model, {}, (), start=0, steps=9, budget=0.5)
    for _ in range(3):
        ledger.doubled(4, doubling._double.check(execute, fine=True))
    rows = {(row.op, row.evidence): row.count for row in ledger.rows() if row.op == "aten.index_put"}
    assert rows[("aten.index_put", "refuted")] == 3
    assert ("aten.index_put", "documented") in rows
