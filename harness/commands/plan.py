"""What a run will need, before it starts: parameters, memory of each rank, tokens, FLOPs, disk and time.

Needs no GPU, and for language no data. Needs the training half to be installed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from harness import config, environment
from harness.commands import Outcome
from harness.errors import UsageError
from harness.format.budget import percent, remedy
from harness.settings import Settings
from harness.training.beginning import own_policy
from harness.training.doctor.machine import signing_key
from harness.words import human_bytes, human_seconds

if TYPE_CHECKING:
    from harness.training.plan import Plan

EXAMPLE = "harness plan configs/gpt-124m.yaml --world-size 8 --gpu H100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config, and what it is to run on."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for example train.micro_batch=8"
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="processes (default: train.world_size or 1)"
    )
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--gpu", metavar="NAME", help="estimate the time on such GPUs, for example H100")
    speed.add_argument(
        "--tokens-per-second",
        type=float,
        metavar="X",
        help="estimate the time at this measured speed of all ranks",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Print the plan."""
    loaded = config.load(arguments.config, arguments.overrides)
    settings = loaded.settings
    world_size = settings.train.world_size or 1 if arguments.world_size is None else arguments.world_size
    if world_size < 1 or (arguments.tokens_per_second is not None and not arguments.tokens_per_second > 0):
        raise UsageError("--world-size and --tokens-per-second must be greater than 0")
    environment.require_training()
    from harness.training.plan import plan

    own, end = own_policy.planned(settings, lambda: signing_key(settings.signing.key, settings.run.dir)[1])
    planned = plan(settings, loaded.path.parent, world_size)
    seconds, assumption = _seconds(planned, settings, arguments.gpu, arguments.tokens_per_second)
    document = {
        **asdict(planned),
        "global_batch": settings.train.global_batch,
        "device_bytes": planned.memory.device,
        "seconds": seconds,
        "speed": assumption,
        "policy": None if own is None else own.reference,
        "policy_ends": None if end is None else end.at,
    }
    rows = _rows(planned, settings)
    if own is not None:
        rows.append(("policy", own.words))
        rows += [("  odd", f"{each.what}: {each.where}; {each.remedy}") for each in own.odd]
    if end is not None:
        early = "before the run: " if seconds is not None and seconds > end.seconds else ""
        rows.append(("  ends", f"{early}{end.words}"))
    rows += [] if arguments.gpu else _digests(planned, settings)
    if seconds is not None:
        rows.append(("time", f"{human_seconds(seconds)}  {assumption}"))
    width = max(len(name) for name, _ in rows)
    return Outcome(document, "\n".join(f"{name:<{width}}  {text}" for name, text in rows))


def _seconds(
    planned: Plan, settings: Settings, gpu: str | None, per_second: float | None
) -> tuple[float | None, str | None]:
    """Training time without start-up, evaluation and saving, and what it rests on."""
    if per_second is not None:
        return planned.units / per_second, f"at {per_second:,.0f} {planned.unit}s per second"
    if gpu is None:
        return None, None
    from harness.training.plan import ASSUMED_MFU
    from harness.training.telemetry.throughput import peak_flops

    peak = peak_flops(gpu, settings.precision)
    if peak is None or planned.flops is None:
        missing = f"the peak of {gpu!r} in {settings.precision}" if peak is None else "the task's FLOPs"
        raise UsageError(f"{missing} is not known", remedy="give --tokens-per-second, measured on it")
    seconds = planned.flops / (peak * ASSUMED_MFU * planned.world_size)
    assumption = f"if {planned.world_size} x {gpu} reach {ASSUMED_MFU:.0%} of {peak / 1e12:,.0f} TFLOP/s"
    return seconds, assumption


def _rows(planned: Plan, settings: Settings) -> list[tuple[str, str]]:
    train, memory, unit = settings.train, planned.memory, planned.unit
    batch = (
        f"{train.global_batch} samples = {train.micro_batch} x {planned.world_size} ranks "
        f"x {planned.accumulation} accumulated"
    )
    keep = settings.checkpoint.keep
    kept = "all kept" if keep == "all" else f"newest {keep if isinstance(keep, int) else keep.newest} kept"
    kept += "" if isinstance(keep, (int, str)) else ", and what checkpoint.keep adds"
    return [
        ("parameters", f"{planned.parameters:,}"),
        ("global batch", batch),
        ("work", f"{planned.units_per_step:,} {unit}s a step, {planned.units:,} in {train.steps:,} steps"),
        ("FLOPs", _flops(planned)),
        ("memory of a rank", _total(memory.device)),
        ("  weights", human_bytes(memory.weights)),
        ("  gradients", human_bytes(memory.gradients)),
        ("  optimizer", human_bytes(memory.optimizer)),
        ("  average", human_bytes(memory.average)),
        *([] if planned.elastic is None else [("  elastic", f"{human_bytes(memory.elastic)} at most")]),
        ("  activations", _total(memory.activations)),
        ("host memory", f"{human_bytes(memory.checkpoint_host)} on each rank at most, for checkpoints"),
        ("checkpoint", f"{human_bytes(planned.checkpoint_bytes)}, {planned.checkpoints} of them, {kept}"),
        ("disk", f"{human_bytes(planned.disk_bytes)} at most"),
        *_store(planned, settings),
        *_elastic(planned, settings),
    ]


_MEASURED = (
    "measured on CPUs over gloo: 2.0 to 2.7 times the seconds of an all-reduce, 1.03 to 1.11 of a step"
)
"""Of the tree on 2 and 4 ranks: scripts/bench/README.md, `same_bits.py`."""


def _elastic(planned: Plan, settings: Settings) -> list[tuple[str, str]]:
    """The price of the same bits at any world size."""
    price = planned.elastic
    if price is None:
        return []
    beside = "a reduce-scatter" if settings.parallel == "fsdp2" else "a ring all-reduce"
    text = f"{price.shards} shards in a fixed tree, {price.lists} lists of gradients at most"
    if price.sent_bytes:
        text += f"; a rank sends {human_bytes(price.sent_bytes)} of gradients a step, "
        times = price.sent_bytes // price.plain_bytes
        text += f"as many as {beside}" if times == 1 else f"{times} times {beside}"
        if settings.parallel == "ddp":
            text += f"; {_MEASURED}"
    return [("elastic", text)]


def _digests(planned: Plan, settings: Settings) -> list[tuple[str, str]]:
    """Step digests that by themselves take more than the budget, on a CPU."""
    from harness.training.plan import FLOPS_OF_A_BYTE

    budget = settings.determinism.budget
    if not budget or not planned.flops_per_step or settings.determinism.mode == "off":
        return []
    share = planned.digest_bytes * FLOPS_OF_A_BYTE * planned.world_size / planned.flops_per_step
    if share <= budget:
        return []
    taken, limit = (round(each * 1_000_000) for each in (share, budget))
    text = (
        f"about {percent(taken)} of the time of a step on a CPU, where a byte takes as long as "
        f"{FLOPS_OF_A_BYTE} FLOPs; determinism.budget is {percent(limit)}: {remedy(taken, limit)}"
    )
    return [("step digests", text)]


def _store(planned: Plan, settings: Settings) -> list[tuple[str, str]]:
    if settings.checkpoint.store is None:
        return []
    text = f"{human_bytes(planned.store_bytes)} at most in {settings.checkpoint.store}"
    return [("store", text)]


def _total(size: int | None) -> str:
    return "unknown: the forward pass depends on values" if size is None else human_bytes(size)


def _flops(planned: Plan) -> str:
    if planned.flops is None or planned.flops_per_step is None:
        return "unknown: the task does not say"
    return f"{planned.flops_per_step:.3g} a step, {planned.flops:.3g} in all"
