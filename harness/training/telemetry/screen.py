"""What a person sees of a run: the first screen, then a bar on a terminal or a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from harness.checkpoint.publisher import Commit
from harness.errors import visible
from harness.terminal import give_up, style, tell
from harness.words import human_bytes, human_seconds

_BAR_SECONDS = 0.1
_LINE_SECONDS = 1.0
"""Least time between two progress lines when nobody watches a terminal."""


class Screen:
    """Speaks for rank 0; silent elsewhere."""

    def __init__(self, *, visible: bool) -> None:
        self._visible = visible
        self._bar: tqdm[Any] | None = None
        self._unit = ""
        self._last = 0
        self._every = 1
        self._drawn = -_LINE_SECONDS
        self._started = time.monotonic()
        self._first = 0
        # The checkpoint writer speaks from its own thread.
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """One line."""
        if not self._visible:
            return
        with self._lock:
            if self._bar is not None:
                self._show(partial(self._bar.write, text, file=sys.stderr))
            else:
                self._show(partial(print, text, flush=True))

    def _show(self, draw: Callable[[], object]) -> None:
        """``draw``; the run goes on without a screen when the pipe, the log's disk or the terminal is gone,
        and its files tell the rest."""
        try:
            draw()
        except OSError as error:
            stream = sys.stdout if self._bar is None else sys.stderr
            self._visible, self._bar = False, None
            give_up(stream)
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                text = f"nothing more is shown on stdout ({error.strerror}); the run goes on: harness watch"
                tell(f"harness: {text}", sys.stderr)

    def table(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """The first screen: what, its value, and where it came from."""
        width = max(len(name) for name, _, _ in rows)
        for name, value, origin in rows:
            where = style(f"  ({visible(origin)})", "dim") if origin else ""
            self.say(f"{style(f'{name:<{width}}', 'bold')}  {visible(value)}{where}")

    def begin(self, first: int, last: int, unit: str, every: int) -> None:
        """Steps ``first + 1`` to ``last`` are about to run; a log gets a line every so many steps."""
        self._first, self._last, self._unit, self._every = first, last, unit, every
        self._started = time.monotonic()
        if self._visible and sys.stderr.isatty():
            layout = "{percentage:3.0f}% {bar:24} {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=last, initial=first, bar_format=layout, file=sys.stderr, leave=True)

    def step(
        self, step: int, loss: float, rate: float, mfu: float | None, scores: Mapping[str, float] | None
    ) -> None:
        """Step ``step`` is recorded; a bar moves at most ten times a second, a log grows once a second."""
        if not self._visible:
            return
        now = time.monotonic()
        waited = now - self._drawn >= (_LINE_SECONDS if self._bar is None else _BAR_SECONDS)
        due = step == self._last or (waited and (self._bar is not None or step % self._every == 0))
        self._drawn = now if due else self._drawn
        if due and self._bar is not None:
            with self._lock:
                self._bar.n = step
                self._show(partial(self._bar.set_postfix_str, self._numbers(step, loss, rate, mfu)))
        elif due:
            self.say(f"step {step:>6}/{self._last}  {self._numbers(step, loss, rate, mfu)}")
        if scores is not None:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            self.say(f"step {step:>6}  evaluation  {shown}")

    def saved(self, commit: Commit) -> None:
        """A checkpoint is on disk, signed and logged."""
        self.say(
            f"step {commit.step:>6}  checkpoint  {commit.name}  id {commit.checkpoint[:12]}  "
            f"{human_bytes(commit.size)}  {commit.seconds:.2f} s in the background"
        )

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._show(self._bar.close)
            self._bar = None

    def _numbers(self, step: int, loss: float, rate: float, mfu: float | None) -> str:
        done = step - self._first
        left = (time.monotonic() - self._started) / max(done, 1) * (self._last - step)
        share = f"  MFU {mfu:.1%}" if mfu is not None else ""
        return f"loss {loss:.4f}  {rate:,.0f} {self._unit}s/s{share}  {human_seconds(left)} left"
