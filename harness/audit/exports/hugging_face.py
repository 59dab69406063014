"""Our decoder under the names of a Hugging Face architecture: config.json and rows of tensors, no arithmetic.

The decoder with SwiGLU computes what Qwen3 computes (arXiv 2505.09388); it only keeps the projections of
attention, and those of the feed-forward, in one matrix each. Both lie row after row, so the renamed tensors
are pieces of ours in the same order of bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import VerificationFailed
from harness.format.manifest import TensorEntry

_KEPT = (
    "vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps", "rope_theta",
    "tie_word_embeddings", "dtype",
)  # fmt: skip
_PLAIN = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm": "input_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.query_norm": "self_attn.q_norm.weight",
    "attention.key_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Piece:
    """Rows of a source tensor under a new name; its pieces follow each other and are all of it."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How an export names things, and why."""

    name: str
    """``qwen3`` or ``native``."""
    reason: str
    config: Mapping[str, Any] | None
    """The config.json; None when the checkpoint has none."""

    def pieces(self, tensor: TensorEntry) -> list[Piece]:
        """What becomes of ``tensor``. Raises `VerificationFailed` for one that the layout does not know."""
        if self.name == "native" or self.config is None:
            return [Piece(tensor.name, tensor.shape)]
        found = list(_qwen3(tensor, self.config))
        rows = sum(piece.shape[0] for piece in found)
        if rows != tensor.shape[0]:
            what = f"tensor `{tensor.name}` of shape {list(tensor.shape)} does not fit config.json"
            raise VerificationFailed(what, where=tensor.file)
        return found


def choose(config: Mapping[str, Any] | None, end: int | None) -> Layout:
    """The layout for a checkpoint with this config.json; ``end``: the end-of-document token, where known."""
    if config is None:
        return Layout("native", "the checkpoint has no config.json, so no architecture is known", None)
    kind = config.get("model_type")
    if kind != "harness-gpt":
        return Layout("native", f"model_type {kind} is not ours to translate: copied as it is", config)
    if config.get("hidden_act") != "silu":
        reason = "transformers has no class for this decoder with a squared ReLU: copied as it is"
        return Layout("native", reason, config)
    translated = {name: config[name] for name in _KEPT} | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        "bos_token_id": end,
        "eos_token_id": end,
    }
    return Layout("qwen3", "the decoder computes what Qwen3 computes", translated)


def _qwen3(tensor: TensorEntry, config: Mapping[str, Any]) -> Iterator[Piece]:
    if tensor.name in _PLAIN:
        yield Piece(_PLAIN[tensor.name], tensor.shape)
        return
    match = _BLOCK.fullmatch(tensor.name)
    if match is None:
        raise VerificationFailed(f"holds the unknown tensor `{tensor.name}`", where=tensor.file)
    prefix, name = f"model.layers.{match[1]}.", match[2]
    size, hidden = config["head_dim"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    parts = {
        "attention.qkv.weight": [("q", heads * size), ("k", kv_heads * size), ("v", kv_heads * size)],
        "mlp.up.weight": [("gate", hidden), ("up", hidden)],
    }
    if name in _IN_BLOCK:
        yield Piece(prefix + _IN_BLOCK[name], tensor.shape)
    elif name in parts:
        owner = "mlp" if name.startswith("mlp") else "self_attn"
        for part, rows in parts[name]:
            yield Piece(f"{prefix}{owner}.{part}_proj.weight", (rows, *tensor.shape[1:]))
    else:
        raise VerificationFailed(f"holds the unknown tensor `{tensor.name}`", where=tensor.file)
