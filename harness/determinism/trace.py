"""What every operator of a micro-step returned, digested in order: two traces of one micro-step, compared.

A `TorchDispatchMode` for double executions (`harness.determinism.double`). It reads every result, which takes
too long for most steps of a run, and changes none, unless ``fill`` is given, which is for executions that are
thrown away. Like the census it ignores the inside of compiled regions, and calls each operator exactly once.

- Results on the CPU are digested by XXH3-64, on a device by a weighted sum of their bits that stays there.
- Views are not read, nor are collectives, which may still be running when they return.
- Memory that `torch.empty` leaves uninitialised is filled as ``fill`` says, otherwise in each of two
  executions: whoever reads it is then found every time and not by luck. It is never compared itself.

Example::

    >>> with Trace() as trace:
    ...     _ = torch.ones(3) + 1
    >>> [call.op for call in trace.calls]
    ['aten.ones', 'aten.add']
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor, nn

from harness.determinism.bit_sums import weighted_sum
from harness.determinism.census import ObserverMode, fitting, render, sequence_number, spelled, user_frame
from harness.determinism.digest import tensor_bytes

_ASYNCHRONOUS = frozenset({"c10d", "_c10d_functional", "c10d_functional", "fsdp", "symm_mem", "_dtensor"})
_EMPTY = frozenset({"empty", "empty_like", "empty_strided", "empty_permuted"})
_EMPTY |= {"new_empty", "new_empty_strided"}
_RESIZES = frozenset({"resize", "resize_as", "resize_output"})
FILLS = (0.0, float("nan"))
"""What uninitialised memory holds in two executions: whatever is computed from it cannot come out alike."""
_FILLS = frozenset({"fill", "zero", "copy", "normal", "uniform", "bernoulli", "random", "exponential"})


@dataclass
class Call:
    """One operator call of a trace."""

    op: str
    """As the ledger spells it."""
    backward: bool
    outputs: tuple[Any, ...]
    """Digests of the results: integers, or scalars on the device until `Trace.finish`."""
    node: int
    """Sequence number of the autograd node: of the one it makes, or of the one that runs."""
    uninitialised: int | None = None
    """Number of the call that left an argument uninitialised."""
    site: str | None = None
    module: str | None = None
    device: str = "cpu"
    dtype: str = "none"


@dataclass
class Kept:
    """Arguments and results of one call, kept to measure how far two executions are apart."""

    inputs: tuple[Any, ...] = ()
    outputs: list[Tensor] = field(default_factory=list)


class Onlooker(Protocol):
    """Who looks at the values themselves."""

    def given(self, call: Call, tensors: Sequence[Tensor], arguments: Sequence[Any]) -> None:
        """Before ``call``: the tensors among its ``arguments``."""
        ...

    def made(self, call: Call, tensors: Sequence[Tensor]) -> None:
        """After it: what it returned or has written to."""
        ...

    def travelling(self, tensors: Sequence[Tensor]) -> None:
        """What a collective is given; what it brings may come later."""
        ...


class Trace(ObserverMode):
    """Records calls while entered. ``keep``: number of the call whose results are kept."""

    def __init__(
        self,
        fill: float | None = None,
        *,
        modules: Mapping[int, str] | None = None,
        keep: int | None = None,
        onlooker: Onlooker | None = None,
    ) -> None:
        """``modules``: identity of a module → its name; given, every forward call gets its place."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.kept = Kept()
        self.nanoseconds = 0
        """Time inside of the trace; see `Census.nanoseconds`."""
        self._fill = fill
        self._modules = modules
        self._keep = keep
        self._onlooker = onlooker
        self._blank: dict[int, int] = {}
        """Address of memory that nobody has written → number of the call that made it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the call, then digest what it returned."""
        keywords = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **keywords)
        kind = _kind(func)
        if kind.view:
            return func(*args, **keywords)
        if kind.asynchronous:
            self._travelling(plain_tensors([*args, *keywords.values()]))
            return func(*args, **keywords)
        started = perf_counter_ns()
        call = self._begin(func, [*args, *keywords.values()])
        called = perf_counter_ns()
        result = func(*args, **keywords)
        returned = perf_counter_ns()
        if kind.empty:
            self._made_blank(result)
        else:
            self._finished(kind, call, result, [*args, *keywords.values()])
        self.nanoseconds += perf_counter_ns() - returned + called - started
        return result

    def _begin(self, function: Any, arguments: Sequence[Any]) -> Call:
        """The call's name and place; made before it runs, since it may write to its arguments."""
        node = None if torch.is_grad_enabled() else torch._C._current_autograd_node()
        number = node._sequence_nr() if node is not None else sequence_number() - 1
        call = Call(spelled(function._schema.name), node is not None, (), number)
        tensors = plain_tensors(arguments)
        if self._blank:
            addresses = (address_of(each) for each in tensors)
            call.uninitialised = next((self._blank[at] for at in addresses if at in self._blank), None)
        if self._modules is not None and node is None:
            call.site, call.module = render(user_frame()), _module(self._modules)
        if len(self.calls) == self._keep:
            self.kept = Kept(inputs=tuple(digest(each) for each in tensors))
        self.calls.append(call)
        if self._onlooker is not None:
            self._onlooker.given(call, tensors, arguments)
        return call

    def _travelling(self, tensors: Sequence[Tensor]) -> None:
        """``tensors`` are sent or will be written by other ranks."""
        for each in tensors:
            self._blank.pop(address_of(each), None)
        if self._onlooker is not None:
            self._onlooker.travelling(tensors)

    def _made_blank(self, result: Any) -> None:
        for tensor in plain_tensors([result]):
            if tensor.numel():
                self._blank[address_of(tensor)] = len(self.calls) - 1
                if self._fill is not None:
                    _fill(tensor, self._fill)

    def _finished(self, kind: _Kind, call: Call, result: Any, arguments: Sequence[Any]) -> None:
        written = [arguments[at] for at in kind.written if at < len(arguments)]
        made = plain_tensors([result]) or plain_tensors(written)
        if kind.several:
            # Further results that are no numbers are often memory that a kernel did not need to write.
            made = [each for each in made if each.is_floating_point()]
        call.outputs = tuple(digest(each) for each in made)
        if made:
            call.device, call.dtype = made[0].device.type, str(made[0].dtype).removeprefix("torch.")
        if self._onlooker is not None:
            self._onlooker.made(call, made)
        if self._blank and (not kind.written or kind.fills):
            for each in made:
                self._blank.pop(address_of(each), None)
        if len(self.calls) - 1 == self._keep:
            self.kept.outputs = [each.detach().clone() for each in made]

    def finish(self) -> list[Call]:
        """The calls, every digest an integer; waits for the device."""
        pending = [value for call in self.calls for value in call.outputs if isinstance(value, Tensor)]
        if pending:
            values = iter(torch.stack([value.to(pending[0].device) for value in pending]).tolist())
            for call in self.calls:
                call.outputs = tuple(
                    next(values) if isinstance(value, Tensor) else value for value in call.outputs
                )
        return self.calls


def take_trace(
    fill: float | None = None,
    *,
    modules: Mapping[int, str] | None = None,
    keep: int | None = None,
    onlooker: Onlooker | None = None,
) -> Trace:
    """A trace to enter, of the kind that fits this process."""
    return fitting(Trace)(fill, modules=modules, keep=keep, onlooker=onlooker)


def place_of(calls: Sequence[Call], call: Call) -> tuple[str | None, str | None]:
    """Module and line of ``call``, one of placed ``calls``; in the backward pass those of the forward call
    that made the autograd node which it runs for."""
    if not call.backward:
        return call.module, call.site
    forward = next((each for each in calls if not each.backward and each.node == call.node), None)
    if forward is None:
        return None, None
    return forward.module, None if forward.site is None else f"{forward.site} (backward)"


def first_difference(one: Sequence[Call], other: Sequence[Call]) -> int | None:
    """Number of the first call of two traces that differs in name or results; None when none does.

    A single differing call that nothing after it shows counts only when it is the last one: a result that
    nobody uses may hold anything.
    """
    pairs = enumerate(zip(one, other, strict=False))
    differing = [at for at, (left, right) in pairs if left.op != right.op or left.outputs != right.outputs]
    shorter = min(len(one), len(other))
    if not differing:
        return None if len(one) == len(other) else shorter
    return None if len(differing) == 1 and differing[0] < shorter - 1 else differing[0]


def digest(tensor: Tensor) -> Any:
    """Of a tensor's bits: an integer on the CPU, else a scalar on its device."""
    if tensor.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(tensor_bytes(tensor)) if tensor.numel() else 0
    return weighted_sum(tensor, 0) if tensor.numel() else tensor.new_zeros((), dtype=torch.int64)


def plain_tensors(values: Sequence[Any]) -> list[Tensor]:
    """The dense tensors among ``values`` and in lists of them; subclasses hide several tensors: left out."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, list | tuple):
            found += plain_tensors(value)
        elif isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter) and _is_dense(value):
            found.append(value)
    return found


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta


def modules_of(model: nn.Module) -> dict[int, str]:
    """Identity of every module of ``model`` → its name; that of the model is its class."""
    return {id(module): name or type(model).__name__ for name, module in model.named_modules()}


@dataclass(frozen=True)
class _Kind:
    """What an operator's schema says of its results."""

    view: bool
    asynchronous: bool
    empty: bool
    fills: bool
    written: tuple[int, ...]
    """Positions of the arguments that it writes to."""
    several: bool


@functools.cache
def _kind(function: Any) -> _Kind:
    schema = function._schema
    name = schema.name.partition("::")[2].strip("_")
    returns = [each.alias_info for each in schema.returns]
    views = [alias is not None and not alias.is_write for alias in returns]
    written = tuple(
        at for at, each in enumerate(schema.arguments) if each.alias_info and each.alias_info.is_write
    )
    return _Kind(
        view=name in _RESIZES or (bool(views) and all(views)),
        asynchronous=function.namespace in _ASYNCHRONOUS,
        empty=name in _EMPTY,
        fills=name in _FILLS,
        written=written,
        several=len(returns) > 1,
    )


def address_of(tensor: Tensor) -> int:
    """Of the memory that ``tensor`` shares with its views."""
    return tensor.untyped_storage().data_ptr()


def _fill(tensor: Tensor, fill: float) -> None:
    """``fill``, or 1 in place of what the dtype has no NaN for."""
    fractions = tensor.is_floating_point() or tensor.is_complex()
    with torch.no_grad():
        tensor.fill_(1 if fill != fill and not fractions else fill)


def _module(names: Mapping[int, str]) -> str | None:
    """Name of the innermost module whose method is running."""
    frame = sys._getframe(2)
    while frame is not None:
        # Reading the variables of every frame is slow, so only where the first one is called self.
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            name = names.get(id(frame.f_locals.get("self")))
            if name is not None:
                return name
        frame = frame.f_back  # type: ignore[assignment]
    return None
