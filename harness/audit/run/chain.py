"""The metrics chain, recomputed from metrics.jsonl and compared with the heads that checkpoints have signed.

- steps count from 1 without a gap or a repetition; a gap that a resume has accepted (``--accept metrics``,
  signed) ends right after the checkpoint that was resumed, and the chain restarts from its signed head; what
  checkpoints inside of the gap have signed cannot be compared
- each line's chain follows from the line before and the line's own batch, rng, loss, gradient norm and the
  digests of gradients and state that it has
- at each checkpoint, the head, the loss, the gradient norm, the digests and the newest evaluation are the
  signed ones, and so is the digest of all bytes of the launch's lines, since what a line says besides
  (learning rate, speed, time) is not in the chain (a statement of an older version does not have it)

A last line without an end belongs to a step that no checkpoint has yet.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import VerificationFailed
from harness.format import chain, strict_json

LINE_LIMIT = 1 << 20
"""Bytes of one line."""
_FLOATS = struct.Struct("<ff")


@dataclass(frozen=True)
class Anchor:
    """What a checkpoint has signed about its step's line."""

    step: int
    head: str | None
    """Hex; None when step digests were off."""
    lines: str | None
    """Hex sha256 of the launch's lines up to here; None in a statement of a version that did not sign it."""
    since: int
    """The step that the launch went on from."""
    loss: str | None
    grad_norm: str | None
    gradients: str | None
    """Hex digest; None when it was not taken at this step."""
    state: str | None
    evaluation: Mapping[str, str]
    """The newest evaluation of the launch; empty when there was none yet."""
    where: str


@dataclass(frozen=True)
class Broken:
    """A line or a checkpoint that does not fit."""

    what: str
    where: str


def check(
    lines: Iterable[bytes], anchors: Iterable[Anchor], gaps: Mapping[int, str], where: str
) -> Iterator[Broken]:
    """Every place where ``lines`` depart from the ``anchors``.

    ``gaps``: step → hex head of the checkpoints after which a signed gap is allowed.
    """
    waiting = {anchor.step: anchor for anchor in anchors}
    ahead = deque(sorted(waiting))
    gap_free = dict(gaps)
    launches = _Launches(waiting.values())
    head, last = chain.GENESIS, 0
    evaluation: Any = {}
    for number, raw in enumerate(lines, start=1):
        place = f"{where}:{number}"
        if not raw.endswith(b"\n"):
            if len(raw) > LINE_LIMIT:
                yield Broken(f"has a line of more than {LINE_LIMIT} bytes", place)
            break
        try:
            line = _line(raw, place)
        except VerificationFailed as error:
            yield Broken(error.what, place)
            return
        step = line["step"]
        allowed = last < step - 1 and step - 1 in gap_free
        if allowed:
            head = bytes.fromhex(gap_free.pop(step - 1))
        elif step != last + 1:
            yield Broken(f"step {step} follows step {last}", place)
        while ahead and ahead[0] <= last:
            ahead.popleft()
        while ahead and ahead[0] < step:
            each = ahead.popleft()
            anchor = waiting.pop(each)
            if not allowed:
                yield Broken(f"{where} has no line of step {each}", anchor.where)
        reason, head = _advance(head, line)
        if reason is not None:
            yield Broken(reason, place)
        evaluation = line.get("evaluation", evaluation)
        launches.add(step, raw)
        anchor_here = waiting.pop(step, None)
        if anchor_here is not None:
            if anchor_here.lines not in (None, launches.digest(anchor_here.since)):
                what = f"{where} has other lines up to step {step} than this checkpoint has signed"
                yield Broken(what, anchor_here.where)
            yield from _compare(anchor_here, head, {**line, "evaluation": evaluation}, where)
        last = step
    for step in sorted(waiting):
        if waiting[step].head is not None:
            yield Broken(f"{where} ends at step {last}, before this checkpoint's", waiting[step].where)


class _Launches:
    """The digest of each launch's lines, as far as they have come by."""

    def __init__(self, anchors: Iterable[Anchor]) -> None:
        last: dict[int, int] = {}
        for anchor in anchors:
            last[anchor.since] = max(anchor.step, last.get(anchor.since, 0))
        self._pending = deque(sorted(last.items()))
        self._running: dict[int, tuple[int, hashlib._Hash]] = {}

    def add(self, step: int, line: bytes) -> None:
        """A line counts for each launch that began before it and still has a checkpoint to come."""
        while self._pending and self._pending[0][0] < step:
            since, end = self._pending.popleft()
            self._running[since] = (end, hashlib.sha256())
        for since, (end, digest) in list(self._running.items()):
            if step > end:
                del self._running[since]
            else:
                digest.update(line)

    def digest(self, since: int) -> str | None:
        """Hex digest of the lines after the step ``since``; None when there are none."""
        return self._running[since][1].hexdigest() if since in self._running else None


def _line(raw: bytes, where: str) -> dict[str, Any]:
    line = strict_json.loads(raw, where=where, limit=LINE_LIMIT)
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise VerificationFailed("is no metrics line", where=where)
    return line


def _advance(head: bytes, line: Mapping[str, Any]) -> tuple[str | None, bytes]:
    """What is wrong with the line's chain, and the head to go on from: the line's own where there is one."""
    if "chain" not in line:
        return None, head
    own = _digest(line["chain"], 32)
    batch, rng = _digest(line.get("batch"), 16), _digest(line.get("rng"), 16)
    loss, norm = _number(line.get("loss")), _number(line.get("grad_norm"), absent=0.0)
    taken = {name: _digest(line[name], 32) for name in ("gradients", "state") if name in line}
    if own is None or batch is None or rng is None or loss is None or norm is None or None in taken.values():
        return "has a broken chain, batch, rng, loss, grad_norm, gradients or state", own or head
    try:
        expected = chain.advance(
            head, step=line["step"], batch=batch, rng=rng, loss=loss, grad_norm=norm, **taken
        )
    except (struct.error, OverflowError):
        return "has a number that is no float32", own
    if (loss, norm) != _FLOATS.unpack(_FLOATS.pack(loss, norm)):
        # The chain holds float32 bits, so it would not show a change below their precision.
        return "has a loss or grad_norm that is no float32", own
    if expected != own:
        return (
            f"step {line['step']} was changed: its chain does not follow from the line before and its facts",
            own,
        )
    return None, own


def _compare(anchor: Anchor, head: bytes, line: Mapping[str, Any], where: str) -> Iterator[Broken]:
    if anchor.head is None:
        return
    if head.hex() != anchor.head:
        yield Broken(f"{where} up to step {anchor.step} is not what this checkpoint has signed", anchor.where)
    for name, signed in (("loss", anchor.loss), ("grad_norm", anchor.grad_norm)):
        shown = _number(line.get(name))
        if signed is not None and shown != float(signed):
            yield Broken(
                f"{where} has {name} {shown} at step {anchor.step}, signed is {signed}", anchor.where
            )
    for name, digest in (("gradients", anchor.gradients), ("state", anchor.state)):
        if line.get(name) != digest:
            what = f"{where} has other {name} at step {anchor.step} than this checkpoint has signed"
            yield Broken(what, anchor.where)
    if anchor.evaluation and not _is_signed(line["evaluation"], anchor.evaluation):
        what = f"{where} has another evaluation up to step {anchor.step} than this checkpoint has signed"
        yield Broken(what, anchor.where)


def _is_signed(shown: Any, signed: Mapping[str, str]) -> bool:
    numbers = shown if isinstance(shown, dict) else {}
    return {name: repr(value) for name, value in numbers.items()} == dict(signed)


def _digest(value: Any, size: int) -> bytes | None:
    try:
        data = bytes.fromhex(value)
    except (TypeError, ValueError):
        return None
    return data if len(data) == size and data.hex() == value else None


def _number(value: Any, absent: float | None = None) -> float | None:
    if value is None:
        return absent
    return float(value) if type(value) in (int, float) else None
