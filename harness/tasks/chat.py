"""The language task on chats: only what the template marks counts in the loss.

It is what `language` becomes when its corpus was prepared with a chat template.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from harness.data.rows import Rows
from harness.data.tokens import Counted, TokenData
from harness.errors import ConfigError
from harness.format.layout import CHAT_TEMPLATE
from harness.settings import Data, Model
from harness.tasks.language import Decoder, perplexity
from harness.tasks.task import Batch, Batches, spread


class Chat(Decoder):
    """A sample is a row of chats (`harness.data.rows`).

    A batch is ``(tokens, counts)``, int64 (batch, length + 1) and bool (batch, length): which predicted
    tokens count; a held-out one also has the bytes of text that these stand for, int64 (batch,).
    """

    def __init__(self, *, model: Model, data: Data, tokens: TokenData, counted: Counted) -> None:
        """``tokens``: the corpus; ``counted``: which of them count in the loss."""
        super().__init__(model=model, data=data, tokens=tokens)
        self._counted = counted
        self._train = Rows(tokens.train, counted, counted.train, data.sequence_length)
        self._held_out = Rows(tokens.held_out, counted, counted.held_out, data.sequence_length)
        if not self._train.count:
            raise ConfigError("the corpus has no chat to train on")
        self.samples, self.held_out_samples = self._train.count, self._held_out.count
        self.headline = "token_accuracy"

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> Batch:
        """The rows ``indices``; every epoch sees them alike."""
        return _batch(self._train, indices)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Nats per counted token, a mean over each row, then over the rows: rows weigh alike, so neither the
        size of a micro-batch nor the number of ranks changes what is minimised."""
        tokens, counts = batch
        nats = _nats(model(tokens[:, :-1]), tokens) * counts
        return (nats.sum(dim=1) / counts.sum(dim=1)).mean()

    def evaluation(self, size: int, limit: int) -> Sequence[Batch]:
        """Held-out rows, evenly spread."""
        groups = spread(self._held_out.count, size, limit)
        return Batches(len(groups), lambda number: self._held_out_batch(groups[number]))

    def _held_out_batch(self, indices: NDArray[np.int64]) -> Batch:
        sizes = np.zeros(len(indices), dtype=np.int64)
        if self._tokens.held_out_bytes is not None:
            sizes = self._held_out.sizes(self._tokens.held_out_bytes, indices)
        return *_batch(self._held_out, indices), torch.from_numpy(sizes)

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums over counted tokens of nats, tokens, bytes of their text and right guesses."""
        tokens, counts, sizes = batch
        logits = model(tokens[:, :-1])
        nats = (_nats(logits, tokens) * counts).double().sum()
        right = ((logits.argmax(dim=-1) == tokens[:, 1:]) & counts).double().sum()
        return torch.stack((nats, counts.double().sum(), sizes.sum().double(), right))

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """``token_accuracy`` (the likeliest token given all before it is the right one), ``loss`` in nats,
        its ``perplexity``, and ``bits_per_byte`` of answers: all over counted tokens, ends included."""
        nats, counted, size, right = sums.tolist()
        loss = nats / counted
        metrics = {"token_accuracy": right / counted, "loss": loss, "perplexity": perplexity(loss)}
        if self._tokens.held_out_bytes is not None and size:
            metrics["bits_per_byte"] = nats / math.log(2) / size
        return metrics

    def files(self) -> dict[str, bytes]:
        """What a decoder has, and the template."""
        return {**super().files(), CHAT_TEMPLATE: self._counted.template}


def _batch(rows: Rows, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    tokens, counts = rows.gather(indices)
    return torch.from_numpy(tokens), torch.from_numpy(np.ascontiguousarray(counts[:, 1:]))


def _nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy (batch, length) in fp32 of each token given those before it."""
    nats = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].reshape(-1), reduction="none")
    return nats.view(tokens.shape[0], -1)
