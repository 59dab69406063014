"""Counts, lists, sizes and durations, as a sentence has them.

>>> counted(1, "step"), counted(1000, "process", "es")
('1 step', '1,000 processes')
>>> listed(["a", "b", "c"], 2), listed(["a: 1", "b: 2", "c: 3"], 1, "; ")
('a, b and 1 more', 'a: 1; and 2 more')
>>> human_bytes(1.5 * 2**30), human_seconds(185)
('1.5 GiB', '3 min 05 s')
"""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str, plural: str = "s") -> str:
    """``number`` and ``noun``, to which any number but 1 adds ``plural``."""
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def listed(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first ``most`` of ``items``, and how many more there are."""
    left_out = len(items) - most
    more = f"{separator.rstrip(' ,')} and {left_out} more" if left_out > 0 else ""
    return separator.join(items[:most]) + more


def human_bytes(count: float) -> str:
    """``count`` bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """``seconds`` in seconds, minutes and seconds, or hours and minutes."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
