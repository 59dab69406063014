"""Moments as documents state them, ``2026-11-25T20:00:00Z``: the order of texts is the order of time."""

from __future__ import annotations

from datetime import UTC, datetime


def text(moment: datetime) -> str:
    """``moment``, which is in UTC, to the second."""
    return f"{moment.replace(tzinfo=None).isoformat(timespec='seconds')}Z"


def now() -> str:
    """This moment by the clock of this machine."""
    return text(datetime.now(UTC))
