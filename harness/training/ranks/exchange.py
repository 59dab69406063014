"""What the ranks tell each other at every step: stop signals, failures behind the scenes, whether anything
was compiled, and digests.

One small all-gather on the control group, begun before the optimizer step and awaited after it. The digests
of an update's micro-batches are combined in the order of its logical shards, so they do not depend on the
world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from harness.workers import Workers

FAILED = 255
"""The flag of a rank whose background work has failed; smaller ones are signal numbers."""

_DIGEST_BYTES = 16
_HEAD = 2
"""Bytes ahead of the digests: the flag, and whether something was compiled."""


@dataclass(frozen=True)
class Told:
    """What is known on every rank after a step."""

    flag: int
    """0, the largest signal number of any rank, or `FAILED`."""
    rank: int
    """A rank that raised ``flag``."""
    batch: bytes
    """Digest of the update's samples, 16 bytes; empty when digests are off."""
    rng: bytes
    """Digest of the generators of every rank, or of every shard, 16 bytes; empty when digests are off."""
    compiled: bool = False
    """Whether any rank has compiled something in this step."""


class Exchange:
    """The step's all-gather; plain local values when there is one rank."""

    def __init__(
        self,
        workers: Workers,
        accumulation: int,
        *,
        digests: bool,
        shard_generators: bool = False,
        interleaved: bool = False,
    ) -> None:
        """``shard_generators``: each micro-batch has generators of its own, not each rank; ``interleaved``:
        neighbouring micro-batches are those of neighbouring ranks."""
        self._group = workers.control
        self._digests = digests
        self._shard_generators = shard_generators
        self._interleaved = interleaved
        self._generators = _DIGEST_BYTES * (accumulation if shard_generators else 1)
        size = _HEAD + (self._generators + _DIGEST_BYTES * accumulation if digests else 0)
        self._own = torch.zeros(size, dtype=torch.uint8)
        self._view = self._own.numpy().data
        self._all = [torch.zeros(size, dtype=torch.uint8) for _ in range(workers.world_size)]
        self._views = [part.numpy().data for part in self._all]
        self._handle: dist.Work | None = None
        self._told: Told | None = None

    def begin(self, flag: int, batches: Sequence[bytes], rng: bytes, *, compiled: bool = False) -> None:
        """Send this rank's flag and digests, and whether it has ``compiled`` something in this step."""
        if self._group is None:
            if self._shard_generators and self._digests:
                rng = _combined([rng])
            self._told = Told(flag, 0, _combined(batches) if self._digests else b"", rng, compiled)
            return
        self._view[0], self._view[1] = flag, compiled
        if self._digests:
            self._view[_HEAD:] = b"".join((rng, *batches))
        self._handle = dist.all_gather(self._all, self._own, group=self._group, async_op=True)

    def end(self) -> Told:
        """What all ranks have sent."""
        if self._told is not None:
            return self._told
        if self._handle is not None:
            self._handle.wait()
        flags = [view[0] for view in self._views]
        flag = max(flags)
        compiled = any(view[1] for view in self._views)
        if not self._digests:
            return Told(flag, flags.index(flag), b"", b"", compiled)
        split = _HEAD + self._generators
        return Told(
            flag,
            flags.index(flag),
            _combined(self._in_order([view[split:] for view in self._views])),
            _combined(self._in_order([view[_HEAD:split] for view in self._views])),
            compiled,
        )

    def _in_order(self, parts: list[memoryview]) -> list[memoryview]:
        """The digests of each rank, in the order of the shards."""
        if not self._interleaved:
            return parts
        starts = range(0, len(parts[0]), _DIGEST_BYTES)
        return [part[start : start + _DIGEST_BYTES] for start in starts for part in parts]


def _combined(parts: Sequence[bytes | memoryview]) -> bytes:
    return xxhash.xxh3_128_digest(b"".join(parts))


def scalar_mean(value: Tensor, workers: Workers) -> Tensor:
    """The mean of a scalar over the ranks, on its device and without waiting for it."""
    if workers.world_size > 1:
        dist.all_reduce(value)
        value /= workers.world_size
    return value
