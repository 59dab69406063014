"""Where two chains of step digests part: by bisection, since equal heads mean that all before is equal.

>>> mine, other = ["a", "b", "c", "d"], ["a", "b", "x", "y"]
>>> first_difference(4, lambda at: mine[at] == other[at])
(2, 3)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.audit.replay.segment import Step
from harness.format import chain

PARTS = {
    "batch": "the samples of the update",
    "rng": "the random number generators",
    "loss": "the forward pass",
    "grad_norm": "the backward pass or the reduction of gradients",
    "gradients": "the backward pass or the reduction of gradients",
    "state": "the optimizer",
}
"""Fact of a line → what made it, in the order of a step."""


@dataclass(frozen=True)
class Divergence:
    """The first step whose facts are not the recorded ones."""

    step: int
    parts: tuple[str, ...]
    """Names of the facts that differ, in the order of a step."""
    queries: int
    """Comparisons of heads that finding it took."""

    @property
    def what(self) -> str:
        """What in that step differs first."""
        return f"{self.parts[0]}: {PARTS[self.parts[0]]}" if self.parts else "chain: a step before"


def first_difference(count: int, equal: Callable[[int], bool]) -> tuple[int | None, int]:
    """The first of ``count`` positions where ``equal`` is false, given that it stays false from there on.

    None when there is none. Returns the number of calls, too: at most log2(count) + 2, one when all is equal.
    """
    if not count or equal(count - 1):
        return None, min(count, 1)
    place, queries = bisected(count - 1, equal)
    return count - 1 if place is None else place, queries + 1


def bisected(count: int, equal: Callable[[int], bool]) -> tuple[int | None, int]:
    """The same, for positions of which nothing is expected: at most log2(count + 1) calls, rounded up.

    >>> bisected(1000, lambda at: at < 136)
    (136, 10)
    """
    low, high, queries = 0, count, 0
    while low < high:
        middle = (low + high) // 2
        queries += 1
        low, high = (middle + 1, high) if equal(middle) else (low, middle)
    return None if low == count else low, queries


def heads_of(start: bytes, steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The chain after each of ``steps`` (facts as in metrics.jsonl), from the head ``start`` on; hex."""
    heads, head = [], start
    for facts in steps:
        taken = {name: bytes.fromhex(facts[name]) for name in ("gradients", "state") if facts.get(name)}
        head = chain.advance(
            head,
            step=facts["step"],
            batch=bytes.fromhex(facts["batch"]),
            rng=bytes.fromhex(facts["rng"]),
            loss=facts["loss"],
            grad_norm=facts["grad_norm"] or 0.0,
            **taken,
        )
        heads.append(head.hex())
    return heads


def between(one: Mapping[int, Step], other: Mapping[int, Step]) -> tuple[Divergence | None, int]:
    """Where the records of two runs part, and the comparisons of heads that it took.

    Steps are looked at as far as both have them.
    """
    numbers = sorted(one.keys() & other.keys())
    place, queries = bisected(len(numbers), lambda at: one[numbers[at]].head == other[numbers[at]].head)
    if place is None:
        return None, queries
    lines = one[numbers[place]].facts, other[numbers[place]].facts
    parts = tuple(name for name in PARTS if lines[0].get(name) != lines[1].get(name))
    return Divergence(numbers[place], parts, queries), queries


def compare(
    recorded: Sequence[Step], replayed: Sequence[Mapping[str, Any]], start: bytes
) -> Divergence | None:
    """The first difference between the recorded steps and those executed again; None when there is none."""
    heads = heads_of(start, replayed)
    count = min(len(heads), len(recorded))
    place, queries = first_difference(count, lambda at: recorded[at].head == heads[at])
    if place is None:
        return None
    facts = recorded[place].facts
    parts = tuple(name for name in PARTS if facts.get(name) != replayed[place].get(name))
    return Divergence(recorded[place].number, parts, queries)
