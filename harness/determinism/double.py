"""Double execution: a micro-step executed twice from the same state and generators, its bits compared.

    double = Double(model, wrapped, generators, holders=(task,))
    found = double.check(execute, fine=True)     # execute(): forward and backward, returns the loss
    found.clean, found.differences

Both executions are thrown away (`harness.determinism.sandbox`), so the run keeps its bits. Where gradients
stay on the rank that made them, the run's own execution may be the first of the two, which saves one::

    own = double.own(execute, fine=True)         # what the run does in any case; own.loss
    found = double.check(execute, fine=True, own=own)

Compared are the loss and the gradient of every parameter, by weighted sums of their bits, one gradient after
the other freed; with ``fine`` also what every operator outside of compiled regions returned
(`harness.determinism.trace`), since a difference of one unit in the last place of an activation is often
absorbed before any gradient.

After a mismatch the micro-step is executed again, up to `REPEATS` times: to name the first operator that
differs, its module and call, and to measure by how many units in the last place (ULP) it and the gradients
differ. A clean pair says little about a rare race: n of them bound its rate by 3/n with 95 % confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from time import perf_counter_ns
from typing import Any

from torch import Tensor, nn

from harness.checkpoint.cut import is_sharded
from harness.checkpoint.rng import Generator
from harness.determinism import codegen
from harness.determinism import trace as traces
from harness.determinism.census import way_ns
from harness.determinism.sandbox import Sandbox
from harness.determinism.trace import Call, Kept
from harness.determinism.ulp import distance, largest_distance

REPEATS = 6
"""Executions that measure a difference once it was seen; a race may well come out alike in two of them."""
MOST_GRADIENTS = 8
"""Parameters that are named when no operator can be; more would hide what matters."""
UNINITIALISED = "torch.zeros, or write all of it before it is read"
"""What to do instead of reading memory that nobody has written."""


@dataclass(frozen=True)
class Difference:
    """An operator or the gradient of a parameter that came out otherwise the second time."""

    op: str
    """`aten.index_put`, or `gradient` of a parameter."""
    module: str | None
    """Name of the module whose method called the operator, or of the parameter."""
    call_site: str | None
    device: str
    dtype: str
    ulp: int | None
    """Largest distance seen, in units in the last place; None when the repetitions came out alike."""
    source: str
    alternative: str | None = None


@dataclass(frozen=True)
class Checked:
    """What a double execution showed."""

    fine: bool
    differences: tuple[Difference, ...]
    operators: frozenset[str]
    """Those that a fine check saw, as the ledger spells them."""
    tensors: int
    """How many gradients and results were compared."""
    nanoseconds: int
    refused: tuple[str, ...] = ()
    """Why nothing was executed; then nothing is known."""

    @property
    def clean(self) -> bool:
        """Whether both executions had the same bits."""
        return not self.differences and not self.refused


@dataclass
class _Outcome:
    """One execution: sums of loss and gradients by name, and its trace."""

    sums: dict[str, int]
    calls: list[Call] = field(default_factory=list)
    kept: Kept = field(default_factory=Kept)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    distances: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Own:
    """The run's own execution, looked at."""

    loss: Tensor
    nanoseconds: int
    """What looking has added to it."""
    outcome: _Outcome
    compilations: int
    """Graphs that were compiled before it."""


@dataclass(frozen=True)
class _Wish:
    """What an execution is to look at besides loss and gradients."""

    fine: bool = False
    fill: float | None = None
    places: bool = False
    """Whether each forward call gets its module and line."""
    keep: int | None = None
    """Number of the call whose results are kept."""
    gradients: Sequence[str] = ()
    """Parameters whose gradients are kept."""
    reference: Mapping[str, Tensor] = field(default_factory=dict)
    """Gradients to measure the distance to."""


class Double:
    """Executes micro-steps of one model twice. Arguments as of `Sandbox`."""

    def __init__(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        generators: Mapping[str, Generator],
        holders: Sequence[object] = (),
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        """``agree``: whether any rank says yes; where passes communicate, all execute equally often."""
        self._model = model
        self._agree = agree
        self._sharded = is_sharded(wrapped)
        self._parameters = dict(model.named_parameters())
        self._sandbox = Sandbox(model, wrapped, generators, holders)

    def own(self, execute: Callable[[], Tensor], *, fine: bool) -> Own:
        """Execute as a part of the run, to be compared by `check` right afterwards.

        Gradients must be None before it, and afterwards be what this rank made.
        """
        started = perf_counter_ns()
        compilations = codegen.compilations()
        self._sandbox.begin_here()
        spent = perf_counter_ns() - started
        trace = traces.take_trace() if fine else None
        with nullcontext() if trace is None else trace:
            loss = execute()
        started = perf_counter_ns()
        outcome = self._outcome(loss, _Wish(), keep=True)
        if trace is not None:
            outcome.calls = trace.finish()
            spent += trace.nanoseconds + way_ns(len(outcome.calls))
        return Own(loss, spent + perf_counter_ns() - started, outcome, compilations)

    def check(
        self,
        execute: Callable[[], Tensor],
        *,
        fine: bool,
        poison: bool = True,
        own: Own | None = None,
    ) -> Checked:
        """Execute twice and compare; ``poison``: fill uninitialised memory, differently in each. ``own`` is
        the first of the two where the run has made it, with ``fine`` as here.

        Of several ranks that communicate in a pass (FSDP2), all must call alike.
        """
        started = perf_counter_ns()
        obstacles = self._sandbox.obstacles()
        if obstacles:
            return Checked(fine, (), frozenset(), 0, perf_counter_ns() - started, tuple(obstacles))
        wishes = [_Wish(fine, fill) for fill in (traces.FILLS if poison else (None, None))]
        compilations = codegen.compilations() if own is None else own.compilations
        with self._sandbox as sandbox:
            pair = [] if own is None else [own.outcome]
            pair += [self._once(sandbox, execute, wish) for wish in wishes[len(pair) :]]
            excused = self._sharded or codegen.compilations() != compilations
            if fine and self._agree(excused and _ran_apart(*pair)):
                # The first pass after an evaluation: FSDP2 gathers ahead by what the evaluation has run;
                # or one in which dynamo has compiled, which runs operators of its own.
                pair = [self._once(sandbox, execute, wish) for wish in wishes]
            names = [name for name in pair[0].sums if pair[0].sums[name] != pair[1].sums.get(name)]
            differences = self._differences(sandbox, execute, pair, names, wishes)
            changed = sandbox.changed()
        calls = pair[0].calls
        return Checked(
            fine,
            tuple(differences),
            frozenset(call.op for call in calls),
            len(pair[0].sums) + sum(len(call.outputs) for call in calls),
            perf_counter_ns() - started + (0 if own is None else own.nanoseconds),
            tuple(f"`{name}` was written to, which cannot be put back" for name in changed),
        )

    def _once(self, sandbox: Sandbox, execute: Callable[[], Tensor], wish: _Wish) -> _Outcome:
        """One execution from the state at the entry."""
        sandbox.rewind()
        if not wish.fine:
            return self._outcome(execute(), wish)
        modules = traces.modules_of(self._model) if wish.places else None
        with traces.take_trace(wish.fill, modules=modules, keep=wish.keep) as trace:
            loss = execute()
        outcome = self._outcome(loss, wish)
        outcome.calls, outcome.kept = trace.finish(), trace.kept
        return outcome

    def _outcome(self, loss: Tensor, wish: _Wish, *, keep: bool = False) -> _Outcome:
        """The sums; each gradient is freed as soon as it is summed, except those to ``keep``."""
        made = _Outcome({})
        sums: dict[str, Any] = {"loss": traces.digest(loss)}
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            local = local_values(parameter.grad)
            sums[name] = traces.digest(local)
            if name in wish.gradients:
                made.gradients[name] = local
            if name in wish.reference:
                made.distances[name] = distance(wish.reference[name], local)
            if not keep:
                parameter.grad = None
        made.sums = {name: int(value) for name, value in sums.items()}
        return made

    def _differences(
        self,
        sandbox: Sandbox,
        execute: Callable[[], Tensor],
        pair: Sequence[_Outcome],
        names: Sequence[str],
        wishes: Sequence[_Wish],
    ) -> list[Difference]:
        """What differs, looked at in `REPEATS` more executions."""
        at = traces.first_difference(pair[0].calls, pair[1].calls)
        # Uninitialised memory may be copied about, as long as nothing is computed from it.
        differs = bool(names) or (at is not None and not _reads_blank(pair[0].calls, at))
        if not self._agree(differs):
            return []
        look = [replace(wish, fine=True) for wish in wishes]
        first = self._once(sandbox, execute, replace(look[0], places=True, gradients=names))
        again = [
            self._once(sandbox, execute, replace(look[number % 2], reference=first.gradients))
            for number in range(1, REPEATS)
        ]
        at = _earliest([at, *(traces.first_difference(first.calls, each.calls) for each in again)])
        kept = []
        if self._agree(at is not None):
            kept = [self._once(sandbox, execute, replace(each, keep=at)) for each in look * (REPEATS // 2)]
        if not differs:
            return []  # on another rank only
        if at is not None:
            instead = _ran_instead(at, first.calls, [*(pair if wishes[0].fine else ()), *again])
            return [_operator(at, first.calls, kept, instead)]
        gradients = [self._gradient(name, again, len(names)) for name in names if name != "loss"]
        return gradients[:MOST_GRADIENTS]

    def _gradient(self, name: str, again: Sequence[_Outcome], differing: int) -> Difference:
        distances = [each.distances[name] for each in again if each.distances.get(name) is not None]
        parameter = self._parameters[name]
        return Difference(
            op="gradient",
            module=name,
            call_site=None,
            device=parameter.device.type,
            dtype=str(parameter.dtype).removeprefix("torch."),
            ulp=max((each for each in distances if each is not None), default=None),
            source=f"double execution: the gradient of this parameter, one of {differing} that differ",
        )


def _earliest(found: Sequence[int | None]) -> int | None:
    return min((each for each in found if each is not None), default=None)


def local_values(gradient: Tensor) -> Tensor:
    """What this rank holds of a gradient, as a dense tensor."""
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return (local.coalesce().values() if local.is_sparse else local).detach()


def _reads_blank(calls: Sequence[Call], at: int) -> bool:
    return at < len(calls) and calls[at].uninitialised is not None


def _ran_apart(one: _Outcome, other: _Outcome) -> bool:
    """Whether two executions ran other operators, whatever these returned."""
    return [call.op for call in one.calls] != [call.op for call in other.calls]


def _ran_instead(at: int, calls: Sequence[Call], others: Sequence[_Outcome]) -> str | None:
    """What ran in other executions in the place of call number ``at`` of ``calls``."""
    if at >= len(calls):
        return None
    ops = [each.calls[at].op if at < len(each.calls) else "nothing" for each in others]
    return next((op for op in ops if op != calls[at].op), None)


def _operator(at: int, calls: Sequence[Call], kept: Sequence[_Outcome], instead: str | None) -> Difference:
    """Call number ``at`` of placed ``calls``, or what must be meant when its arguments already differed;
    ``instead``: what ran in its place in another execution."""
    if at >= len(calls):
        return _other("operators", None, "double execution: the second one ran other operators")
    call = calls[at]
    if call.uninitialised is not None:
        maker = calls[call.uninitialised]
        source = f"double execution: {call.op} reads memory that {maker.op} left uninitialised"
        return _other(maker.op, maker, source, UNINITIALISED)
    module, site = traces.place_of(calls, call)
    if instead is not None:
        source = f"double execution: {call.op} ran in one, {instead} in its place in another"
        return replace(_other(call.op, call, source), module=module, call_site=site)
    if len({each.kept.inputs for each in kept}) > 1:
        source = f"double execution: what {call.op} was given differed, and no operator outside made it"
        return replace(_other("compiled region", call, source), module=module, call_site=site)
    results = [each.kept.outputs for each in kept]
    distances = [largest_distance(versions) for versions in zip(*results, strict=False)]
    return Difference(
        op=call.op,
        module=module,
        call_site=site,
        device=call.device,
        dtype=call.dtype,
        ulp=max((each for each in distances if each is not None), default=None),
        source="double execution: equal arguments, other bits",
    )


def _other(op: str, place: Call | None, source: str, alternative: str | None = None) -> Difference:
    device, dtype = ("cpu", "none") if place is None else (place.device, place.dtype)
    module, site = (None, None) if place is None else (place.module, place.site)
    return Difference(op, module, site, device, dtype, None, source, alternative)
