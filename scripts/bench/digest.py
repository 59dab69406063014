"""What the step digests cost: of gradients and state, over a training step and over reading the memory once.

python scripts/bench/digest.py [--rounds 30] [--json FILE]

A decoder of 10.8M parameters (six layers, width 384, 128 tokens, batch 4), fp32, one thread. A step of
training, the digest of its gradients, the digest of the state after it and a plain int64 sum of the same
bytes, the floor, take turns. Beside them: xxh3-128 of each tensor (fast, but it depends on how a
tensor is cut) and a weight computed for every element (the textbook form of the sum).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import xxhash
from interleave import keep, rounds, spread, table, verdict
from table_task import Table
from throughput import BATCH, SIZES
from torch import Tensor, nn

from harness.checkpoint.state import TrainingState
from harness.settings import Determinism
from harness.training.step_digests import StepDigests
from harness.workers import Workers

LIMIT = 0.01
"""Of a step on a CPU."""


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """Milliseconds of one call."""

    def call() -> float:
        started = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - started)

    return call


def textbook(tensors: list[Tensor]) -> None:
    """A weight for every element, multiplied and added."""
    for tensor in tensors:
        words = tensor.view(-1).view(torch.int32)
        (words * (2 * torch.arange(words.numel()) + 1)).sum()


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    task = Table(seed=0, **SIZES)
    model = task.build_model()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    digests = StepDigests(Workers.alone(torch.device("cpu")), TrainingState(model, optimizer))
    batch = task.gather(np.arange(BATCH), np.zeros(BATCH, dtype=np.int64))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        task.loss(model, batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def gradients() -> list[Tensor]:
        return [each.grad for each in parameters if each.grad is not None]

    step()
    values = rounds(
        {
            "step": timed(step),
            "gradients": timed(lambda: digests.gradients().digest()),
            "state": timed(lambda: digests.state().digest()),
            "floor": timed(lambda: [each.view(-1).view(torch.int64).sum() for each in gradients()]),
            "xxh3-128": timed(lambda: [xxhash.xxh3_128_digest(each.numpy()) for each in gradients()]),
            "textbook sum": timed(lambda: textbook(gradients())),
        },
        arguments.rounds,
    )
    size = sum(each.numel() * each.element_size() for each in gradients())
    medians = {name: statistics.median(each) for name, each in values.items()}
    rows = [("", "ms", "of a step", "GB/s")]
    for name, each in values.items():
        read = size * (3 if name == "state" else 1)
        speed = "" if name == "step" else f"{read / medians[name] / 1e6:.1f}"
        rows.append((name, spread(each, ".2f"), f"{medians[name] / medians['step']:.2%}", speed))
    print(table(rows))
    every = Determinism().state_every
    cost = (medians["gradients"] + medians["state"] / every) / medians["step"]
    ratio = medians["gradients"] / medians["floor"]
    print(f"gradients over the floor: {ratio:.2f}")
    tokens = SIZES["length"] * BATCH
    text = f"gradients at every step, state every {every}: {cost:.2%} of a step of {tokens} tokens"
    print(verdict(text, cost, LIMIT))
    keep(arguments.json, {"share": cost, "over_floor": ratio, "ms": medians})


if __name__ == "__main__":
    main()
