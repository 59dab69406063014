"""The operator census: which operators of the catalogue ran in a step, where, how often, on which device.

A `TorchDispatchMode` that only looks. Two properties keep it from changing the run:

- it ignores the inside of compiled regions (`ignore_compile_internals`). A mode that does not makes
  `torch.compile` fall back to eager code, for that step and every later one: other bits, for good;
- it calls each operator exactly once, with the arguments it was given.

So inside a compiled region it sees library calls only; `harness.determinism.codegen` reads the rest.

A gradient is traced to the forward call that needs it: autograd gives the node of a forward operator a
sequence number, and the node that runs in the backward pass still has it.

Example::

    >>> weight = torch.ones(4, requires_grad=True)
    >>> with Census() as census:
    ...     weight[torch.tensor([0, 0])].sum().backward()
    >>> [finding.op for finding in census.findings]
    ['aten.index_put']
"""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns
from types import CodeType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.determinism.catalogue import TAG, Entry, catalogue
from harness.determinism.graph import GRADIENTS

# Absent from torch's stubs; both are what torch's own profiler and module tracker use.
sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]

_CLASSIFIED_NAMESPACES = frozenset(
    {"aten", "prim", "prims", "c10d", "_c10d_functional", "c10d_functional", "fsdp", "inductor", "profiler"}
    | {"mkldnn", "mkl", "mkldnn_prepacked", "quantized", "debugprims", "rngprims", "_dtensor", "symm_mem"}
)
_MAX_MODE = 2  # EmbeddingBag's modes: sum, mean, max


class Finding(NamedTuple):
    """An operator of the catalogue that ran; the fields of a ledger row that a census can know."""

    op: str
    device: str
    dtype: str
    call_site: str | None
    entry: Entry


class _Kind(NamedTuple):
    """What is known of an operator; ``unclassified`` is its name when no list covers its origin."""

    entries: tuple[Entry, ...]
    has_gradient: bool
    unclassified: str | None


class Call(NamedTuple):
    """An operator call: the overload and its arguments."""

    function: Any
    arguments: Sequence[Any]
    keywords: Mapping[str, Any]

    def argument(self, name: str) -> Any:
        """The argument called ``name``, or its default; None when the overload has none of that name."""
        for index, parameter in enumerate(self.function._schema.arguments):
            if parameter.name == name:
                if index < len(self.arguments):
                    return self.arguments[index]
                return self.keywords.get(name, parameter.default_value)
        return None

    def tensor(self) -> Tensor | None:
        """The first tensor with fractions among the arguments, else the first tensor."""
        found = list(_tensors(self.arguments)) + list(_tensors(list(self.keywords.values())))
        return next((tensor for tensor in found if tensor.is_floating_point()), found[0] if found else None)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    nested = [item if isinstance(item, list | tuple) else (item,) for item in values]
    return [item for items in nested for item in items if isinstance(item, Tensor)]


def _free_collective(call: Call) -> bool:
    """Three addends or more, and nobody fixed the algorithm."""
    distributed = torch.distributed
    return distributed.is_initialized() and distributed.get_world_size() > 2 and "NCCL_ALGO" not in os.environ


def _is_quantized(call: Call) -> bool:
    return bool(call.arguments[0].is_quantized)


def _is_floating(call: Call) -> bool:
    return bool(call.arguments[0].is_floating_point() or call.arguments[0].is_complex())


CONDITIONS: Mapping[str, Callable[[Call], bool]] = {
    "accumulates": lambda call: bool(call.argument("accumulate")),
    "overwrites": lambda call: not call.argument("accumulate"),
    "sums": lambda call: call.argument("reduce") in ("sum", "mean"),
    "multiplies": lambda call: call.argument("reduce") == "prod",
    "max_mode": lambda call: call.argument("mode") == _MAX_MODE,
    "weighted": lambda call: call.argument("weights") is not None,
    "returns_indices": lambda call: call.function._overloadname.startswith("dim"),
    "floating": _is_floating,
    "quantized": _is_quantized,
    "sparse": lambda call: any(tensor.layout is not torch.strided for tensor in _tensors(call.arguments)),
    "tensor_source": lambda call: call.argument("src") is not None,
    "free_workspace": lambda call: "CUBLAS_WORKSPACE_CONFIG" not in os.environ,
    "free_collective": _free_collective,
}
"""The conditions that entries of the catalogue name."""


class ObserverMode(TorchDispatchMode):
    """A mode that only looks: of a compiled region it sees what that calls."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled regions run as compiled."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import dynamo, which takes seconds, only to keep it from looking at this class."""
        return False


Mode = TypeVar("Mode", bound=ObserverMode)


def fitting(kind: type[Mode]) -> type[Mode]:
    """``kind`` as this process needs it: once dynamo is loaded, it must not compile the mode itself.

    Between two compiled graphs of a model operators run while dynamo is on, and it compiles whatever Python
    they call: of a mode, dozens of pieces, for seconds. The bits stay as they are.
    """
    return _unseen(kind) if "torch._dynamo" in sys.modules else kind  # type: ignore[arg-type]


@functools.cache
def _unseen(kind: type[Any]) -> type[Any]:
    """``kind``, unseen by dynamo. Torch hides what the class itself defines, not what it inherits."""
    own = {
        "__torch_dispatch__": kind.__torch_dispatch__,
        "_should_skip_dynamo": classmethod(lambda cls: True),
    }
    return type(f"{kind.__name__}OfCompiled", (kind,), own)


class Census(ObserverMode):
    """Counts operators while entered; results are valid after the exit."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.findings: Counter[Finding] = Counter()
        self.unclassified: set[str] = set()
        self.operators = 0
        self.nanoseconds = 0
        """Time inside the census itself; the dispatcher's way into Python and back is `way_ns`."""
        self.paused = False
        """Whether what runs now is no part of the step, and not counted."""
        self._sites: dict[int, tuple[str, CodeType, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the call, then make it."""
        if self.paused:
            return func(*args, **(kwargs or {}))
        started = perf_counter_ns()
        keywords = kwargs or {}
        self._look(func, args, keywords)
        self.nanoseconds += perf_counter_ns() - started
        return func(*args, **keywords)

    def _look(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.operators += 1
        known = classify(function)
        if known.unclassified is not None:
            self.unclassified.add(known.unclassified)
        if known.has_gradient and torch.is_grad_enabled():
            self._remember_site(function)
        if known.entries:
            self._find(known.entries, Call(function, arguments, keywords))

    def _remember_site(self, function: Any) -> None:
        if torch._C._current_autograd_node() is not None:
            return  # a recomputation inside the backward pass numbers its nodes by its own thread
        number = sequence_number() - 1  # autograd made the node just before it called the operator,
        if number in self._sites:  # so the first operator with that number is the node's own
            return
        frame = user_frame()
        if frame is not None:
            self._sites[number] = (_plain(function.name()), *frame)

    def _find(self, entries: tuple[Entry, ...], call: Call) -> None:
        node = None if torch.is_grad_enabled() else torch._C._current_autograd_node()
        tensor = call.tensor()
        device = "cpu" if tensor is None else tensor.device.type
        for entry in entries:
            if _applies(entry, device, call, node is not None):
                op = spelled(call.function._schema.name)
                dtype = "none" if tensor is None else str(tensor.dtype).removeprefix("torch.")
                site = self._site(node) if node is not None else render(user_frame())
                self.findings[Finding(op, device, dtype, site, entry)] += 1
                return

    def _site(self, node: Any) -> str:
        """The forward call whose gradient runs, when its operator and the node bear the same name."""
        operator, *place = self._sites.get(node._sequence_nr(), ("",))
        name = node.name().rpartition("::")[2]
        if not place or _plain(operator) != _plain(name.partition("Backward")[0]):
            return f"{name} (backward)"
        return f"{render(tuple(place))} (backward)"


def take_census() -> Census:
    """A census to enter, of the kind that fits this process."""
    return fitting(Census)()


def way_ns(calls: int) -> int:
    """Nanoseconds that ``calls`` operators take longer on their way through a mode that does nothing."""
    return calls * _way_ns("torch._dynamo" in sys.modules)


@functools.cache
def _way_ns(compiled: bool) -> int:
    value, idle, count = torch.zeros(1), (_unseen(Census) if compiled else Census)(), 50
    idle.paused = True

    def fastest() -> int:
        found = []
        for _ in range(3):
            started = perf_counter_ns()
            for _ in range(count):
                value.neg_()
            found.append(perf_counter_ns() - started)
        return min(found)

    plain = fastest()
    with idle:
        return max(0, fastest() - plain) // count


def _applies(entry: Entry, device: str, call: Call, backward: bool) -> bool:
    """Whether an entry means this call. Accelerators that the lists do not name are taken for CUDA."""
    if entry.device != "any" and entry.device != ("cpu" if device == "cpu" else "cuda"):
        return False
    if entry.backward and not backward:
        return False
    return entry.condition is None or CONDITIONS[entry.condition](call)


@functools.cache
def classify(function: Any) -> _Kind:
    """What the catalogue and torch's tags say of an operator."""
    if not isinstance(function, torch._ops.OpOverload):
        return _Kind((), False, str(function))
    name = function._schema.name
    entries = catalogue().find(name)
    tag = getattr(torch.Tag, "nondeterministic_bitwise", None)
    if tag is not None and tag in function.tags:
        return _Kind((*entries, _tagged(name)), False, None)
    origin = None if function.namespace in _CLASSIFIED_NAMESPACES else name.replace("::", ".")
    return _Kind(entries, _plain(name) in _forwards(), origin)


@functools.cache
def _forwards() -> frozenset[str]:
    """Plain names of the forward operators whose gradient is in the catalogue."""
    ending = "_backward"
    named = (operator for entry in catalogue().entries for operator in entry.operators)
    spelled = (_plain(name.removesuffix(ending)) for name in named if name.endswith(ending))
    return frozenset((*spelled, *(_plain(node.partition("Backward")[0]) for node in GRADIENTS)))


def _tagged(name: str) -> Entry:
    return Entry(name, (name,), "any", False, None, "documented", "unchanged", None, TAG)


def spelled(operator: str) -> str:
    """An operator's name in the ledger: the same for its in-place, checked and private forms."""
    namespace, _, name = operator.partition("::")
    return f"{namespace}.{name.strip('_').removesuffix('_impl').removeprefix('unsafe_')}"


def _plain(name: str) -> str:
    """`aten::index_put_.default` and `IndexPut` as `indexput`."""
    return name.rpartition("::")[2].partition(".")[0].replace("_", "").lower()


_INSIDE = ("torch.", "harness.determinism.", "contextlib.", "accelerate.")


def user_frame() -> tuple[CodeType, int] | None:
    """Code and line of the innermost Python frame outside of torch."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not f"{name}.".startswith(_INSIDE):
            return frame.f_code, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def render(place: tuple[Any, ...] | None) -> str | None:
    """`gpt.py:120 forward`: the file's name only, so that no home folder gets into a signed document."""
    if place is None:
        return None
    code, line = place
    return f"{os.path.basename(code.co_filename)}:{line} {code.co_name}"
