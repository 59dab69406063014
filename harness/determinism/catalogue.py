"""Which operators need not come out the same twice, who says so, and what to use instead.

Two lists, kept apart by their evidence kind:

- ``documented``: parsed from the docstring of `torch.use_deterministic_algorithms` of the installed build,
  so the list is the build's own, and operators tagged `torch.Tag.nondeterministic_bitwise`.
- ``observed``: a curated list of what torch never alerts on, or alerts on once per process.

The docstring names modules and Python functions; `_OPERATORS` says which aten operators those become. A
test checks that every bullet of the installed build is known here and that every operator named here exists.

Example::

    >>> catalogue().find("aten::index_put")[0].name
    'torch.Tensor.__getitem__'
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch

Device = Literal["cpu", "cuda", "any"]
UnderStrict = Literal["deterministic", "raises", "unchanged"]

DOCSTRING = "torch.use_deterministic_algorithms"
TAG = "torch.Tag.nondeterministic_bitwise"


@dataclass(frozen=True)
class Entry:
    """An operation that is or may be nondeterministic."""

    name: str
    """As the source calls it."""
    operators: tuple[str, ...]
    """Names of the aten (or c10d) operators, without overload."""
    device: Device
    backward: bool
    """Whether only the gradient is meant."""
    condition: str | None
    """Name of the condition on the arguments in `harness.determinism.census.CONDITIONS`."""
    evidence: Literal["documented", "observed"]
    strict: UnderStrict
    """What becomes of it with `determinism.mode=strict`."""
    alternative: str | None
    source: str


@dataclass(frozen=True)
class Catalogue:
    """Every entry, the operators that draw random numbers, and the digest of both."""

    torch: str
    entries: tuple[Entry, ...]
    seeded: tuple[str, ...]
    """Operators tagged `torch.Tag.nondeterministic_seeded`: they consume RNG state, which is saved."""
    sha256: str

    def find(self, operator: str) -> tuple[Entry, ...]:
        """Entries of an operator such as `aten::index_put`, documented ones first."""
        return _by_operator().get(operator, ())

    def count(self, evidence: str) -> int:
        """Number of entries of an evidence kind."""
        return sum(entry.evidence == evidence for entry in self.entries)


@functools.cache
def catalogue() -> Catalogue:
    """The catalogue of the installed torch build, made at first use (about 30 ms)."""
    entries = (*documented(), *CURATED)
    seeded = seeded_operators()
    content = json.dumps([torch.__version__, [asdict(entry) for entry in entries], seeded], sort_keys=True)
    return Catalogue(
        torch=torch.__version__,
        entries=entries,
        seeded=seeded,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
    )


@functools.cache
def _by_operator() -> dict[str, tuple[Entry, ...]]:
    table: dict[str, tuple[Entry, ...]] = {}
    for entry in catalogue().entries:
        for operator in entry.operators:
            table[operator] = (*table.get(operator, ()), entry)
    return table


def seeded_operators() -> tuple[str, ...]:
    """Overloads of aten tagged as drawing random numbers, sorted."""
    tag = torch.Tag.nondeterministic_seeded
    packets = (getattr(torch.ops.aten, name) for name in dir(torch.ops.aten))
    overloads = (
        getattr(packet, overload)
        for packet in packets
        if isinstance(packet, torch._ops.OpOverloadPacket)
        for overload in packet.overloads()
    )
    return tuple(sorted(overload.name() for overload in overloads if tag in overload.tags))


@dataclass(frozen=True)
class Bullet:
    """One line of the docstring's two lists: the function or class, and when it is meant."""

    target: str
    text: str
    raises: bool


_BULLET = re.compile(r"\*\s+:(?:class|func):`(?P<target>[\w.]+)`(?P<text>.*)", re.DOTALL)


def bullets(docstring: str) -> Iterator[Bullet]:
    """The bullets of the two lists of operations; nested lists belong to their bullet's text."""
    # Python 3.13 and newer have taken the indentation away, which ends a list here.
    plain = inspect.cleandoc(docstring)
    parts = re.split(r"The following normally-nondeterministic operations will (act|throw)", plain)
    for verb, part in zip(parts[1::2], parts[2::2], strict=True):
        body = re.split(r"\n\s*\n(?=\S)", part.split("\n\n", 1)[1])[0]
        for chunk in re.split(r"\n(?=\s*\* )", "\n" + body):
            found = _BULLET.search(chunk)
            if found:
                yield Bullet(found["target"], " ".join(found["text"].split()), raises=verb == "throw")


def documented() -> tuple[Entry, ...]:
    """The docstring's operations as entries; empty when Python dropped the docstrings (-OO)."""
    return tuple(_entry(bullet) for bullet in bullets(torch.use_deterministic_algorithms.__doc__ or ""))


def _entry(bullet: Bullet) -> Entry:
    backward = "differentiate" in bullet.text or "requires grad" in bullet.text
    return Entry(
        name=bullet.target,
        operators=_operators(bullet.target, backward),
        device=_device(bullet.text),
        backward=backward,
        condition=_condition(bullet),
        evidence="documented",
        strict="raises" if bullet.raises else "deterministic",
        alternative=_ALTERNATIVES.get(bullet.target, None if bullet.raises else STRICT),
        source=DOCSTRING,
    )


def _device(text: str) -> Device:
    if "CPU or CUDA" in text or not re.search(r"\b(CPU|CUDA)\b", text):
        return "any"
    return "cuda" if "CUDA" in text else "cpu"


_CONDITION_WORDS = {
    "accumulate=True": "accumulates",
    "accumulate=False": "overwrites",
    "'sum'": "sums",
    "'prod'": "multiplies",
    "'max'": "max_mode",
    "weights": "weighted",
    "indices output": "returns_indices",
    "floating": "floating",
    "quantized": "quantized",
    "sparse": "sparse",
    "`src` type is Tensor": "tensor_source",
}


def _condition(bullet: Bullet) -> str | None:
    text = bullet.text.replace('"', "'")
    return next((name for words, name in _CONDITION_WORDS.items() if words in text), None)


STRICT = "determinism.mode=strict, which uses torch's deterministic implementation"

_INDEX_PUT = ("aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index_put")
_INDEX_ADD = ("aten::index_add", "aten::index_add_")
_SCATTER_ADD = ("aten::scatter_add", "aten::scatter_add_")
_CONVOLUTION = ("aten::convolution", "aten::_convolution", "aten::convolution_backward")

# What the census sees of a documented function. Several names share operators: the first entry counts.
_OPERATORS: dict[str, tuple[str, ...]] = {
    "torch.nn.Conv1d": _CONVOLUTION,
    "torch.nn.Conv2d": _CONVOLUTION,
    "torch.nn.Conv3d": _CONVOLUTION,
    "torch.nn.ConvTranspose1d": _CONVOLUTION,
    "torch.nn.ConvTranspose2d": _CONVOLUTION,
    "torch.nn.ConvTranspose3d": _CONVOLUTION,
    "torch.bmm": ("aten::bmm",),
    "torch.Tensor.__getitem__": _INDEX_PUT,
    "torch.Tensor.index_put": _INDEX_PUT,
    "torch.Tensor.put_": ("aten::put_", "aten::put"),
    "torch.Tensor.scatter_add_": _SCATTER_ADD,
    "torch.gather": _SCATTER_ADD,
    "torch.index_add": _INDEX_ADD,
    "torch.index_select": _INDEX_ADD,
    "torch.repeat_interleave": _INDEX_ADD,
    "torch.Tensor.index_copy": ("aten::index_copy", "aten::index_copy_"),
    "torch.Tensor.scatter": ("aten::scatter", "aten::scatter_"),
    "torch.Tensor.scatter_reduce": ("aten::scatter_reduce", "aten::scatter_reduce_"),
    "torch.nn.MaxPool3d": ("aten::max_pool3d_with_indices_backward",),
    "torch.nn.AdaptiveAvgPool2d": ("aten::_adaptive_avg_pool2d_backward",),
    "torch.nn.AdaptiveAvgPool3d": ("aten::_adaptive_avg_pool3d_backward",),
    "torch.nn.MaxUnpool1d": ("aten::max_unpool2d",),
    "torch.nn.functional.interpolate": (
        "aten::upsample_linear1d_backward",
        "aten::upsample_bilinear2d_backward",
        "aten::upsample_bicubic2d_backward",
        "aten::upsample_trilinear3d_backward",
    ),
    # The call sites of alertNotDeterministic in the torch 2.13 CUDA build have the 2-d form only.
    "torch.nn.NLLLoss": ("aten::nll_loss2d_forward",),
    "torch.nn.CTCLoss": ("aten::_ctc_loss_backward", "aten::_cudnn_ctc_loss"),
    "torch.nn.EmbeddingBag": ("aten::_embedding_bag_dense_backward",),
    "torch.nn.functional.grid_sample": (
        "aten::grid_sampler_2d_backward",
        "aten::grid_sampler_3d_backward",
        "aten::cudnn_grid_sampler_backward",
    ),
    "torch.Tensor.resize_": ("aten::resize_",),
}


def _operators(target: str, backward: bool) -> tuple[str, ...]:
    """The aten operators of a documented name; by spelling where `_OPERATORS` does not list it."""
    if target in _OPERATORS:
        return _OPERATORS[target]
    name = target.rpartition(".")[2]
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return (f"aten::{snake}_backward" if backward else f"aten::{snake}",)


_ALTERNATIVES = {
    "torch.Tensor.__getitem__": "torch.nn.functional.embedding(index, weight), or determinism.mode=strict",
    "torch.Tensor.put_": "torch.Tensor.index_put_ on a flat view, with determinism.mode=strict",
    "torch.nn.AdaptiveMaxPool2d": "torch.nn.MaxPool2d with a fixed window",
    "torch.nn.FractionalMaxPool2d": "torch.nn.MaxPool2d",
    "torch.nn.FractionalMaxPool3d": "torch.nn.MaxPool3d with determinism.mode=strict",
    "torch.nn.AdaptiveAvgPool2d": "torch.nn.AvgPool2d with a fixed window",
    "torch.nn.functional.interpolate": "mode='nearest', or a transposed convolution",
    "torch.nn.ReflectionPad1d": "torch.cat of flipped slices",
    "torch.nn.ReflectionPad2d": "torch.cat of flipped slices",
    "torch.nn.ReflectionPad3d": "torch.cat of flipped slices",
    "torch.nn.NLLLoss": "the loss over inputs flattened to (N, C)",
    "torch.nn.EmbeddingBag": "mode='sum' or mode='mean'",
    "torch.bincount": "torch.bincount without weights, or scatter_add_ with determinism.mode=strict",
    "torch.median": "torch.sort and the middle index",
    "torch.Tensor.scatter_reduce": "reduce='sum' with determinism.mode=strict",
}

_ATTENTION = "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
_ATTENTION_SOURCE = "torch alerts on it once per process only (ATen, attention_backward.cu)"
_CUBLAS_SOURCE = "https://docs.nvidia.com/cuda/cublas/#results-reproducibility"
_BINARY_SOURCE = "alertNotDeterministic call in the torch 2.13 CUDA build, absent from its documentation"
_NCCL_SOURCE = "NCCL chooses algorithm, ring order and NVLS at start, by topology"


def _curated(
    name: str,
    operators: tuple[str, ...],
    alternative: str | None,
    source: str,
    *,
    condition: str | None = None,
    strict: UnderStrict = "deterministic",
) -> Entry:
    return Entry(name, operators, "cuda", False, condition, "observed", strict, alternative, source)


CURATED = (
    _curated(
        "flash attention backward",
        ("aten::_scaled_dot_product_flash_attention_backward", "aten::_flash_attention_backward"),
        f"determinism.mode=strict, or {_ATTENTION}",
        _ATTENTION_SOURCE,
    ),
    _curated(
        "memory-efficient attention backward",
        ("aten::_scaled_dot_product_efficient_attention_backward", "aten::_efficient_attention_backward"),
        f"determinism.mode=strict, or {_ATTENTION}",
        _ATTENTION_SOURCE,
    ),
    _curated(
        "cuDNN attention backward",
        ("aten::_scaled_dot_product_cudnn_attention_backward",),
        f"determinism.mode=strict, or {_ATTENTION}",
        _ATTENTION_SOURCE,
    ),
    _curated(
        "cuBLAS with a shared workspace",
        ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation"),
        "CUBLAS_WORKSPACE_CONFIG=:4096:8 (determinism.mode=strict sets it); matters with several streams",
        _CUBLAS_SOURCE,
        condition="free_workspace",
    ),
    _curated(
        "NCCL reduction with a free choice of algorithm",
        (
            "c10d::allreduce_",
            "c10d::allreduce_coalesced_",
            "c10d::reduce_",
            "c10d::reduce_scatter_",
            "c10d::_reduce_scatter_base_",
            "c10d::reduce_scatter_tensor_coalesced_",
            "_c10d_functional::all_reduce",
            "_c10d_functional::reduce_scatter_tensor",
        ),
        "NCCL_ALGO=Ring NCCL_PROTO=Simple (determinism.mode=strict sets them) on the same topology",
        _NCCL_SOURCE,
        condition="free_collective",
    ),
    _curated(
        "index_reduce",
        ("aten::index_reduce", "aten::index_reduce_"),
        "torch.index_add with determinism.mode=strict",
        _BINARY_SOURCE,
        strict="raises",
    ),
    _curated(
        "antialiased upsampling backward",
        ("aten::_upsample_bilinear2d_aa_backward", "aten::_upsample_bicubic2d_aa_backward"),
        "antialias=False with mode='nearest'",
        _BINARY_SOURCE,
        strict="raises",
    ),
)


def alternative_for_alert(name: str) -> str | None:
    """What to use instead of the operator that torch's refusal calls ``name``; None when nothing is known.

    Torch names C++ functions (`avg_pool3d_backward_cuda`), so the longest operator name inside it counts.
    """
    spelled = name.replace(" ", "_").lower()
    matches = [
        (len(operator), entry.alternative)
        for entry in catalogue().entries
        for operator in entry.operators
        if operator.partition("::")[2].strip("_").removesuffix("_backward") in spelled
    ]
    raising = [match for match in matches if match[1] != STRICT]
    return max(raising, key=lambda match: match[0])[1] if raising else None
