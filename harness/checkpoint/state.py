"""What is saved: weights, optimizer, scaler, averages, buffers; named tensors and a few JSON facts.

The model goes to ``model.safetensors`` under its public names, a shared weight once. Everything else that a
step reads goes to ``optimizer-00001-of-00001.safetensors``:

- ``optimizer.PARAMETER.SLOT`` for every tensor of the optimizer's state (``exp_avg``, ``step``…)
- ``ema.PARAMETER`` for an exponential moving average of the weights
- ``scaler.NAME`` for the loss scaler of fp16
- ``buffer.NAME`` for buffers that the model does not put in its state dict

Restoring is strict: a tensor too few, too many, or of another shape or dtype is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import TrainingFailed

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer-00001-of-00001.safetensors"


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


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's tensors by name, and the aliases (name → the name it shares its memory with)."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        owner = owners.setdefault(identity, name) if tensor.numel() else name
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


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Copy ``tensors`` into ``model``; shared weights must be shared in the same way."""
    expected, model_aliases = model_tensors(model)
    if model_aliases != dict(aliases):
        raise TrainingFailed(f"shared weights differ: checkpoint {dict(aliases)}, model {model_aliases}")
    _copy_all(expected, tensors, MODEL_FILE)


def load_optimizer(state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into optimizer, averages, loose buffers and scaler."""
    rest = dict(tensors)
    parameters = dict(state.model.named_parameters())
    slots: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in rest if key.startswith("optimizer.")]:
        name, slot = key.removeprefix("optimizer.").rsplit(".", 1)
        slots.setdefault(name, {})[slot] = rest.pop(key)
    # A parameter that no loss has reached yet has no state, so fewer is no fault; what is there must fit.
    odd = sorted(set(slots) - {name for name, parameter in parameters.items() if parameter.requires_grad})
    if odd:
        raise TrainingFailed(f"optimizer state of parameters that the model does not train: {odd[:3]}")
    _load_slots(state.optimizer, parameters, slots)
    if state.scaler is not None:
        _load_scaler(state.scaler, {key: rest.pop(key) for key in list(rest) if key.startswith("scaler.")})
    targets = {f"ema.{name}": tensor for name, tensor in state.ema.items()}
    targets |= {f"buffer.{name}": tensor for name, tensor in _loose_buffers(state.model)}
    _copy_all(targets, rest, OPTIMIZER_FILE)


def group_names(state: TrainingState) -> list[list[str]]:
    """The parameter names of each optimizer group, in order; must be the same at a resume."""
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in state.optimizer.param_groups]


def _loose_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name not in saved)


def _load_slots(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    slots: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Fill the optimizer's state; `step` counters keep their device (CPU unless fused on a GPU)."""
    optimizer.state.clear()
    fused = bool(optimizer.defaults.get("fused")) or bool(optimizer.defaults.get("capturable"))
    for name, values in slots.items():
        parameter = parameters[name]
        for slot, value in values.items():
            if value.ndim and value.shape != parameter.shape:
                raise TrainingFailed(f"optimizer.{name}.{slot} has shape {tuple(value.shape)}")
            device = parameter.device if value.ndim or fused else torch.device("cpu")
            optimizer.state[parameter][slot] = value.to(device, copy=True)


def _scaler_tensors(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    return {
        f"scaler.{key}": torch.tensor([value], dtype=torch.float64)
        for key, value in scaler.state_dict().items()
    }


def _load_scaler(scaler: torch.amp.GradScaler, tensors: Mapping[str, Tensor]) -> None:
    current = scaler.state_dict()
    if set(tensors) != {f"scaler.{key}" for key in current}:
        raise TrainingFailed(f"loss scaler state does not fit: {sorted(tensors)}")
    scaler.load_state_dict(
        {key: type(value)(tensors[f"scaler.{key}"].item()) for key, value in current.items()}
    )


def _copy_all(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], where: str) -> None:
    missing, extra = sorted(set(targets) - set(sources)), sorted(set(sources) - set(targets))
    if missing or extra:
        raise TrainingFailed(
            f"tensors do not fit: {len(missing)} missing {missing[:3]}, {len(extra)} unknown {extra[:3]}",
            where=where,
        )
    with torch.no_grad():
        for name, target in targets.items():
            source = sources[name]
            if source.shape != target.shape or source.dtype != target.dtype:
                raise TrainingFailed(
                    f"`{name}` is {source.dtype} {tuple(source.shape)}, "
                    f"the model wants {target.dtype} {tuple(target.shape)}",
                    where=where,
                )
            target.copy_(source)
