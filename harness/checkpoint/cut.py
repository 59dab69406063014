"""What is cut among the ranks, told without importing what cuts it.

`torch.distributed.tensor` and `torch.distributed.fsdp` bring sympy and take more than a second to import. A
process in which nobody has imported them cannot hold anything of theirs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_cut(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether this rank holds a part of ``tensor`` only."""
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(tensor, found.DTensor)


def is_sharded(module: object) -> TypeIs[FSDPModule]:
    """Whether FSDP2 has cut the parameters of ``module``."""
    found = sys.modules.get("torch.distributed.fsdp")
    return found is not None and isinstance(module, found.FSDPModule)


def groups(module: FSDPModule) -> list[Any]:
    """FSDP2's own record of the parameters that it gathers together when ``module`` runs; none for none."""
    state: Any = module._get_fsdp_state()
    # Torch 2.11 has one group for each module.
    found = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [each for each in found if each is not None]
