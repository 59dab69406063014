"""What the step digests cost: of gradients and state, over steps of several sizes and over a plain sum.

python scripts/bench/digest.py [--rounds 30] [--batch 4 8 16 32] [--json FILE]

A decoder of 10.8M parameters (six layers, width 384, 128 tokens), fp32, one thread, processor time. Steps of
training of each batch, the clipping of their gradients with and without the digest that is made after it, and
the digest of the state take turns, the clippings each after a backward pass. What a digest costs is what its
turn takes longer than the clipping of its round. Two floors: a plain int64 sum of each gradient right after
it was multiplied, while the cache has it, and one after clipping, which reads them from memory as the digest
does. Beside them: xxh3-128 of each tensor (fast, but it depends on how a tensor is cut), a weight computed
for every element (the textbook form of the sum), and clipping from the first gradient to the last, with the
digest after it, for what the order of memory saves.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
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
from harness.training import optimizer
from harness.training.step.digests import StepDigests
from harness.workers import Workers

LIMIT = 0.01
"""Of a step on a CPU."""


def timed(function: Callable[[], object], before: Callable[[], object] = int) -> Callable[[], float]:
    """Milliseconds of one call, of this thread's processor time; ``before`` is called first, untimed."""

    def call() -> float:
        before()
        started = time.thread_time()
        function()
        return 1e3 * (time.thread_time() - started)

    return call


def plain(tensor: Tensor) -> None:
    """The sum of its words, which no digest can do without reading."""
    tensor.view(-1).view(torch.int64).sum()


def textbook(tensor: Tensor) -> None:
    """A weight for every element, multiplied and added."""
    words = tensor.view(-1).view(torch.int32)
    (words * (2 * torch.arange(words.numel()) + 1)).sum()


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, nargs="+", default=(BATCH,))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    task = Table(seed=0, **SIZES)
    model = task.build_model()
    parameters = list(model.parameters())
    adamw = torch.optim.AdamW(parameters, fused=True)
    digests = StepDigests(Workers.alone(torch.device("cpu")), TrainingState(model, adamw))
    factor = torch.tensor(1.0)

    def step(size: int) -> None:
        adamw.zero_grad(set_to_none=True)
        batch = task.gather(np.arange(size), np.zeros(size, dtype=np.int64))
        task.loss(model, batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()

    def gradients() -> list[Tensor]:
        return [each.grad for each in parameters if each.grad is not None]

    def backward() -> None:
        adamw.zero_grad(set_to_none=True)
        task.loss(model, task.gather(np.arange(BATCH), np.zeros(BATCH, dtype=np.int64))).backward()

    def clipped() -> None:
        optimizer.gradient_norm(gradients())
        optimizer.scale(gradients(), factor)

    def on_the_way(look: Callable[[Tensor], object]) -> None:
        """What looks at each gradient right after it was multiplied."""
        optimizer.gradient_norm(gradients())
        for each in gradients():
            look(each.mul_(factor))

    def after(look: Callable[[Tensor], object]) -> None:
        """What looks at each gradient after all were multiplied."""
        clipped()
        for each in gradients():
            look(each)

    def digested() -> None:
        clipped()
        digests.gradients().digest()

    def digested_in_order() -> None:
        optimizer.gradient_norm(gradients())
        torch._foreach_mul_(gradients(), factor)
        digests.gradients().digest()

    step(BATCH), backward()
    digested(), digests.state()  # what is made once
    steps = {f"step of {size * SIZES['length']:,} tokens": size for size in arguments.batch}
    values = rounds(
        {
            **{name: timed(partial(step, size)) for name, size in steps.items()},
            "clipping": timed(clipped, backward),
            "gradients": timed(digested, backward),
            "gradients, clipped in order": timed(digested_in_order, backward),
            "state": timed(lambda: digests.state().digest()),
            "floor in the cache": timed(lambda: on_the_way(plain), backward),
            "floor from memory": timed(lambda: after(plain), backward),
            "xxh3-128": timed(lambda: after(lambda each: xxhash.xxh3_128_digest(each.numpy())), backward),
            "textbook sum": timed(lambda: after(textbook), backward),
        },
        arguments.rounds,
    )
    for name in set(values) - {*steps, "clipping", "state"}:
        pairs = zip(values[name], values["clipping"], strict=True)
        values[name] = [with_it - without for with_it, without in pairs]
    medians = {name: statistics.median(each) for name, each in values.items()}
    print(table([("", "ms"), *((name, spread(each, ".2f")) for name, each in values.items())]))
    ratio = medians["gradients"] / medians["floor from memory"]
    print(f"gradients over the floor from memory: {ratio:.2f}")
    every = Determinism().state_every
    first = medians[next(iter(steps))]
    flops = model.flops_per_token(SIZES["length"]) * SIZES["length"] * arguments.batch[0]
    held = sum(each.numel() * each.element_size() for each in parameters)
    per_byte = (medians["gradients"] + medians["state"]) / (4 * held) * flops / first
    print(f"a byte digested takes as long as {per_byte:.1f} FLOPs of the first step")
    print(f"gradients at every step, state every {every}:")
    shares = {}
    for name in steps:
        shares[name] = (medians["gradients"] + medians["state"] / every) / medians[name]
        print(verdict(f"{shares[name]:.2%} of a {name}", shares[name], LIMIT))
        floors = [medians[f"floor {where}"] / medians[name] for where in ("in the cache", "from memory")]
        print(f"  the floors of its gradients: {floors[0]:.2%} and {floors[1]:.2%}")
    keep(arguments.json, {"shares": shares, "over_floor": ratio, "ms": medians})


if __name__ == "__main__":
    main()
