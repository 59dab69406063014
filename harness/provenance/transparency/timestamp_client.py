"""Asking a time-stamping authority over HTTP (RFC 3161 section 3.4) for a timestamp of a log head.

The answer is checked for what needs no trust: it was granted, it is whole, it is over this head, and it
carries the number that was drawn for this request, so it is no older answer. Whether its certificate counts
is for whoever verifies, by their own policy.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any

from harness.errors import EnvironmentFault, VerificationFailed, storage_fault
from harness.format import files
from harness.provenance.transparency import log, timestamp
from harness.provenance.transparency.log import Head

SECONDS = 10.0
"""For one request, connection and answer together."""
_CUT_SECONDS = 0.05
"""Between two looks for a connection that is to be cut."""
_OTHER = "name another authority (signing.timestamp, --timestamp)"
_ASKS, _ANSWERS = "application/timestamp-query", "application/timestamp-reply"


def ask(url: str, message: bytes, *, seconds: float = SECONDS) -> bytes:
    """A timestamp of ``message``, as it is kept. Raises `EnvironmentFault` when none could be had."""
    nonce = secrets.randbits(63) | 1 << 63
    try:
        stamp = timestamp.granted(_post(url, timestamp.request(message, nonce), seconds), where=url)
        said = timestamp.opened_by_anybody(stamp, message, where=url)
    except VerificationFailed as error:
        what = f"the authority's answer {error.what}"
        raise EnvironmentFault(what, where=url, remedy=_OTHER) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        what = f"the authority did not answer: {reason}"
        raise EnvironmentFault(
            what, where=url, remedy=f"check the network and try again, or {_OTHER}"
        ) from error
    if said.nonce != nonce:
        what = "the authority's answer is not to this request: its number differs"
        raise EnvironmentFault(what, where=url, remedy=_OTHER)
    return stamp


def write(folder: Path, head: Head, url: str, *, seconds: float = SECONDS) -> None:
    """Ask ``url`` for a timestamp of ``head`` and put it into the log ``folder``.

    Raises `EnvironmentFault` when there is no good answer, or the file cannot be written.
    """
    path = folder / timestamp.path_of(head.size)
    stamp = ask(url, log.text_of(head), seconds=seconds)
    try:
        files.write_durable(path, stamp)
    except OSError as error:
        raise storage_fault(error, "writing a timestamp", path) from error


def _post(url: str, body: bytes, seconds: float) -> bytes:
    deadline = time.monotonic() + seconds
    late = TimeoutError(f"not within {seconds:g} s")
    request = urllib.request.Request(url, body, {"Content-Type": _ASKS, "Accept": _ANSWERS})
    parts, size = [], 0
    try:
        with _cut_at(deadline) as opener, opener.open(request, timeout=seconds) as answer:
            if answer.headers.get_content_type() != _ANSWERS:
                raise VerificationFailed(f"is of type {answer.headers.get_content_type()}, not {_ANSWERS}")
            # Each read has the whole time, so that a server which sends a byte now and then would never end.
            while part := answer.read1(timestamp.LIMIT):
                parts.append(part)
                size += len(part)
                if size > timestamp.LIMIT:
                    raise VerificationFailed(f"has more than {timestamp.LIMIT} bytes")
                if time.monotonic() > deadline:
                    raise late
    except (OSError, HTTPException) as error:
        # A connection that was cut fails as if the server had gone.
        raise (late if time.monotonic() > deadline else error) from error
    return b"".join(parts)


@contextmanager
def _cut_at(deadline: float) -> Iterator[urllib.request.OpenerDirector]:
    """An opener whose connections are cut from ``deadline`` on: each byte of a header has the whole time."""
    made: list[HTTPConnection] = []
    done = threading.Event()

    def cut() -> None:
        wait = deadline - time.monotonic()
        while not done.wait(max(wait, _CUT_SECONDS)):
            wait = 0.0
            for connection in made:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=cut, name="deadline", daemon=True).start()
    try:
        yield urllib.request.build_opener(_Http(made), _Https(made))
    finally:
        done.set()


class _Http(urllib.request.HTTPHandler):
    """Puts its connections into a list."""

    def __init__(self, made: list[HTTPConnection]) -> None:
        super().__init__()
        self._made = made

    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_connection, HTTPConnection, self._made), req)


class _Https(urllib.request.HTTPSHandler):
    """Puts its connections into a list."""

    def __init__(self, made: list[HTTPConnection]) -> None:
        super().__init__()
        self._made = made

    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_connection, HTTPSConnection, self._made), req)


def _connection(
    kind: type[HTTPConnection], made: list[HTTPConnection], host: str, **words: Any
) -> HTTPConnection:
    made.append(kind(host, **words))
    return made[-1]
