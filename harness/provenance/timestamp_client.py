"""Asking a time-stamping authority over HTTP (RFC 3161 section 3.4) for a timestamp of a log head.

The answer is checked for what needs no trust: it was granted, it is whole, it is over this head, and it
carries the number that was drawn for this request, so it is no older answer. Whether its certificate counts
is for whoever verifies, by their own policy.
"""

from __future__ import annotations

import secrets
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from harness.errors import EnvironmentFault, VerificationFailed, storage_fault
from harness.format import files
from harness.provenance import log, timestamp
from harness.provenance.log import Head

SECONDS = 10.0
"""For one request, connection and answer together."""
_ASKS, _ANSWERS = "application/timestamp-query", "application/timestamp-reply"


def ask(url: str, message: bytes, *, seconds: float = SECONDS) -> bytes:
    """A timestamp of ``message``, as it is kept. Raises `EnvironmentFault` when none could be had."""
    nonce = secrets.randbits(63) | 1 << 63
    try:
        stamp = timestamp.granted(_post(url, timestamp.request(message, nonce), seconds), where=url)
        said = timestamp.opened_by_anybody(stamp, message, where=url)
    except VerificationFailed as error:
        raise EnvironmentFault(f"the authority's answer {error.what}", where=url) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise EnvironmentFault(f"the authority did not answer: {reason}", where=url) from error
    if said.nonce != nonce:
        raise EnvironmentFault("the authority's answer is not to this request: its number differs", where=url)
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
    request = urllib.request.Request(url, body, {"Content-Type": _ASKS, "Accept": _ANSWERS})
    parts, size = [], 0
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        if answer.headers.get_content_type() != _ANSWERS:
            raise VerificationFailed(f"is of type {answer.headers.get_content_type()}, not {_ANSWERS}")
        # Each read has the whole time, so that a server which sends a byte now and then would never end.
        while part := answer.read1(timestamp.LIMIT):
            parts.append(part)
            size += len(part)
            if size > timestamp.LIMIT:
                raise VerificationFailed(f"has more than {timestamp.LIMIT} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:g} s")
    return b"".join(parts)
