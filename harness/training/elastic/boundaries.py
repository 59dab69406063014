"""One gradient for each input of a unit, whoever holds the unit's parameters.

FSDP2 sends what a unit gets through a node of its own, so what the unit gives back to a tensor is added up
before it meets what comes from elsewhere, past the unit (a skip connection around it, a second branch).
Without FSDP2 the same gradients would be added one by one, in another order: measured, other bits in four of
four models with a branch around their blocks. So every run has such nodes, where FSDP2 has its own or more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Joined(torch.autograd.Function):
    """Its inputs; gradients pass when all are there, as through FSDP2's `RegisterPostBackwardFunction`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        """The ``inputs`` themselves."""
        return inputs

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """The ``gradients`` themselves."""
        return gradients


def join(model: nn.Module) -> None:
    """Put the nodes at every unit of ``model`` that is not compiled, which has one node in any case."""
    compiled = {inner for each in model.modules() if _is_compiled(each) for inner in each.modules()}
    for unit in dict.fromkeys(_units(model)):
        if unit not in compiled:
            unit.register_forward_pre_hook(_joined, with_kwargs=True)


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """What accelerate's `fsdp2_prepare_model` makes units of: the classes that the model names, embeddings,
    head and last norm, and the model."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = {type(each) for each in model.modules() if type(each).__name__.removeprefix("FSDP") in names}
    kinds = tuple(found)
    for each in model.modules():
        if isinstance(getattr(each, "_checkpoint_wrapped_module", each), kinds):
            yield each
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        embedding = getattr(model, getter, lambda: None)()
        if isinstance(embedding, nn.Module):
            yield embedding
    for base in (model, getattr(model, getattr(model, "base_model_prefix", "") or "_", None)):
        if isinstance(base, nn.Module):
            yield from (each for each in base.children() if "Norm" in type(each).__name__)
    yield model


def _joined(
    module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not torch.is_grad_enabled():
        return None
    flat, shape = pytree.tree_flatten((arguments, options))
    places = [at for at, each in enumerate(flat) if isinstance(each, Tensor) and each.requires_grad]
    if not places:
        return None
    apply: Any = Joined.apply
    for at, each in zip(places, apply(*(flat[at] for at in places)), strict=True):
        flat[at] = each
    joined: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(flat, shape)
    return joined
