"""What a run folder must not tell: where the user's home is, who the user is, which host it was.

A run folder is handed to strangers. So a path below the home folder is written `~/…`, in run.yaml, in every
statement and in events, and read back as the reader's own: the same config then means the same run under
another home. Paths elsewhere stay as the user wrote them.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import PurePath
from typing import Any

_SHORTHAND = "~/"


def expanded(value: Any) -> Any:
    """``value`` with each string in it that begins with `~/` as a path below the home folder."""
    if isinstance(value, str):
        home = os.path.expanduser("~")
        return os.path.join(home, value[2:]) if value.startswith(_SHORTHAND) and home != "~" else value
    if isinstance(value, Mapping):
        return {name: expanded(inner) for name, inner in value.items()}
    return [expanded(item) for item in value] if isinstance(value, list) else value


def abbreviated(value: Any) -> Any:
    """``value`` with each string or path in it that lies below the home folder as `~/…`."""
    if isinstance(value, (str, PurePath)):
        text = str(value)
        below = (text[len(home) + 1 :] for home in _homes() if text.startswith(f"{home}/"))
        return next((f"{_SHORTHAND}{rest.lstrip('/')}" for rest in below), value)
    if isinstance(value, Mapping):
        return {name: abbreviated(inner) for name, inner in value.items()}
    return [abbreviated(item) for item in value] if isinstance(value, list) else value


def without_home(text: str) -> str:
    """Free ``text``, such as a command line, with the home folder as `~` wherever it stands."""
    for home in _homes():
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return text


def scrubbed(text: str) -> str:
    """Free ``text``, such as a traceback, without home folder, user name in a path, and host name."""
    text = without_home(text)
    user, host = _user(), socket.gethostname()
    if user:
        text = re.sub(rf"/{re.escape(user)}(?=/)", "/<user>", text)
    # `localhost` tells nothing, and is part of many messages.
    if len(host) > 1 and host != "localhost":
        text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "<host>", text)
    return text


def _homes() -> list[str]:
    """The home folder as it is called, and where links lead; none when it is the root or not known."""
    home = os.path.expanduser("~").rstrip("/")
    names = [home, os.path.realpath(home)] if home.startswith("/") else []
    return sorted({name for name in names if name != "/"}, key=len, reverse=True)


@cache
def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without an entry
        return None
