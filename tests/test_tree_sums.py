"""The sums of logical shards: what is sent while the backward pass still runs, and in which order."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.errors import TrainingFailed
from harness.training.elastic import tree_sums
from harness.training.elastic.sharded_sums import Order
from harness.training.elastic.tree_sums import ShardSums
from harness.workers import Workers

RANKS, SHARDS = 2, 4
ALONE = Workers.alone(torch.device("cpu"))


def test_each_bucket_is_sent_while_the_backward_pass_of_the_last_shard_still_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the order of events on one of two ranks, whose peer has the same gradients. When the last
    shard's gradient has come down to the first layer, both layers above have been sent, and before the last
    shard nothing was. The sum of the ranks: twice torch's own of these shards."""
    events: list[str] = []

    def all_to_all(pieces: Tensor, rows: Tensor, async_op: bool) -> Any:
        events.append("sent")
        assert async_op
        pieces.copy_(rows[0])  # of both ranks
        return done

    def all_gather(whole: Tensor, own: Tensor, async_op: bool = False) -> Any:
        events.append("gathered")
        parts = whole.view(RANKS, -1)
        parts[0] = own
        parts[1] *= 2  # what this rank has sent of the peer's piece, and the peer's own
        return done if async_op else None

    class Done:
        def wait(self) -> None:
            """Nothing is on its way."""

    done = Done()
    monkeypatch.setattr(tree_sums.dist, "all_to_all_single", all_to_all)
    monkeypatch.setattr(tree_sums, "all_gather", all_gather)
    monkeypatch.setattr(tree_sums, "BUCKET_BYTES", 300)  # one layer
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
    batches = [torch.randn(2, 8) for _ in range(SHARDS // RANKS)]
    sums = ShardSums(
        replace(Workers.alone(torch.device("cpu")), world_size=RANKS),
        list(layers.named_parameters()),
        len(batches),
    )

    def loss_of(batch: Tensor) -> Tensor:
        first = layers[0](batch)
        first.register_hook(lambda _: events.append("at the first layer"))
        return layers[2](layers[1](first).relu()).square().mean()  # type: ignore[no-any-return]

    loss = loss_of(batches[0])
    loss.backward()
    sums.take(loss.detach())
    assert events == ["at the first layer"]
    loss = loss_of(batches[1])
    with sums.last():
        loss.backward()
    sums.take(loss.detach())
    assert events[1:] == ["sent", "sent", "at the first layer", "sent"]
    sums.finish()
    assert events[5:] == ["gathered"] * 4  # three buckets, and the losses
    found = [each.grad for each in layers.parameters()]
    expected = torch.autograd.grad(sum(map(loss_of, batches)), list(layers.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, 2 * other)


def learned(*passed: tuple[str, str, int]) -> Order:
    """An order of this process alone."""
    order = Order(ALONE)
    order.learn(True)
    for each in passed:
        order.require(*each)
    order.learn(False)
    return order


def test_a_rank_that_would_send_something_else_is_stopped_before_it_does() -> None:
    """Oracle: the order that was learned, in every pass after it; the unit that did not come is named."""
    order = learned(("back", "head", 8), ("back", "block", 16))
    for unit, elements in 2 * (("head", 8), ("block", 16)):
        order.require("back", unit, elements)
    with pytest.raises(TrainingFailed, match="a parameter of `head` gets no gradient from a micro-batch"):
        order.require("back", "block", 16)
    with pytest.raises(TrainingFailed, match="a parameter of `block` gets no gradient from a micro-batch"):
        order.require("back", "block", 12)


def test_a_unit_that_only_some_micro_batches_use_is_named_whether_it_is_missing_or_comes() -> None:
    """Oracle: one block skipped where it came in the pass that was learned, and one that had not come."""
    for learnt, comes in ((("one", "rare", "last"), ("one", "last")), (("one", "last"), ("one", "rare"))):
        order = learned(*(("forward", each, 0) for each in learnt))
        order.require("forward", comes[0])
        with pytest.raises(TrainingFailed, match="`rare` is left out by some micro-batches and used by"):
            order.require("forward", comes[1])
    one = learned(("forward", "rare", 0), ("back", "rare", 8))
    with pytest.raises(TrainingFailed, match="`rare` is left out by some micro-batches and used by"):
        one.require("back", "root", 8)


@pytest.mark.parametrize(
    ("here", "there", "says"),
    [
        (("forward", "block"), ("forward", "last"), "to `block` on the way forward, rank 1 to `last` on"),
        (("forward", ""), ("forward", "last"), "to the end of the way forward, rank 1 to `last` on"),
        (("back", "block", 8), ("back", "block", 6), "to `block` on the way back with 8 elements, rank"),
    ],
)
def test_ranks_that_make_other_passes_are_told_apart_before_they_wait_for_each_other(
    here: tuple[Any, ...], there: tuple[Any, ...], says: str
) -> None:
    """Oracle: what the other rank says that it comes to."""

    class Pair(Workers):
        def gather_bytes(self, data: bytes) -> list[bytes]:
            """The other rank's passes, and then its agreement that they differ."""
            return [data, json.dumps([*there, 0][:3]).encode() if data.startswith(b"[") else data]

    order = Order(Pair(0, 2, torch.device("cpu"), "none", None, 1))
    order.learn(True)
    with pytest.raises(TrainingFailed, match=f"rank 0 comes {says}"):
        order.require(*here) if here[1] else order.meet(here[0])
