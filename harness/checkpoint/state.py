"""What is saved: weights, optimizer, scaler, averages, buffers; named tensors and a few JSON facts.

The model goes to ``model*.safetensors`` under its public names, a shared weight once. Everything else that a
step reads goes to ``optimizer-*.safetensors`` (`harness.checkpoint.shards` says which tensor to which file):

- ``optimizer.PARAMETER.SLOT`` for every tensor of the optimizer's state (``exp_avg``, ``step``…)
- ``ema.PARAMETER`` for an exponential moving average of the weights
- ``scaler.NAME`` for the loss scaler of fp16
- ``buffer.NAME`` for buffers that the model does not put in its state dict

Restoring is strict: a tensor too few, too many, or of another shape or dtype is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from harness.checkpoint.shards import Group, Item, Part, divide
from harness.errors import TrainingFailed


@dataclass(frozen=True)
class TrainingState:
    """The objects whose tensors a step reads and writes."""

    model: nn.Module
    """The module itself, without DDP or compile wrappers."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    ema: Mapping[str, Tensor] = field(default_factory=dict)
    """Averaged weights by parameter name; empty when none are kept."""


def rng_file(rank: int) -> str:
    """File name of the generators of ``rank``."""
    return f"rng-rank-{rank:05d}.safetensors"


def tensors_of(state: TrainingState) -> dict[Group, dict[str, Tensor]]:
    """Everything that is saved, by group and name; the live tensors, not copies."""
    return {"model": model_tensors(state.model)[0], "optimizer": optimizer_tensors(state)}


def parts_of(
    state: TrainingState, tensors: Mapping[Group, Mapping[str, Tensor]], world_size: int, file_bytes: int
) -> tuple[Part, ...]:
    """The files of a checkpoint of ``tensors`` (from `tensors_of`) and which rank writes each.

    Under DDP the ranks hold equal parameters, and so equal optimizer states and averages of them. Buffers may
    differ (each rank's batch statistics), so rank 0's are the ones that are saved.
    """
    parameters = {name for name, _ in state.model.named_parameters(remove_duplicate=False)}
    items: dict[Group, list[Item]] = {"model": [], "optimizer": []}
    for group, named in tensors.items():
        for name, tensor in named.items():
            known = name if group == "model" else name.removeprefix("ema.")
            anywhere = known in parameters or name.startswith("optimizer.")
            items[group].append(Item(name, tensor.numel() * tensor.element_size(), anywhere))
    return divide(items["model"], items["optimizer"], world_size, file_bytes)


class Source(Protocol):
    """Where a restore takes tensors from; every rank asks for the same ones in the same order."""

    def described(self, group: Group) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor of a group."""

    def fill(self, group: Group, name: str, target: Tensor) -> None:
        """Copy a tensor into ``target``, of the same dtype and (whole) shape."""


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's tensors by name, and the aliases (name → the name it shares its tensor with)."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[int, str] = {}
    # First of all, since under FSDP2 it frees the whole parameters that an evaluation has left behind.
    saved = model.state_dict()
    # A state dict holds detached tensors, and a rank's shard of a small one may be empty: only the module's
    # own objects tell which are shared.
    objects: dict[str, Tensor] = {}
    objects |= model.named_parameters(remove_duplicate=False)
    objects |= model.named_buffers(remove_duplicate=False)
    for name, tensor in saved.items():
        owner = owners.setdefault(id(objects[name]), name) if name in objects else name
        if owner == name:
            tensors[name] = tensor
        else:
            aliases[name] = owner
    return tensors, aliases


def optimizer_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Everything besides the model that a step reads, by its name in the optimizer file."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in state.model.named_parameters():
        for slot, value in state.optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TrainingFailed(
                    f"optimizer keeps {slot} of {name} as {type(value).__name__}, not as a tensor",
                    remedy="use an optimizer whose state is tensors (for AdamW: fused or capturable)",
                )
            tensors[f"optimizer.{name}.{slot}"] = value
    tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.items()}
    tensors |= {f"buffer.{name}": tensor for name, tensor in _loose_buffers(state.model)}
    if state.scaler is not None:
        tensors |= _scaler_tensors(state.scaler)
    return tensors


def load_model(model: nn.Module, source: Source, aliases: Mapping[str, str]) -> None:
    """Fill ``model`` from ``source``; shared weights must be shared in the same way."""
    expected, model_aliases = model_tensors(model)
    if model_aliases != dict(aliases):
        raise TrainingFailed(f"shared weights differ: checkpoint {dict(aliases)}, model {model_aliases}")
    _fill_all(source, "model", expected, source.described("model"))


def load_optimizer(state: TrainingState, source: Source) -> None:
    """Fill optimizer, averages, loose buffers and scaler from ``source``."""
    rest = dict(source.described("optimizer"))
    parameters = dict(state.model.named_parameters())
    slots = {key: rest.pop(key) for key in [key for key in rest if key.startswith("optimizer.")]}
    # A parameter that no loss has reached yet has no state, so fewer is no fault; what is there must fit.
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    odd = sorted(key for key in slots if _slot(key)[0] not in trained)
    if odd:
        raise TrainingFailed(f"optimizer state of parameters that the model does not train: {odd[:3]}")
    _load_slots(state.optimizer, parameters, slots, source)
    if state.scaler is not None:
        scaler = {key: rest.pop(key) for key in list(rest) if key.startswith("scaler.")}
        _load_scaler(state.scaler, scaler, source)
    targets = {f"ema.{name}": tensor for name, tensor in state.ema.items()}
    targets |= {f"buffer.{name}": tensor for name, tensor in _loose_buffers(state.model)}
    _fill_all(source, "optimizer", targets, rest)


def group_names(state: TrainingState) -> list[list[str]]:
    """The parameter names of each optimizer group, in order; must be the same at a resume."""
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in state.optimizer.param_groups]


def _loose_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name not in saved)


def _slot(key: str) -> tuple[str, str]:
    """Parameter and slot of ``optimizer.PARAMETER.SLOT``."""
    name, _, slot = key.removeprefix("optimizer.").rpartition(".")
    return name, slot


def _load_slots(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    slots: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    source: Source,
) -> None:
    """Fill the optimizer's state; `step` counters keep their device (CPU unless fused on a GPU)."""
    optimizer.state.clear()
    fused = bool(optimizer.defaults.get("fused")) or bool(optimizer.defaults.get("capturable"))
    for key, (dtype, shape) in slots.items():
        name, slot = _slot(key)
        parameter = parameters[name]
        if shape and shape != tuple(parameter.shape):
            raise TrainingFailed(f"{key} has shape {shape}")
        if shape:
            value = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:
            value = torch.empty((), dtype=dtype, device=parameter.device if fused else "cpu")
        source.fill("optimizer", key, value)
        optimizer.state[parameter][slot] = value


def _scaler_tensors(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    return {
        f"scaler.{key}": torch.tensor([value], dtype=torch.float64)
        for key, value in scaler.state_dict().items()
    }


def _load_scaler(
    scaler: torch.amp.GradScaler, described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], source: Source
) -> None:
    current = scaler.state_dict()
    if set(described) != {f"scaler.{key}" for key in current}:
        raise TrainingFailed(f"loss scaler state does not fit: {sorted(described)}")
    values = {}
    for key, value in current.items():
        held = torch.empty(1, dtype=torch.float64)
        source.fill("optimizer", f"scaler.{key}", held)
        values[key] = type(value)(held.item())
    scaler.load_state_dict(values)


def _fill_all(
    source: Source,
    group: Group,
    targets: Mapping[str, Tensor],
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    missing, extra = sorted(set(targets) - set(described)), sorted(set(described) - set(targets))
    if missing or extra:
        raise TrainingFailed(
            f"tensors do not fit: {len(missing)} missing {missing[:3]}, {len(extra)} unknown {extra[:3]}",
            where=f"{group} files of the checkpoint",
        )
    for name, target in targets.items():
        dtype, shape = described[name]
        if shape != tuple(target.shape) or dtype != target.dtype:
            raise TrainingFailed(
                f"`{name}` is {dtype} {shape}, the model wants {target.dtype} {tuple(target.shape)}",
                where=f"{group} files of the checkpoint",
            )
    with torch.no_grad():
        for name, target in targets.items():
            source.fill(group, name, target)
