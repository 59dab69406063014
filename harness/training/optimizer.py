"""Fused AdamW, clipping, the fp16 loss scaler and averaged weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.checkpoint.cut import is_cut
from harness.errors import EnvironmentFault, TrainingFailed
from harness.settings import Optimizer as OptimizerSettings

CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


class EagerAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that is never compiled, so that dynamo is not imported to be told so.

    torch 2.13 wraps these methods to hide them from dynamo, and imports it (two seconds, with sympy) when the
    first of them is called. Here they are called without the wrappers: the same code, so the same bits.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update."""
        return _STEP(self, closure)


_STEP: Callable[..., Any] = inspect.unwrap(torch.optim.AdamW.step)


def adamw(
    model: nn.Module, settings: OptimizerSettings, kind: type[torch.optim.AdamW] = EagerAdamW
) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101); weight decay on parameters of two or more dimensions only.

    One kernel launch per group on CPU and CUDA. Raises `TrainingFailed` when nothing is trainable, or
    something that the kernel cannot train.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise TrainingFailed("the model has no trainable parameters", remedy="check the task's build_model")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_floating_point():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise TrainingFailed(
                f"`{name}` is {dtype}, and the fused AdamW trains real floating-point parameters only",
                remedy="keep it as real numbers (torch.view_as_complex in forward)",
            )
    decayed = [parameter for parameter in trainable if parameter.ndim >= 2]
    others = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return kind(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The global 2-norm of ``gradients``, a scalar.

    With `clip_factor` and `scale` the same operations as `torch.nn.utils.clip_grad_norm_`, bit for bit, which
    spends most of its time on sorting by device and dtype what is of one device and dtype here
    (``scripts/bench/hot_loop.py``). Of gradients that are cut among the ranks each rank takes its part, and
    the squares are added up.
    """
    first = gradients[0]
    if is_cut(first):
        shards = [local(each) for each in gradients]
        square = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(shards))).square()
        dist.all_reduce(square)
        whole: Tensor = square.sqrt()
        return whole
    if _mixed(gradients):
        return nn.utils.get_total_norm(gradients)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


def clip_factor(norm: Tensor, clip: float) -> Tensor:
    """What gradients of ``norm`` are multiplied by to be at most ``clip`` long, a scalar on their device."""
    return (clip / (norm + CLIP_EPSILON)).clamp(max=1.0)


def scale(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiply ``gradients``, or this rank's part of them, by the scalar ``factor``, in place.

    From the last one to the first: the cache still has what their norm has read last, and will have what
    their digest reads first.
    """
    last_to_first = [local(each) for each in reversed(gradients)]
    if _mixed(gradients):
        for gradient in last_to_first:
            gradient.mul_(factor.to(gradient.device))
    else:
        torch._foreach_mul_(last_to_first, factor)


def _mixed(gradients: list[Tensor]) -> bool:
    first = gradients[0]
    return any(each.dtype != first.dtype or each.device != first.device for each in gradients)


def local(gradient: Tensor) -> Tensor:
    """This rank's rows of ``gradient``, or all of it where it is not cut."""
    return gradient.to_local() if is_cut(gradient) else gradient


class Average:
    """An exponential moving average of the weights, on their device."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """``decay`` in [0, 1): the share of the average that each update keeps."""
        self._weights: list[Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
        self._decay = decay
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.tensors: Mapping[str, Tensor] = {
            name: weight.detach().clone() for name, weight in zip(names, self._weights, strict=True)
        }
        self._averages = list(self.tensors.values())

    def update(self) -> None:
        """Move the average towards the weights."""
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._weights, 1.0 - self._decay)


@dataclass(frozen=True)
class Precision:
    """What the forward and backward pass compute in, and why."""

    name: str
    autocast: torch.dtype | None
    scaled: bool
    reason: str


def precision(name: str, device: torch.device) -> Precision:
    """What ``precision`` of the config means on ``device``.

    Raises `EnvironmentFault` where the hardware or the installation does not have it.
    """
    if name == "fp32":
        return Precision(name, None, False, "weights and arithmetic in float32")
    if name == "bf16":
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise _unavailable("bf16", torch.cuda.get_device_name(device))
        return Precision(name, torch.bfloat16, False, "autocast to bfloat16, weights float32")
    if name == "fp16":
        reason = "autocast to float16 with a dynamic loss scale, weights float32"
        return Precision(name, torch.float16, True, reason)
    if device.type != "cuda":
        raise _unavailable("fp8", "a CPU")
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise _unavailable("fp8", torch.cuda.get_device_name(device))
    return Precision(name, torch.bfloat16, False, "linear layers in float8 (torchao), the rest in bfloat16")


def convert_fp8(model: nn.Module) -> None:
    """Replace the linear layers by torchao's float8 training layers, in place.

    Raises `EnvironmentFault` without torchao.
    """
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise EnvironmentFault(
            "precision fp8 needs torchao, which is not installed",
            remedy="pip install torchao, or precision=bf16",
        ) from error
    convert_to_float8_training(model, module_filter_fn=_fits_float8)


def _fits_float8(module: nn.Module, name: str) -> bool:
    # Float8 matrix products want both sides to be multiples of 16 (torchao README, float8 training).
    return isinstance(module, nn.Linear) and module.in_features % 16 == 0 and module.out_features % 16 == 0


def loss_scaler(device: torch.device) -> torch.amp.GradScaler:
    """The dynamic loss scale of fp16 (arXiv 1710.03740), with torch's defaults."""
    return torch.amp.GradScaler(device.type)


def _unavailable(name: str, hardware: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"precision {name} is not available on {hardware}",
        where="precision",
        remedy="use precision=bf16 or precision=fp32" if name == "fp8" else "use precision=fp16 or fp32",
    )
