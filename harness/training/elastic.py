"""The same bits at any world size: gradients and losses of logical shards, added in one fixed tree.

``determinism.elastic``. An update has K logical shards, its micro-batches; a rank computes K / W neighbouring
ones. Every shard draws its random numbers from generators that are seeded by (seed, shard, step), so a rank
draws nothing of its own. Inside a rank the gradients are added by `tree.Counter`; across ranks each bucket
is cut in W pieces: all-to-all, the upper levels of the tree on each piece, all-gather. That moves
2 N (W - 1) / W bytes per rank for N bytes of gradients, as a ring all-reduce does, and begins while the
backward pass of the last shard still runs, bucket by bucket. The model is called as it is, without DDP around
it, so that one process and many run the same operators.

What would break it is looked for before the first step, on shard 0, which every rank computes: gradients
that differ between the ranks (code that reads its rank, another processor), buffers that change (batch
statistics are those of a rank's own shards), parameters without a gradient. A task with generators of its
own is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.determinism import tree
from harness.determinism.bit_sums import Piece, Plan
from harness.determinism.sandbox import IDLE
from harness.errors import ConfigError, TrainingFailed
from harness.settings import Settings
from harness.workers import Workers

BUCKET_BYTES = 25 << 20
"""As DDP's."""
_ALIGNMENT = 64
"""Bytes at which a gradient starts in its bucket, as in memory of its own."""
_THREADS = 1
LOOK_FOR = "look for code that reads its rank, and for processors or GPUs of another kind"


def pin_threads(settings: Settings) -> list[str]:
    """Give torch's operators one thread in an elastic run; returns what was changed, in words.

    Launchers give ranks other numbers of threads than a bare process has, and sums are cut by threads.
    """
    before = torch.get_num_threads()
    if not settings.determinism.elastic or before == _THREADS:
        return []
    torch.set_num_threads(_THREADS)
    return [f"threads = {_THREADS} (was {before})"]


def recorded(settings: Settings) -> dict[str, str | int]:
    """What the statement's ``determinism.settings`` say of it; nothing when the run is not elastic."""
    if not settings.determinism.elastic:
        return {}
    return {"elastic_shards": settings.micro_batches, "elastic_tree": tree.SHAPE}


def in_words(settings: Settings) -> str:
    """At which world sizes the bits are the same."""
    count = settings.micro_batches
    sizes = [str(1 << power) for power in range(count.bit_length())]
    return f"{count} shards added in a fixed tree: the same bits on {', '.join(sizes)} ranks"


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
                raise without_gradient(self._names[min(late)])
            return
        gradients = []
        for name, parameter in zip(self._names, self._parameters, strict=True):
            if parameter.grad is None:
                raise without_gradient(name)
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
            gathered.append(dist.all_gather_into_tensor(bucket.whole, own, async_op=True))
        for bucket, work in zip(self._buckets, gathered, strict=True):
            if work is not None:
                work.wait()
            for parameter, view in bucket.views(self._parameters):
                parameter.grad = view
            bucket.waiting, bucket.work = set(bucket.positions), None
        losses = torch.stack(self._losses)
        if self._buckets:
            every = losses.new_empty(len(losses) * self._workers.world_size)
            dist.all_gather_into_tensor(every, losses)
            losses = every
        self._counter.clear()
        self._losses, self._next = [], 0
        return tree.summed(losses) / len(losses)

    def examine(self, model: nn.Module, backward: Callable[[], object]) -> None:
        """See `examine`."""
        examine(self._workers, model, backward)

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


def without_gradient(name: str) -> TrainingFailed:
    """The error about a parameter that a micro-batch does not reach."""
    return TrainingFailed(
        f"`{name}` gets no gradient from a micro-batch, so its sum has no fixed tree",
        where="determinism.elastic",
        remedy="freeze it, use it in every micro-batch, or set determinism.elastic=false",
    )


def refuse(generators: Sequence[str]) -> None:
    """Raise `ConfigError` for a task with generators that follow a rank."""
    if generators:
        raise ConfigError(
            f"the task has generators of its own ({', '.join(generators)}), which follow a rank, not a shard",
            where="determinism.elastic",
            remedy="draw from the global ones of python, numpy or torch, which are seeded for each shard",
        )


def examine(workers: Workers, model: nn.Module, backward: Callable[[], object]) -> None:
    """Compute shard 0 on every rank, and compare. ``backward`` leaves its gradients; afterwards there are
    none, and buffers are as before. Collective.

    Raises `TrainingFailed` on every rank: a buffer that changes, a parameter without a gradient, ranks that
    do not get the same.
    """
    names, sums = workers.together(lambda: _examined(model, backward))
    every = workers.gather_bytes(sums.numpy().tobytes())
    odd = next((rank for rank, data in enumerate(every) if data != every[0]), None)
    if odd is None:
        return
    first, other = (torch.frombuffer(bytearray(every[rank]), dtype=torch.int64) for rank in (0, odd))
    differ = [names[at] for at in (first != other).nonzero().flatten().tolist()]
    raise TrainingFailed(
        f"from the same samples and generators rank {odd} gets other gradients than rank 0, in "
        f"{len(differ)} of {len(names)} tensors, first `{differ[0]}`",
        where="determinism.elastic",
        remedy=LOOK_FOR,
    )


def _examined(model: nn.Module, backward: Callable[[], object]) -> tuple[list[str], Tensor]:
    """The names of the trained parameters, and a sum over the bits of each one's gradient."""
    gradients = first_gradients(model, backward)
    plan = Plan({name: Piece(each, each.numel()) for name, each in gradients.items()}, 0)
    return plan.names, plan.sums().cpu()


def first_gradients(model: nn.Module, backward: Callable[[], object]) -> dict[str, Tensor]:
    """What ``backward`` leaves in the trained parameters, taken from them; buffers are as before.

    Raises `TrainingFailed` for a buffer that changes, and for a parameter without a gradient.
    """
    saved = set(model.state_dict())
    kept = {name: each.clone() for name, each in model.named_buffers()}
    backward()
    changed = [
        name for name, each in model.named_buffers() if name in saved and not torch.equal(each, kept[name])
    ]
    if changed:
        raise TrainingFailed(
            f"the buffer `{changed[0]}` changes in training, and each rank would see only its own shards",
            where="determinism.elastic",
            remedy="use a layer without running statistics, or set determinism.elastic=false",
        )
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                raise without_gradient(name)
            gradients[name] = parameter.grad
            parameter.grad = None
    return gradients
