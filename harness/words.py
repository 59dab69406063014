"""Counts, lists, sizes and durations, as a sentence has them."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str, plural: str = "s") -> str:
    """``1 step``, ``1,000 steps``; ``plural`` is what more than one add to ``noun``."""
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def listed(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first ``most`` of ``items``, and how many more there are: ``a, b and 3 more``."""
    left_out = len(items) - most
    more = f"{separator.rstrip(' ,')} and {left_out} more" if left_out > 0 else ""
    return separator.join(items[:most]) + more


def human_bytes(count: float) -> str:
    """``count`` bytes with a binary unit: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """``seconds`` as ``12 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
