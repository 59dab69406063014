"""What every statement of a launch says of it: run, launch, config, code, data, environment, determinism."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness import config, environment
from harness.determinism import settings as determinism
from harness.tasks import build as tasks
from harness.tasks.task import Task
from harness.training.elastic import mode as elastic
from harness.training.ranks.launch import Launch
from harness.training.statement.record import RunFacts, Segment, plain
from harness.training.step import digests
from harness.workers import Workers

_MESH = {"ddp": "data_parallel", "fsdp2": "fully_sharded"}
"""The only dimension of the mesh of ranks."""


def facts_of(
    loaded: config.Loaded,
    started: Launch,
    workers: Workers,
    task: Task,
    run_id: str,
    start: Mapping[str, Any] | None,
    policy: Mapping[str, Any] | None,
    segment: Segment,
) -> RunFacts:
    """What a statement of this launch says of it."""
    settings = loaded.settings
    text = config.resolved_text(settings)
    identity = task.identity()
    template = identity.digests.get("template")
    source = tasks.source(settings, loaded.path.parent)
    return RunFacts(
        run={"id": run_id, "name": settings.run_name, "seed": settings.run.seed},
        segment=segment,
        launch={
            "command": list(started.command),
            "launcher": started.launcher,
            "world_size": started.world_size,
            "nodes": started.nodes,
            "mesh": {_MESH[settings.parallel]: started.world_size},
            "precision": settings.precision,
            "compile": settings.compile,
            "parallel": settings.parallel,
            "backend": workers.backend,
        },
        config={"sha256": config.digest(text), "text": text},
        code={
            **environment.code(),
            "task": None if source is None else {"import_path": source[0], "sha256": source[1]},
        },
        data={
            "kind": identity.kind,
            "corpus_sha256": identity.digests["corpus"],
            "tokenizer_sha256": identity.digests.get("tokenizer"),
            "counts": dict(identity.counts),
            **({"template_sha256": template} if template else {}),
        },
        environment=plain({**environment.facts(settings.run.host), "stack": determinism.stack()}),
        determinism_mode=settings.determinism.mode,
        determinism_settings=plain(
            {**determinism.read_back(), **elastic.recorded(settings), **digests.recorded(settings)}
        ),
        start=start,
        policy=policy,
    )
