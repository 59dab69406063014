"""A launch in words: the rows of the first screen, each with where it came from, and the last line.

The class of the launch comes first, with what it rests on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness import config
from harness.settings import Settings
from harness.tasks.task import Task
from harness.training.beginning.continuation import Launched
from harness.training.beginning.resume import OpenRun
from harness.training.beginning.start import Origin
from harness.training.desk import Desk, newest_id
from harness.training.elastic import mode as elastic
from harness.training.ranks.launch import Launch
from harness.training.recorder import Recorder
from harness.training.statement.record import RunFacts, Segment
from harness.words import human_seconds
from harness.workers import Workers


def first_screen(
    loaded: config.Loaded,
    started: Launch,
    workers: Workers,
    task: Task,
    opened: OpenRun,
    launched: Launched,
    changes: Sequence[str],
    origin: Origin | None,
) -> list[tuple[str, str, str]]:
    """What the launch continues, then what this run is, each row with where it came from."""
    settings, origins, segment = loaded.settings, loaded.origins, launched.segment
    accumulation = settings.train.global_batch // (settings.train.micro_batch * workers.world_size)
    batch = (
        f"{settings.train.global_batch} samples = {settings.train.micro_batch} x {workers.world_size} ranks "
        f"x {accumulation} accumulated"
    )
    identity = task.identity()
    counts = ", ".join(
        f"{value:,} {name}" for name, value in identity.counts.items() if not name.startswith("held_out")
    )
    return [
        (
            "resume",
            _resume_text(segment, settings),
            "compared with the signed statement" if segment.number else "",
        ),
        *[("differs", str(item), "") for item in segment.differences],
        *[("accepted", text, "--accept") for text in segment.accepted],
        *[("skipped", f"{item.name}: {item.reason}", "left where it is") for item in segment.skipped],
        ("parent", _parent_text(segment), ""),
        (
            "run",
            f"{settings.run_name}  {launched.facts.run['id'][:12]}  in {settings.run.dir}",
            origins["run.dir"],
        ),
        ("world size", f"{workers.world_size} on {workers.device.type}", f"launched by {started.launcher}"),
        ("parallel", _parallel_text(settings, workers), origins["parallel"]),
        ("global batch", batch, origins["train.global_batch"]),
        ("precision", settings.precision, origins["precision"]),
        (
            "data",
            f"{identity.kind} {(identity.digests['corpus'] or '')[:12]}  {counts}",
            "checked just now",
        ),
        *_start_rows(launched.facts, origin),
        *_elastic_rows(settings, origins),
        ("determinism", _determinism_text(settings, changes), origins["determinism.mode"]),
        ("signed by", opened.held.signer.ed25519_id[:12], opened.held.signer_reason),
        *_policy_rows(opened, origins),
    ]


def _start_rows(facts: RunFacts, origin: Origin | None) -> list[tuple[str, str, str]]:
    if origin is not None:
        return [("begins with", origin.words, origin.trust)]
    if facts.start is None:
        return []
    began = (
        f"step {facts.start['step']} of {facts.start['name']}, checkpoint {facts.start['checkpoint'][:12]}"
    )
    return [("began with", began, "signed when the run began")]


def _policy_rows(opened: OpenRun, origins: Mapping[str, str]) -> list[tuple[str, str, str]]:
    own, end = opened.held.own_policy, opened.policy_end
    if own is None:
        return []
    odd = [("odd", f"{each.what}; {each.remedy}", each.where) for each in own.odd]
    ends = [] if end is None else [("policy ends", end.words, "")]
    return [("policy", own.words, origins["signing.policy"]), *odd, *ends]


def _parallel_text(settings: Settings, workers: Workers) -> str:
    if workers.world_size == 1:
        return f"{settings.parallel}: one process, nothing to share"
    meaning = {"ddp": "ddp: the whole model on every rank", "fsdp2": "fsdp2: a shard of every tensor on each"}
    return meaning[settings.parallel]


def _elastic_rows(settings: Settings, origins: Mapping[str, str]) -> list[tuple[str, str, str]]:
    if not settings.determinism.elastic:
        return []
    return [("elastic", elastic.in_words(settings), origins["determinism.elastic"])]


def _resume_text(segment: Segment, settings: Settings) -> str:
    world = "at any world size" if settings.determinism.elastic else "and world size"
    meaning = {
        "genesis": "none: a new run",
        "exact": f"exact: same stack {world}, the same bits as without the interruption",
        "same-data": "same-data: the same samples in the same order, other rounding",
        "accepted": "accepted: continues although it differs, as asked",
    }
    return meaning[segment.kind]


def _parent_text(segment: Segment) -> str:
    if segment.resumed_from is None:
        return "genesis"
    checkpoint, step = segment.resumed_from
    return f"step {step}, checkpoint {checkpoint[:12]}"


def _determinism_text(settings: Settings, changes: Sequence[str]) -> str:
    meaning = {
        "off": "off: nothing is watched",
        "warn": "warn: kernels are watched, no bit is changed",
        "strict": "strict: " + "; ".join(changes),
    }
    return meaning[settings.determinism.mode]


def closing(settings: Settings, recorder: Recorder, desk: Desk | None, start: int, seconds: float) -> str:
    """The last line of a run that reached its end."""
    if start >= settings.train.steps:
        return f"complete: step {start} of {settings.train.steps} was saved before; nothing to do"
    scores = "".join(f"  {name} {value:.4f}" for name, value in recorder.evaluation.items())
    scores = scores and f"  held out{scores}"
    loss = "" if recorder.loss is None else f"  loss {recorder.loss:.4f}"
    checkpoint = newest_id(desk)
    return (
        f"complete: {settings.train.steps} steps in {human_seconds(seconds)}{loss}{scores}  "
        f"newest checkpoint {'' if checkpoint is None else checkpoint[:12]}"
    )
