"""Where the generators of a process begin: for a model's first weights, for the updates of a rank or of a
logical shard of an elastic run, and for a batch of an evaluation."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Seed python, numpy and torch of this process from (seed, rank, step)."""
    _seed(f"{seed}/{rank}/{step}")


def _seed(text: str) -> None:
    digest = hashlib.sha256(text.encode()).digest()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "little"))
    torch.manual_seed(int.from_bytes(digest[4:12], "little") >> 1)


def seed_shard(seed: int, shard: int, update: int) -> None:
    """Seed python, numpy and torch of this process for logical shard ``shard`` of an update, both from 0."""
    _seed(f"{seed}/shard/{shard}/{update}")


def seed_evaluation(batch: int) -> None:
    """Seed python, numpy and torch of this process for held-out batch ``batch`` of an evaluation, from 0."""
    _seed(f"evaluation/{batch}")


def seed_weights(seed: int) -> None:
    """Seed python, numpy and torch of this process for the weights that a run begins with, on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
