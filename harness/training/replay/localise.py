"""Which operator of an update does not repeat its own bits: its micro-batches, each executed twice.

Every rank calls alike, and looks at its own micro-batches; what it finds is told with its rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from harness.determinism.double import Difference, Double
from harness.tasks.task import Batch
from harness.training.evaluation.held_out import on_device
from harness.training.step.session import Session

MOST = 4
"""Micro-batches that are looked at."""


def located(current: Session, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """What differed in a double execution: ``op``, ``module``, ``site``, ``ulp``, ``source`` and ``rank``.

    Empty when nothing did, or when the model may not be executed in a sandbox (gradient hooks of a user, or
    those of an elastic run).
    """
    workers = current.workers

    def agree(mine: bool) -> bool:
        return any(map(bool, map(int, workers.gather_bytes(b"%d" % mine))))

    double = Double(
        current.model, current.wrapped, current.task.generators(), holders=(current.task,), agree=agree
    )
    found: list[Difference] = []
    for batch in batches[:MOST]:
        if agree(bool(found)):
            break
        found += double.check(partial(_pass, current, batch), fine=True).differences
    mine = [
        {"op": each.op, "module": each.module, "site": each.call_site, "ulp": each.ulp, "source": each.source}
        for each in found
    ]
    told = [json.loads(each) for each in workers.gather_bytes(json.dumps(mine).encode())]
    return [{**each, "rank": rank} for rank, lines in enumerate(told) for each in lines]


def _pass(current: Session, batch: Batch) -> Tensor:
    """Forward and backward of one micro-batch."""
    with current.autocast():
        loss = current.task.loss(current.wrapped, on_device(batch, current.workers.device))
    loss.backward()
    return loss.detach()
