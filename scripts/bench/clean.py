"""Double executions of sound models on several ranks: whether any says that bits differ, under load.

python scripts/bench/clean.py [--executions 200] [--parallel ddp fsdp2] [--processes 2] [--load 2]
                              [--only TEXT] [--seed 0] [--json FILE]

`harness train` under torchrun, as a user has it: a decoder of two layers and width 64 with dropout and
clipping, one thread a rank, so that every operator has a fixed order. What comes between two steps comes
often (an evaluation every third step, a checkpoint every 25), since what it leaves behind is where two
executions of one micro-step may begin otherwise: FSDP2 gathers ahead by what ran before. The budget is 0.9,
so that about every third step is looked at, half of the time at every operator. For each sharding: one
micro-batch an update and four, bf16, activation checkpointing, and logical shards; each goes on until its
part of --executions, counted on all ranks, is made. --load: busy processes beside it, since a false row may
need ranks that wait for each other. Any `measured` row of the last ledgers is false, and is printed.
`planted.py` asks the same of one process, and whether planted faults are found.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from interleave import keep, table, verdict
from same_bits import launched

from harness.format import layout
from harness.format.ledger import Ledger
from harness.provenance.signing import keys

STEPS = 150
BATCH = 16
CONFIG = f"""\
run: {{seed: 3}}
model: {{layers: 2, width: 64, heads: 2, dropout: 0.1}}
data: {{limit_bytes: 200000, sequence_length: 32}}
optimizer: {{lr: 3e-3, clip: 0.5}}
train: {{steps: {STEPS}, global_batch: {BATCH}}}
evaluate: {{every: 3, batches: 1}}
checkpoint: {{every: 25, keep: 1}}
determinism: {{budget: 0.9}}
"""
CASES: dict[str, tuple[Any, ...]] = {
    "one micro-batch": (1,),
    "four micro-batches": (4,),
    "bf16": (1, "precision=bf16"),
    "activation checkpointing": (1, "train.activation_checkpointing=true"),
    "logical shards": (4, "determinism.elastic=true"),
}
"""Micro-batches of a rank in an update, and what else is set."""
BUSY = "import os\nwhile True: sorted(os.urandom(1 << 16))"


@dataclass
class Outcome:
    """What the ledgers of the runs of one case say."""

    runs: int = 0
    executions: int = 0
    """Double executions, those of each rank counted."""
    false: list[str] = field(default_factory=list)
    """Measured rows."""
    refused: list[str] = field(default_factory=list)


@contextmanager
def load(processes: int) -> Iterator[None]:
    """So many processes that want a core each."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for each in started:
            each.kill()
            each.wait()


def run(folder: Path, name: str, ranks: int, settings: list[str], outcome: Outcome) -> None:
    """One launch, and what the ledger of its last checkpoint says."""
    launched(folder, name, ranks, *settings)
    data = (max((folder / name / layout.CHECKPOINTS).glob("step-*")) / layout.LEDGER).read_bytes()
    said = Ledger.parse(data, name)
    double = [each for each in said.coverage if each.observer == "double"]
    outcome.runs += 1
    outcome.executions += sum(each.steps * len(each.ranks) for each in double)
    rows = [row for row in said.rows if row.evidence == "measured"]
    outcome.false += [f"{name}: {row.op} in {row.module} at {row.call_site}: {row.source}" for row in rows]
    outcome.refused += said.not_executed_twice


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--executions", type=int, default=200, help="of all cases, at least")
    parser.add_argument("--parallel", nargs="+", choices=("ddp", "fsdp2"), default=("ddp", "fsdp2"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--load", type=int, default=2)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this text")
    parser.add_argument("--seed", type=int, default=0, help="of the first run, for slices of a long one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    ranks = arguments.processes
    cases = [(parallel, case) for parallel in arguments.parallel for case in CASES if arguments.only in case]
    part = -(-arguments.executions // len(cases))
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as name, load(arguments.load):
        folder = Path(name)
        keys.create(folder / "me")
        (folder / "same.yaml").write_text(CONFIG)
        for parallel, case in cases:
            outcome = outcomes[f"{parallel}, {case}"] = Outcome()
            micro_batches, *settings = CASES[case]
            settings += [f"train.micro_batch={BATCH // ranks // micro_batches}"]
            settings += [f"parallel={parallel}", f"signing.key={folder}/me.key"]
            while outcome.executions < part and not outcome.refused:
                seed = arguments.seed + outcome.runs
                label = f"{parallel}-{case.replace(' ', '-')}-{seed}"
                run(folder, label, ranks, [*settings, f"run.seed={seed}"], outcome)
                told = f"{label}: {outcome.executions} executions, {len(outcome.false)} false rows"
                print(told, file=sys.stderr, flush=True)
    rows = [(f"{ranks} processes, {arguments.load} busy", "runs", "executions", "false rows", "refused")]
    for label, each in outcomes.items():
        counts = (str(each.runs), str(each.executions), str(len(each.false)))
        rows.append((label, *counts, ", ".join(sorted(set(each.refused))) or "-"))
    print(table(rows))
    false = [text for each in outcomes.values() for text in each.false]
    print("\n".join(false))
    made = sum(each.executions for each in outcomes.values())
    print(verdict(f"{len(false)} false rows in {made} clean double executions", len(false), 0))
    print(f"{time.perf_counter() - started:.0f} s")
    keep(arguments.json, {label: asdict(each) for label, each in outcomes.items()})


if __name__ == "__main__":
    main()
