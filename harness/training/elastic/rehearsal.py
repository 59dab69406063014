"""What would break the bits of an elastic run, looked for before its first step, on every rank alike.

While the task is made, the model is built and the first shards are computed:

- code that asks for its rank or world size, and collectives other than FSDP2's (`harness.determinism.peers`)

Before the first step:

- ranks that begin with other weights or buffers; generators of the task's own; sparse gradients, batch
  statistics of all ranks, weights that are not contiguous (`unfit`)
- shards 0, 1 and 0 again, evaluations between them: gradients of shard 0 that differ between the two, or
  between the ranks; weights, buffers, attributes and global variables of a person's own code that carry
  something from one to the next; a parameter without a gradient; a loss that is no scalar
- with loader processes, micro-batches of the first update that are not those of this process

All of it is refused. It is executed in a sandbox and leaves no trace. The digest of the gradients of shards 0
and 1 is signed: the next launch, which may have another world size, must get the same. What shows later, such
as a rank that is looked at when a rare sample comes, is not seen here; step digests and a replay find that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from harness.checkpoint import mesh
from harness.checkpoint.state import model_tensors
from harness.determinism import peers
from harness.determinism.bit_sums import Piece, Plan
from harness.determinism.peers import Peers
from harness.determinism.sandbox import Sandbox, Snapshot
from harness.errors import ConfigError, HarnessError, TrainingFailed
from harness.tasks.task import Batch, Task
from harness.training.elastic import unfit
from harness.training.elastic.tree_sums import ShardSums, without_gradient
from harness.training.evaluation.held_out import evaluating, on_device
from harness.training.optimizer import local
from harness.training.seeding import seed_evaluation, seed_shard
from harness.words import listed
from harness.workers import Workers

if TYPE_CHECKING:
    from harness.training.elastic.sharded_sums import ShardedSums
    from harness.training.step.session import Session

_WHERE = "determinism.elastic"
_TURN_OFF = "or set determinism.elastic=false"
_LOOK_FOR = "look for code that reads its rank, and for processors or GPUs of another kind"
_NAMED = 3


def make_task(make: Callable[[], Task]) -> Task:
    """The task that ``make`` returns. Raises `TrainingFailed` when making it asks for the other ranks,
    `ConfigError` when it has generators of its own."""
    with Peers() as seen:
        task = make()
    _refuse_peers(seen, task, "is made")
    generators = list(task.generators())
    if generators:
        raise ConfigError(
            f"the task has generators of its own ({', '.join(generators)}), which follow a rank, not a shard",
            where=_WHERE,
            remedy="draw from the global ones of python, numpy or torch, which are seeded for each shard",
        )
    return task


def build_model(task: Task, workers: Workers) -> nn.Module:
    """The task's model. Raises `TrainingFailed` on every rank when one builds another than rank 0, or when
    building it asks for the other ranks. Collective."""
    model = workers.together(lambda: _built(task))
    tensors, _ = model_tensors(model)
    plan = Plan({name: each.detach() for name, each in tensors.items()}, 0)
    every = workers.gather_bytes(plan.sums().cpu().numpy().tobytes())
    for rank, data in enumerate(every):
        if data != every[0]:
            sums = (np.frombuffer(each, dtype=np.int64) for each in (every[0], data))
            first = next(name for name, one, other in zip(plan.names, *sums, strict=True) if one != other)
            raise TrainingFailed(
                f"rank {rank} builds another model than rank 0: `{first}` differs",
                where=_WHERE,
                remedy="draw first weights from the global generators of python, numpy or torch, which are "
                "seeded alike on every rank",
            )
    return model


def _built(task: Task) -> nn.Module:
    with Peers() as seen:
        model = task.build_model()
    _refuse_peers(seen, task, "builds its model")
    unfit.refuse(model)
    return model


def examine(
    session: Session,
    sums: ShardSums | ShardedSums,
    size: int,
    held_out: Sequence[Batch],
    *,
    compiled: bool,
) -> str:
    """Compute the first shards, of ``size`` samples, as the module says; returns the digest of the gradients
    of shards 0 and 1 at the first weights, hex, the same at every world size. Collective.

    Raises `TrainingFailed` on every rank for what would break the bits.
    """
    rehearsal = _Rehearsal(session, size, held_out)
    with Sandbox(session.model, session.wrapped, session.task.generators(), (session.task,)):
        # The ranks pass together, so what is wrong on one is told when all have.
        plan, zero, one = rehearsal.passes(sums, compiled)
        odd = sums.differing(plan.names, zero)
    session.workers.together(rehearsal.refuse)
    if odd is not None:
        raise TrainingFailed(
            f"from the same samples and generators rank {odd.rank} gets other gradients than rank 0, "
            f"in {odd.extent}, first `{odd.first}`",
            where=_WHERE,
            remedy=_LOOK_FOR,
        )
    return hashlib.sha256(b"".join(plan.digest(sums.total(each)) for each in (zero, one))).hexdigest()


class _Rehearsal:
    """The passes of one rank, and what was wrong in them."""

    def __init__(self, session: Session, size: int, held_out: Sequence[Batch]) -> None:
        self._session = session
        self._size = size
        self._held_out = [on_device(each, session.workers.device) for each in held_out]
        self._wrong: list[HarnessError] = []

    def refuse(self) -> None:
        """Raise the first thing that was wrong."""
        if self._wrong:
            raise self._wrong[0]

    def passes(self, sums: ShardSums | ShardedSums, compiled: bool) -> tuple[Plan, Tensor, Tensor]:
        """Shards 0, 0, 1, 0, and evaluations before the second and the third; how gradients are summed, and
        the sums over the bits of those that the second pass left, and the third."""
        model, task = self._session.model, self._session.task
        saved = set(model.state_dict())
        buffers = {name: each.clone() for name, each in model.named_buffers() if name in saved}
        # The first one fills caches and is watched. What is compiled is traced where nobody sees it, so here
        # it runs as it is written.
        with _as_written(compiled), Peers() as seen, sums.agreed() as ends:
            self._pass(0, ends)
        self._note(lambda: _refuse_peers(seen, task, "computes a micro-batch"))
        self._evaluate()
        sums.compare()
        plan, first = self._pass(0)
        kept = Snapshot(model, [task, *peers.own_code([task, *model.modules()])])
        weights = self._weights()
        self._evaluate()
        _, second = self._pass(1)
        _, again = self._pass(0)
        self._note_state(buffers, kept)
        now = self._weights()
        changed = [name for name, each in weights.items() if now.get(name) != each]
        if changed:
            self._note_wrong(
                f"the parameter `{changed[0]}` is written to in a micro-batch, and each rank would see only "
                "its own shards",
                f"leave weights to the optimizer (optimizer.ema averages after each update), {_TURN_OFF}",
            )
        if not torch.equal(first, again):
            other = (first != again).nonzero().flatten().tolist()
            self._note_wrong(
                "from the same samples and generators shard 0 gets other gradients when computed again, "
                f"in {len(other)} of {len(plan.names)} tensors, first `{plan.names[other[0]]}`",
                "draw from the global generators of python, numpy and torch in `loss` and from none of them "
                "in `batch`, read no clock; for kernels that vary set determinism.mode=strict",
            )
        return plan, first, second

    def _note_state(self, buffers: Mapping[str, Tensor], kept: Snapshot) -> None:
        """What the passes have left behind: in ``buffers``, saved ones, or in what was ``kept``."""
        now = dict(self._session.model.named_buffers())
        changed = [name for name, each in buffers.items() if not torch.equal(now[name], each)]
        if changed:
            self._note_wrong(
                f"the buffer `{changed[0]}` changes in training, and each rank would see only its own shards",
                f"use a layer without running statistics, or one in evaluation mode, {_TURN_OFF}",
            )
        moved = kept.moved()
        if moved:
            self._note_wrong(
                f"`{listed(moved, _NAMED)}` is not the same after the same micro-batch, and each rank would "
                "see only its own shards",
                f"keep no counters or averages from one micro-batch to the next, {_TURN_OFF}",
            )

    def _weights(self) -> dict[str, tuple[int, int, int]]:
        """Of each parameter: where it lies, how often it was written to, a sum over its bits."""
        held = {name: local(each.detach()) for name, each in self._session.model.named_parameters()}
        plan = Plan(held, 0)
        sums = dict(zip(plan.names, plan.sums().tolist(), strict=True))
        return {name: (each.data_ptr(), each._version, sums[name]) for name, each in held.items()}

    def _evaluate(self) -> None:
        """Evaluate the held-out batch, which must leave nothing that a micro-batch reads."""
        session = self._session
        with evaluating(session.task, session.model), session.autocast():
            for batch in self._held_out:
                seed_evaluation(0)
                session.task.evaluate(session.model, batch)

    def _note(self, check: Callable[[], None]) -> None:
        try:
            check()
        except HarnessError as error:
            self._wrong.append(error)

    def _note_wrong(self, what: str, remedy: str) -> None:
        self._wrong.append(TrainingFailed(what, where=_WHERE, remedy=remedy))

    def _pass(self, shard: int, ends: Callable[[str], None] = lambda _: None) -> tuple[Plan, Tensor]:
        """Forward and backward of ``shard`` as the first update has it; the gradients are taken away.
        ``ends`` is called where each of the two ways does."""
        session = self._session
        batch = self._samples(shard)
        seed_shard(session.seed, shard, 0)
        with unfit.explaining(session.model), session.autocast():
            loss = session.task.loss(session.wrapped, batch)
        if loss.ndim:
            self._note_wrong(
                f"the loss has shape {tuple(loss.shape)}, and must be a scalar", "return its mean or sum"
            )
        ends("forward")
        early = [name for name, each in session.model.named_parameters() if each.grad is not None]
        if early:
            self._note_wrong(
                f"`{early[0]}` has a gradient before the loss is returned, and each sharding would "
                "add it in its own order",
                f"call no backward in `loss`: return the sum of what is to be minimised, {_TURN_OFF}",
            )
        with unfit.explaining(session.model):
            loss.backward()
        ends("back")
        gradients: dict[str, Piece] = {}
        for name, parameter in session.model.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                self._wrong.append(without_gradient(f"`{name}`"))
            elif parameter.grad is not None:
                rows, begin = mesh.local_part(name, parameter.grad)
                gradients[name] = Piece(rows, parameter.numel(), begin, tuple(parameter.shape))
                parameter.grad = None
        plan = Plan(gradients, 0)
        return plan, plan.sums().cpu()

    def _samples(self, shard: int) -> Batch:
        """Samples of the corpus, from the first again where there are fewer, on the device."""
        task = self._session.task
        indices = np.arange(shard * self._size, (shard + 1) * self._size, dtype=np.int64) % task.samples
        batch = task.batch(indices, np.zeros(self._size, dtype=np.int64))
        return on_device(batch, self._session.workers.device)


def _as_written(compiled: bool) -> AbstractContextManager[object]:
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _refuse_peers(seen: Peers, task: Task, when: str) -> None:
    """Raise `TrainingFailed` when ``seen`` has noted anything."""
    asked, sent = seen.asked(peers.home_of(type(task))), seen.sent()
    if asked or sent:
        verb = "asks for its rank or world size" if asked else "talks to the other ranks"
        raise TrainingFailed(
            f"the task {verb} when it {when}: {listed(asked or sent, _NAMED)}",
            where=_WHERE,
            remedy=f"take that out: a shard must not know who computes it, {_TURN_OFF}",
        )
