"""Tokens per second of a 10.8M-parameter decoder: the harness, checkpoints and ledger on, over a bare loop.

python scripts/bench/throughput.py [--rounds 3] [--steps 130] [--json FILE]

Six layers, width 384, 128 tokens, batch 4, fp32 on all cores. Bare loop and harness take turns of some steps
each; the harness saves a checkpoint (130 MB) at step 100, its default, and at the end, keeps the ledger, digests
every batch and clips. A turn's clock starts after its second step and ends before its last, with which the
harness evaluates.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import interleave
import numpy as np
import orjson
import torch
from table_task import Table
from torch import nn

from harness import config
from harness.provenance import keys
from harness.training.loop import train

SIZES = {"layers": 6, "width": 384, "heads": 6, "length": 128}
BATCH, SKIPPED = 4, 2
LIMIT = 0.99
BARE, HARNESS = "bare loop", "harness"


def bare(steps: int) -> float:
    """Tokens per second of a plain loop that clips."""
    torch.manual_seed(0)
    task = Table(seed=0, **SIZES)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    epochs = np.zeros(BATCH, dtype=np.int64)
    started = 0.0
    for number in range(steps):
        if number == SKIPPED:
            started = time.perf_counter()
        batch = task.gather(np.arange(BATCH) + BATCH * number, epochs)
        loss = task.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (steps - SKIPPED) * BATCH * SIZES["length"] / (time.perf_counter() - started)


def harness(folder: Path, steps: int) -> float:
    """Tokens per second of a fresh run, by the times in its metrics."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        made = config.load(folder / "small.yaml", [f"run.dir={run}/run", f"train.steps={steps}"])
        train(made, quiet=True)
        with open(f"{run}/run/metrics.jsonl", "rb") as stream:
            times = [orjson.loads(line)["time"] for line in stream]
    return (steps - SKIPPED - 1) * BATCH * SIZES["length"] / float(times[-2] - times[SKIPPED - 1])


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=130)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys.create(folder / "me")
        sizes = ", ".join(f"{key}: {value}" for key, value in SIZES.items())
        (folder / "small.yaml").write_text(
            f"run: {{dir: x}}\ntask: {{kind: 'table_task:Table', options: {{{sizes}}}}}\n"
            f"train: {{steps: 1, global_batch: {BATCH}, micro_batch: {BATCH}}}\n"
            f"schedule: {{kind: constant}}\nsigning: {{key: {folder}/me.key}}\n"
        )
        turns = {BARE: lambda: bare(arguments.steps), HARNESS: lambda: harness(folder, arguments.steps)}
        values = interleave.rounds(turns, arguments.rounds)
    ratios = interleave.ratios(values, HARNESS, BARE)
    rows = [("loop", "tokens/s, median [middle half]")]
    rows += [(name, interleave.spread(speeds, ",.0f")) for name, speeds in values.items()]
    print(interleave.table(rows))
    text = f"harness / bare: {interleave.spread(ratios, '.3f')}, at least {LIMIT} wanted"
    print(interleave.verdict(text, statistics.median(ratios), LIMIT, at_least=True))
    interleave.keep(arguments.json, {"tokens_per_s": values, "ratios": ratios})


if __name__ == "__main__":
    main()
