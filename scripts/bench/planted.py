"""Planted faults: whether the ledger flags each and names the right place, and whether it cries wolf.

python scripts/bench/planted.py [--trials 10] [--clean 200] [--compiled] [--only TEXT] [--seed 0]
                                [--json FILE]

The models of tests/planted_models.py train for up to `STEPS` steps under a ledger, with a double execution at
the steps of `DOUBLE`, on two threads: indexing whose gradient adds atomically, an operator that flips a last
bit as os.urandom has it, a read of uninitialised memory, a custom operator that no list knows; with
--compiled also a compiled embedding. A trial ends when the fault is flagged, and for those that change bits
when it is measured. Beside them the peer: the warnings of torch.use_deterministic_algorithms(True,
warn_only=True) in one step of the same model. A changed number of threads must show in the stack and a
changed seed in the digest of the gradients of the first step.

Then --clean double executions of sound models, the first of each pair as the run's own pass, half of them
looking at every operator: any difference is a false row. Bits are compared, so a busy machine changes nothing
but the time that it takes. `planted_runs.py` plants the same faults in runs by `harness train`.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))

import torch
from interleave import keep, table, verdict
from planted_models import Blank, Indexing, Restless, Sound, Untagged, micro_step
from torch import Tensor, nn

from harness.determinism import settings
from harness.determinism.bit_sums import Plan
from harness.determinism.double import Checked, Double
from harness.determinism.ledger import Ledger
from harness.format import ledger as document
from harness.model.gpt import GPT, Shape

STEPS = 200
DOUBLE = (3, 8, *range(25, STEPS + 1, 25))
THREADS = 2
RIGHT = 0.95
"""Share of the measured differences that must name the planted place."""
SAME = 30
"""Clean double executions between new weights."""


@dataclass(frozen=True)
class Fault:
    """A model with a fault, and what must be named."""

    name: str
    model: type[nn.Module]
    places: frozenset[str]
    """Operators, or parameters after `gradient`, that are the right answer."""
    changes_bits: bool = True
    compiled: bool = False


FAULTS = (
    Fault("index backward, two threads", Indexing, frozenset({"aten.index_put", "gradient table"})),
    Fault("os.urandom in the last bit", Restless, frozenset({"planted.restless"})),
    Fault("uninitialised read", Blank, frozenset({"aten.empty_like"})),
    Fault("untagged custom operator", Untagged, frozenset({"planted.untagged"}), changes_bits=False),
)
COMPILED = Fault("compiled embedding, two threads", Sound, frozenset({"gradient table"}), compiled=True)


@dataclass
class Outcome:
    """What the trials of one fault gave."""

    trials: int = 0
    flagged: int = 0
    measured: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """Step at which each trial had what it wanted."""
    evidence: Counter[str] = field(default_factory=Counter)
    """Kind → trials in which the planted place was flagged by it."""
    warned: int | None = None
    """Trials in which torch's own warning came; None where it was not asked."""


def trial(fault: Fault, model: nn.Module, outcome: Outcome) -> None:
    """Train ``model`` until its fault is flagged, or for `STEPS` steps."""
    ledger = Ledger("warn", 50, 0, torch.device("cpu"))
    run = torch.compile(model) if fault.compiled else model
    double, execute = Double(model, run, {}), micro_step(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kinds: set[str] = set()
    for step in range(1, STEPS + 1):
        if step in DOUBLE:
            for found in doubled(model, double, execute, fine=True).differences:
                place = f"gradient {found.module}" if found.op == "gradient" else found.op
                right = place in fault.places
                outcome.right += right
                outcome.wrong += [] if right else [place]
                kinds |= {"measured"} if right else set()
        with ledger.observe(step):
            execute()
            optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            ledger.scan(step)
            kinds |= seen(ledger, fault)
        if "measured" in kinds or (kinds and not fault.changes_bits):
            break
    outcome.trials += 1
    outcome.flagged += bool(kinds)
    outcome.measured += "measured" in kinds
    outcome.steps += [step] if kinds else []
    outcome.evidence.update(kinds)


def doubled(model: nn.Module, double: Double, execute: Callable[[], Tensor], *, fine: bool) -> Checked:
    """A double execution as in a run of one process: its own pass is the first of the two."""
    model.zero_grad()
    checked = double.check(execute, fine=fine, own=double.own(execute, fine=fine))
    model.zero_grad()
    return checked


def seen(ledger: Ledger, fault: Fault) -> set[str]:
    """The kinds of evidence, other than measured, that name the fault."""
    rows = ledger.rows()
    kinds = {row.evidence for row in rows if row.op in fault.places and row.evidence != "measured"}
    if fault.compiled:  # generated code has no parameters: its atomic additions are the row
        kinds |= {row.evidence for row in rows if row.backend == "inductor"}
    named = document.Ledger.parse(ledger.to_bytes(), "ledger.json").unclassified
    return kinds | ({"unknown"} if fault.places & set(named) else set())


def warned(model: nn.Module) -> bool:
    """Whether torch warns of anything in a step of ``model``."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            micro_step(model)()
    finally:
        torch.use_deterministic_algorithms(False)
    return any("deterministic" in str(each.message) for each in caught)


def other_threads() -> bool:
    """Whether the stack of one thread and that of two differ in the thread counts only."""
    stacks = []
    for threads in (1, THREADS):
        torch.set_num_threads(threads)
        stacks.append(settings.stack())
    differing = {name for name in stacks[0] if stacks[0][name] != stacks[1][name]}
    return "threads" in differing and differing <= {"threads", "mkl_threads"}


def first_digest(seed: int) -> bytes:
    """Of the gradients of the first step from ``seed``."""
    torch.manual_seed(seed)
    model = Sound()
    micro_step(model)()
    plan = Plan({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    return plan.digest(plan.sums())


def sound_models() -> Sequence[tuple[nn.Module, Callable[[], Tensor]]]:
    """Models without a fault, each with its forward and backward pass."""
    made: list[tuple[nn.Module, Callable[[], Tensor]]] = []
    for kind in (Sound, Untagged):
        model = kind()
        made.append((model, micro_step(model)))
    decoder = GPT(Shape(64, 32, 2, 32, 2, 2))
    tokens = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(1))

    def execute() -> Tensor:
        logits = decoder(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    return [*made, (decoder, execute)]


def false_rows(count: int, seed: int) -> tuple[int, list[str]]:
    """Double executions of sound models that were made, and what they wrongly said."""
    said, made = [], 0
    for number in range(count):
        if number % SAME == 0:
            torch.manual_seed(seed + number)
            models = [(model, Double(model, model, {}), execute) for model, execute in sound_models()]
        checked = doubled(*models[number % len(models)], fine=number // len(models) % 2 == 0)
        made += not checked.refused
        said += [f"{each.op} in {each.module}" for each in checked.differences]
    return made, said


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--clean", type=int, default=200)
    parser.add_argument(
        "--compiled", action="store_true", help="also the compiled embedding; needs a C++ compiler"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose name has this text")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial, for slices of a long run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(THREADS)
    outcomes: dict[str, Outcome] = {}
    faults = (*FAULTS, *((COMPILED,) if arguments.compiled else ()))
    faults = tuple(each for each in faults if arguments.only in each.name)
    for fault in faults if arguments.trials else ():
        outcome = outcomes[fault.name] = Outcome()
        for number in range(arguments.trials):
            torch.manual_seed(arguments.seed + number)
            trial(fault, fault.model(), outcome)
            if not fault.compiled:  # torch.compile would compile again for it
                outcome.warned = (outcome.warned or 0) + warned(fault.model())
    threads = other_threads()
    torch.set_num_threads(THREADS)
    seeds = first_digest(1) == first_digest(1) and first_digest(1) != first_digest(2)
    made, said = false_rows(arguments.clean, arguments.seed)
    report(outcomes, threads=threads, seeds=seeds, made=made, said=said)
    print(f"{time.perf_counter() - started:.0f} s")
    told = {name: {**vars(each), "evidence": dict(each.evidence)} for name, each in outcomes.items()}
    clean = {"executions": made, "false": said}
    document = {"faults": told, "threads": threads, "seeds": seeds, "clean": clean}
    keep(arguments.json, document)


def report(
    outcomes: dict[str, Outcome], *, threads: bool, seeds: bool, made: int, said: Sequence[str]
) -> None:
    """Print the table and the verdicts."""
    rows = [("fault", "flagged", "measured", "right place", "by step", "evidence", "torch warns")]
    for name, each in outcomes.items():
        evidence = ", ".join(f"{kind} {count}" for kind, count in sorted(each.evidence.items()))
        placed = f"{each.right} of {each.right + len(each.wrong)}"
        last = str(max(each.steps, default="-"))
        counts = (f"{each.flagged} of {each.trials}", str(each.measured), placed, last, evidence)
        rows.append((name, *counts, "-" if each.warned is None else str(each.warned)))
    print(table(rows))
    every = list(outcomes.values())
    trials, flagged = sum(each.trials for each in every) + 2, sum(each.flagged for each in every)
    found = flagged + threads + seeds
    right, wrong = sum(each.right for each in every), sum(len(each.wrong) for each in every)
    print(f"a changed thread count {'shows' if threads else 'DOES NOT SHOW'} in the stack")
    print(f"a changed seed {'shows' if seeds else 'DOES NOT SHOW'} in the first step's digest")
    print(verdict(f"{found} of {trials} flagged within {STEPS} steps", found, trials, at_least=True))
    if right + wrong:
        share = right / (right + wrong)
        text = f"{share:.1%} of {right + wrong} measured rows name the place"
        print(verdict(text, share, RIGHT, at_least=True))
    if made:
        text = f"{len(said)} false rows in {made} clean double executions {' '.join(said[:3])}"
        print(verdict(text.rstrip(), len(said), 0))


if __name__ == "__main__":
    main()
