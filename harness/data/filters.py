"""What is done to a document's text, and why it is dropped: pure functions of its bytes and its name."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from harness.data import chat
from harness.data.documents import Document
from harness.data.recipe import Filters, Format
from harness.data.tokenizer import decoded


def formatted(document: Document, how: Format) -> bytes:
    """The text of ``document`` as ``how`` says; of a chat, the messages.

    Raises `ConfigError` when it must be UTF-8, or a chat, and is not.
    """
    if how == Format():
        return document.text
    if how.chat is not None:
        messages = chat.parse(document.text, document.name)
        return chat.written([{**each, "content": _cleaned(each["content"], how)} for each in messages])
    text = _cleaned(decoded(document), how)
    # Not str.format: the text may hold braces, and a template must reach nothing else.
    places = {"{text}": text, "{name}": document.name}
    return re.sub(r"\{(?:text|name)\}", lambda found: places[found[0]], how.template).encode()


def _cleaned(text: str, how: Format) -> str:
    if how.newlines == "lf":
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if how.unicode == "nfc":
        text = unicodedata.normalize("NFC", text)
    if how.strip:
        text = text.strip()
    return text


@dataclass(frozen=True)
class Sieve:
    """The filters that look at one document alone; duplicates are found later, over all."""

    filters: Filters

    @property
    def names(self) -> list[str]:
        """Every reason that `reason` may give, in the order in which they are asked."""
        chosen = self.filters
        named = [f"shorter than {chosen.min_bytes} bytes"]
        named += [f"longer than {chosen.max_bytes} bytes"] if chosen.max_bytes is not None else []
        named += [f"ASCII share below {chosen.ascii_share!r}"] if chosen.ascii_share else []
        return named + [f"matches {pattern}" for pattern in dict.fromkeys(chosen.drop)]

    def reason(self, text: bytes) -> str | None:
        """Why a document is dropped, or None when it stays."""
        chosen = self.filters
        if len(text) < chosen.min_bytes:
            return f"shorter than {chosen.min_bytes} bytes"
        if chosen.max_bytes is not None and len(text) > chosen.max_bytes:
            return f"longer than {chosen.max_bytes} bytes"
        if chosen.ascii_share and ascii_share(text) < chosen.ascii_share:
            return f"ASCII share below {chosen.ascii_share!r}"
        # Bytes that are no UTF-8 are matched as what they are, one character each.
        readable = text.decode("utf-8", "surrogateescape") if chosen.drop else ""
        found = (pattern for pattern in chosen.drop if re.search(pattern, readable))
        return next((f"matches {pattern}" for pattern in found), None)


def ascii_share(text: bytes) -> float:
    """Share of bytes below 128; 1 for no text."""
    return 1 - len(text.translate(None, bytes(range(128)))) / len(text) if text else 1.0
