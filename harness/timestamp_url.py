"""``https://HOST/PATH``: where a time-stamping authority answers. Nothing secret: configs are signed."""

from __future__ import annotations

import re

FORM = "https://HOST[:PORT]/PATH or http://… (no user, no question mark: configs are signed and shown)"
_URL = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[A-Za-z0-9._~%/=+-]*)?")


def is_valid(url: str) -> bool:
    """Whether ``url`` is one. Plain HTTP is as good: the answer is signed, and compared with the question."""
    return _URL.fullmatch(url) is not None
