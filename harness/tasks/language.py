"""The language task: predict the next token of documents; evaluated in bits per byte of held-out text."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from harness.data.tokens import TokenData, Windows
from harness.errors import ConfigError
from harness.model.gpt import GPT, Shape
from harness.settings import Data, Model
from harness.tasks.task import Batch, Batches, Identity, Task, spread


class Decoder(Task):
    """What tasks share whose model is our decoder and whose samples are `TokenData`."""

    unit = "token"
    held_out_samples: int
    """Number of held-out samples."""

    def __init__(self, *, model: Model, data: Data, tokens: TokenData) -> None:
        """``tokens``: the corpus that ``data`` names."""
        self._data = data
        self._tokens = tokens
        self._shape = shape_of(model, data.sequence_length, tokens.vocabulary)
        self.units_per_sample = data.sequence_length

    def identity(self) -> Identity:
        """The corpus' files, the tokenizer, the template of chats, and counts of documents, bytes, tokens and
        samples."""
        counted = self._tokens.counted
        template = {} if counted is None else {"template": counted.template_sha256}
        return Identity(
            kind=self._data.kind,
            digests={"corpus": self._tokens.corpus, "tokenizer": self._tokens.tokenizer, **template},
            counts={
                **self._tokens.counts,
                "samples": self.samples,
                "held_out_samples": self.held_out_samples,
            },
            files=self._tokens.files,
        )

    def require_unchanged(self) -> None:
        """The corpus' files are held open since they were digested."""
        self._tokens.require_unchanged()

    def build_model(self) -> nn.Module:
        """A new decoder."""
        return GPT(self._shape)

    def flops_per_sample(self) -> int:
        """Operations of forward and backward for one sample; see `GPT.flops_per_token`."""
        with torch.device("meta"):
            model = GPT(self._shape)
        return model.flops_per_token(self.units_per_sample) * self.units_per_sample

    def files(self) -> dict[str, bytes]:
        """config.json, and tokenizer.json when the tokenizer has a file."""
        config = json.dumps(self._shape.config(), indent=2, sort_keys=True) + "\n"
        files = {"config.json": config.encode()}
        if self._tokens.tokenizer_file is not None:
            files["tokenizer.json"] = self._tokens.tokenizer_file
        return files


class Language(Decoder):
    """A sample is ``data.sequence_length`` + 1 neighbouring tokens; documents follow each other.

    A training batch is ``(tokens,)``, int64 (batch, length + 1); a held-out one also has the bytes of text
    that the predicted tokens stand for, int64 (batch,), 0 when unknown.
    """

    def __init__(self, *, model: Model, data: Data, tokens: TokenData) -> None:
        """``tokens``: the corpus. Every seed has the same samples, only their order is another."""
        super().__init__(model=model, data=data, tokens=tokens)
        self._train = Windows(tokens.train, data.sequence_length)
        self._held_out = Windows(tokens.held_out, data.sequence_length)
        sizes = tokens.held_out_bytes
        self._held_out_bytes = None if sizes is None else Windows(sizes, data.sequence_length)
        self.samples, self.held_out_samples = self._train.count, self._held_out.count
        self.headline = "loss" if self._held_out_bytes is None else "bits_per_byte"
        self._check_lengths()

    def _check_lengths(self) -> None:
        for name, windows, arrays in (
            ("training", self._train, self._tokens.train),
            ("held-out", self._held_out, self._tokens.held_out),
        ):
            # A held-out array of one token is an end of document alone: nothing was to be held out.
            longest = max(map(len, arrays), default=1)
            if not windows.count and (name == "training" or longest > 1):
                raise ConfigError(
                    f"the {name} documents have {longest} tokens, "
                    f"fewer than a sample of {windows.length} + 1",
                    remedy="lower data.sequence_length or add documents",
                )

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> Batch:
        """The windows ``indices``; every epoch sees them alike."""
        return (torch.from_numpy(self._train.gather(indices)),)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean nats per token."""
        return _nats(model, batch[0], "mean")

    def evaluation(self, size: int, limit: int) -> Sequence[Batch]:
        """Held-out windows, evenly spread over the held-out documents."""
        groups = spread(self._held_out.count, size, limit)
        return Batches(len(groups), lambda number: self._held_out_batch(groups[number]))

    def _held_out_batch(self, indices: NDArray[np.int64]) -> Batch:
        sizes = np.zeros(len(indices), dtype=np.int64)
        if self._held_out_bytes is not None:
            # The first token of a window is given, not predicted.
            sizes = self._held_out_bytes.gather(indices)[:, 1:].sum(axis=1)
        return torch.from_numpy(self._held_out.gather(indices)), torch.from_numpy(sizes)

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums of nats, predicted tokens and bytes of their text."""
        tokens, sizes = batch
        nats = _nats(model, tokens, "none").double().sum()
        predicted = torch.tensor(tokens[:, 1:].numel(), dtype=torch.float64, device=tokens.device)
        return torch.stack((nats, predicted, sizes.sum().double()))

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """``loss`` in nats per token, its ``perplexity``, and ``bits_per_byte`` where the bytes are known.

        Bits per byte counts the bits of all predicted tokens, ends of documents included.
        """
        nats, predicted, size = sums.tolist()
        metrics = {"loss": nats / predicted, "perplexity": perplexity(nats / predicted)}
        if self._held_out_bytes is not None:
            metrics["bits_per_byte"] = nats / math.log(2) / size
        return metrics


def perplexity(loss: float) -> float:
    """Of a ``loss`` in nats per token: its exponential; infinite where no float is as large."""
    return math.inf if loss > math.log(sys.float_info.max) else math.exp(loss)


def shape_of(model: Model, context: int, vocabulary: int) -> Shape:
    """The decoder that ``model`` describes, for sequences of ``context`` tokens."""
    return Shape(
        vocabulary=vocabulary,
        context=context,
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        kv_heads=model.kv_heads or model.heads,
        mlp=model.mlp,
        dropout=model.dropout,
        tie_embeddings=model.tie_embeddings,
        rope_base=model.rope_base,
    )


def _nats(model: nn.Module, tokens: Tensor, reduction: str) -> Tensor:
    """Cross entropy in fp32 of each token of ``tokens`` (batch, length + 1) given those before it."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].reshape(-1), reduction=reduction)
