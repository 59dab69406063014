"""Ranks that execute alike, although one of them may raise: none then waits for it in a collective for ever.

Before each collective of a pass the ranks meet over the control group. One whose pass has raised says so
there (`Meeting.left`), the others leave their passes as well (`PartedError`), and all meet at the end. The
collective is never begun, its group stays whole, and it does not matter what carries it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from harness.determinism.census import ObserverMode, fitting
from harness.workers import Workers

_COLLECTIVE, _QUESTION, _LEFT, _END = b"c", b"q", b"l", b"e"
"""Where a rank is: about to call a collective, to hear what any rank says, out of a pass that raised, or at
the end of its passes."""
_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "c10d_functional"})


class PartedError(Exception):
    """Another rank is not where this one is, since a pass of it has raised."""


class Meeting:
    """See the module. Every rank has one, and all call it alike until one of them leaves its passes."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.needed = False
        """Whether the passes were seen to communicate."""

    def together(self, execute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """``execute``, a pass; before each of its collectives the ranks meet, and `PartedError` is raised
        in it when another one has left."""
        if self._workers.world_size == 1:
            return execute

        def executed() -> Tensor:
            with fitting(_Before)(self._collective):
                return execute()

        return executed

    def any(self, mine: bool) -> bool:
        """Whether any rank says so. Raises `PartedError` when another one has left its passes."""
        return b"1" in self._met(_QUESTION, b"%d" % mine)

    def left(self, reason: str) -> None:
        """A pass of this rank has raised, for this ``reason``."""
        with suppress(PartedError):
            self._met(_LEFT, reason.encode())

    def ended(self, data: bytes) -> list[bytes]:
        """The ``data`` of every rank, when all have come to the end of their passes or have left them."""
        while True:
            with suppress(PartedError):  # those who were elsewhere know now, and come
                return self._met(_END, data)

    def _collective(self) -> None:
        self.needed = True
        self._met(_COLLECTIVE, b"")

    def _met(self, place: bytes, data: bytes) -> list[bytes]:
        found = self._workers.gather_bytes(place + data)
        others = [rank for rank, each in enumerate(found) if each[:1] != place]
        left = [f"rank {rank}: {found[rank][1:].decode()}" for rank in others if found[rank][:1] == _LEFT]
        if others:
            raise PartedError(left[0] if left else f"rank {others[0]} executed something else")
        return [each[1:] for each in found]


class _Before(ObserverMode):
    """Calls ``meet`` before each collective."""

    def __init__(self, meet: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._meet = meet

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Meet, then make the call."""
        if isinstance(func, torch._ops.OpOverload) and func.namespace in _COLLECTIVES:
            self._meet()
        return func(*args, **(kwargs or {}))
