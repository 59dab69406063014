"""How far honest executions of the same steps end apart: the noise floor that a replay is held against.

A segment is executed plainly, then once for each honest perturbation (other threads, other instruction sets,
another order of additions), which computes the same mathematics in other roundings. For every tensor of the
state (parameters, buffers, averages, moments of the optimizer), with 2-norms over the segment::

    distance(w') = |w' - w| / |update of w|            w: the plain execution, w': another one
    floor        = the largest distance of a perturbation, at least half a unit in the last place of w

- a perturbation counts when its bits are neither those of the plain execution nor those of another one
- the record lies within the floor when no tensor, nor the model as a whole, is farther than `FACTOR` floors
- at least `LEAST` perturbations must count, or nothing is said
- the least change that would have been found is executed, not computed: the learning rate is raised by the
  `RATES` and one value of one sample is changed, under the same rule; when no rate is found, nothing is said
- it is weak when the precision is not fp32, or when a learning rate 0.1 % higher or the value is not found
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from harness.words import listed

LEAST = 5
"""Perturbations with bits of their own from which a floor counts."""
FACTOR = 3
"""Times the floor, up to which a distance may be honest."""
RATES = ("0.1", "0.01", "0.001", "0.0001", "0.00001")
"""Shares by which the learning rate is raised, to see which of them is found."""
SMALL = Decimal("0.001")
MEASURE = "|w' - w| / |update of w|, 2-norm of each tensor over the segment"
MODEL = "model."
"""How the names of the model's own tensors begin; others are the optimizer's, averages and buffers."""
_WIDEST = 1e300
_SHOWN = 3


@dataclass(frozen=True)
class Scale:
    """What the distances of a tensor are measured by, from the plain execution."""

    update: float
    """2-norm of what the segment has changed."""
    size: float
    """2-norm of the tensor after it."""
    roundoff: float
    """2-norm of half a unit in the last place of each element."""

    @property
    def unit(self) -> float:
        """The update; the tensor itself where there was none."""
        return self.update or self.size or 1.0


Gaps = Mapping[str, float]
"""Tensor → 2-norm of what it is away from the plain execution's."""


@dataclass(frozen=True)
class Execution:
    """One more execution of the segment."""

    name: str
    """``2 threads``, ``learning rate`` …"""
    bits: str
    """Digest of the state that it ended with."""
    gaps: Gaps


@dataclass(frozen=True)
class Measured:
    """Everything that was executed."""

    precision: str
    steps: tuple[int, int]
    bits: str
    """Of the plain execution."""
    scales: Mapping[str, Scale]
    recorded: Gaps
    """From the plain execution to the record."""
    perturbed: Sequence[Execution]
    changed: Sequence[tuple[str, str, Execution]]
    """What was changed on purpose, by how much, and what came of it."""


def distances(gaps: Gaps, scales: Mapping[str, Scale]) -> dict[str, float]:
    """Tensor → distance; a gap that is no number is the widest."""
    return {name: _finite(gap / scales[name].unit) for name, gap in gaps.items()}


def whole(gaps: Gaps, scales: Mapping[str, Scale]) -> float:
    """The distance of the model's tensors together; counters of the optimizer would hide them."""
    names = [name for name in gaps if name.startswith(MODEL)]
    unit = math.hypot(*(scales[name].update for name in names)) or 1.0
    return _finite(math.hypot(*(_finite(gaps[name]) for name in names)) / unit)


def own(measured: Measured) -> list[Execution]:
    """The perturbations with bits of their own, each once."""
    known, kept = {measured.bits}, []
    for each in measured.perturbed:
        if each.bits not in known:
            known.add(each.bits)
            kept.append(each)
    return kept


def floors(members: Sequence[Execution], scales: Mapping[str, Scale]) -> dict[str, float]:
    """Tensor → floor."""
    told = [distances(each.gaps, scales) for each in members]
    return {
        name: max([scale.roundoff / scale.unit, *(each[name] for each in told)])
        for name, scale in scales.items()
    }


def ratio(gaps: Gaps, floor: Mapping[str, float], scales: Mapping[str, Scale]) -> float:
    """The largest distance over what the rule allows; above 1 it is found."""
    told = distances(gaps, scales)
    return max((_share(told[name], FACTOR * floor[name]) for name in told), default=0.0)


def document(measured: Measured) -> dict[str, Any]:
    """The field ``floor`` of a replay's statement; numbers as decimal strings."""
    members, scales = own(measured), measured.scales
    floor = floors(members, scales)
    told = distances(measured.recorded, scales)
    tried: list[dict[str, Any]] = [
        {"what": what, "size": size, "ratio": _text(found), "found": found > 1}
        for what, size, each in measured.changed
        for found in (ratio(each.gaps, floor, scales),)
    ]
    rates = [Decimal(each["size"]) for each in tried if each["what"] == "learning rate" and each["found"]]
    # Only as small as everything above it was found, too.
    least = min((each for each in rates if _all_found(tried, each)), default=None)
    others = all(each["found"] for each in tried if each["what"] != "learning rate")
    overall = max((whole(each.gaps, scales) for each in members), default=0.0)
    first, last = measured.steps
    return {
        "measure": MEASURE,
        "measured": _text(overall),
        "bound": _text(FACTOR * overall),
        "samples": len(members),
        "source": f"steps {first + 1} to {last}, executed {1 + len(measured.perturbed)} times",
        "precision": measured.precision,
        "weak": measured.precision != "fp32" or least is None or least > SMALL or not others,
        "distance": _text(whole(measured.recorded, scales)),
        "tensors": [
            {"name": name, "floor": _text(floor[name]), "distance": _text(told[name])} for name in scales
        ],
        "members": list(_members(measured, members)),
        "detectable": {
            "what": "learning rate",
            "least": None if least is None else str(least),
            "tried": tried,
        },
    }


def _all_found(tried: Sequence[Mapping[str, Any]], least: Decimal) -> bool:
    return all(
        each["found"] for each in tried if each["what"] == "learning rate" and Decimal(each["size"]) >= least
    )


def _members(measured: Measured, members: Sequence[Execution]) -> Iterator[dict[str, Any]]:
    """Every perturbation; ``apart``: whether the floor of the others alone would have called it outside."""
    for each in measured.perturbed:
        others = floors([other for other in members if other is not each], measured.scales)
        apart = ratio(each.gaps, others, measured.scales) > 1
        distance = _text(whole(each.gaps, measured.scales))
        yield {"name": each.name, "distance": distance, "own": each in members, "apart": apart}


def unusable(floor: Mapping[str, Any]) -> str | None:
    """Why the floor of a statement says nothing; None: it does. Decided by its numbers."""
    if floor["samples"] < LEAST:
        return f"{floor['samples']} independent perturbations, {LEAST} are the least"
    if floor.get("distance") is None or not floor.get("tensors"):
        return "no distance from the record"
    if floor.get("detectable", {"least": None})["least"] is None:
        return "none of the known changes was found, so the floor is too wide to say anything"
    return None


def beyond(floor: Mapping[str, Any]) -> str | None:
    """What of the record lies beyond the rule; None when nothing does."""
    wide = [
        each["name"]
        for each in floor["tensors"]
        if Decimal(each["distance"]) > FACTOR * Decimal(each["floor"])
    ]
    if wide:
        return f"beyond the floor in {listed(wide, _SHOWN)}"
    if Decimal(floor["distance"]) > FACTOR * Decimal(floor["measured"]):
        return f"a distance of {floor['distance']}, and a floor of {floor['measured']}"
    return None


def lacks(floor: Mapping[str, Any]) -> str | None:
    """Why the floor of a statement does not show that the replay lies within it; None: it does."""
    return unusable(floor) or beyond(floor)


def says(floor: Mapping[str, Any]) -> str:
    """The floor, what it would have found, and how weak it is, in one line."""
    least = floor["detectable"]
    found = (
        f"would have found {least['what']} {least['least']}" if least["least"] else "finds no known change"
    )
    weak = f"; weak, since {floor.get('precision')} has a wide floor" if floor.get("weak") else ""
    return (
        f"distance {floor['distance']} of the update, floor {floor['measured']} from "
        f"{floor['samples']} perturbations; {found}{weak}"
    )


def lines(floor: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and text of a measured floor for a screen."""
    yield "floor", says(floor)
    for each in floor["members"]:
        note = "" if each["own"] else ", no bits of its own: not counted"
        note += ", beyond the floor of the others" if each["own"] and each["apart"] else ""
        yield "", f"{each['name']}: {each['distance']}{note}"
    for each in floor["detectable"]["tried"]:
        found = "found" if each["found"] else "NOT found"
        yield "changed", f"{each['what']}, {each['size']}: {found}, {each['ratio']} of what is allowed"
    widest = max(floor["tensors"], key=lambda each: _allowed(each), default=None)
    if widest is not None:
        told = f"distance {widest['distance']}, floor {widest['floor']}"
        yield "nearest", f"{widest['name']}: {told}, {_allowed(widest):.2g} of what is allowed"


def _allowed(tensor: Mapping[str, Any]) -> float:
    return _share(float(tensor["distance"]), FACTOR * float(tensor["floor"]))


def _share(part: float, allowed: float) -> float:
    return 0.0 if part == 0 else _finite(part / allowed if allowed else math.inf)


def _finite(value: float) -> float:
    return min(value, _WIDEST) if not math.isnan(value) else _WIDEST


def _text(value: float) -> str:
    return f"{value:.3e}"
