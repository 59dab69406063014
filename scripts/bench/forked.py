"""Many short runs from one process that has imported everything: each in a fork of it, some at once."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def each(
    items: Iterable[T], function: Callable[[T, Path], Any], scratch: Path, *, at_once: int = 2
) -> Iterator[tuple[T, Any]]:
    """``function(item, said)`` in a process of its own for every item, and what it returned, as JSON.

    ``said``: a file that takes the output of that process. One that dies or raises gives ``{"died": why}``.
    This process must not have used threads of torch before.
    """
    waiting: dict[int, tuple[T, int, Path]] = {}
    selector = selectors.DefaultSelector()

    def ended() -> Iterator[tuple[T, Any]]:
        for key, _ in selector.select():
            descriptor = int(key.fd)
            item, pid, said = waiting.pop(descriptor)
            selector.unregister(descriptor)
            with os.fdopen(descriptor, "rb") as stream:
                data = stream.read()
            _, status = os.waitpid(pid, 0)
            yield item, json.loads(data) if data else {"died": f"status {status}: {said.read_text()[-500:]}"}

    for number, item in enumerate(items):
        said = scratch / f"said-{number % (2 * at_once)}.txt"
        reader, writer = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            _run(function, item, said, writer)
        os.close(writer)
        waiting[reader] = item, pid, said
        selector.register(reader, selectors.EVENT_READ)
        if len(waiting) >= at_once:
            yield from ended()
    while waiting:
        yield from ended()


def prepare(function: Callable[[], Any], scratch: Path) -> None:
    """Import here what ``function`` imports when it runs in a fork, so that each later one has it already."""

    def imported(_: None, said: Path) -> list[str]:
        function()
        return list(sys.modules)

    ((_, names),) = each([None], imported, scratch)
    if isinstance(names, dict):
        raise SystemExit(names["died"])
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # Otherwise every collection in a fork walks, and so copies, the pages of all these modules.
    gc.collect()
    gc.freeze()


def _run(function: Callable[[T, Path], Any], item: T, said: Path, writer: int) -> None:
    """In the child: never returns."""
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        try:
            result = function(item, said)
        except BaseException:
            result = {"died": traceback.format_exc()[-1500:]}
        with os.fdopen(writer, "wb") as stream, contextlib.suppress(BrokenPipeError):
            stream.write(json.dumps(result).encode())
    finally:
        os._exit(0)
