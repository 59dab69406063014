"""``s3://BUCKET/PREFIX``: where a store is. Nothing secret, and nothing that a shell may mistake."""

from __future__ import annotations

import re

FORM = "s3://BUCKET/PREFIX (letters, digits, . _ = - and /)"
_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9_=-][A-Za-z0-9._=-]*)*)/?")


def parse(url: str) -> tuple[str, str | None] | None:
    """Bucket and prefix, which may be absent; None for anything else."""
    match = _URL.fullmatch(url)
    return None if match is None else (match[1], match[2].strip("/") or None)
