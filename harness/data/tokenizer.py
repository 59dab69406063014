"""How text becomes tokens: bytes, or byte-pair encoding by Hugging Face `tokenizers`.

Every document is followed by the end-of-document token. Besides tokens an encoder says how many bytes of the
document each token stands for (0 for the end of document; a document's counts add up to its length), so bits
per byte are over true bytes whatever the tokenizer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from harness.data.documents import Document
from harness.errors import ConfigError, EnvironmentFault
from harness.format import byte_tokenizer
from harness.format.byte_tokenizer import END_OF_DOCUMENT

Tokens = NDArray[np.uint32]


class Encoder(Protocol):
    """What text is tokenized with."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        ...

    @property
    def end(self) -> int:
        """The end-of-document token."""
        ...

    @property
    def digest(self) -> str:
        """Hex sha256 of what defines the encoder."""
        ...

    @property
    def file(self) -> bytes | None:
        """The tokenizer.json, or None for bytes."""
        ...

    def encode(self, document: Document) -> tuple[Tokens, Tokens]:
        """The tokens of ``document`` without the end, and the bytes that each stands for."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The text of ``tokens``, to be read; bytes that are no UTF-8 become U+FFFD."""
        ...


class ByteEncoder:
    """A token for each of the 256 byte values, and 256 for the end of a document."""

    vocabulary = byte_tokenizer.VOCABULARY
    end = byte_tokenizer.END
    digest = byte_tokenizer.DIGEST
    file = None

    def encode(self, document: Document) -> tuple[Tokens, Tokens]:
        """The bytes themselves."""
        tokens = np.frombuffer(document.text, dtype=np.uint8).astype(np.uint32)
        return tokens, np.ones_like(tokens)

    def decode(self, tokens: list[int]) -> str:
        """The bytes as UTF-8; an end of document is U+2402."""
        parts = (bytes([each]) if each < byte_tokenizer.VALUES else "\u2402".encode() for each in tokens)
        return b"".join(parts).decode("utf-8", "replace")


class BpeEncoder:
    """A Hugging Face tokenizer.json.

    Raises `EnvironmentFault` without `tokenizers`, `ConfigError` when ``file`` is none or has no
    end-of-document token ``<|endoftext|>``.
    """

    def __init__(self, file: bytes, where: str) -> None:
        try:
            self._tokenizer: Any = _tokenizers().Tokenizer.from_buffer(file)
        except ValueError as error:
            raise ConfigError(
                f"not a tokenizer.json: {error}", where=where, remedy="check tokenizer.file"
            ) from error
        # A file may ask for these: all would lose text or read "<|endoftext|>" in a document as its end.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        end = self._tokenizer.token_to_id(END_OF_DOCUMENT)
        if end is None:
            raise ConfigError(
                f"tokenizer has no token {END_OF_DOCUMENT}",
                where=where,
                remedy="add it to its special tokens",
            )
        self.end: int = end
        # Not the number of tokens: a vocabulary may have holes, and ids must fit the embedding.
        self.vocabulary: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.file = file
        self.digest = hashlib.sha256(file).hexdigest()

    def encode(self, document: Document) -> tuple[Tokens, Tokens]:
        """Tokens, each with the bytes from where the ones before ended to where it ends.

        The last takes what follows it, so bytes that a normaliser drops are counted too.
        """
        text = decoded(document)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        tokens = np.array(encoding.ids, dtype=np.uint32)
        if not tokens.size:
            raise ConfigError(
                "tokenizer makes no token of a document",
                where=document.name,
                remedy="use another tokenizer.file",
            )
        ends = _byte_positions(text)[[end for _, end in encoding.offsets]]
        ends[-1] = len(document.text)
        covered = np.maximum.accumulate(ends)
        return tokens, np.diff(covered, prepend=0).astype(np.uint32)

    def decode(self, tokens: list[int]) -> str:
        """As the tokenizer's own decoder writes them, special tokens by name."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))


def train_bpe(documents: Iterable[Document], vocabulary: int) -> bytes:
    """A byte-level BPE tokenizer.json of ``vocabulary`` tokens; the same bytes for the same documents.

    Raises `ConfigError` when the vocabulary is too small to hold the bytes and the end of document.
    """
    library = _tokenizers()
    if vocabulary <= byte_tokenizer.VOCABULARY:
        raise ConfigError(
            f"tokenizer.vocabulary {vocabulary} leaves no room for merges", remedy="set at least 258"
        )
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator((decoded(document) for document in documents), trainer)
    return str(tokenizer.to_str()).encode()


def read_tokenizer(path: Path) -> bytes:
    """The bytes of a tokenizer.json. Raises `ConfigError` when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"tokenizer.file cannot be read ({error.strerror})", where=str(path)) from error


def library_version() -> str:
    """Version of `tokenizers`: another one may cut the same text differently."""
    return str(_tokenizers().__version__)


def decoded(document: Document) -> str:
    """The text of ``document``. Raises `ConfigError` when it is not UTF-8."""
    try:
        return document.text.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"document is not UTF-8: {error.reason} at byte {error.start}",
            where=document.name,
            remedy="use tokenizer.kind=bytes",
        ) from error


def _byte_positions(text: str) -> NDArray[np.int64]:
    """The byte offset in UTF-8 of every character of ``text``, and of its end."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate(([0], np.cumsum(sizes)))


def _tokenizers() -> Any:
    # Its own default prints a warning into every loader process that is forked later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: F401  submodules, loaded on demand
    except ImportError as error:
        raise EnvironmentFault(
            "tokenizer.kind bpe needs tokenizers", remedy="pip install 'harness[train]'"
        ) from error
    return tokenizers
