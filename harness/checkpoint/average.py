"""The weighted sum of tensors, for `harness merge`: float64, one rounding, the same bytes every time.

A tensor of whole numbers or truth values (a counter, a mask) has no average: it must be the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

import torch

_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""safetensors dtype → torch's."""


def combine(weights: Sequence[Decimal], dtype: str, values: Sequence[bytes]) -> bytes:
    """The bytes of the sum of ``values``, each a tensor of ``dtype`` times its weight.

    Element by element in the order of ``values``, in float64, so neither threads nor vector width matter;
    rounded once to ``dtype``. Raises `ValueError` for a dtype without an average unless all ``values`` are
    equal, and for a result that is not finite.
    """
    if dtype not in _FLOATS:
        if any(value != values[0] for value in values):
            raise ValueError(f"it holds {dtype}, which has no average, and differs between them")
        return values[0]
    if not values[0]:
        return b""
    total: torch.Tensor | None = None
    for weight, value in zip(weights, values, strict=True):
        # A product and a sum of their own: fused, they would round once instead of twice on some machines.
        part = torch.frombuffer(bytearray(value), dtype=_FLOATS[dtype]).double().mul_(float(weight))
        total = part if total is None else total.add_(part)
    if total is None or not bool(torch.isfinite(rounded := total.to(_FLOATS[dtype])).all()):
        raise ValueError("the sum is not finite")
    return rounded.view(torch.uint8).numpy().tobytes()
