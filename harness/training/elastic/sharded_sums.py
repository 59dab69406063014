"""The fixed tree of `elastic.tree_sums` under FSDP2, where a rank holds rows of each parameter.

FSDP2 brings gradients together as soon as a block's backward pass is over. It does so here for every
micro-batch, and the W ranks compute W neighbouring shards at a time: rank r has shards r, W + r, 2 W + r …,
so that what one reduce-scatter adds, by an all-to-all and a local tree, is a subtree. The counter then adds
rows only: log2(K / W) + 1 lists of N / W bytes instead of N. The price is K / W times the communication of
gradients that are first added up inside a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from harness.determinism import tree
from harness.training.elastic.tree_sums import Differing, without_gradient
from harness.training.optimizer import local
from harness.workers import Workers


class Order:
    """What a backward pass brings together, in its order: the same in every pass and on every rank, or gloo
    ends the process, and others add what does not belong together."""

    def __init__(self) -> None:
        self._learning = False
        self._passes: list[tuple[str, int]] = []
        self._next = 0

    def learn(self, learning: bool) -> None:
        """Take the passes from here on for the order, or from here on compare with it."""
        if learning:
            self._passes = []
        self._learning, self._next = learning, 0

    def require(self, unit: str, elements: int) -> None:
        """``unit`` sends so many. Raises `TrainingFailed` when that is not what comes next."""
        if self._learning:
            self._passes.append((unit, elements))
        elif self._passes:
            wanted = self._passes[self._next % len(self._passes)]
            self._next += 1
            if (unit, elements) != wanted:
                raise without_gradient(f"a parameter of `{wanted[0]}`")


class TreeReduceScatter(ReduceScatter):
    """Adds the gradients of one FSDP2 unit in the tree's order, as its custom reduce-scatter."""

    def __init__(self, unit: str, order: Order) -> None:
        self.unit = unit
        self._order = order
        self.watching = False
        """Whether every rank sends the same, so that another one shows."""
        self.others: Tensor | None = None
        """When `watching`: of each rank, whether it sent other bits than rank 0."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Memory for what is sent and for what is received, as FSDP2's own."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """``output_tensor`` becomes this rank's piece of the sum of every rank's ``input_tensor``, both flat.

        ``op`` would be a sum, or an average where each rank had the loss of its own samples alone; here every
        loss is divided by the shards of the update, and the tree only adds.
        """
        self._order.require(self.unit, input_tensor.numel())
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        rows = received.view(group.size(), -1)
        if self.watching:
            bits = rows.view(torch.uint8)
            self.others = (bits != bits[0]).any(dim=1)
        output_tensor.copy_(tree.folded(rows))


class ShardedSums:
    """`ShardSums` of parameters that are cut among the ranks. Collective."""

    def __init__(self, workers: Workers, model: nn.Module, count: int) -> None:
        """``model``: cut by FSDP2; ``count``: shards of this rank, a power of two."""
        self._workers = workers
        self._count = count
        trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        self._names = [name for name, _ in trained]
        self._parameters = [parameter for _, parameter in trained]
        self._counter = tree.Counter()
        self._losses: list[Tensor] = []
        self._units: list[TreeReduceScatter] = []
        self._order = Order()
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule):
                unit = TreeReduceScatter(name or type(module).__name__.removeprefix("FSDP"), self._order)
                module.set_custom_reduce_scatter(unit)
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                self._units.append(unit)

    @contextmanager
    def last(self) -> Iterator[None]:
        """Around the backward pass of this rank's last shard, which is like every other."""
        yield

    def take(self, loss: Tensor) -> None:
        """The backward pass of the next shard is over; ``loss`` is its detached loss.

        Raises `TrainingFailed` for a parameter without a gradient.
        """
        self._losses.append(loss)
        rows = []
        for name, parameter in zip(self._names, self._parameters, strict=True):
            if parameter.grad is None:
                raise without_gradient(f"`{name}`")
            rows.append(local(parameter.grad))
        if len(self._losses) < self._count:
            self._counter.add(rows)
            for parameter in self._parameters:
                parameter.grad = None
            return
        for position, own in enumerate(rows):
            total = self._counter.carried(position, own)
            if total is not own:
                own.copy_(total)
        self._counter.clear()

    def finish(self) -> Tensor:
        """The rows' sums are in each parameter's ``grad``; returns the mean loss, a scalar."""
        losses = torch.stack(self._losses)
        every = losses.new_empty(len(losses) * self._workers.world_size)
        dist.all_gather_into_tensor(every, losses)
        self._losses = []
        # (rank, its shards) to the order of the shards.
        ordered = every.view(self._workers.world_size, -1).t().reshape(-1)
        return tree.summed(ordered) / len(ordered)

    def compare(self) -> None:
        """In the next pass every rank has the same shard: watch whether they bring the same together."""
        for unit in self._units:
            unit.watching, unit.others = True, None
        self._order.learn(True)

    def differing(self, names: Sequence[str], sums: Tensor) -> Differing | None:
        """Whether a rank brought other gradients than rank 0 since `compare`. This rank's rows, of which
        ``sums`` are, do not say. Collective."""
        self._order.learn(False)
        own = torch.zeros(len(self._units), self._workers.world_size, dtype=torch.uint8)
        for row, unit in zip(own, self._units, strict=True):
            unit.watching = False
            if unit.others is not None:
                row |= unit.others.to("cpu", torch.uint8)
        found = torch.zeros_like(own)
        for data in self._workers.gather_bytes(own.numpy().tobytes()):
            found |= torch.frombuffer(bytearray(data), dtype=torch.uint8).view(own.shape)
        places = found.nonzero().tolist()
        if not places:
            return None
        unit, rank = places[0]
        count = len({unit for unit, _ in places})
        return Differing(rank, self._units[unit].unit, f"{count} of {len(self._units)} units of FSDP2")
