"""Everything that a step needs, built the same way on every rank, saved and restored as one.

The order is the whole secret of exact resume (facts in docs/architecture.md): build → warm-up passes →
tensors → data cursor → generators last. DDP lays its gradient buckets out anew after its first pass, so a
resumed process would add gradients in another order than the uninterrupted one; the warm-up makes both start
alike.
"""

from __future__ import annotations

import hashlib
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from harness.checkpoint import restore, rng, state
from harness.checkpoint.restore import Loaded
from harness.checkpoint.snapshot import serialize
from harness.checkpoint.state import TrainingState
from harness.data.loader import MicroBatches
from harness.data.order import Order
from harness.determinism.digest import batch_digest, rng_digest
from harness.determinism.ledger import Ledger
from harness.errors import ConfigError, EnvironmentFault, TrainingFailed
from harness.format import layout
from harness.settings import Settings
from harness.tasks.task import Batch, Task
from harness.training import elastic, optimizer, tree_norm
from harness.training.doubling import Doubling
from harness.training.elastic import ShardSums
from harness.training.exchange import Exchange, scalar_mean
from harness.training.optimizer import Average, Precision
from harness.training.schedule import LearningRate
from harness.training.sharded_sums import ShardedSums
from harness.training.step_digests import StepDigests, Sums
from harness.training.whole_lanes import WholeLanes
from harness.workers import Workers

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


@dataclass
class Session:
    """One rank's model, optimizer and data, ready to step."""

    task: Task
    workers: Workers
    model: nn.Module
    """The model itself; its names are the public names."""
    wrapped: nn.Module
    """What is called in training: the model, or DDP around it; compiled when asked for."""
    state: TrainingState
    average: Average | None
    precision: Precision
    schedule: LearningRate
    batches: MicroBatches
    clip: float | None
    wants_norm: bool
    digests: bool
    gradients_every: int
    """Steps between two digests of the gradients; 0 takes none."""
    state_every: int
    """Steps between two digests of the state besides those of checkpoints; 0 takes none."""
    seed: int
    sums: ShardSums | ShardedSums | None = None
    """Adds what the logical shards give in a fixed tree; None when the run is not elastic."""
    updates: int = 0
    """Updates that the state is of."""
    doubling: Doubling | None = None
    """Executes micro-steps twice, now and then; None when nothing is looked at."""

    def __post_init__(self) -> None:
        self._step_digests = StepDigests(self.workers, self.state)
        self._optimizer = self.state.optimizer
        self._scaler = self.state.scaler
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self._names = [names[id(each)] for each in self._parameters]
        self._move = self.workers.device.type != "cpu"
        self._distributed = self.workers.world_size > 1
        self._sharded = self.wrapped if isinstance(self.wrapped, FSDPModule) else None
        # DDP gives every rank the buffers of rank 0, which are the ones that are saved; FSDP2 does not.
        saved = set(self.model.state_dict()) if self._sharded else set()
        self._buffers = [buffer for name, buffer in self.model.named_buffers() if name in saved]
        self._shard_rng: list[bytes] = []

    @property
    def accumulation(self) -> int:
        """Micro-batches of this rank in one update."""
        return self.batches.accumulation

    def exchange(self, *, digests: bool | None = None) -> Exchange:
        """What the ranks tell each other at every step; ``digests``: None for what the config says."""
        return Exchange(
            self.workers,
            self.accumulation,
            digests=self.digests if digests is None else digests,
            shard_generators=self.sums is not None,
            interleaved=self.batches.interleaved,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of forward passes."""
        if self.precision.autocast is None:
            return nullcontext()
        return torch.autocast(self.workers.device.type, dtype=self.precision.autocast)

    def rng_digest(self) -> bytes:
        """Digest of torch's CPU generator, 16 bytes, or as many for each shard of this rank; empty when
        digests are off."""
        if self.sums is not None:
            return b"".join(self._shard_rng)
        return bytes.fromhex(rng_digest()) if self.digests else b""

    def forward_backward(self, stream: Iterator[Batch], ledger: Ledger, digests: list[bytes]) -> Tensor:
        """Gradients of one update from the next ``accumulation`` micro-batches.

        Returns the mean loss of all ranks, a detached scalar; appends each of this rank's micro-batches'
        digests to ``digests``.
        """
        if self.sums is not None:
            return self._tree(self.sums, stream, ledger, digests)
        count = self.batches.accumulation
        total: Tensor | None = None
        for buffer in self._buffers:
            dist.broadcast(buffer, 0)
        for number in range(count):
            batch = self._next_batch(stream, digests)
            if number == 0:
                self._look_twice(batch)
            if self._sharded is not None:
                self._sharded.set_requires_gradient_sync(number == count - 1)
                loss = self._backward(batch, count, ledger)
            elif self._distributed and number < count - 1:
                with self.wrapped.no_sync():  # type: ignore[operator]
                    loss = self._backward(batch, count, ledger)
            else:
                loss = self._backward(batch, count, ledger)
            total = loss if total is None else total + loss
        if total is None:
            raise TrainingFailed("an update has no micro-batch")
        return scalar_mean(total if count == 1 else total / count, self.workers)

    def _tree(
        self, sums: ShardSums | ShardedSums, stream: Iterator[Batch], ledger: Ledger, digests: list[bytes]
    ) -> Tensor:
        """The same, every shard with generators of its own, and all of them added in one order."""
        count = self.batches.accumulation
        of_all = count * self.workers.world_size
        self._shard_rng = []
        for number in range(count):
            batch = self._next_batch(stream, digests)
            seed_shard(self.seed, self.batches.shard(number), self.updates)
            if number == 0:
                self._look_twice(batch)
            with sums.last() if number == count - 1 else nullcontext():
                loss = self._backward(batch, of_all, ledger)
            sums.take(loss)
            if self.digests:
                self._shard_rng.append(bytes.fromhex(rng_digest()))
        return sums.finish()

    def _next_batch(self, stream: Iterator[Batch], digests: list[bytes]) -> Batch:
        batch = next(stream)
        if self.digests:
            digests.append(bytes.fromhex(batch_digest(batch)))
        if self._move:
            batch = tuple(tensor.to(self.workers.device, non_blocking=True) for tensor in batch)
        return batch

    def _look_twice(self, batch: Batch) -> None:
        """Before the first micro-batch of an update is used: execute it twice, when it is time to."""
        if self.doubling is None:
            return

        def execute() -> Tensor:
            with self.autocast():
                loss = self.task.loss(self.wrapped, batch)
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            return loss.detach()

        self.doubling.look(self.updates + 1, execute)

    def _backward(self, batch: Batch, count: int, ledger: Ledger) -> Tensor:
        if self.precision.autocast is None:
            loss = self.task.loss(self.wrapped, batch)
        else:
            with self.autocast():
                loss = self.task.loss(self.wrapped, batch)
        ledger.walk(loss)
        share = loss if count == 1 else loss / count
        (share if self._scaler is None else self._scaler.scale(share)).backward()
        return loss.detach()

    def gradient_norm(self) -> Tensor | None:
        """The global 2-norm of the unscaled gradients, a scalar; clips when the config says so."""
        if self._scaler is not None and self.wants_norm:
            self._scaler.unscale_(self._optimizer)
        if not self.wants_norm:
            return None
        if self.sums is not None:
            named = zip(self._names, self._parameters, strict=True)
            return tree_norm.gradient_norm(
                {name: p.grad for name, p in named if p.grad is not None}, self.clip
            )
        return optimizer.gradient_norm([p.grad for p in self._parameters if p.grad is not None], self.clip)

    def gradient_sums(self, step: int) -> Sums | None:
        """The gradients that the optimizer is about to get, for their digest; None when it is not due."""
        return self._step_digests.gradients() if is_due(step, self.gradients_every) else None

    def state_sums(self, step: int, saving: bool) -> Sums | None:
        """The state after the update, for its digest; None when not due and no checkpoint is ``saving``."""
        due = self.digests and (saving or is_due(step, self.state_every))
        return self._step_digests.state() if due else None

    def update(self, rate: float) -> None:
        """One optimizer step at learning rate ``rate``."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.updates += 1


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
    torch.manual_seed(settings.run.seed)
    model = task.build_model().to(workers.device)
    if settings.train.activation_checkpointing:
        _checkpoint_activations(model)
    if precision.name == "fp8":
        optimizer.convert_fp8(model)
    clip, wants_norm = settings.optimizer.clip, settings.determinism.step_digests
    # Before the optimizer, whose parameters are the shards under FSDP2.
    wrapped = _wrapped(model, settings, workers, prepare)
    sums = _sums(model, task, workers, batches.accumulation) if settings.determinism.elastic else None
    scaler = optimizer.loss_scaler(workers.device) if precision.scaled else None
    average = Average(model, settings.optimizer.ema) if settings.optimizer.ema else None
    # A GPU's fused kernel computes every element by the same instructions; the CPU's does not.
    lanes = settings.determinism.elastic and workers.device.type == "cpu"
    adamw = optimizer.adamw(model, settings.optimizer, WholeLanes if lanes else torch.optim.AdamW)
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
        sums.examine(model, partial(_first_shard, session, settings.train.micro_batch))
    elif workers.world_size > 1 or settings.compile:
        _warm_up(session, settings.train.micro_batch)
    return session


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 for never, happens at ``step``."""
    return every > 0 and step % every == 0


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Seed python, numpy and torch of this process from (seed, rank, step)."""
    _seed(f"{seed}/{rank}/{step}")


def _seed(text: str) -> None:
    digest = hashlib.sha256(text.encode()).digest()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "little"))
    torch.manual_seed(int.from_bytes(digest[4:12], "little") >> 1)


def seed_shard(seed: int, shard: int, update: int) -> None:
    """Seed python, numpy and torch of this process for logical shard ``shard`` of an update, both from 0."""
    _seed(f"{seed}/shard/{shard}/{update}")


def captured_rng(session: Session) -> bytes:
    """This rank's generators as the bytes of a safetensors file.

    An elastic run seeds them anew for every shard; between updates they are put where rank 0 of any world
    size has them, and the other ranks have nothing to save: empty.
    """
    if session.sums is not None:
        if not session.workers.first:
            return b""
        seed_shard(session.seed, 0, session.updates)
    name = state.rng_file(session.workers.rank)
    return serialize(name, rng.capture(session.task.generators()))


def wanted_files(rank: int, path: str) -> bool:
    """Whether rank ``rank`` needs the payload file ``path``, which is no part of the tensors, to resume."""
    return path in (layout.TRAINER, layout.LEDGER, state.rng_file(rank))


def resume(session: Session, loaded: Loaded) -> Iterator[Batch]:
    """Put the checkpoint's tensors, cursor and generators in place; returns the micro-batches that follow.

    A checkpoint of another world size has no generators for these ranks: they are seeded anew from (seed,
    rank, step), which the class ``same-data`` says; those of an elastic run follow its shards. Raises
    `TrainingFailed` for anything that does not fit, and `DamagedCheckpoint` on every rank when tensors are
    not what was signed.
    """
    trainer = loaded.trainer
    exact_ranks = trainer["world_size"] == session.workers.world_size
    if trainer["groups"] != state.group_names(session.state):
        raise TrainingFailed("the optimizer's parameter groups are not those of the checkpoint")
    state.load(session.state, loaded, trainer["aliases"])
    stream = session.batches.iterate(trainer["step"])
    session.updates = trainer["step"]
    if session.sums is not None:
        return stream
    file = state.rng_file(session.workers.rank)
    own = loaded.files.get(file)
    if exact_ranks and own is None:
        raise TrainingFailed(f"the checkpoint has no generators for rank {session.workers.rank}")
    if exact_ranks and own is not None:
        rng.restore(restore.tensors_in(own, file), session.task.generators())
    else:
        seed_rank(session.seed, session.workers.rank, trainer["step"])
    return stream


def begin(session: Session, weights: Loaded | None) -> Iterator[Batch]:
    """A new run's micro-batches; ``weights``: the checkpoint of another run that it begins with.

    Raises `ConfigError` when that is another model's, `DamagedCheckpoint` when a tensor is not what was
    signed.
    """
    if weights is not None:
        try:
            state.load_weights(session.state, weights)
        except TrainingFailed as error:
            raise ConfigError(
                f"start.checkpoint holds another model: {error.what}",
                where=str(weights.folder),
                remedy="give this run's model the sizes in its config.json",
            ) from error
    return session.batches.iterate(0)


def _wrapped(model: nn.Module, settings: Settings, workers: Workers, prepare: Accelerator) -> nn.Module:
    if _is_cut(settings, workers):
        wrapped = _sharded(model, prepare)
    elif settings.determinism.elastic:
        wrapped = model
    else:
        wrapped = _replicated(model, workers, prepare)
    if settings.compile:
        for module in _units(model) if settings.determinism.elastic else [wrapped]:
            module.compile()
    return wrapped


def _units(model: nn.Module) -> list[nn.Module]:
    """What FSDP2 gathers at a time, and an elastic run compiles at a time: between them FSDP2 interrupts what
    is compiled, and other operators fused are other bits. The model itself where it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [each for each in model.modules() if type(each).__name__ in names] or [model]


def _is_cut(settings: Settings, workers: Workers) -> bool:
    """Whether each rank holds rows of the parameters."""
    return settings.parallel == "fsdp2" and workers.world_size > 1


def _sums(model: nn.Module, task: Task, workers: Workers, count: int) -> ShardSums | ShardedSums:
    elastic.refuse(list(task.generators()))
    if isinstance(model, FSDPModule):
        return ShardedSums(workers, model, count)
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    return ShardSums(workers, trained, count)


def _sharded(model: nn.Module, prepare: Accelerator) -> nn.Module:
    """``model`` itself, its parameters cut along their first dimension among all ranks."""
    sharded: nn.Module = fsdp2_prepare_model(prepare, model)
    if not isinstance(sharded, FSDPModule):
        raise EnvironmentFault("accelerate made no fully sharded model", where="parallel: fsdp2")
    return sharded


def _replicated(model: nn.Module, workers: Workers, prepare: Accelerator) -> nn.Module:
    if workers.world_size > 1 and prepare.ddp_handler is not None:
        # Rank 0 saves its buffers for all, so persistent ones must be rank 0's everywhere.
        prepare.ddp_handler.broadcast_buffers = bool(
            set(model.state_dict()) - set(dict(model.named_parameters()))
        )
        prepare.ddp_handler.gradient_as_bucket_view = True
    with warnings.catch_warnings():
        # torch 2.13 renames the argument that accelerate passes on; both mean the same here.
        warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated", FutureWarning)
        wrapped: nn.Module = prepare.prepare_model(model)
    if workers.world_size > 1 and not isinstance(wrapped, DistributedDataParallel):
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
    indices = np.arange(size, dtype=np.int64) % session.task.samples
    batch = session.task.batch(indices, np.zeros(size, dtype=np.int64))
    batch = tuple(tensor.to(session.workers.device) for tensor in batch)
    for _ in range(_WARM_UP_PASSES):
        with session.autocast():
            loss = session.task.loss(session.wrapped, batch)
        loss.backward()
        session.state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in session.model.named_buffers():
            buffer.copy_(kept[name])
    rng.restore(generators, session.task.generators())


def _first_shard(session: Session, size: int) -> None:
    """The gradients of samples 0 to ``size``, as the first shard of the first update draws."""
    indices = np.arange(size, dtype=np.int64) % session.task.samples
    batch = session.task.batch(indices, np.zeros(size, dtype=np.int64))
    batch = tuple(tensor.to(session.workers.device) for tensor in batch)
    seed_shard(session.seed, 0, 0)
    with session.autocast():
        loss = session.task.loss(session.wrapped, batch)
    loss.backward()


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
