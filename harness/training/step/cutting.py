"""A model whose parameters are cut among the ranks by FSDP2, or why it cannot be, with a name.

FSDP2 refuses some models while it cuts them, others in their first pass only and without a name.
"""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import nn

from harness.checkpoint.cut import groups, is_sharded
from harness.determinism.sandbox import is_hooked
from harness.errors import ConfigError, EnvironmentFault

_WHERE = "parallel: fsdp2"


def cut(model: nn.Module, prepare: Accelerator) -> nn.Module:
    """``model`` itself, its parameters cut along their first dimension among all ranks.

    Raises `ConfigError` for a model that FSDP2 cannot cut, `EnvironmentFault` when accelerate does not.
    """
    hooked = [name for name, each in model.named_parameters() if is_hooked(each)]
    if hooked:
        raise ConfigError(
            f"`{hooked[0]}` has a hook on its gradient, which FSDP2 would lose: it replaces parameters",
            where=_WHERE,
            remedy="do it in the model's forward pass, or set parallel=ddp",
        )
    empty = [name for name, each in model.named_parameters() if each.requires_grad and not each.numel()]
    if empty:
        raise _uncut(f"`{empty[0]}` has no elements")
    shared: dict[int, list[str]] = {}
    for name, each in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(each), []).append(name)
    try:
        sharded: nn.Module = fsdp2_prepare_model(prepare, model)
    except (ValueError, NotImplementedError) as error:  # a scalar, strides
        raise _uncut(str(error)) from error
    if not is_sharded(sharded):
        remedy = "install the accelerate of requirements.lock, or set parallel: ddp"
        raise EnvironmentFault("accelerate made no fully sharded model", where=_WHERE, remedy=remedy)
    for first, *others in shared.values():
        for other in others:
            if _unit(sharded, first) is not _unit(sharded, other):
                raise _uncut(f"`{first}` is `{other}` as well, in another unit")
    _refuse_mixed_dtypes(sharded)
    return sharded


def _uncut(why: str) -> ConfigError:
    return ConfigError(
        f"FSDP2 cannot cut this model: {' '.join(why.split()).removesuffix('.')}",
        where=_WHERE,
        remedy="change the model so, or set parallel=ddp",
    )


def _unit(model: nn.Module, parameter: str) -> object:
    """What FSDP2 knows of the unit that gathers ``parameter``."""
    found: nn.Module = model
    module = model
    for part in parameter.split(".")[:-1]:
        module = module.get_submodule(part)
        found = module if is_sharded(module) else found
    return found._get_fsdp_state() if is_sharded(found) else None


def _refuse_mixed_dtypes(model: nn.Module) -> None:
    """Raise `ConfigError` for a unit whose trained parameters have several dtypes."""
    names = {id(each): name for name, each in model.named_parameters()}
    for module in model.modules():
        for group in groups(module) if is_sharded(module) else ():
            trained = [each.sharded_param for each in group.fsdp_params if each.sharded_param.requires_grad]
            dtypes = {each.dtype: names[id(each)] for each in reversed(trained)}
            if len(dtypes) > 1:
                told = " and ".join(f"`{name}` is {dtype}" for dtype, name in dtypes.items())
                raise _uncut(f"in one unit {told.replace('torch.', '')}")
