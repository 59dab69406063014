"""Training speed while a checkpoint is written behind it, over the speed when none is.

python scripts/bench/in_flight.py [--gib 0.75] [--saves 6] [--json FILE]

Steps of a stack of square layers, and saves of its state by what `harness train` calls, one after the other
with as many steps between them. Once with one thread fewer than cores, so that a core is free, and once with
all of them; in the second case the writing threads run at the lowest priority, as in a run on CPUs. The copy
that blocks is not part of it: `checkpoint.py` measures that.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from checkpoint import Harness, scratch, training_state
from interleave import keep, verdict

LIMIT = 0.9
BATCH = 16


def step(bench: Harness) -> float:
    """Seconds of one update."""
    started = time.perf_counter()
    width = bench.made.model[0].in_features  # type: ignore[index]
    bench.made.model(torch.ones(BATCH, width)).square().mean().backward()
    bench.made.optimizer.step()
    bench.made.optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def measured(bench: Harness, saves: int) -> tuple[list[float], list[float]]:
    """Seconds of steps beside a save, and of as many steps after it without one."""
    beside: list[float] = []
    alone: list[float] = []
    for _ in range(saves):
        writer = bench.begin()
        count = 0
        while writer.busy:
            seconds = step(bench)
            # The step in which the save ends belongs to neither.
            if writer.busy:
                beside.append(seconds)
            count += 1
        writer.wait()
        alone += [step(bench) for _ in range(count)]
    return beside, alone


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=0.75, help="GiB of state (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: the temporary folder)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    found = {}
    with scratch(arguments.folder) as root:
        bench = Harness(root, "harness", training_state(arguments.gib))
        bench.first()
        for threads in sorted({max(1, cores - 1), cores}):
            torch.set_num_threads(threads)
            step(bench)
            beside, alone = measured(bench, arguments.saves)
            ratio = statistics.median(alone) / statistics.median(beside)
            found[f"{threads} of {cores} cores train"] = ratio
            text = (
                f"{threads} of {cores} cores train: {ratio:.2f} of the speed while a save is in flight "
                f"({len(beside)} steps, median {1e3 * statistics.median(alone):.0f} ms without)"
            )
            if threads < cores:
                text = verdict(f"{text} (limit {LIMIT})", ratio, LIMIT, at_least=True)
            print(text, flush=True)
    keep(arguments.json, {"speed while a save is in flight": found})


if __name__ == "__main__":
    main()
