"""Tokens per second of a 10.8M-parameter decoder: the harness, checkpoints and ledger on, over a bare loop.

python scripts/bench/throughput.py [--steps 230] [--json FILE]

Six layers, width 384, 128 tokens, batch 4, fp32 on all cores. One run of the harness with its defaults: a
checkpoint (130 MB) every 100 steps, the ledger, digests, clipping. Whenever it fetches a batch, one step of a
bare loop that clips runs in between, so that both see the same machine. While a checkpoint is written behind
the loop, the neighbouring bare step is slowed as well, and the median bare step stands in for it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import table_task
import torch
from interleave import Pairs, keep, spread, verdict
from table_task import Table
from torch import nn

from harness import config
from harness.provenance.signing import keys
from harness.training.loop import train

SIZES = {"layers": 6, "width": 384, "heads": 6, "length": 128}
BATCH = 4
LIMIT = 0.99


def bare() -> Callable[[], None]:
    """One step of a plain loop that clips."""
    torch.manual_seed(0)
    task = Table(seed=0, **SIZES)
    model = task.build_model()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, fused=True)
    numbers = iter(range(0, 10**9, BATCH))
    epochs = np.zeros(BATCH, dtype=np.int64)

    def step() -> None:
        places = (next(numbers) + np.arange(BATCH)) % task.samples
        loss = task.loss(model, task.gather(places, epochs))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measured(steps: int) -> tuple[list[float], list[float], int]:
    """µs of the harness's steps and of the bare steps beside them, and how many had a save behind them."""
    pairs, writing = Pairs(bare()), []

    def fetched() -> None:
        writing.append(any(thread.name == "checkpoint-writer" for thread in threading.enumerate()))
        pairs.fetched()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys.create(folder / "me")
        sizes = ", ".join(f"{key}: {value}" for key, value in SIZES.items())
        (folder / "small.yaml").write_text(
            f"run: {{dir: {folder}/run}}\ntask: {{kind: 'table_task:Table', options: {{{sizes}}}}}\n"
            f"train: {{steps: {steps}, global_batch: {BATCH}, micro_batch: {BATCH}}}\n"
            f"signing: {{key: {folder}/me.key}}\n"
        )
        table_task.on_batch = fetched
        train(config.load(folder / "small.yaml"), quiet=True)
    busy = writing[1 : len(pairs.loop_us) + 1]
    usual = statistics.median(pairs.bare_us)
    bare_us = [usual if saving else own for own, saving in zip(pairs.bare_us, busy, strict=False)]
    return pairs.loop_us[1:], bare_us[1:], sum(busy)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--steps", type=int, default=230)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    loop_us, bare_us, busy = measured(arguments.steps)
    tokens = BATCH * SIZES["length"] * 1e6
    for name, values in (("bare loop", bare_us), ("harness", loop_us)):
        speed = tokens * len(values) / sum(values)
        print(
            f"{name:<10} {speed:7,.0f} tokens/s  {spread([each / 1000 for each in values], '.0f')} ms a step"
        )
    ratio = sum(bare_us) / sum(loop_us)
    text = f"harness / bare: {ratio:.3f}, {len(loop_us)} steps, {busy} during a save; at least {LIMIT} wanted"
    print(verdict(text, ratio, LIMIT, at_least=True))
    keep(arguments.json, {"ratio": ratio, "steps": len(loop_us), "during_a_save": busy})


if __name__ == "__main__":
    main()
