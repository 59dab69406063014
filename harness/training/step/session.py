"""Everything that a step needs on one rank, stepped as one.

`harness.training.step.building` makes it, `harness.training.step.position` puts it where a run begins or goes
on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.checkpoint.cut import is_sharded
from harness.checkpoint.state import TrainingState
from harness.data.loader import MicroBatches
from harness.determinism.digest import batch_digest, rng_digest
from harness.determinism.ledger import Ledger
from harness.errors import TrainingFailed
from harness.tasks.task import Batch, Task
from harness.training import optimizer
from harness.training.evaluation.held_out import on_device
from harness.training.optimizer import Average, Precision
from harness.training.ranks.exchange import Exchange, scalar_mean
from harness.training.schedule import LearningRate
from harness.training.seeding import seed_shard
from harness.training.step.digests import StepDigests, Sums
from harness.training.step.doubling import Doubling
from harness.training.step.remembered import Remembered
from harness.workers import Workers

if TYPE_CHECKING:
    from harness.training.elastic.sharded_sums import ShardedSums
    from harness.training.elastic.tree_sums import ShardSums


@dataclass
class Session:
    """One rank's model, optimizer and data, ready to step."""

    task: Task
    workers: Workers
    model: nn.Module
    """The model itself; its names are the public names."""
    wrapped: nn.Module
    """What is called in training: the model, or DDP around it; compiled when asked for."""
    state: TrainingState
    average: Average | None
    precision: Precision
    schedule: LearningRate
    batches: MicroBatches
    clip: float | None
    wants_norm: bool
    digests: bool
    gradients_every: int
    """Steps between two digests of the gradients; 0 takes none."""
    state_every: int
    """Steps between two digests of the state besides those of checkpoints; 0 takes none."""
    seed: int
    sums: ShardSums | ShardedSums | None = None
    """Adds what the logical shards give in a fixed tree; None when the run is not elastic."""
    rehearsed: str = ""
    """Digest of what the first shards of an elastic run give at its first weights, hex."""
    updates: int = 0
    """Updates that the state is of."""
    doubling: Doubling | None = None
    """Executes micro-steps twice, now and then; None when nothing is looked at."""

    def __post_init__(self) -> None:
        self._step_digests = StepDigests(self.workers, self.state)
        self._optimizer = self.state.optimizer
        self._scaler = self.state.scaler
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self._names = [names[id(each)] for each in self._parameters]
        self._move = self.workers.device.type != "cpu"
        self._distributed = self.workers.world_size > 1
        self._sharded = self.wrapped if is_sharded(self.wrapped) else None
        # DDP gives every rank the buffers of rank 0, which are the ones that are saved; FSDP2 does not.
        saved = set(self.model.state_dict()) if self._sharded else set()
        self._buffers = [buffer for name, buffer in self.model.named_buffers() if name in saved]
        self._shard_rng: list[bytes] = []
        self.remembered = Remembered()

    @property
    def accumulation(self) -> int:
        """Micro-batches of this rank in one update."""
        return self.batches.accumulation

    def exchange(self, *, digests: bool | None = None) -> Exchange:
        """What the ranks tell each other at every step; ``digests``: None for what the config says."""
        return Exchange(
            self.workers,
            self.accumulation,
            digests=self.digests if digests is None else digests,
            shard_generators=self.sums is not None,
            interleaved=self.batches.interleaved,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of forward passes."""
        if self.precision.autocast is None:
            return nullcontext()
        return torch.autocast(self.workers.device.type, dtype=self.precision.autocast)

    def rng_digest(self) -> bytes:
        """Digest of torch's CPU generator, 16 bytes, or as many for each shard of this rank; empty when
        digests are off."""
        if self.sums is not None:
            return b"".join(self._shard_rng)
        return self.remembered.rng_digest() if self.digests else b""

    def forward_backward(self, stream: Iterator[Batch], ledger: Ledger, digests: list[bytes]) -> Tensor:
        """Gradients of one update from the next ``accumulation`` micro-batches.

        Returns the mean loss of all ranks, a detached scalar; appends each of this rank's micro-batches'
        digests to ``digests``.
        """
        losses = self.remembered.begin(self.updates, self.task.generators)
        if self.sums is not None:
            return self._tree(self.sums, stream, ledger, digests, losses)
        count = self.batches.accumulation
        total: Tensor | None = None
        for buffer in self._buffers:
            dist.broadcast(buffer, 0)
        for number in range(count):
            batch = self._next_batch(stream, digests)
            if self._sharded is not None or self._distributed:
                if number == 0:
                    self._look_twice(batch)
                with self._reduced(last=number == count - 1):
                    loss = self._backward(batch, count, ledger)
            elif number == 0 and self.doubling is not None:
                execute = partial(self._backward, batch, count, ledger)
                loss = self.doubling.execute(self.updates + 1, execute)
            else:
                loss = self._backward(batch, count, ledger)
            losses.append(loss)
            total = loss if total is None else total + loss
        if total is None:
            raise TrainingFailed("an update has no micro-batch")
        return scalar_mean(total if count == 1 else total / count, self.workers)

    def _reduced(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around a pass of several ranks, which reduce gradients in the ``last`` one of an update."""
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(last)
        elif not last:
            return self.wrapped.no_sync()  # type: ignore[operator,no-any-return]
        return nullcontext()

    def _tree(
        self,
        sums: ShardSums | ShardedSums,
        stream: Iterator[Batch],
        ledger: Ledger,
        digests: list[bytes],
        losses: list[Tensor],
    ) -> Tensor:
        """The same, every shard with generators of its own, and all of them added in one order."""
        count = self.batches.accumulation
        of_all = count * self.workers.world_size
        self._shard_rng = []
        for number in range(count):
            batch = self._next_batch(stream, digests)
            seed_shard(self.seed, self.batches.shard(number), self.updates)
            if number == 0:
                self._look_twice(batch)
            with sums.last() if number == count - 1 else nullcontext():
                loss = self._backward(batch, of_all, ledger)
            losses.append(loss)
            sums.take(loss)
            if self.digests:
                self._shard_rng.append(bytes.fromhex(rng_digest()))
        return sums.finish()

    def _next_batch(self, stream: Iterator[Batch], digests: list[bytes]) -> Batch:
        batch = next(stream)
        if self.digests:
            digests.append(bytes.fromhex(batch_digest(batch)))
        return self._moved(batch)

    def _moved(self, batch: Batch) -> Batch:
        return on_device(batch, self.workers.device) if self._move else batch

    def micro_steps(self, update: int, ledger: Ledger) -> Iterator[Callable[[], Tensor]]:
        """The passes of this rank in the update after ``update`` others, to be made again in this order.

        Nothing is reduced by them, except by FSDP2's own.
        """
        count = self.batches.accumulation
        of_all = count if self.sums is None else count * self.workers.world_size
        for number in range(count):
            batch = self._moved(self.batches.numbered(update * count + number))
            if self.sums is not None:
                seed_shard(self.seed, self.batches.shard(number), update)
            yield partial(self._backward, batch, of_all, ledger)

    def _look_twice(self, batch: Batch) -> None:
        """Before the first micro-batch of an update is used: execute it twice, when it is time to.

        The run's own pass cannot be one of the two where it reduces gradients or adds them to others.
        """
        if self.doubling is None:
            return

        def execute() -> Tensor:
            with self.autocast():
                loss = self.task.loss(self.wrapped, batch)
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            return loss.detach()

        self.doubling.look(self.updates + 1, execute)

    def look_again(self, step: int, ledger: Ledger) -> None:
        """After update ``step``, in which some rank compiled something: look as after a start."""
        ledger.look_again(step)
        if self.doubling is not None:
            self.doubling.look_again(step)

    def _backward(self, batch: Batch, count: int, ledger: Ledger) -> Tensor:
        if self.precision.autocast is None:
            loss = self.task.loss(self.wrapped, batch)
        else:
            with self.autocast():
                loss = self.task.loss(self.wrapped, batch)
        ledger.walk(loss)
        share = loss if count == 1 else loss / count
        (share if self._scaler is None else self._scaler.scale(share)).backward()
        return loss.detach()

    def clip_gradients(self) -> Tensor | None:
        """The global 2-norm of the unscaled gradients, a scalar; clips when the config says so."""
        if not self.wants_norm:
            return None
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        if self.sums is not None:
            from harness.training.elastic import tree_norm

            named = zip(self._names, self._parameters, strict=True)
            norm = tree_norm.gradient_norm({name: p.grad for name, p in named if p.grad is not None})
        else:
            norm = optimizer.gradient_norm(self._gradients())
        if self.clip is not None:
            optimizer.scale(self._gradients(), optimizer.clip_factor(norm, self.clip))
        return norm

    def gradient_sums(self, step: int) -> Sums | None:
        """What the optimizer is about to get, for its digest; None when that is not due."""
        return self._step_digests.gradients() if is_due(step, self.gradients_every) else None

    def _gradients(self) -> list[Tensor]:
        return [each.grad for each in self._parameters if each.grad is not None]

    @property
    def digest_ns(self) -> int:
        """What the digests of gradients and state have cost so far."""
        return self._step_digests.spent_ns

    def state_sums(self, step: int, saving: bool) -> Sums | None:
        """The state after the update, for its digest; None when not due and no checkpoint is ``saving``."""
        due = self.digests and (saving or is_due(step, self.state_every))
        return self._step_digests.state() if due else None

    def update(self, rate: float) -> None:
        """One optimizer step at learning rate ``rate``."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.updates += 1


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 for never, happens at ``step``."""
    return every > 0 and step % every == 0
