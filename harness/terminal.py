"""Colour, progress and Ctrl-C on a terminal, and neither colour nor progress where nobody looks.

Colour obeys https://no-color.org and appears only on a terminal. Progress goes to stderr.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any, Literal

from harness.errors import visible
from harness.words import human_bytes

Style = Literal["red", "green", "yellow", "bold", "dim"]

_CODES: dict[Style, str] = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}
STOPPED = "harness: stopped by the keyboard"
INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as the shell gives it."""

_COLOURS = re.compile(r"(\x1b\[[0-9]+m)")
_IMPORTING = "<frozen importlib._bootstrap>"
"""The file that frames of Python's import system name."""
_REDRAW_SECONDS = 0.1
_BAR_WIDTH = 24


def open_streams() -> None:
    """Make stdout and stderr fit to write to, whoever has started the process.

    Both are UTF-8, as what is redirected into a file has to be (a log head, HTML), with escapes for a name
    that is no Unicode. A closed descriptor is opened on nothing, since the next file that is opened would
    get its number, and everything that is printed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def give_up(stream: IO[str]) -> None:
    """Send what is still in ``stream`` nowhere: its reader has left, or its disk is full.

    Else the interpreter would write it at its end once more, and fail once more.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(text: str, stream: IO[str]) -> None:
    """One line on ``stream``, at once. Work goes on when nobody can read it any more."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        give_up(stream)


@contextmanager
def keyboard() -> Iterator[None]:
    """Ctrl-C within the block raises `KeyboardInterrupt`, once, where this process can bear it.

    While a module is imported it ends the process with one line: the C++ of torch imports Python modules, and
    aborts at an exception from there. So does a second Ctrl-C, after which nobody waits for what the first
    one cleans up. Where Ctrl-C is ignored or has another handler, it stays so.
    """
    heard = False

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if heard or _imports(frame):
            # stderr may be in the middle of a line of its own, and must not be entered twice.
            os.write(2, f"{STOPPED}\n".encode())
            os._exit(INTERRUPTED)
        heard = True
        raise KeyboardInterrupt

    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _imports(frame: FrameType | None) -> bool:
    """Whether ``frame`` was called, over however many others, by the import of a module."""
    while frame is not None and frame.f_code.co_filename != _IMPORTING:
        frame = frame.f_back
    return frame is not None


def coloured(stream: IO[str]) -> bool:
    """Whether ``stream`` is a terminal that wants colour."""
    return "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb" and stream.isatty()


def style(text: str, name: Style, stream: IO[str] | None = None) -> str:
    """``text`` in a colour when ``stream`` (stdout by default) shows colours, else unchanged."""
    if not coloured(stream or sys.stdout):
        return text
    return f"\x1b[{_CODES[name]}m{text}\x1b[0m"


def shown(text: str) -> str:
    """Lines of ``text`` with nothing in them that a terminal would obey or hide but our own colours; whoever
    made it has seen to that for what comes from strangers, and this is for what was forgotten."""
    if all(line.isprintable() for line in text.split("\n")):
        return text
    parts = _COLOURS.split(text) if coloured(sys.stdout) else [text]
    return "".join(
        part if number % 2 else "\n".join(map(visible, part.split("\n"))) for number, part in enumerate(parts)
    )


def json_text(value: Any, *, indent: int | None = None) -> str:
    """``value`` as JSON that stdout can write and a terminal shows: with escapes for what does not print, for
    a name in it that is no Unicode, as a file's need not be, and for what is beyond stdout's encoding."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    if not all(line.isprintable() for line in text.split("\n")):
        text = "".join(
            each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text
        )
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, indent=indent)
    return text


class Progress:
    """A bar on stderr that counts bytes or items; silent when ``visible`` is false."""

    def __init__(self, total: int, unit: str, label: str, visible: bool) -> None:
        self._total = max(total, 1)
        self._unit = unit
        self._label = label
        self._visible = visible
        self._done = 0
        self._drawn = 0.0

    def advance(self, count: int) -> None:
        """``count`` more of the total are done."""
        self._done += count
        now = time.monotonic()
        if self._visible and (now - self._drawn > _REDRAW_SECONDS or self._done >= self._total):
            self._drawn = now
            self._draw()

    def _draw(self) -> None:
        share = min(self._done / self._total, 1.0)
        filled = round(share * _BAR_WIDTH)
        amount = human_bytes(self._done) if self._unit == "B" else f"{self._done} {self._unit}"
        bar = "█" * filled + "░" * (_BAR_WIDTH - filled)
        sys.stderr.write(f"\r{self._label} {bar} {share:4.0%} {amount}\x1b[K")
        sys.stderr.flush()

    def clear(self) -> None:
        """Remove the bar from the screen."""
        if self._visible and self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


@contextmanager
def progress(total: int, unit: str, label: str, *, quiet: bool = False) -> Iterator[Progress]:
    """A progress bar for ``total`` of ``unit`` (``"B"`` for bytes); shown on a terminal unless ``quiet``."""
    bar = Progress(total, unit, label, visible=sys.stderr.isatty() and not quiet)
    try:
        yield bar
    finally:
        bar.clear()
