"""Moments as documents state them, ``2026-11-25T20:00:00Z``: the order of texts is the order of time."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from harness.errors import UsageError


def text(moment: datetime) -> str:
    """``moment``, which is in UTC, to the second."""
    return f"{moment.replace(tzinfo=None).isoformat(timespec='seconds')}Z"


def of_document() -> str:
    """When a document is made: now, or at $SOURCE_DATE_EPOCH, so that it can be made again byte for byte
    (reproducible-builds.org/specs/source-date-epoch). Raises `UsageError` for a variable that is no time."""
    told = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        return now() if told is None else text(datetime.fromtimestamp(int(told), UTC))
    except (ValueError, OverflowError, OSError) as error:
        remedy = "give whole seconds since 1970, or unset it"
        raise UsageError(f"{told!r} is no time", where="$SOURCE_DATE_EPOCH", remedy=remedy) from error


def now() -> str:
    """This moment by the clock of this machine."""
    return text(datetime.now(UTC))
