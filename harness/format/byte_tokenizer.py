"""The tokenizer of bytes: 0 to 255 are byte values, 256 is the end of a document.

Also as a tokenizer.json, so that `tokenizers` and `transformers` read an exported model without this package:
a byte-level BPE without merges, whose 256 letters are GPT-2's printable stand-ins for bytes
(github.com/openai/gpt-2, src/encoder.py, bytes_to_unicode), each with the id of its byte. Format:
huggingface.co/docs/tokenizers, checked against that library by the tests.
"""

from __future__ import annotations

import hashlib
import json

VALUES = 256
END = VALUES
VOCABULARY = VALUES + 1
END_OF_DOCUMENT = "<|endoftext|>"
DIGEST = hashlib.sha256(b"harness byte tokenizer/1: 0-255 the byte, 256 the end of document\n").hexdigest()
"""Hex sha256 of what defines it; statements name it as ``data.tokenizer_sha256``."""

_EXACTLY = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
"""How the end of a document is found in a text: as it is written."""
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
"""Bytes that stand for themselves; the others get the letters from U+0100 on, in their order."""


def tokenizer_json() -> bytes:
    """The file, always the same bytes. Like any tokenizer.json it reads text: no byte that is not UTF-8."""
    spare = (byte for byte in range(VALUES) if byte not in _PRINTABLE)
    letters = {byte: chr(byte) for byte in _PRINTABLE} | {
        byte: chr(VALUES + number) for number, byte in enumerate(spare)
    }
    end = {"id": END, "content": END_OF_DOCUMENT, "special": True, **_EXACTLY}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {letters[byte]: byte for byte in range(VALUES)}
    document = {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
