"""What a model cannot be or do in an elastic run, in one line that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from harness.errors import TrainingFailed

_WHERE = "determinism.elastic"
_TURN_OFF = "or set determinism.elastic=false"
_USE_DDP = "or set parallel=ddp, which has the same bits"


def refuse(model: nn.Module) -> None:
    """Raise `TrainingFailed` for what ``model`` is made of."""
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise TrainingFailed(
                f"`{name}` has sparse gradients, which are not added in a tree",
                where=_WHERE,
                remedy=f"build it with sparse=False, {_TURN_OFF}",
            )
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            raise TrainingFailed(
                f"`{name}` is a SyncBatchNorm, whose statistics are of what all ranks compute at a time",
                where=_WHERE,
                remedy=f"use a layer without batch statistics, such as LayerNorm or GroupNorm, {_TURN_OFF}",
            )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise TrainingFailed(
                f"the parameter `{name}` has no shape yet",
                where=_WHERE,
                remedy="give the layer its sizes, or call the model once in build_model",
            )
        if parameter.requires_grad and not parameter.is_contiguous():
            raise TrainingFailed(
                f"the parameter `{name}` of shape {tuple(parameter.shape)} is not contiguous in memory",
                where=_WHERE,
                remedy=f"make it of .contiguous() in torch.contiguous_format, {_TURN_OFF}",
            )


def once(model: nn.Module) -> None:
    """Refuse to differentiate ``model``, cut by FSDP2, twice (``create_graph=True``): FSDP2 frees the weights
    after the first time. Later passes too, since a penalty may come at some steps only."""
    if getattr(model, "_compiled_call_impl", None) is not None:
        return  # torch refuses it by itself
    kind = type(model).__name__.removeprefix("FSDP")

    def check(gradient: Tensor) -> None:
        if torch.is_grad_enabled():
            raise TrainingFailed(
                f"`{kind}` is differentiated twice (create_graph=True), and FSDP2 frees weights in between",
                where=_WHERE,
                remedy=f"take the gradient's penalty out of the loss, {_USE_DDP}",
            )

    def watch(module: nn.Module, arguments: Any, output: Any) -> None:
        for each in pytree.tree_leaves(output):
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(check)

    model.register_forward_hook(watch)


@contextmanager
def explaining(model: nn.Module) -> Iterator[None]:
    """Around a pass of ``model``: raise a refusal for an error of torch that is known; any other stays."""
    try:
        yield
    except RuntimeError as error:
        found = _explained(error, model)
        if found is None:
            raise
        raise found from error


def _explained(error: RuntimeError, model: nn.Module) -> TrainingFailed | None:
    text, place = str(error), _innermost(error.__traceback__, model)
    if "got mixed torch.Tensor and DTensor" in text:
        return TrainingFailed(
            f"the parameters of `{place}` are used while FSDP2 has them cut: not by calling the model",
            where="parallel: fsdp2",
            remedy=f"let `loss` call the model and put all that reads weights into its forward, {_USE_DDP}",
        )
    if "is a view and is being modified inplace" in text and ("Joined" in text or "PostBackward" in text):
        return TrainingFailed(
            f"`{place}` writes to the input of a unit in place, of which the gradient is added up",
            where=_WHERE,
            remedy=f"make a new tensor there (x = x + y for x += y, inplace=False), {_TURN_OFF}",
        )
    return None


def _innermost(traceback: TracebackType | None, model: nn.Module) -> str:
    """The module of ``model`` whose code ran last before an error; the model where none did."""
    names = {id(module): name for name, module in model.named_modules() if name}
    found = type(model).__name__.removeprefix("FSDP")
    while traceback is not None:
        found = names.get(id(traceback.tb_frame.f_locals.get("self")), found)
        traceback = traceback.tb_next
    return found
