"""The tiers for a reader: as JSON, on a screen, and as what a rerun may change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.audit.tiers.rules import TITLES, Tiers

_SHOWN = 3


def document(tiers: Tiers) -> dict[str, Any]:
    """The verdict as plain JSON."""
    return {
        "verdict": tiers.headline,
        "tiers": [
            {
                "tier": each.name,
                "means": TITLES[each.name],
                "held": each.held,
                "evidence": list(each.evidence),
                "missing": list(each.missing),
                "reaches": list(each.reaches),
            }
            for each in tiers.tiers
        ],
        "contradicted_by": list(tiers.contradicted),
    }


def lines(tiers: Tiers) -> Iterator[tuple[str, str]]:
    """Label and text of the verdict for a screen: what holds and why, then what the next tier lacks."""
    means = "; ".join(TITLES[each.name] for each in tiers.told)
    yield "tier", f"{tiers.headline}{': ' if means else ''}{means}"
    for each in tiers.told:
        yield from (("", f"- {text}") for text in (*each.evidence[:_SHOWN], *each.reaches))
    if tiers.contradicted:
        yield from (("", f"- {text}") for text in tiers.contradicted[:_SHOWN])
    elif tiers.nothing is not None:
        yield "", f"- no evidence counts: {tiers.nothing}"
    elif tiers.next is not None:
        yield "next tier", f"{tiers.next.name} needs: {'; '.join(tiers.next.missing[:_SHOWN])}"


def could_vary(tiers: Tiers) -> Iterator[str]:
    """What another execution could do differently, as far as the tiers tell."""
    same, world, floor, _ = tiers.tiers
    if tiers.contradicted:
        yield f"a replay gave other bits than the record: {tiers.contradicted[0]}"
    elif tiers.nothing is not None:
        yield f"the same stack may give other bits; no evidence counts: {tiers.nothing}"
    elif not same.held:
        lacking = "; ".join(same.missing[:_SHOWN])
        yield f"the same stack may give other bits: it would take {lacking} to show that it does not"
    else:
        yield f"the same stack has given the same bits, no further than this: {'; '.join(same.reaches)}"
    if not world.held:
        yield "another number of processes adds in another order; no replay with one was equal"
    if floor.held:
        yield f"another stack gives other bits; how far they go was measured: {floor.evidence[0]}"
    else:
        yield "another stack or number of threads gives other bits, and how far they go was not measured"
