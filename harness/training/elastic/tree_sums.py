"""Adds up whole gradients and the losses of logical shards in one fixed tree, on every rank alike.

Inside a rank the gradients are added by `tree.Counter`; across ranks each bucket is cut in W pieces:
all-to-all, the upper levels of the tree on each piece, all-gather. That moves 2 N (W - 1) / W bytes per rank
for N bytes of gradients, as a ring all-reduce does, and begins while the backward pass of the last shard
still runs, bucket by bucket. The model is called as it is, without DDP around it, so that one process and
many run the same operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.determinism import tree
from harness.determinism.sandbox import IDLE
from harness.errors import TrainingFailed
from harness.workers import Workers

all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""By its name in torch 2.13, which warns about the one before."""
BUCKET_BYTES = 25 << 20
"""As DDP's."""
_ALIGNMENT = 64
"""Bytes at which a gradient starts in its bucket, as in memory of its own."""


@dataclass(frozen=True)
class Differing:
    """A rank that got other gradients than rank 0 from the same shard."""

    rank: int
    first: str
    """The first tensor, or unit of FSDP2, in which."""
    extent: str
    """``2 of 8 tensors``."""


@dataclass
class _Bucket:
    """Neighbouring parameters whose gradients travel together."""

    positions: list[int]
    places: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of each parameter, in elements."""
    whole: Tensor = field(default_factory=lambda: torch.empty(0))
    """What is sent, and in the end the sum: (W x piece,)."""
    pieces: Tensor = field(default_factory=lambda: torch.empty(0))
    """What came: row r is this rank's piece of rank r's."""
    waiting: set[int] = field(default_factory=set)
    """Positions whose gradients have not come yet."""
    work: dist.Work | None = None

    def views(self, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter with its part of `whole`."""
        for position, (start, end) in zip(self.positions, self.places, strict=True):
            yield parameters[position], self.whole[start:end].view(parameters[position].shape)


class ShardSums:
    """Adds up the gradients of an update's shards, on every rank alike. Collective."""

    def __init__(self, workers: Workers, parameters: Sequence[tuple[str, nn.Parameter]], count: int) -> None:
        """``parameters``: the trained ones; ``count``: shards of this rank, a power of two."""
        self._workers = workers
        self._names = [name for name, _ in parameters]
        self._parameters = [parameter for _, parameter in parameters]
        self._count = count
        self._counter = tree.Counter()
        self._losses: list[Tensor] = []
        self._buckets: list[_Bucket] = []
        self._next = 0
        self._armed = False
        if workers.world_size > 1:
            self._buckets = list(self._laid_out())
            owner = {at: each for each in self._buckets for at in each.positions}
            for position, parameter in enumerate(self._parameters):
                parameter.register_post_accumulate_grad_hook(self._hook(position, owner[position]))

    @property
    def bytes(self) -> int:
        """Of the buckets; the lists that `tree.Counter` holds come on top."""
        return sum(each.whole.nbytes + each.pieces.nbytes for each in self._buckets)

    @contextmanager
    def last(self) -> Iterator[None]:
        """Around the backward pass of this rank's last shard: what it finishes is sent at once."""
        self._armed = bool(self._buckets)
        try:
            yield
        finally:
            self._armed = False

    def take(self, loss: Tensor) -> None:
        """The backward pass of the next shard is over; ``loss`` is its detached loss.

        Raises `TrainingFailed` for a parameter without a gradient.
        """
        self._losses.append(loss)
        last = len(self._losses) == self._count
        if last and self._buckets:
            late = [position for each in self._buckets for position in each.waiting]
            if late:
                raise without_gradient(f"`{self._names[min(late)]}`")
            return
        gradients = []
        for name, parameter in zip(self._names, self._parameters, strict=True):
            if parameter.grad is None:
                raise without_gradient(f"`{name}`")
            gradients.append(parameter.grad)
            parameter.grad = None
        if not last:
            self._counter.add(gradients)
            return
        for position, (parameter, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
            parameter.grad = self._counter.carried(position, gradient)

    def finish(self) -> Tensor:
        """Leave the sum over all shards in each parameter's ``grad``; returns the mean loss, a scalar."""
        gathered = []
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
            own = tree.folded(bucket.pieces)
            gathered.append(all_gather(bucket.whole, own, async_op=True))
        for bucket, work in zip(self._buckets, gathered, strict=True):
            if work is not None:
                work.wait()
            for parameter, view in bucket.views(self._parameters):
                parameter.grad = view
            bucket.waiting, bucket.work = set(bucket.positions), None
        losses = torch.stack(self._losses)
        if self._buckets:
            every = losses.new_empty(len(losses) * self._workers.world_size)
            all_gather(every, losses)
            losses = every
        self._counter.clear()
        self._losses, self._next = [], 0
        return tree.summed(losses) / len(losses)

    @contextmanager
    def agreed(self) -> Iterator[Callable[[str], None]]:
        """Around the first pass; a pass here brings nothing together before its end."""
        yield lambda _: None

    def compare(self) -> None:
        """Nothing to prepare for `differing`: every rank has whole gradients."""

    def total(self, sums: Tensor) -> Tensor:
        """Of all elements, from this rank's ``sums`` over bits, which are of all of them."""
        return sums

    def differing(self, names: Sequence[str], sums: Tensor) -> Differing | None:
        """Whether a rank has other gradients than rank 0; ``sums``: one of each of ``names``. Collective."""
        every = self._workers.gather_bytes(sums.numpy().tobytes())
        odd = next((rank for rank, data in enumerate(every) if data != every[0]), None)
        if odd is None:
            return None
        first, other = (torch.frombuffer(bytearray(every[rank]), dtype=torch.int64) for rank in (0, odd))
        found = [names[at] for at in (first != other).nonzero().flatten().tolist()]
        return Differing(odd, found[0], f"{len(found)} of {len(names)} tensors")

    def _laid_out(self) -> Iterator[_Bucket]:
        """Buckets in the order in which gradients come: roughly the parameters' from last to first."""
        positions: list[int] = []
        size = 0
        for position in reversed(range(len(self._parameters))):
            parameter = self._parameters[position]
            other = positions and parameter.dtype != self._parameters[positions[-1]].dtype
            if positions and (other or size + parameter.nbytes > BUCKET_BYTES):
                yield self._bucket(positions)
                positions, size = [], 0
            positions.append(position)
            size += parameter.nbytes
        yield self._bucket(positions)

    def _bucket(self, positions: list[int]) -> _Bucket:
        first = self._parameters[positions[0]]
        step = _ALIGNMENT // first.element_size()
        bucket, end = _Bucket(positions, waiting=set(positions)), 0
        for position in positions:
            start, end = end, end + self._parameters[position].numel()
            bucket.places.append((start, end))
            end = -(-end // step) * step
        ranks = self._workers.world_size
        piece = -(-end // (ranks * step)) * step
        bucket.whole = torch.zeros(ranks * piece, dtype=first.dtype, device=first.device)
        bucket.pieces = torch.zeros(ranks, piece, dtype=first.dtype, device=first.device)
        return bucket

    def _hook(self, position: int, bucket: _Bucket) -> Callable[[Tensor], None]:
        start, end = bucket.places[bucket.positions.index(position)]

        def arrived(parameter: Tensor) -> None:
            if not self._armed or parameter.grad is None:
                return
            if position not in bucket.waiting:
                raise TrainingFailed(
                    f"`{self._names[position]}` gets its gradient in several parts",
                    where="determinism.elastic",
                    remedy="use non-reentrant activation checkpointing, or set determinism.elastic=false",
                )
            total = self._counter.carried(position, parameter.grad)
            bucket.whole[start:end].view(parameter.shape).copy_(total)
            parameter.grad = None
            bucket.waiting.remove(position)
            self._send()

        setattr(arrived, IDLE, True)
        return arrived

    def _send(self) -> None:
        """Send the buckets that are whole, in the same order on every rank."""
        while self._next < len(self._buckets) and not self._buckets[self._next].waiting:
            bucket = self._buckets[self._next]
            rows = bucket.whole.view(bucket.pieces.shape)
            bucket.work = dist.all_to_all_single(bucket.pieces, rows, async_op=True)
            self._next += 1


def without_gradient(what: str) -> TrainingFailed:
    """The error about a parameter, ``what`` in words, that a micro-batch does not reach."""
    return TrainingFailed(
        f"{what} gets no gradient from a micro-batch, so its sum has no fixed tree",
        where="determinism.elastic",
        remedy="freeze it, use it in every micro-batch, or set determinism.elastic=false",
    )
