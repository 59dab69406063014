"""Whole tensors between the ranks that hold them and the one rank that writes or reads them.

A tensor is either the same on every rank (DDP, buffers, counters) or cut along its first dimension (FSDP2's
`DTensor`, ``Shard(0)`` on a mesh of one dimension). `collect` brings it whole to its writer's host memory,
`spread` takes it from its reader's. Each shard travels once, straight to the rank that needs it, so no rank
ever holds more of the model than its share.

Every rank must call the same functions for the same tensors in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.checkpoint.cut import is_cut
from harness.errors import TrainingFailed
from harness.workers import Workers

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def collect(workers: Workers, name: str, tensor: Tensor, owner: int, target: Tensor | None) -> None:
    """Copy the whole of ``tensor`` to ``target``, host memory of rank ``owner``; None on the others.

    The copy from a GPU may still be under way when it returns. Raises `TrainingFailed` for a tensor that is
    cut in another way.
    """
    if not is_cut(tensor):
        if target is not None:
            target.copy_(tensor, non_blocking=True)
        return
    shard, rows = _shard(name, tensor)
    group = _group(workers, shard)
    pieces = [torch.empty_like(shard) for _ in range(workers.world_size)] if target is not None else None
    dist.gather(_bytes(shard), None if pieces is None else [_bytes(each) for each in pieces], owner, group)
    if target is not None and pieces is not None:
        for rank, piece in enumerate(pieces):
            first, last = _range(tensor.shape[0], rows, rank)
            target[first:last].copy_(piece[: last - first], non_blocking=True)


def spread(workers: Workers, name: str, tensor: Tensor, owner: int, source: Tensor | None) -> None:
    """Fill ``tensor`` on every rank from ``source``, host memory of rank ``owner``; None on the others."""
    if is_cut(tensor):
        shard, rows = _shard(name, tensor)
        pieces = None if source is None else _cut(source.to(shard.device), rows, workers.world_size)
        dist.scatter(_bytes(shard), pieces, owner, _group(workers, shard))
        local = tensor.to_local()
        local.copy_(shard[: local.shape[0]])
        return
    if source is not None:
        tensor.copy_(source)
    if workers.world_size > 1:
        whole = tensor if tensor.is_contiguous() else tensor.contiguous()
        dist.broadcast(_bytes(whole), owner, _group(workers, whole))
        if whole is not tensor:
            tensor.copy_(whole)


def local_part(name: str, tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's elements of ``tensor``, and the position of the first of them in the whole.

    Raises `TrainingFailed` for a tensor that is cut in another way.
    """
    if not is_cut(tensor):
        return tensor, 0
    _check_placement(name, tensor)
    local, length = tensor.to_local(), tensor.shape[0]
    (ranks,) = tensor.device_mesh.shape
    first, _ = _range(length, -(-length // ranks), tensor.device_mesh.get_local_rank())
    return local, first * (tensor.numel() // max(1, length))


def _check_placement(name: str, tensor: DTensor) -> None:
    from torch.distributed.tensor import Shard

    mesh = tuple(tensor.device_mesh.shape)
    if mesh != (dist.get_world_size(),) or tuple(tensor.placements) != (Shard(0),):
        raise TrainingFailed(
            f"`{name}` is placed as {tensor.placements} on a mesh of {mesh}",
            remedy="checkpoints know one mesh dimension of all ranks, with tensors cut along their first one",
        )


def _shard(name: str, tensor: DTensor) -> tuple[Tensor, int]:
    """This rank's rows, padded to the number that the first rank has, and that number."""
    _check_placement(name, tensor)
    (ranks,) = tensor.device_mesh.shape
    rows = -(-tensor.shape[0] // ranks)
    local = tensor.to_local()
    first, last = _range(tensor.shape[0], rows, tensor.device_mesh.get_local_rank())
    if local.shape[0] != last - first:
        raise TrainingFailed(f"`{name}` has {local.shape[0]} rows on this rank, not {last - first}")
    if local.shape[0] == rows:
        return local.contiguous(), rows
    padded = local.new_zeros((rows, *local.shape[1:]))
    padded[: local.shape[0]] = local
    return padded, rows


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: gloo does not know every dtype, and nothing is added up here."""
    return tensor.view(-1).view(torch.uint8)


def _cut(source: Tensor, rows: int, ranks: int) -> list[Tensor]:
    pieces = []
    for rank in range(ranks):
        first, last = _range(source.shape[0], rows, rank)
        piece = source[first:last]
        if last - first < rows:
            piece = torch.cat([piece, piece.new_zeros((rows - (last - first), *source.shape[1:]))])
        pieces.append(_bytes(piece.contiguous()))
    return pieces


def _range(total: int, rows: int, rank: int) -> tuple[int, int]:
    """The rows of ``rank``, as torch.chunk deals them."""
    return min(rank * rows, total), min((rank + 1) * rows, total)


def _group(workers: Workers, tensor: Tensor) -> Any:
    """Tensors in host memory travel over gloo, whatever carries the gradients."""
    return workers.control if tensor.device.type == "cpu" else None
