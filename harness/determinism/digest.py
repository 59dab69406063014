"""Digests of one step: of its batch and of the random number generator, a few microseconds each.

XXH3-128 (https://github.com/Cyan4973/xxHash): fast and well mixed, not cryptographic. The digests are made
for finding the step where two runs part; what an adversary could touch is covered by SHA-256 elsewhere.

Example::

    >>> import torch
    >>> batch_digest((torch.arange(3),)) == batch_digest((torch.arange(3),))
    True
    >>> batch_digest((torch.arange(3),)) == batch_digest((torch.arange(3, dtype=torch.int32),))
    False
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

# numpy has no type for these; the same bytes are read through an integer type of the same width.
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INTEGERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_NUMPY_KNOWS = _INTEGERS | {torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128}

_headers: dict[tuple[torch.dtype, torch.Size], bytes] = {}
_MOST_HEADERS = 4096  # batches of ever new shapes must not grow the table for good


def batch_digest(batch: Sequence[Tensor], *, copy_from_device: bool = False) -> str:
    """32 hex digits over dtype, shape and bytes of each tensor, in order.

    Strides, storage offsets and `requires_grad` make no difference. A tensor on a device is copied to the
    host only with ``copy_from_device``, since that waits for the device; without it, `ValueError`.
    """
    digest = xxhash.xxh3_128()
    for tensor in batch:
        if tensor.device.type != "cpu":
            tensor = _copied(tensor, copy_from_device)
        digest.update(_header(tensor))
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def rng_digest(state: Tensor | None = None) -> str:
    """32 hex digits over the state of torch's CPU generator, or over ``state`` of it. Draws no number."""
    return xxhash.xxh3_128_hexdigest(tensor_bytes(torch.get_rng_state() if state is None else state))


def _copied(tensor: Tensor, allowed: bool) -> Tensor:
    if not allowed:
        raise ValueError(
            f"a digest of a tensor on {tensor.device} waits for the device: copy_from_device=True"
        )
    return tensor.cpu()


def _header(tensor: Tensor) -> bytes:
    key = (tensor.dtype, tensor.shape)
    header = _headers.get(key)
    if header is None:
        if len(_headers) >= _MOST_HEADERS:
            _headers.clear()
        header = _headers[key] = f"{tensor.dtype}{list(tensor.shape)}\0".encode()
    return header


def tensor_bytes(tensor: Tensor) -> Any:
    """An array over the tensor's own memory, which the hash reads through the buffer protocol."""
    if tensor.dtype in _INTEGERS and tensor.is_contiguous():
        return tensor.numpy()  # nothing to detach or to resolve
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if plain.dtype not in _NUMPY_KNOWS:
        plain = plain.view(_SAME_WIDTH[plain.element_size()])
    return plain.numpy()
