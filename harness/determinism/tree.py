"""Sums in one fixed binary tree, the same bits however many processes share the work.

The leaves are the K logical shards of an update in their order, K a power of two; the tree adds neighbours:
``((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))``. A process that holds K / W neighbouring leaves, W a power of
two, holds a whole subtree, so who adds which part does not show in the result. Floating-point addition is
commutative but not associative: only the shape of the tree matters, not which of two operands comes first.

EasyScale (SC '23, arXiv 2208.14228) keeps the bits over changes of the world size by fixing the order of its
virtual workers; the tree does so with logarithmic memory, and needs no particular all-reduce.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_power_of_two(number: int) -> bool:
    """Whether ``number`` is 1, 2, 4, 8 …"""
    return number > 0 and number & (number - 1) == 0


def summed(leaves: Tensor) -> Tensor:
    """The sum of ``leaves`` along their first dimension, whose length is a power of two. ``leaves`` is kept.

    Raises `ValueError` for another length.
    """
    return folded(leaves.clone())


def folded(leaves: Tensor) -> Tensor:
    """`summed` in the memory of ``leaves``, which are lost: the sum is their first.

    Raises `ValueError` as `summed`.
    """
    if not is_power_of_two(len(leaves)):
        raise ValueError(f"a tree of {len(leaves)} leaves, which is no power of two")
    while len(leaves) > 1:
        leaves[0::2].add_(leaves[1::2])
        leaves = leaves[0::2]
    return leaves[0]


class Counter:
    """Adds lists of tensors, one leaf after the other, in the tree's order, as a binary counter carries.

    At most log2(leaves) + 1 lists are held at a time, the one that is being added included.
    """

    def __init__(self) -> None:
        self._levels: list[list[Tensor] | None] = []

    def add(self, leaf: list[Tensor]) -> None:
        """Take the next ``leaf``; its tensors belong to the counter from now on."""
        level = 0
        for level, held in enumerate(self._levels):
            if held is None:
                break
            torch._foreach_add_(held, leaf)
            leaf, self._levels[level] = held, None
        else:
            level = len(self._levels)
            self._levels.append(None)
        self._levels[level] = leaf

    def carried(self, position: int, tensor: Tensor) -> Tensor:
        """The sum over all leaves of the tensor at ``position``, ``tensor`` being that of the last leaf.

        For the last leaf, whose tensors come one by one, each position once; `clear` when all have come.
        Nothing of that position is held any more.
        """
        for held in self._levels:
            if held is not None:
                tensor = held[position].add_(tensor)
                held[position] = tensor.new_empty(0)
        return tensor

    def clear(self) -> None:
        """Begin again."""
        self._levels = []


def held_lists(leaves: int) -> int:
    """How many lists a `Counter` of so many ``leaves`` holds at most, the gradients themselves included."""
    return max(1, leaves).bit_length()
