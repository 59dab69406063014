"""Loader processes must make the micro-batches that the run itself would make.

A rank of another world size has other ones, so a batch that depends on its process makes another run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from harness.data.loader import MicroBatches
from harness.determinism.digest import batch_digest
from harness.errors import TrainingFailed
from harness.tasks.task import Batch


def same_as_here(batches: MicroBatches, stream: Iterator[Batch], updates: int) -> Iterator[Batch]:
    """The micro-batches of ``stream``, which loader processes make for the updates after so many.

    Those of the first update are compared with what this process makes of ``batches``; raises
    `TrainingFailed` for another one.
    """
    count = batches.accumulation
    first = list(itertools.islice(stream, count))
    for number, batch in enumerate(first, start=updates * count):
        if batch_digest(batch) != batch_digest(batches.numbered(number)):
            raise TrainingFailed(
                f"a loader process makes other micro-batches of update {updates + 1} than the run itself",
                where="determinism.elastic",
                remedy="make `batch` a function of its arguments: draw from generators that are seeded by "
                "them, not by the process",
            )
    return itertools.chain(first, stream)
