"""What all looking costs a run: ledger, double executions, step digests; and whether it moves a bit.

python scripts/bench/ledger.py [--steps 1000] [--batch 4] [--only cost bits] [--json FILE]

Cost: a decoder of 10.8M parameters (six layers, width 384, 128 tokens, batch 4 or --batch), fp32, one thread,
trained by the real loop, with looks as often as the default budget allows. Each step that is looked at is
compared with plain steps beside it in the same run, by the processor time of the thread that trains, since a
busy machine moves the clock more than looking does. Gradients are digested at every second step, so that each
digest has neighbours without one; they are counted at every step, and the budget is told twice their cost.
What is too small or too rare to be seen that way is timed inside, censuses as the ledger does.

Bits: a decoder with dropout, 24 steps, eager and compiled, on two ranks with DDP and with FSDP2: everything
on (a census at every step, half of the time for double executions) and everything off must end on the same
tensors, optimizer and generators included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import table_task
import torch
from interleave import keep, spread, table, verdict
from same_bits import launched
from throughput import BATCH, SIZES

from harness import config
from harness.determinism.double import Double
from harness.determinism.ledger import Ledger
from harness.errors import Interrupted
from harness.format import chain, layout
from harness.format import ledger as ledgers
from harness.provenance.signing import keys
from harness.settings import Checkpoint, Determinism
from harness.training import recorder
from harness.training.loop import train
from harness.training.ranks import exchange
from harness.training.step import session
from harness.training.step.digests import StepDigests

LIMIT = 0.01
"""Of the time of a run's steps."""
NEAR = 12
"""Steps on either side among which a step's neighbours are."""
WARM = 2
"""First steps, which are no one's neighbours."""
BITS_STEPS = 24
BITS = """\
run: {seed: 3}
model: {layers: 2, width: 64, heads: 2, dropout: 0.1}
data: {limit_bytes: 200000, sequence_length: 32}
optimizer: {lr: 3e-3, clip: 0.5}
train: {global_batch: 8, micro_batch: 2}
"""
CASES = {
    "eager": (1, ()),
    "compiled": (1, ("compile=true",)),
    "DDP, 2 ranks": (2, ()),
    "DDP, 2 ranks, compiled": (2, ("compile=true",)),
    "FSDP2, 2 ranks": (2, ("parallel=fsdp2",)),
}
ON = ("determinism.census_every=1", "determinism.budget=0.5")
OFF = ("determinism.mode=off", "determinism.step_digests=false")


class Watch:
    """Processor time of every step of a run, and which steps were looked at."""

    def __init__(self) -> None:
        self._marks: list[float] = []
        self.looked: dict[str, list[int]] = defaultdict(list)
        """What → steps in which it happened."""
        self.inside: dict[str, float] = defaultdict(float)
        """What → seconds spent in it."""
        self.said: dict[str, Any] = {}
        """The ledger at the end."""

    def fetched(self) -> None:
        """A step has ended, the next begins."""
        self._marks.append(time.thread_time())

    def seconds(self) -> dict[int, float]:
        """Step → its processor time; the last one has no end."""
        ends = zip(self._marks, self._marks[1:], strict=False)
        return {number: end - begin for number, (begin, end) in enumerate(ends, 1)}

    @contextmanager
    def around(self, owner: Any, name: str, what: str) -> Iterator[None]:
        """Note each call of ``owner.name``."""
        original: Callable[..., Any] = getattr(owner, name)

        def noted(*values: Any, **named: Any) -> Any:
            self.looked[what].append(len(self._marks))
            started = time.thread_time()
            try:
                return original(*values, **named)
            finally:
                self.inside[what] += time.thread_time() - started

        setattr(owner, name, noted)
        try:
            yield
        finally:
            setattr(owner, name, original)


def watched(folder: Path, steps: int, batch: int) -> Watch:
    """A run of the real loop, gradients digested at every second step."""
    watch = Watch()
    sizes = ", ".join(f"{key}: {value}" for key, value in SIZES.items())
    (folder / "small.yaml").write_text(
        f"run: {{dir: {folder}/run}}\ntask: {{kind: 'table_task:Table', options: {{{sizes}}}}}\n"
        f"train: {{steps: {steps}, global_batch: {batch}, micro_batch: {batch}}}\n"
        f"checkpoint: {{every: 1000000}}\nsigning: {{key: {folder}/me.key}}\n"
    )
    keys.create(folder / "me")
    table_task.on_batch = watch.fetched
    small = ((session, "batch_digest"), (session, "rng_digest"), (exchange.Exchange, "begin"))
    small += ((exchange.Exchange, "end"), (chain, "advance"))
    saving = ((Ledger, "scan"), (Ledger, "to_bytes"), (recorder, "unite_files"), (ledgers, "summary"))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(StepDigests, "gradients", counted_twice(StepDigests.gradients)))
        stack.enter_context(watch.around(Ledger, "_keep", "census"))
        stack.enter_context(watch.around(Double, "check", "double"))
        for owner, name in small:
            stack.enter_context(watch.around(owner, name, "small"))
        for owner, name in saving:
            stack.enter_context(watch.around(owner, name, "save"))
        with suppress(Interrupted):  # what was measured until then is reported
            train(
                config.load(folder / "small.yaml", ["determinism.gradients_every=2"]),
                quiet=True,
            )
    (last,) = (folder / "run" / "checkpoints").iterdir()
    watch.said = json.loads((last / layout.LEDGER).read_text())
    return watch


def counted_twice(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """What digests them, so that half of the digests are accounted for as all of them."""

    def counted(digests: StepDigests, *values: Any) -> Any:
        before = digests.spent_ns
        made = gradients(digests, *values)
        digests.spent_ns += digests.spent_ns - before
        return made

    return counted


def excess(seconds: dict[int, float], looked: Sequence[int], plain: Sequence[int]) -> list[float]:
    """Seconds by which each step of ``looked`` is longer than the median of plain ones beside it.

    A neighbour has its gradients digested if the step has, so it is an even number of steps away.
    """
    found = []
    for step in looked:
        beside = [each for each in plain if abs(each - step) <= NEAR and (each - step) % 2 == 0]
        found.append(seconds[step] - statistics.median(seconds[each] for each in beside))
    return found


def cost(steps: int, batch: int) -> dict[str, float]:
    """Measure and print what looking costs; returns name → share of the run."""
    with tempfile.TemporaryDirectory() as name:
        watch = watched(Path(name), steps, batch)
    seconds, usually = watch.seconds(), Determinism()
    looked = {what: {each for each in watch.looked[what] if each in seconds} for what in ("census", "double")}
    states = {each for each in seconds if each % usually.state_every == 0}
    plain = sorted(set(seconds) - states - looked["census"] - looked["double"] - set(range(WARM + 1)))
    usual = statistics.median(seconds[each] for each in plain if each % 2)
    digested = [
        seconds[each] - (seconds[each - 1] + seconds[each + 1]) / 2
        for each in plain
        if each % 2 == 0 and {each - 1, each + 1} <= set(plain)
    ]
    alone = {
        "state digests": sorted(states - looked["census"] - looked["double"]),
        "double executions": sorted(looked["double"]),
    }
    each = {what: excess(seconds, found, plain) for what, found in alone.items()}
    times = {
        "state digests": len(seconds) // usually.state_every,
        "double executions": len(looked["double"]),
    }
    whole = usual * len(seconds)
    shares: dict[str, float] = {}
    rows = [("", "measured", "ms longer than the steps beside it", "times", "of the run")]
    shown = {"gradient digests": (digested, len(seconds))} | {
        what: (values, times[what]) for what, values in each.items()
    }
    for what, (values, count) in shown.items():
        typical = statistics.mean(values) if what == "double executions" else statistics.median(values)
        shares[what] = count * typical / whole
        longer = spread([1e3 * value for value in values], ".2f")
        rows.append((what, str(len(values)), longer, str(count), f"{shares[what]:.2%}"))
    saves = Checkpoint().every
    taken = {each["observer"]: each for each in watch.said["coverage"]}
    censuses = sum(taken[each]["microseconds"] for each in ("census", "graph")) / 1e6
    inside = {f"{taken['census']['steps']} censuses": censuses / whole}
    inside["other digests, exchange and chain"] = watch.inside["small"] / whole
    inside[f"ledger at a save, every {saves}"] = watch.inside["save"] / usual / saves
    for words, share in inside.items():
        shares[words] = share
        rows.append((words, "-", "timed inside", "-", f"{share:.2%}"))
    print(table(rows))
    tokens = SIZES["length"] * batch
    print(f"a plain step: {1e3 * usual:.0f} ms of the processor, {tokens} tokens; {len(seconds)} steps")
    print(f"double executions at steps {', '.join(map(str, alone['double executions']))}")
    print(f"the ledger's own account: {watch.said['budget']['spent'] / 1e6:.2%}")
    error = statistics.stdev(digested) / len(digested) ** 0.5 / usual
    total = sum(shares.values())
    text = f"ledger, double executions and digests: {total:.2%} of the run, give or take {2 * error:.2%}"
    print(verdict(text, total, LIMIT))
    return {**shares, "total": total, "step_ms": 1e3 * usual}


def tensors(run: Path) -> list[list[Any]]:
    """Name, dtype, shape and digest of every tensor of the newest checkpoint."""
    manifest = json.loads((max((run / "checkpoints").iterdir()) / "MANIFEST.json").read_text())
    return sorted(
        [each["name"], each["dtype"], each["shape"], each["digest"]] for each in manifest["tensors"]
    )


def bits() -> dict[str, bool]:
    """Case → whether everything on and everything off end alike."""
    alike = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys.create(folder / "me")
        common = (
            f"train.steps={BITS_STEPS}",
            f"checkpoint.every={BITS_STEPS}",
            f"signing.key={folder}/me.key",
        )
        (folder / "same.yaml").write_text(BITS)
        for number, (case, (ranks, settings)) in enumerate(CASES.items()):
            for way, chosen in (("on", ON), ("off", OFF)):
                launched(folder, f"{number}-{way}", ranks, *common, *settings, *chosen)
            on, off = (tensors(folder / f"{number}-{way}") for way in ("on", "off"))
            alike[case] = on == off
            newest = max((folder / f"{number}-on" / "checkpoints").iterdir())
            looked = json.loads((newest / "ledger.json").read_text())["coverage"]
            times = ", ".join(f"{each['observer']} {each['steps']}" for each in looked)
            print(
                f"{case}: {len(on)} tensors {'equal' if alike[case] else 'DIFFER'}; looked: {times}",
                flush=True,
            )
    print(
        verdict(
            f"{sum(alike.values())} of {len(alike)} alike", sum(alike.values()), len(alike), at_least=True
        )
    )
    return alike


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--only", nargs="+", choices=("cost", "bits"), default=("cost", "bits"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, object] = {}
    if "bits" in arguments.only:
        document["bits"] = bits()
    if "cost" in arguments.only:
        document["cost"] = cost(arguments.steps, arguments.batch)
    keep(arguments.json, document)


if __name__ == "__main__":
    main()
