"""Planted faults in runs, on one process or several: whether the ledger flags each and names the right place.

python scripts/bench/planted_runs.py [--runs 3] [--processes 1 2] [--compiled] [--only TEXT] [--seed 0]
                                     [--json FILE]

The faults of `planted.py`, each in a model that `harness train` trains for `STEPS` steps as it is by default,
budget and all: by itself, or under torchrun with gloo and DDP, two threads a rank. What is read is the ledger
of its last checkpoint, or of the state that was kept before a NaN, as a user would; the budget leaves one
double execution there. Flagged: the planted operator or parameter is in a row, or among the operators that
no list covers. Measured: it is in a `measured` row. Any other measured row, and any at all of the model
without a fault, names a wrong place. Then the sound model with another number of threads, which must show in
the signed stack, and with another seed, which must show in the gradients of the first step.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))

import numpy as np
import planted_models
import torch
from interleave import keep, table, verdict
from numpy.typing import NDArray
from planted import COMPILED, FAULTS, STEPS, THREADS, Fault
from planted_models import ROWS, WIDTH, Sound
from torch import Tensor, nn

from harness.format import layout
from harness.format.ledger import Ledger
from harness.provenance.signing import keys
from harness.tasks.task import Batch, Identity, Task

ROOT = Path(__file__).resolve().parent.parent.parent
BATCH = 4
SOUND = Fault("none", Sound, frozenset())


class Planted(Task):
    """A model of tests/planted_models.py on random tokens; named ``planted_runs:Planted`` in configs."""

    samples = 1024
    unit = "token"
    units_per_sample = 128
    headline = "loss"

    def __init__(self, *, seed: int, model: str) -> None:
        self._model = model
        generator = torch.Generator().manual_seed(seed)
        self._tokens = torch.randint(ROWS, (self.samples, self.units_per_sample), generator=generator)
        self._targets = torch.randn(self.units_per_sample, WIDTH, generator=generator)

    def identity(self) -> Identity:
        return Identity("planted", {"corpus": "0" * 64, "tokenizer": None}, {"samples": self.samples}, {})

    def build_model(self) -> nn.Module:
        made: nn.Module = getattr(planted_models, self._model)()
        return made

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> Batch:
        return (self._tokens[torch.from_numpy(indices)],)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        made: Tensor = model(batch[0])
        return nn.functional.mse_loss(made, self._targets.expand_as(made))

    def evaluation(self, size: int, limit: int) -> Sequence[Batch]:
        return []

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss(model, batch).reshape(1)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        return {"loss": float(sums[0])}


@dataclass
class Runs:
    """What the ledgers of runs of one fault say."""

    runs: int = 0
    flagged: int = 0
    measured: int = 0
    doubled: int = 0
    """Double executions in all runs, those of each rank counted."""
    stopped: int = 0
    """Runs that ended early, since the loss was no number."""
    wrong: list[str] = field(default_factory=list)
    """Places that were measured to differ and are not the planted one."""


@contextmanager
def trained(fault: Fault, processes: int, seed: int, steps: int, threads: int) -> Iterator[tuple[Path, int]]:
    """The folder of a run of ``steps`` steps with the defaults, and its exit code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys.create(folder / "me")
        options = f"{{model: {fault.model.__name__}}}"
        (folder / "planted.yaml").write_text(
            f"run: {{dir: {folder}/run, seed: {seed}}}\n"
            f"task: {{kind: 'planted_runs:Planted', options: {options}}}\n"
            f"train: {{steps: {steps}, global_batch: {BATCH * processes}, micro_batch: {BATCH}}}\n"
            f"checkpoint: {{every: {steps}}}\nevaluate: {{every: 0}}\n"
            f"compile: {str(fault.compiled).lower()}\nsigning: {{key: {folder}/me.key}}\n"
        )
        places = (ROOT, ROOT / "tests", ROOT / "scripts" / "bench")
        environ = {**os.environ, "HOME": name, "OMP_NUM_THREADS": str(threads)}
        environ |= {"PYTHONPATH": os.pathsep.join([*map(str, places), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        command += ["harness", "train", "planted.yaml"]
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
        if not (folder / "run" / layout.CHECKPOINTS).is_dir():
            raise SystemExit(
                f"{fault.name}: ended with {done.returncode}: {done.stdout} {done.stderr[-3000:]}"
            )
        yield folder / "run", done.returncode


def read(run: Path) -> Ledger:
    """The only ledger of ``run``."""
    (last,) = (run / layout.CHECKPOINTS).iterdir()
    return Ledger.parse((last / layout.LEDGER).read_bytes(), layout.LEDGER)


def planted(fault: Fault, processes: int, seed: int, outcome: Runs) -> None:
    """One run, and what its ledger says of the fault."""
    with trained(fault, processes, seed, STEPS, THREADS) as (folder, code):
        said = read(folder)
    named = [(f"gradient {row.module}" if row.op == "gradient" else row.op, row) for row in said.rows]
    measured = {place for place, row in named if row.evidence == "measured"}
    suspected = {place for place, row in named if row.evidence != "refuted"} | set(said.unclassified)
    by_code = fault.compiled and any(row.backend == "inductor" for row in said.rows)
    outcome.runs += 1
    outcome.flagged += by_code or bool(suspected & fault.places)
    outcome.measured += bool(measured & fault.places)
    outcome.stopped += code != 0
    outcome.wrong += sorted(measured - fault.places)
    outcome.doubled += sum(
        each.steps * len(each.ranks) for each in said.coverage if each.observer == "double"
    )


def changed(processes: int) -> tuple[bool, bool]:
    """Whether another number of threads shows in the signed stack, and nothing else there, and whether
    another seed shows in the first step's gradients."""
    stacks: list[dict[str, Any]] = []
    gradients: list[str] = []
    for seed, threads in ((0, THREADS), (0, 1), (1, THREADS)):
        with trained(SOUND, processes, seed, 2, threads) as (run, _):
            gradients.append(json.loads((run / layout.METRICS).read_text().splitlines()[0])["gradients"])
            (last,) = (run / layout.CHECKPOINTS).iterdir()
            bundle = json.loads((last / layout.CHECKPOINT_BUNDLE).read_bytes())
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        stacks.append(statement["predicate"]["environment"]["stack"])
    differing = {name for name in stacks[0] if stacks[0][name] != stacks[1][name]}
    seen = "threads" in differing and differing <= {"threads", "mkl_threads"}
    return seen, gradients[0] != gradients[2]


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2))
    parser.add_argument(
        "--compiled", action="store_true", help="also the compiled embedding; needs a C++ compiler"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose name has this text")
    parser.add_argument("--seed", type=int, default=0, help="of the first run, for slices of a long one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    faults = [*FAULTS, *([COMPILED] if arguments.compiled else []), SOUND]
    faults = [each for each in faults if arguments.only in each.name]
    document: dict[str, Any] = {}
    for processes in arguments.processes:
        outcomes = {fault.name: Runs() for fault in faults}
        for fault in faults:
            for number in range(arguments.runs):
                planted(fault, processes, arguments.seed + number, outcomes[fault.name])
            told = f"{processes} processes, {fault.name}: {outcomes[fault.name]}"
            print(told, file=sys.stderr, flush=True)
        threads, seeds = changed(processes)
        report(processes, outcomes, threads=threads, seeds=seeds)
        by_fault = {name: vars(each) for name, each in outcomes.items()}
        document[str(processes)] = {"faults": by_fault, "threads": threads, "seeds": seeds}
    print(f"{time.perf_counter() - started:.0f} s")
    keep(arguments.json, document)


def report(processes: int, outcomes: dict[str, Runs], *, threads: bool, seeds: bool) -> None:
    """Print the table and the verdicts."""
    rows = [(f"{processes} processes", "flagged", "measured", "stopped by NaN", "double", "wrong places")]
    for name, each in outcomes.items():
        counts = (f"{each.flagged} of {each.runs}", f"{each.measured} of {each.runs}")
        rows.append((name, *counts, str(each.stopped), str(each.doubled), ", ".join(each.wrong) or "-"))
    print(table(rows))
    print(f"a changed thread count {'shows' if threads else 'DOES NOT SHOW'} in the signed stack")
    print(f"a changed seed {'shows' if seeds else 'DOES NOT SHOW'} in the first step's gradients")
    faulty = [each for name, each in outcomes.items() if name != SOUND.name]
    found, of_all = sum(each.flagged for each in faulty), sum(each.runs for each in faulty)
    text = f"{found + threads + seeds} of {of_all + 2} flagged within {STEPS} steps"
    print(verdict(text, found + threads + seeds, of_all + 2, at_least=True))
    wrong = sum(len(each.wrong) for each in outcomes.values())
    print(verdict(f"{wrong} measured rows name another place", wrong, 0))


if __name__ == "__main__":
    main()
