"""The order of samples: a pure function of the seed and the position, with no state and no memory.

Every position of the endless stream of samples belongs to epoch ``position // samples``, and each epoch is
a permutation of all samples. The permutation is a Feistel network over Z_a x Z_b (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002) with a x b just above the number of samples; places that
fall outside are walked on until they fall inside, which keeps it a permutation. Reaching any position
costs the same, so a resume does not replay anything::

    >>> order = Order(samples=5, seed=7)
    >>> epochs, indices = order.places(start=0, count=10)
    >>> sorted(indices[:5].tolist()), epochs.tolist()
    ([0, 1, 2, 3, 4], [0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]
_Words = NDArray[np.uint64]

# Even, so that a place ends in the radix it started in; eight rounds of a 64-bit mixer leave no pattern that
# tests of adjacent places see.
_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Order:
    """The order of ``samples`` samples under ``seed``.

    Raises `ValueError` when there are no samples.
    """

    def __init__(self, samples: int, seed: int) -> None:
        if samples < 1:
            raise ValueError(f"an order needs at least one sample, not {samples}")
        self.samples = samples
        self.seed = seed
        self._left = np.uint64(math.isqrt(samples - 1) + 1)
        self._right = np.uint64(-(-samples // int(self._left)))
        digest = hashlib.sha256(f"harness order/1\0{seed}".encode()).digest()
        self._key = np.frombuffer(digest[:8], dtype="<u8").astype(np.uint64)

    def places(self, start: int, count: int) -> tuple[Places, Places]:
        """Epochs and sample indices (int64, ``count`` each) of the positions from ``start`` on."""
        return self.at(np.arange(start, start + count, dtype=np.int64))

    def at(self, positions: Places) -> tuple[Places, Places]:
        """Epochs and sample indices (int64) of any ``positions`` (int64, 0 or more)."""
        epochs, within = np.divmod(positions, np.int64(self.samples))
        keys = _mix(self._key + epochs.astype(np.uint64) * _GOLDEN)
        places = self._permute(within.astype(np.uint64), keys)
        outside = np.flatnonzero(places >= np.uint64(self.samples))
        while outside.size:
            places[outside] = self._permute(places[outside], keys[outside])
            outside = outside[places[outside] >= np.uint64(self.samples)]
        return epochs, places.astype(np.int64)

    def _permute(self, places: _Words, keys: _Words) -> _Words:
        """One pass of the network: a permutation of [0, left x right) for each key."""
        left, right = np.divmod(places, self._right)
        for number in range(_ROUNDS):
            size = self._right if number % 2 else self._left
            noise = _mix(right ^ _mix(keys + np.uint64(number)))
            left, right = right, (left + noise % size) % size
        return left * self._right + right


def _mix(words: _Words) -> _Words:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014), wrapping in 64 bits."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
