"""The fixed tree of `elastic.tree_sums` under FSDP2, where a rank holds rows of each parameter.

FSDP2 brings gradients together as soon as a block's backward pass is over. It does so here for every
micro-batch, and the W ranks compute W neighbouring shards at a time: rank r has shards r, W + r, 2 W + r …,
so that what one reduce-scatter adds, by an all-to-all and a local tree, is a subtree. The counter then adds
rows only: log2(K / W) + 1 lists of N / W bytes instead of N. The price is K / W times the communication of
gradients that are first added up inside a rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from harness.checkpoint import cut
from harness.determinism import tree
from harness.errors import TrainingFailed
from harness.training.elastic import unfit
from harness.training.elastic.tree_sums import Differing, all_gather, without_gradient
from harness.training.optimizer import local
from harness.workers import Workers

FORWARD, BACKWARD = "forward", "back"
_Passed = tuple[str, str, int]
"""The way, the unit, and the elements that it sends."""


class Order:
    """What a pass gathers on its way forward and adds on its way back, in its order: the same in every pass
    and on every rank, or gloo ends the process, waits for ever, or mixes what does not belong together."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._learning = False
        self._pass: list[_Passed] = []
        self._next = 0

    def learn(self, learning: bool) -> None:
        """Take the pass from here on for the order, in which the ranks agree before each thing that they do
        together, or from here on compare with it, each rank for itself."""
        if learning:
            self._pass = []
        self._learning, self._next = learning, 0

    def require(self, way: str, unit: str, elements: int = 0) -> None:
        """``unit`` comes next on its ``way``, and sends so many. Raises `TrainingFailed` when another one
        did in the pass that was learned, or, while that is made, when another one does on another rank."""
        what = (way, unit, elements)
        if self._learning:
            self._agree(what)
            self._pass.append(what)
        elif self._pass:
            at = self._next % len(self._pass)
            self._next += 1
            if what != self._pass[at]:
                # One that comes later was reached too early: what should have come before it is missing.
                raise _left_out(self._pass[at] if way == BACKWARD or what in self._pass[at:] else what)

    def meet(self, way: str, unit: str = "") -> None:
        """The same while the order is learned, and nothing later: ``unit``, or where ``way`` ends."""
        if self._learning:
            self._agree((way, unit, 0))

    def _agree(self, what: _Passed) -> None:
        every = [json.loads(each) for each in self._workers.gather_bytes(json.dumps(what).encode())]
        odd = next((rank for rank, each in enumerate(every) if each != every[0]), None)
        if odd is None:
            return

        def differ() -> None:
            raise TrainingFailed(
                f"the ranks make other passes of the same samples: rank 0 comes to {_in_words(*every[0])}, "
                f"rank {odd} to {_in_words(*every[odd])}",
                where="determinism.elastic",
                remedy="run the same modules on every rank, or set determinism.elastic=false",
            )

        self._workers.together(differ)


def _in_words(way: str, unit: str, elements: int) -> str:
    if not unit:
        return f"the end of the way {way}"
    return f"`{unit}` on the way {way}" + (f" with {elements} elements" if elements else "")


def _left_out(passed: _Passed) -> TrainingFailed:
    way, unit, _ = passed
    if way == BACKWARD:
        return without_gradient(f"a parameter of `{unit}`")
    return TrainingFailed(
        f"`{unit}` is left out by some micro-batches and used by others, so its sum has no fixed tree",
        where="determinism.elastic",
        remedy="use it in every micro-batch (multiply by 0 to drop it), or set determinism.elastic=false",
    )


class WatchedAllGather(DefaultAllGather):
    """Gathers the parameters of one FSDP2 unit as FSDP2's own does, in the order that every rank has."""

    def __init__(self, unit: str, order: Order, model: nn.Module, *, stays: bool) -> None:
        """``stays``: gathered after a forward pass, so that the pass after an evaluation need not gather."""
        self._unit = unit
        self._reached = order.meet if stays else order.require
        self._model = model

    def __call__(self, *arguments: Any, **options: Any) -> dist.Work | None:
        """As FSDP2's own.

        An evaluation is in no pass, and what is gathered on the way back is planned by FSDP2 from the forward
        passes before it, evaluations included: neither is compared.
        """
        if self._model.training and torch._C._current_graph_task_id() == -1:
            self._reached(FORWARD, self._unit)
        work: dist.Work | None = super().__call__(*arguments, **options)
        return work


class TreeReduceScatter(ReduceScatter):
    """Adds the gradients of one FSDP2 unit in the tree's order, as its custom reduce-scatter."""

    def __init__(self, unit: str, order: Order) -> None:
        self.unit = unit
        self._order = order
        self.watching = False
        """Whether every rank sends the same, so that another one shows; nothing is then added."""
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
        self._order.require(BACKWARD, self.unit, input_tensor.numel())
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        rows = received.view(group.size(), -1)
        if self.watching:
            bits = rows.view(torch.uint8)
            self.others = (bits != bits[0]).any(dim=1)
        output_tensor.copy_(rows[0] if self.watching else tree.folded(rows))


def _stays_gathered(module: FSDPModule) -> bool:
    """Whether accelerate asked so: of a model's last norm and head, which the way back begins with."""
    return not all(each._reshard_after_forward for each in cut.groups(module))


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
        self._order = Order(workers)
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule):
                unit = TreeReduceScatter(name or type(module).__name__.removeprefix("FSDP"), self._order)
                module.set_custom_reduce_scatter(unit)
                stays = not name or _stays_gathered(module)
                module.set_custom_all_gather(WatchedAllGather(unit.unit, self._order, model, stays=stays))
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                self._units.append(unit)
        unfit.once(model)

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
        all_gather(every, losses)
        self._losses = []
        # (rank, its shards) to the order of the shards.
        ordered = every.view(self._workers.world_size, -1).t().reshape(-1)
        return tree.summed(ordered) / len(ordered)

    @contextmanager
    def agreed(self) -> Iterator[Callable[[str], None]]:
        """Around the first pass, which every rank makes of the same shard: what it gathers and adds is what
        every pass does. Call what is given where it ends on its way forward, and back."""
        self._order.learn(True)
        yield self._order.meet
        self._order.learn(False)

    def compare(self) -> None:
        """In the next pass every rank has the same shard: watch whether they bring the same together."""
        for unit in self._units:
            unit.watching, unit.others = True, None

    def total(self, sums: Tensor) -> Tensor:
        """Of all elements, from every rank's ``sums`` over the bits of its rows. Collective."""
        every = self._workers.gather_bytes(sums.numpy().tobytes())
        return torch.stack([torch.frombuffer(bytearray(each), dtype=torch.int64) for each in every]).sum(0)

    def differing(self, names: Sequence[str], sums: Tensor) -> Differing | None:
        """Whether a rank brought other gradients than rank 0 since `compare`. This rank's rows, of which
        ``sums`` are, do not say. Collective."""
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
