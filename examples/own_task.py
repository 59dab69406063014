"""A task of one's own: tell two spirals apart. Run it with `harness train examples/own_task.yaml`."""

import hashlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from harness.tasks.task import Batches, Identity, Task, spread


class Spirals(Task):
    samples, unit, units_per_sample, headline = 4096, "point", 1, "accuracy"
    held_out = 1024

    def __init__(self, *, seed: int, width: int = 64, noise: float = 0.02) -> None:
        self.seed, self.width, self.noise = seed, width, noise

    def identity(self) -> Identity:
        # Nothing is read from disk; with the code, whose digest every checkpoint has, this says it all.
        corpus = hashlib.sha256(f"spirals {self.seed} {self.noise}".encode()).hexdigest()
        return Identity("spirals", {"corpus": corpus, "tokenizer": None}, {"samples": self.samples}, {})

    def build_model(self) -> nn.Module:
        width = self.width
        return nn.Sequential(
            nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def points(self, indices, split):
        # Each point from its own generator: the same whoever asks for it, and whenever.
        rows = np.stack([np.random.default_rng((self.seed, split, i)).normal(size=3) for i in indices])
        labels = indices % 2
        turn = 3 * np.pi * np.sqrt(1 / (1 + np.exp(-2 * rows[:, 0])))
        angle = turn + np.pi * labels
        xy = turn[:, None] / 10 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + self.noise * rows[:, 1:]
        return torch.from_numpy(xy.astype(np.float32)), torch.from_numpy(labels)

    def batch(self, indices, epochs):
        return self.points(indices, split=0)

    def loss(self, model, batch):
        points, labels = batch
        return F.cross_entropy(model(points).float(), labels)

    def evaluation(self, size, limit):
        groups = spread(self.held_out, size, limit)
        return Batches(len(groups), lambda number: self.points(groups[number], split=1))

    def evaluate(self, model, batch):
        points, labels = batch
        right = (model(points).argmax(dim=1) == labels).double()
        return torch.stack((right.sum(), torch.ones_like(right).sum()))

    def metrics(self, sums):
        return {"accuracy": (sums[0] / sums[1]).item()}
