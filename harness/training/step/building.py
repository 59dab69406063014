"""How one rank's `Session` is built: model, wrapping, optimizer, data, and the passes that warm it up.

The same on every rank, and the same for a new and a resumed run. DDP lays its gradient buckets out anew after
its first pass, so a resumed process would add gradients in another order than the uninterrupted one; the
warm-up makes both start alike.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.checkpoint import rng
from harness.checkpoint.cut import is_sharded
from harness.checkpoint.state import TrainingState
from harness.data.loader import MicroBatches
from harness.data.order import Order
from harness.errors import ConfigError, EnvironmentFault
from harness.settings import Settings
from harness.tasks.task import Batch, Task
from harness.training import optimizer
from harness.training.evaluation.held_out import on_device
from harness.training.optimizer import Average
from harness.training.schedule import LearningRate
from harness.training.seeding import seed_rank, seed_weights
from harness.training.step import compiler, cutting
from harness.training.step.session import Session
from harness.workers import Workers

if TYPE_CHECKING:
    from harness.training.elastic.sharded_sums import ShardedSums
    from harness.training.elastic.tree_sums import ShardSums

_WARM_UP_PASSES = 2
"""DDP lays out its buckets again at the start of its second pass."""


def accelerator(settings: Settings) -> Accelerator:
    """Accelerate's device placement and DDP, and nothing else of it.

    Raises `ConfigError` when `accelerate launch` or its config file asks for what the harness config decides.
    """
    _refuse_conflicts(os.environ, settings)
    plugin = None
    if settings.parallel == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
    made = Accelerator(
        # Without a GPU, Accelerate takes several processes for one unless it is told that CPUs are meant.
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        fsdp_plugin=plugin,
        kwargs_handlers=[DistributedDataParallelKwargs()],
    )
    # Accelerate forgets the plugin where there is no GPU, and reads it from here when it shards a model.
    made.state.fsdp_plugin = plugin
    return made


def _refuse_conflicts(environ: Mapping[str, str], settings: Settings) -> None:
    asked = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", settings.precision):
        raise ConfigError(
            f"accelerate is configured for mixed precision {asked}, the config says {settings.precision}",
            where="ACCELERATE_MIXED_PRECISION",
            remedy=f"set precision={asked}, or accelerate launch --mixed_precision no",
        )
    for name, harmless in (
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1", "auto")),
        ("ACCELERATE_DYNAMO_BACKEND", ("no", "")),
        ("ACCELERATE_USE_FSDP", ("false", "true") if settings.parallel == "fsdp2" else ("false",)),
        ("ACCELERATE_USE_DEEPSPEED", ("false",)),
        ("ACCELERATE_USE_MEGATRON_LM", ("false",)),
    ):
        value = environ.get(name)
        if value is not None and value.lower() not in harmless:
            raise ConfigError(
                f"accelerate is configured with {name}={value}, which the harness config decides",
                where=name,
                remedy="remove it from accelerate's config file",
            )


def build(settings: Settings, task: Task, workers: Workers, prepare: Accelerator) -> Session:
    """Model, optimizer and data of this rank, seeded by (run.seed, rank) and warmed up.

    Raises `ConfigError` or `EnvironmentFault` for what the task, the device or the world size cannot do.
    """
    precision = optimizer.precision(settings.precision, workers.device)
    batches = MicroBatches(
        task,
        Order(task.samples, settings.run.seed),
        global_batch=settings.train.global_batch,
        micro_batch=settings.train.micro_batch,
        rank=workers.rank,
        world_size=workers.world_size,
        workers=settings.train.data_workers,
        interleaved=settings.determinism.elastic and _is_cut(settings, workers),
    )
    seed_weights(settings.run.seed)
    elastic = settings.determinism.elastic
    model = (_model_of_shards(task, workers) if elastic else task.build_model()).to(workers.device)
    if settings.train.activation_checkpointing:
        _checkpoint_activations(model)
    if precision.name == "fp8":
        optimizer.convert_fp8(model)
    clip, wants_norm = settings.optimizer.clip, settings.determinism.step_digests
    # Before the optimizer, whose parameters are the shards under FSDP2.
    wrapped = _wrapped(model, settings, workers, prepare)
    sums = _sums(model, workers, batches.accumulation) if elastic else None
    scaler = optimizer.loss_scaler(workers.device) if precision.scaled else None
    average = Average(model, settings.optimizer.ema) if settings.optimizer.ema else None
    # A GPU's fused kernel computes every element by the same instructions; the CPU's does not.
    kind = _whole_lanes() if elastic and workers.device.type == "cpu" else optimizer.EagerAdamW
    adamw = optimizer.adamw(model, settings.optimizer, kind)
    session = Session(
        task=task,
        workers=workers,
        model=model,
        wrapped=wrapped,
        state=TrainingState(model, adamw, scaler, average.tensors if average else {}),
        average=average,
        precision=precision,
        schedule=_schedule(settings),
        batches=batches,
        clip=clip,
        wants_norm=wants_norm or clip is not None,
        digests=settings.determinism.step_digests,
        gradients_every=settings.determinism.gradients_every if settings.determinism.step_digests else 0,
        state_every=settings.determinism.state_every,
        seed=settings.run.seed,
        sums=sums,
    )
    seed_rank(settings.run.seed, workers.rank)
    if sums is not None:
        from harness.training.elastic import rehearsal

        size = settings.train.micro_batch
        held_out = task.evaluation(size, 1)
        session.rehearsed = rehearsal.examine(session, sums, size, held_out, compiled=settings.compile)
    elif workers.world_size > 1 or settings.compile:
        _warm_up(session, settings.train.micro_batch)
    return session


def _wrapped(model: nn.Module, settings: Settings, workers: Workers, prepare: Accelerator) -> nn.Module:
    if _is_cut(settings, workers):
        wrapped = cutting.cut(model, prepare)
    elif settings.determinism.elastic:
        wrapped = model
    else:
        wrapped = _replicated(model, workers, prepare)
    if settings.compile:
        if workers.device.type == "cpu":
            compiler.require()
        for module in _units(model) if settings.determinism.elastic else [wrapped]:
            module.compile()
    if settings.determinism.elastic:
        from harness.training.elastic import boundaries

        boundaries.join(model)
    return wrapped


def _units(model: nn.Module) -> list[nn.Module]:
    """What FSDP2 gathers at a time, and an elastic run compiles at a time: between them FSDP2 interrupts what
    is compiled, and other operators fused are other bits. The model itself where it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    # FSDP2 makes a class of its own, `FSDPBlock` of `Block`.
    return [each for each in model.modules() if type(each).__name__.removeprefix("FSDP") in names] or [model]


def _is_cut(settings: Settings, workers: Workers) -> bool:
    """Whether each rank holds rows of the parameters."""
    return settings.parallel == "fsdp2" and workers.world_size > 1


def _model_of_shards(task: Task, workers: Workers) -> nn.Module:
    from harness.training.elastic import rehearsal

    return rehearsal.build_model(task, workers)


def _whole_lanes() -> type[torch.optim.AdamW]:
    from harness.training.elastic.whole_lanes import WholeLanes

    return WholeLanes


def _sums(model: nn.Module, workers: Workers, count: int) -> ShardSums | ShardedSums:
    if is_sharded(model):
        from harness.training.elastic.sharded_sums import ShardedSums

        return ShardedSums(workers, model, count)
    from harness.training.elastic.tree_sums import ShardSums

    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    return ShardSums(workers, trained, count)


def _replicated(model: nn.Module, workers: Workers, prepare: Accelerator) -> nn.Module:
    if workers.world_size == 1:
        return model  # on its device; accelerate would import what makes a DTensor only to look for one
    if prepare.ddp_handler is not None:
        # Rank 0 saves its buffers for all, so persistent ones must be rank 0's everywhere.
        prepare.ddp_handler.broadcast_buffers = bool(
            set(model.state_dict()) - set(dict(model.named_parameters()))
        )
        prepare.ddp_handler.gradient_as_bucket_view = True
    with warnings.catch_warnings():
        # torch 2.13 renames the argument that accelerate passes on; both mean the same here.
        warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated", FutureWarning)
        wrapped: nn.Module = prepare.prepare_model(model)
    if not isinstance(wrapped, DistributedDataParallel):
        raise EnvironmentFault(
            f"{workers.world_size} processes run, but accelerate made no data-parallel model of them",
            where=f"distributed type {prepare.distributed_type}",
            remedy="launch with torchrun --nproc-per-node N -m harness train …",
        )
    return wrapped


def _warm_up(session: Session, size: int) -> None:
    """Forward and backward passes that leave nothing behind but DDP's final bucket layout."""
    kept = {name: buffer.clone() for name, buffer in session.model.named_buffers()}
    generators = rng.capture(session.task.generators())
    batch = _first_samples(session, size)
    for _ in range(_WARM_UP_PASSES):
        with session.autocast():
            loss = session.task.loss(session.wrapped, batch)
        loss.backward()
        session.state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in session.model.named_buffers():
            buffer.copy_(kept[name])
    rng.restore(generators, session.task.generators())


def _first_samples(session: Session, size: int) -> Batch:
    """Samples 0 to ``size``, from the first again where there are fewer, on the device."""
    indices = np.arange(size, dtype=np.int64) % session.task.samples
    batch = session.task.batch(indices, np.zeros(size, dtype=np.int64))
    return on_device(batch, session.workers.device)


def _checkpoint_activations(model: nn.Module) -> None:
    switch = getattr(model, "set_activation_checkpointing", None)
    if switch is None:
        raise EnvironmentFault(
            f"{type(model).__name__} has no set_activation_checkpointing",
            where="train.activation_checkpointing",
            remedy="give the model that method, or set it to false",
        )
    switch(True)


def _schedule(settings: Settings) -> LearningRate:
    chosen = settings.schedule
    return LearningRate(
        kind=chosen.kind,
        peak=settings.optimizer.lr,
        steps=settings.train.steps,
        warmup=chosen.warmup,
        decay=chosen.decay,
        final=chosen.final,
    )
