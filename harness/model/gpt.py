"""A decoder-only transformer: RoPE, RMSNorm, QK norm, SDPA, SwiGLU or ReLU squared, no biases.

With ``mlp: swiglu`` it computes what Qwen3 computes (arXiv 2505.09388), with the three attention projections
in one matrix and the two of the feed-forward in another.

    x = embedding[tokens]
    x = x + dropout(attention(rms_norm(x)));  x = x + dropout(mlp(rms_norm(x)))      for each block
    logits = rms_norm(x) @ output.T           (the embedding when tied)

Initial weights, all from torch's global generator: embeddings N(0, 0.02); a matrix N(0, 1/sqrt(inputs)),
those that write into the residual stream divided by sqrt(2 x layers), so that its variance does not grow
with depth (GPT-2); norms 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_EPSILON = 1e-6
_EMBEDDING_STD = 0.02
# Sizes that tensor cores take in every precision, fp8 included.
_HIDDEN_MULTIPLE = 16


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    vocabulary: int
    """Number of tokens."""
    context: int
    """Longest sequence, in tokens."""
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: Literal["swiglu", "relu2"] = "swiglu"
    dropout: float = 0.0
    tie_embeddings: bool = True
    rope_base: float = 10_000.0

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward: 8/3 (SwiGLU) or 4 (ReLU squared) widths, a multiple of 16."""
        ratio = 8 / 3 if self.mlp == "swiglu" else 4
        return math.ceil(self.width * ratio / _HIDDEN_MULTIPLE) * _HIDDEN_MULTIPLE

    def config(self) -> dict[str, Any]:
        """The sizes under Hugging Face's names, for config.json."""
        return {
            "model_type": "harness-gpt",
            "architectures": ["GPT"],
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.hidden,
            "hidden_act": "silu" if self.mlp == "swiglu" else "relu2",
            "dropout": self.dropout,
            "rms_norm_eps": _EPSILON,
            "rope_theta": self.rope_base,
            "tie_word_embeddings": self.tie_embeddings,
            "dtype": "float32",
        }


class GPT(nn.Module):
    """The decoder of ``shape``. Tensors: ``embedding.weight``, ``blocks.N.…``, ``norm``, ``output``."""

    cosine: Tensor
    sine: Tensor
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    """Classes whose instances are gathered one at a time under FSDP2 (Hugging Face convention)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.width))
        self.output = None if shape.tie_embeddings else nn.Linear(shape.width, shape.vocabulary, bias=False)
        cosine, sine = _angles(shape)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        self._checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        residual = 1 / math.sqrt(2 * self.shape.layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                scale = residual if name.endswith((".attention.out", ".mlp.down")) else 1.0
                nn.init.normal_(module.weight, std=scale / math.sqrt(module.in_features))
        nn.init.normal_(self.embedding.weight, std=_EMBEDDING_STD)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Whether a block's activations are computed again in the backward pass instead of kept."""
        self._checkpointing = enabled

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, time, vocabulary) for int64 ``tokens`` (batch, time), time at most the context."""
        length = tokens.shape[1]
        cosine, sine = self.cosine[:length], self.sine[:length]
        x = self.embedding(tokens)  # (batch, time, width)
        for block in self.blocks:
            if self._checkpointing and self.training:
                x = checkpoint(block, x, cosine, sine, use_reentrant=False, preserve_rng_state=True)
            else:
                x = block(x, cosine, sine)
        x = F.rms_norm(x, (self.shape.width,), self.norm, _EPSILON)
        return F.linear(x, self.embedding.weight) if self.output is None else self.output(x)

    def flops_per_token(self, length: int) -> int:
        """Operations of forward and backward for a token of a sequence of ``length``: 6N + 12 x layers x
        width x length (PaLM, arXiv 2204.02311, appendix B), N the weights that are multiplied."""
        multiplied = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        if self.output is None:
            multiplied += self.embedding.weight.numel()
        return 6 * multiplied + 12 * self.shape.layers * self.shape.width * length


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to the stream after."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._size = (shape.width,)
        self._dropout = shape.dropout
        self.attention_norm = nn.Parameter(torch.ones(shape.width))
        self.attention = Attention(shape)
        self.mlp_norm = nn.Parameter(torch.ones(shape.width))
        self.mlp: nn.Module = SwiGLU(shape) if shape.mlp == "swiglu" else SquaredReLU(shape)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """The stream ``x`` (batch, time, width) after this block."""
        attended = self.attention(F.rms_norm(x, self._size, self.attention_norm, _EPSILON), cosine, sine)
        x = x + self._drop(attended)
        return x + self._drop(self.mlp(F.rms_norm(x, self._size, self.mlp_norm, _EPSILON)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self._dropout, self.training) if self._dropout else x


class Attention(nn.Module):
    """Causal grouped-query attention with normalised and rotated queries and keys."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._heads, self._kv_heads, self._head_size = shape.heads, shape.kv_heads, shape.head_size
        self.qkv = nn.Linear(shape.width, (shape.heads + 2 * shape.kv_heads) * shape.head_size, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.query_norm = nn.Parameter(torch.ones(shape.head_size))
        self.key_norm = nn.Parameter(torch.ones(shape.head_size))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Attention over ``x`` (batch, time, width), projected back to width."""
        batch, time, width = x.shape
        heads, kv_heads = self._heads, self._kv_heads
        qkv = self.qkv(x).view(batch, time, heads + 2 * kv_heads, self._head_size)
        # (batch, time, head, head size): the heads of the queries, of the keys, of the values.
        # Queries and keys share one norm and one rotation: half the operations of doing each alone.
        qk = _rotate(self._normalise(qkv[:, :, : heads + kv_heads]), cosine, sine).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            qk[:, :heads],  # (batch, head, time, head size)
            qk[:, heads:],
            qkv[:, :, heads + kv_heads :].transpose(1, 2),
            is_causal=True,
            enable_gqa=kv_heads < heads,
        )
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, time, width))
        return out

    def _normalise(self, qk: Tensor) -> Tensor:
        query_weight = self.query_norm.expand(self._heads, -1)
        key_weight = self.key_norm.expand(self._kv_heads, -1)
        weight = torch.cat((query_weight, key_weight)).to(qk.dtype)
        return F.rms_norm(qk, (self._head_size,), None, _EPSILON) * weight


class SwiGLU(nn.Module):
    """silu(gate) x up, then down (arXiv 2002.05202); ``up`` holds gate and up, in this order."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The feed-forward of ``x`` (batch, time, width)."""
        gate, up = self.up(x).chunk(2, dim=-1)
        down: Tensor = self.down(F.silu(gate) * up)
        return down


class SquaredReLU(nn.Module):
    """relu(up) squared, then down (arXiv 2109.08668)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The feed-forward of ``x`` (batch, time, width)."""
        down: Tensor = self.down(F.relu(self.up(x)).square())
        return down


def _angles(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines (context, 1, head size / 2) of the rotary angles, computed in fp64, kept in fp32."""
    half = shape.head_size // 2
    frequencies = shape.rope_base ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(shape.context, dtype=torch.float64)[:, None, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """``x`` (batch, time, head, head size) rotated: its halves are real and imaginary part of each pair."""
    first, second = x.chunk(2, dim=-1)
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
