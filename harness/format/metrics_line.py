"""A line of metrics.jsonl, as far as anybody must read it before it is verified: its step."""

from __future__ import annotations

import orjson


def step_of(line: bytes) -> int | None:
    """The step of a complete line; None for a line that was cut off."""
    if not line.endswith(b"\n"):
        return None
    try:
        step = orjson.loads(line)["step"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
