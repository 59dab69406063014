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

AS_SAVED = "configure model and optimizer as they were when it was saved"
"""What to do when a checkpoint does not fit."""


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


Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name → dtype and shape of the whole tensor."""


class Source(Protocol):
    """Where a restore takes tensors from."""

    def described(self, group: Group) -> Described:
        """The tensors of a group."""

    def fill(self, targets: Mapping[tuple[Group, str], Tensor]) -> None:
        """Fill tensors that fit their description; every rank asks for the same ones."""


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


def load(state: TrainingState, source: Source, aliases: Mapping[str, str]) -> None:
    """Fill model, optimizer, averages, loose buffers and scaler from ``source``.

    Shared weights must be shared in the same way. Raises `TrainingFailed` for anything that does not fit,
    before a tensor is touched.
    """
    model, shared = model_tensors(state.model)
    if shared != dict(aliases):
        what = f"shared weights differ: checkpoint {dict(aliases)}, model {shared}"
        raise TrainingFailed(what, remedy=AS_SAVED)
    described = source.described("optimizer")
    slots = _slots(state, {key: value for key, value in described.items() if key.startswith("optimizer.")})
    others = {f"ema.{name}": tensor for name, tensor in state.ema.items()}
    others |= {f"buffer.{name}": tensor for name, tensor in _loose_buffers(state.model)}
    scaler = {} if state.scaler is None else _scaler_tensors(state.scaler)
    expected: dict[Group, dict[str, Tensor]] = {"model": model, "optimizer": {**slots, **others, **scaler}}
    for group, targets in expected.items():
        _check_fits(group, targets, source.described(group))
    source.fill(
        {(group, name): tensor for group, named in expected.items() for name, tensor in named.items()}
    )
    _adopt_slots(state, slots)
    if state.scaler is not None:
        _adopt_scaler(state.scaler, scaler)


def load_weights(state: TrainingState, source: Source) -> None:
    """Fill the model alone from ``source``; an average of the weights begins with them.

    Raises `TrainingFailed` for anything that does not fit, before a tensor is touched.
    """
    model, _ = model_tensors(state.model)
    _check_fits("model", model, source.described("model"))
    source.fill({("model", name): tensor for name, tensor in model.items()})
    parameters = dict(state.model.named_parameters())
    with torch.no_grad():
        for name, average in state.ema.items():
            average.copy_(parameters[name])


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


def _slots(state: TrainingState, described: Described) -> dict[str, Tensor]:
    """A tensor for each slot of ``described``: the optimizer's own, or a new one.

    `step` counters keep their device (CPU unless fused on a GPU). A parameter that no loss has reached yet
    has no state, so fewer slots than parameters are no fault.
    """
    parameters = dict(state.model.named_parameters())
    defaults = state.optimizer.defaults
    fused = bool(defaults.get("fused")) or bool(defaults.get("capturable"))
    slots: dict[str, Tensor] = {}
    odd = []
    for key, (dtype, shape) in described.items():
        name, slot = _slot(key)
        parameter = parameters.get(name)
        if parameter is None or not parameter.requires_grad:
            odd.append(key)
            continue
        if shape and shape != tuple(parameter.shape):
            raise TrainingFailed(f"{key} has shape {shape}", remedy=AS_SAVED)
        own = state.optimizer.state.get(parameter, {}).get(slot)
        if isinstance(own, Tensor) and own.dtype == dtype and tuple(own.shape) == shape:
            slots[key] = own
        elif shape:
            slots[key] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:
            slots[key] = torch.empty((), dtype=dtype, device=parameter.device if fused else "cpu")
    if odd:
        what = f"optimizer state of parameters that the model does not train: {sorted(odd)[:3]}"
        raise TrainingFailed(what, remedy=AS_SAVED)
    return slots


def _adopt_slots(state: TrainingState, slots: Mapping[str, Tensor]) -> None:
    parameters = dict(state.model.named_parameters())
    state.optimizer.state.clear()
    for key, tensor in slots.items():
        name, slot = _slot(key)
        state.optimizer.state[parameters[name]][slot] = tensor


def _scaler_tensors(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    return {
        f"scaler.{key}": torch.tensor([value], dtype=torch.float64)
        for key, value in scaler.state_dict().items()
    }


def scaler_facts(state: TrainingState) -> dict[str, str] | None:
    """The loss scaler's numbers as text, for trainer.json; None without one."""
    if state.scaler is None:
        return None
    return {key.lstrip("_"): repr(value) for key, value in state.scaler.state_dict().items()}


def _adopt_scaler(scaler: torch.amp.GradScaler, tensors: Mapping[str, Tensor]) -> None:
    scaler.load_state_dict(
        {key: type(value)(tensors[f"scaler.{key}"].item()) for key, value in scaler.state_dict().items()}
    )


def _check_fits(group: Group, targets: Mapping[str, Tensor], described: Described) -> None:
    where = f"{group} files of the checkpoint"
    missing, extra = sorted(set(targets) - set(described)), sorted(set(described) - set(targets))
    if missing or extra:
        raise TrainingFailed(
            f"tensors do not fit: {len(missing)} missing {missing[:3]}, {len(extra)} unknown {extra[:3]}",
            where=where,
            remedy=AS_SAVED,
        )
    for name, target in targets.items():
        dtype, shape = described[name]
        if shape != tuple(target.shape) or dtype != target.dtype:
            raise TrainingFailed(
                f"`{name}` is {dtype} {shape}, the model wants {target.dtype} {tuple(target.shape)}",
                where=where,
                remedy=AS_SAVED,
            )
