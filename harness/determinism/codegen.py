"""What inductor generated: atomic additions and run-time tuning in the code of compiled regions.

Inside a compiled region a census sees library calls only. The rest is source code that inductor wrote and
loaded, also when it came from its cache: reading it names the kernels that add in no fixed order, and its
digest pins what was compiled. Nothing is imported for this: without inductor loaded there is nothing to read.

Example::

    >>> code = "cpp_fused_index_put_0 = async_compile.cpp_pybinding(['float*'], r'''atomic_add(p, v);''')"
    >>> [(finding.op, finding.kernel) for finding in scan_source(code)]
    [('aten.index_put', 'cpp_fused_index_put_0')]
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

KERNEL = re.compile(r"^(?P<name>\w+) = async_compile\.(?P<kind>\w+)\(", re.MULTILINE)
ATOMIC = re.compile(r"\b(?:atomic_add\w*|tl\.atomic_\w+)\s*[(<]")
# Its launch configuration, and with it the order of additions, is chosen by timing several.
TUNED = re.compile(r"triton_heuristics\.(?:reduction|template|split_scan)\(")
_TYPE = re.compile(r"atomic_add\w*<(\w+)|(?:float|double|half|bfloat16|int64_t)(?=\* out_ptr)|\*(fp\d+|bf16)")
_TYPES = {"float": "float32", "double": "float64", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
_TYPES |= {"fp16": "float16", "fp64": "float64"}

# Operators whose generated code adds in place; the longest name that a kernel's name contains is meant.
_OPERATORS = (
    "embedding_dense_backward",
    "_unsafe_index_put",
    "index_put",
    "index_add",
    "index_select_backward",
    "scatter_reduce",
    "scatter_add",
    "scatter",
    "max_pool2d_with_indices_backward",
    "upsample_bilinear2d_backward",
)


@dataclass(frozen=True)
class Finding:
    """A kernel in generated code that is order-dependent."""

    op: str
    kernel: str
    device: str
    dtype: str
    places: int
    tuned: bool
    """Whether it is the tuning that makes it so; atomic additions otherwise."""


@dataclass(frozen=True)
class Scanned:
    """A loaded file of generated code: sha256 of its text and its findings."""

    sha256: str
    findings: tuple[Finding, ...]

    @property
    def atomics(self) -> int:
        """Number of atomic additions in the file."""
        return sum(finding.places for finding in self.findings if not finding.tuned)


def compilations() -> int:
    """Graphs that dynamo has compiled in this process so far, as it counts them; 0 when it is not loaded."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def loaded_modules() -> list[ModuleType]:
    """Modules that inductor generated and loaded in this process; none when inductor is not loaded."""
    cache = sys.modules.get("torch._inductor.codecache")
    return [] if cache is None else list(cache.PyCodeCache.modules)


def scan_module(module: ModuleType) -> Scanned | None:
    """Read a generated module from its file; None when the file is gone."""
    try:
        text = Path(module.__file__ or "").read_text()
    except OSError:
        return None
    return Scanned(hashlib.sha256(text.encode()).hexdigest(), tuple(scan_source(text)))


def scan_source(text: str) -> Iterator[Finding]:
    """The order-dependent kernels of a file that inductor generated."""
    starts = list(KERNEL.finditer(text))
    ends = [start.start() for start in starts[1:]] + [len(text)]
    for start, end in zip(starts, ends, strict=True):
        body = text[start.start() : end].split("async_compile.wait(", 1)[0]
        places = len(ATOMIC.findall(body))
        if places:
            yield _finding(start, body, places, tuned=False)
        if TUNED.search(body) and "'deterministic': True" not in body:
            yield _finding(start, body, 1, tuned=True)


def _finding(start: re.Match[str], body: str, places: int, *, tuned: bool) -> Finding:
    kernel = start["name"]
    operators = [name for name in _OPERATORS if name in kernel]
    return Finding(
        op=f"aten.{max(operators, key=len).lstrip('_')}" if operators and not tuned else f"inductor.{kernel}",
        kernel=kernel,
        device="cpu" if start["kind"].startswith("cpp") else "cuda",
        dtype=_dtype(body),
        places=places,
        tuned=tuned,
    )


def _dtype(body: str) -> str:
    """The type that is added, as far as the text shows it."""
    found = _TYPE.search(body)
    word = "" if found is None else found[1] or found[2] or found[0]
    return _TYPES.get(word, word or "unknown")
