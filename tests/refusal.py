"""For fuzzing parsers: a value, or the one exception that may come instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from harness.errors import VerificationFailed

T = TypeVar("T")


def accepted(parse: Callable[..., T], *arguments: Any) -> list[T]:
    """What ``parse(*arguments, where="there")`` returns, alone in a list; empty when it refuses.

    Any exception but `VerificationFailed` passes through and fails the test.
    """
    try:
        return [parse(*arguments, where="there")]
    except VerificationFailed as error:
        place = error.where
    assert place == "there"
    return []
