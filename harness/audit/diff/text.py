"""The verdict of `harness diff` as a person reads it: one line a step, facts by topic, the verdict last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.audit.diff.comparison import Result, Step
from harness.audit.diff.facts import TOPICS, Fact
from harness.audit.diff.tensors import Difference
from harness.audit.folders import story
from harness.errors import visible
from harness.terminal import style
from harness.words import counted, human_bytes

_LABEL = 13
_MOST_TENSORS = 6
_MOST_FACTS = 8
_WIDEST_VALUE = 44


def render(result: Result) -> str:
    """The whole text."""
    return "\n".join(_lines(result))


def _lines(result: Result) -> Iterator[str]:
    if result.trust is None:
        yield style(story.NOT_VERIFIED, "yellow")
    else:
        yield style(f"verified: both sides, signed by {visible(result.trust)}", "green")
    yield _line("A", str(result.plan.a))
    yield _line("B", str(result.plan.b))
    width = max(len(step.name) for step in result.steps)
    for step in result.steps:
        yield from _step(step, width)
    for side, names in (("A", result.plan.only_in_a), ("B", result.plan.only_in_b)):
        if names:
            yield _line(f"only in {side}", ", ".join(names))
    yield from _facts(result.steps)
    yield from (_line("note", note) for note in result.notes)
    yield _verdict(result)


def _step(step: Step, width: int) -> Iterator[str]:
    compared, name = step.compared, visible(step.name).ljust(width)
    amount = human_bytes(compared.bytes_compared)
    if step.equal:
        text = f"{counted(compared.tensors, 'tensor')} equal"
        yield f"{name}  {style(text, 'green')} ({amount})"
        return
    found = compared.differences
    text = f"{len(found)} of {counted(compared.tensors, 'tensor')} differ"
    yield f"{name}  {style(text, 'red')} ({amount}): {_parts(step)}"
    for difference in found[:_MOST_TENSORS]:
        yield f"    {_difference(difference)}"
    if len(found) > _MOST_TENSORS:
        yield f"    … {len(found) - _MOST_TENSORS} more: --json"


def _parts(step: Step) -> str:
    words = []
    for part, total in step.compared.counts.items():
        differing = sum(each.part == part for each in step.compared.differences)
        words.append(f"{part} {f'{differing} of {total}' if differing else 'equal'}")
    return ", ".join(words)


def _difference(difference: Difference) -> str:
    name = f"{difference.part} `{visible(difference.name)}` {difference.dtype} {list(difference.shape)}"
    if difference.differing is None:
        return f"{name}: {difference.reason}"
    first = f", first at {list(difference.first)}" if difference.first else ""
    text = f"{name}: {difference.differing:,} of {counted(difference.elements, 'element')}{first}"
    distance = difference.distance
    if distance is None:
        return text
    relative = "without a norm" if distance.relative_l2 is None else f"{distance.relative_l2:.2e}"
    text += f", up to {distance.largest_ulp:,} ULP, relative L2 {relative}"
    if distance.not_finite:
        text += f", {distance.not_finite:,} not finite"
    capped = difference.measured < difference.elements
    return text + (f" (measured: {difference.measured:,} elements; --elements)" if capped else "")


def _facts(steps: Sequence[Step]) -> Iterator[str]:
    """Every fact once, with the steps that it holds for when these are not all."""
    holds: dict[Fact, list[str]] = {}
    for step in steps:
        for fact in step.facts or ():
            holds.setdefault(fact, []).append(step.name)
    compared = [step for step in steps if step.facts is not None]
    for topic in TOPICS:
        found = sorted(fact for fact in holds if fact.topic == topic)
        if topic == "identity":
            yield from _identity(found)
        elif compared and not found:
            yield _line(topic, "equal")
        for number, fact in enumerate(found[:_MOST_FACTS] if topic != "identity" else ()):
            where = "" if len(holds[fact]) == len(compared) else f"  ({_span(holds[fact])})"
            text = f"{fact.name}: {_short(fact.a)} → {_short(fact.b)}{where}"
            yield _line("" if number else topic, text, yellow=True)
        if topic != "identity" and len(found) > _MOST_FACTS:
            yield _line("", f"… {len(found) - _MOST_FACTS} more: --json")


def _identity(found: Sequence[Fact]) -> Iterator[str]:
    """Only the names: these tell runs apart and have no part in the training."""
    if found:
        names = sorted({fact.name for fact in found})
        more = f", … {len(names) - _MOST_FACTS} more: --json" if len(names) > _MOST_FACTS else ""
        yield _line("identity", f"differs, not counted: {', '.join(names[:_MOST_FACTS])}{more}")


def _verdict(result: Result) -> str:
    steps = counted(len(result.steps), "step") if result.steps[0].step is not None else "the pair"
    first = result.first
    if first is None:
        return f"{style('equal', 'green')}  every tensor of {steps}, bit for bit"
    step, difference = first
    where = f"{step.name}, {difference.part} `{visible(difference.name)}`"
    return f"{style('different', 'red')}  first at {where}"


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}, {len(names)} in all"


def _short(text: str) -> str:
    return text if len(text) <= _WIDEST_VALUE else f"{text[: _WIDEST_VALUE - 1]}…"


def _line(label: str, text: str, *, yellow: bool = False) -> str:
    shown = visible(text)
    return f"{label.ljust(_LABEL)} {style(shown, 'yellow') if yellow else shown}"
