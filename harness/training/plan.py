"""What a run will need, worked out before it starts: no data is read for language, no GPU is used.

Parameters and activations are counted, not estimated by formula: the model is built and run once on torch's
fake tensors, which have shapes and dtypes and no memory. What a GPU adds on top (CUDA context, allocator
fragments, kernel workspaces) is not counted, and `compile` saves some of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn import functional as F

from harness.checkpoint.shards import Item, divide
from harness.checkpoint.state import model_tensors
from harness.data.cache import given_tokenizer
from harness.determinism import tree
from harness.errors import ConfigError
from harness.model.gpt import GPT
from harness.settings import Data, Model, Settings, Tokenizer
from harness.tasks.build import build
from harness.tasks.language import shape_of

_FLOAT = 4
_VALUE_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
FLOPS_OF_A_BYTE = 12
"""As long as so many FLOPs of a step takes the digest of a byte on a CPU: scripts/bench/README.md,
`digest.py`."""
ASSUMED_MFU = 0.4
"""Of a GPU's peak; GPT 124M reached 0.32 to 0.41 on H100 in the logs of modded-nanogpt and llm.c."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    """Weights and buffers; under FSDP2 this rank's shard, without what is gathered to compute."""
    gradients: int
    optimizer: int
    average: int
    """The moving average of the weights."""
    elastic: int
    """What `determinism.elastic` adds at most: gradients that wait for their neighbours in the tree, and
    buckets that are received; 0 without it."""
    activations: int | None
    """What a micro-batch's forward pass keeps for the backward pass, and the gradient of its largest tensor;
    None when the model's forward pass depends on the values of its data."""
    checkpoint_host: int
    """Host memory of the rank with the largest part of a checkpoint, from which that is written."""

    @property
    def device(self) -> int | None:
        """Everything that lies on the device."""
        if self.activations is None:
            return None
        return self.weights + self.gradients + self.optimizer + self.average + self.elastic + self.activations


@dataclass(frozen=True)
class Elastic:
    """What adding gradients in one fixed tree costs a rank."""

    shards: int
    lists: int
    """Lists of gradients that are held at most, those that are just computed included."""
    held_bytes: int
    """Bytes of those that wait, and of the buckets, at most."""
    sent_bytes: int
    """Bytes of gradients that a rank sends at each step."""
    plain_bytes: int
    """What it would send without: a ring all-reduce, or one reduce-scatter under FSDP2."""


@dataclass(frozen=True)
class Plan:
    """What a run of given settings and world size will need."""

    parameters: int
    memory: Memory
    world_size: int
    accumulation: int
    unit: str
    units_per_step: int
    units: int
    """Units (tokens, images) of the whole run."""
    flops_per_step: int | None
    flops: int | None
    """Forward and backward of the whole run; None when the task does not say."""
    checkpoint_bytes: int
    """Tensors of one checkpoint."""
    checkpoints: int
    """How many are written."""
    disk_bytes: int
    """At most so much at once, when no checkpoint of the run is there yet; one checkpoint, which a resume
    fetches, where `checkpoint.store` is the only place."""
    store_bytes: int
    """The same in `checkpoint.store`; 0 without one."""
    elastic: Elastic | None
    """What `determinism.elastic` costs; None without it."""
    digest_bytes: int
    """Bytes of gradients and state that a rank digests at a step, on average; 0 without step digests."""


def plan(settings: Settings, base: Path, world_size: int) -> Plan:
    """Work out the plan; ``base`` is the folder of the config.

    Raises `ConfigError` when the global batch does not divide, or the model cannot be built without memory.
    """
    train = settings.train
    per_pass = train.micro_batch * world_size
    if train.global_batch % per_pass:
        raise ConfigError(
            f"train.global_batch {train.global_batch} is not a multiple of "
            f"train.micro_batch {train.micro_batch} x {world_size} ranks",
            remedy="change train.micro_batch or the number of processes",
        )
    subject = _subject(settings, base)
    with FakeTensorMode() as mode:
        try:
            model = subject.build()
        except Exception as error:
            raise ConfigError(
                f"the model cannot be built on fake tensors: {type(error).__name__}: {error}",
                remedy="build_model must not look at the values of tensors",
            ) from error
        activations = _activations(subject, model, mode, settings)
        sizes = _sizes(model, settings)
    flops = subject.flops_per_sample
    flops_per_step = None if flops is None else flops * train.global_batch
    written = -(-train.steps // settings.checkpoint.every)
    checkpoint = sizes["checkpoint"]
    shards = world_size if settings.parallel == "fsdp2" else 1
    price = elastic(sizes["trainable"], world_size, settings) if settings.determinism.elastic else None
    return Plan(
        parameters=sizes["parameters"],
        memory=Memory(
            weights=-(-sizes["weights"] // shards),
            gradients=-(-sizes["trainable"] // shards),
            optimizer=-(-sizes["optimizer"] // shards),
            average=-(-sizes["average"] // shards),
            elastic=0 if price is None else price.held_bytes,
            activations=activations,
            checkpoint_host=_arena(model, settings, world_size),
        ),
        world_size=world_size,
        accumulation=train.global_batch // per_pass,
        unit=subject.unit,
        units_per_step=subject.units_per_sample * train.global_batch,
        units=subject.units_per_sample * train.global_batch * train.steps,
        flops_per_step=flops_per_step,
        flops=None if flops_per_step is None else flops_per_step * train.steps,
        checkpoint_bytes=checkpoint,
        checkpoints=written,
        disk_bytes=checkpoint * (1 if settings.checkpoint.store_only else _at_once(written, settings)),
        store_bytes=checkpoint * _at_once(written, settings) if settings.checkpoint.store else 0,
        elastic=price,
        digest_bytes=_digested(sizes, settings) // world_size,
    )


def _digested(sizes: Mapping[str, int], settings: Settings) -> int:
    """Bytes of all ranks at a step, on average; those of checkpoints besides are left out."""
    chosen = settings.determinism
    if not chosen.step_digests:
        return 0
    every = ((sizes["trainable"], chosen.gradients_every), (sizes["checkpoint"], chosen.state_every))
    return sum(size // steps for size, steps in every if steps)


def elastic(gradients: int, world_size: int, settings: Settings) -> Elastic:
    """``gradients``: bytes of all of them. Volumes as in docs/determinism.md."""
    shards = settings.micro_batches
    count = shards // world_size
    lists = tree.held_lists(count)
    once = gradients * (world_size - 1) // world_size
    if settings.parallel == "fsdp2" and world_size > 1:
        return Elastic(shards, lists, (lists - 1) * -(-gradients // world_size), once * count, once)
    # Of the two buckets the one that is sent takes the place of the gradients.
    buckets = 1 if world_size > 1 else 0
    return Elastic(shards, lists, (lists - 1 + buckets) * gradients, 2 * once, 2 * once)


def _at_once(written: int, settings: Settings) -> int:
    """Checkpoints on disk at once: an old one is removed after the new one is published and read back."""
    keep = settings.checkpoint.keep
    if keep == "all":
        return written
    if isinstance(keep, int):
        return min(written, keep + 1)
    others = len(keep.pinned) + (0 if keep.best is None else keep.best.count)
    regular = settings.train.steps // keep.every if keep.every else 0
    return min(written, keep.newest + others + regular + 1)


@dataclass(frozen=True)
class _Subject:
    """What is planned: a model and one micro-batch's loss, both made under fake tensors."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, FakeTensorMode], Tensor]
    unit: str
    units_per_sample: int
    flops_per_sample: int | None


def _subject(settings: Settings, base: Path) -> _Subject:
    model, data, tokenizer = settings.model, settings.data, settings.tokenizer
    if model and data and tokenizer and data.kind != "tokens":
        return _language(model, data, tokenizer, base, settings.train.micro_batch)
    task = build(settings, base)
    indices = np.arange(settings.train.micro_batch, dtype=np.int64) % task.samples
    batch = task.batch(indices, np.zeros_like(indices))

    def loss(built: nn.Module, mode: FakeTensorMode) -> Tensor:
        return task.loss(built, tuple(mode.from_tensor(tensor) for tensor in batch))

    return _Subject(task.build_model, loss, task.unit, task.units_per_sample, task.flops_per_sample())


def _language(model: Model, data: Data, tokenizer: Tokenizer, base: Path, micro_batch: int) -> _Subject:
    """The language task without its corpus: a tokenizer still to be trained has the size it will have."""
    given = given_tokenizer(tokenizer, base)
    length = data.sequence_length
    shape = shape_of(model, length, tokenizer.vocabulary if given is None else given.vocabulary)

    def loss(built: nn.Module, mode: FakeTensorMode) -> Tensor:
        tokens = torch.zeros((micro_batch, length + 1), dtype=torch.int64)
        logits = built(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].reshape(-1))

    with torch.device("meta"):
        flops = GPT(shape).flops_per_token(length) * length
    return _Subject(lambda: GPT(shape), loss, "token", length, flops)


def _activations(subject: _Subject, model: nn.Module, mode: FakeTensorMode, settings: Settings) -> int | None:
    """Bytes that the forward pass of a micro-batch keeps, and its largest tensor once more."""
    owned = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def kept() -> list[int]:
        with _recording(owned) as saved, _arithmetic(settings.precision):
            subject.loss(model, mode)
        return [tensor.untyped_storage().nbytes() for tensor in saved.values()]

    try:
        sizes = kept()
        recomputed = 0
        if settings.train.activation_checkpointing and isinstance(model, GPT):
            recomputed = sum(sizes) // len(model.blocks)
            model.set_activation_checkpointing(True)
            sizes = kept()
    except _VALUE_DEPENDENT:
        return None
    return sum(sizes) + max(sizes, default=0) + recomputed


@contextmanager
def _recording(owned: set[int]) -> Iterator[dict[int, Tensor]]:
    """The tensors that autograd saves, each storage once, those of the model itself left out."""
    kept: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in owned:
            kept[_storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield kept


def _arithmetic(precision: str) -> Any:
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast("cpu", dtype=dtype, enabled=precision != "fp32")


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _sizes(model: nn.Module, settings: Settings) -> dict[str, int]:
    """Bytes (and the number of parameters) of what `checkpoint.state` saves."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in trained) * _FLOAT
    weights = sum(tensor.untyped_storage().nbytes() for tensor in (*parameters, *model.buffers()))
    # AdamW: two moments, and a step count for each parameter.
    optimizer = 2 * trainable + len(trained) * _FLOAT
    average = trainable if settings.optimizer.ema else 0
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": trainable,
        "weights": weights,
        "optimizer": optimizer,
        "average": average,
        "checkpoint": weights + optimizer + average,
    }


def _arena(model: nn.Module, settings: Settings, world_size: int) -> int:
    """Bytes of the largest share, by the same division as `harness.checkpoint.state` makes it."""
    weights = [
        Item(name, tensor.numel() * tensor.element_size()) for name, tensor in model_tensors(model)[0].items()
    ]
    state: list[Item] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slots = {"exp_avg": parameter.numel(), "exp_avg_sq": parameter.numel(), "step": 1}
            state += [Item(f"optimizer.{name}.{slot}", count * _FLOAT) for slot, count in slots.items()]
            state += [Item(f"ema.{name}", parameter.numel() * _FLOAT)] if settings.optimizer.ema else []
    loads = [0] * world_size
    for part in divide(weights, state, world_size, settings.checkpoint.file_bytes):
        loads[part.rank] += part.size
    return max(loads)
