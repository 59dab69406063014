"""Tokenizers, the token cache and token shards."""

from __future__ import annotations

import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from harness.data.cache import prepare
from harness.data.documents import Document
from harness.data.tokenizer import BpeEncoder, ByteEncoder, train_bpe
from harness.data.tokens import TokenData, Windows
from harness.errors import ConfigError, EnvironmentFault, VerificationFailed
from harness.settings import Data, Tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "class Café:\n    naïve = '数字 🙂'\n",
    "for x in range(10): pass\n",
] * 20
DOCUMENTS = [Document(f"{number}", text.encode()) for number, text in enumerate(TEXTS)]
TRAINED = train_bpe(DOCUMENTS, 300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty small text files."""
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(f"document {number}: " + TEXTS[number % 3] * 3)
    return tmp_path


def prepared(folder: Path, tokenizer: Tokenizer | None = None, **fields: Any) -> TokenData:
    data = Data(**{"kind": "text", "files": ["*.txt"], "validation": 0.2, "cache": Path("cache"), **fields})
    return prepare(data, tokenizer or Tokenizer(), folder)


def entry(folder: Path) -> Path:
    """The one entry of the cache."""
    (only,) = [path for path in (folder / "cache").iterdir() if path.is_dir()]
    return only


@given(st.binary(min_size=1))
def test_bytes_are_their_own_tokens(text: bytes) -> None:
    """Oracle: the bytes, each standing for one."""
    tokens, sizes = ByteEncoder().encode(Document("d", text))
    assert bytes(tokens.tolist()) == text
    assert (sizes == 1).all()


@settings(deadline=None)
@given(st.text(min_size=1, max_size=80))
def test_bpe_tokens_decode_to_the_text_and_count_its_bytes(text: str) -> None:
    """Oracle: the library's own decoder, and the length in UTF-8 (also inside a character)."""
    raw = text.encode("utf-8", "ignore")
    if not raw:
        return
    tokens, sizes = BpeEncoder(TRAINED, "trained").encode(Document("d", raw))
    library = tokenizers.Tokenizer.from_buffer(TRAINED)
    assert library.decode(tokens.tolist(), skip_special_tokens=False).encode() == raw
    assert len(tokens) == len(sizes)
    assert sizes.sum() == len(raw)


def test_the_end_of_document_written_in_a_text_is_text() -> None:
    """Oracle: the end's id is not among the tokens of a text that spells it."""
    encoder = BpeEncoder(TRAINED, "trained")
    tokens, sizes = encoder.encode(Document("d", b"a <|endoftext|> b"))
    assert encoder.end not in tokens
    assert sizes.sum() == 17


def test_a_tokenizer_that_truncates_or_pads_loses_nothing() -> None:
    """Oracle: the number of bytes of a text longer than the truncation."""
    library = tokenizers.Tokenizer.from_buffer(TRAINED)
    library.enable_truncation(4)
    library.enable_padding(length=64)
    tokens, sizes = BpeEncoder(library.to_str().encode(), "own").encode(DOCUMENTS[0])
    assert sizes.sum() == len(DOCUMENTS[0].text)
    assert len(tokens) != 64


def test_a_normaliser_does_not_change_the_bytes_counted() -> None:
    """Oracle: the document's length, with a normaliser that strips and lowers."""
    library = tokenizers.Tokenizer.from_buffer(TRAINED)
    library.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Strip(), tokenizers.normalizers.Lowercase()]
    )
    text = b"   Some TEXT with spaces   \n\n"
    _, sizes = BpeEncoder(library.to_str().encode(), "own").encode(Document("d", text))
    assert sizes.sum() == len(text)


def test_training_is_deterministic() -> None:
    """Oracle: the same bytes from the same documents, in this process and in one with a single thread."""
    assert train_bpe(DOCUMENTS, 300) == TRAINED
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, initializer=_use_one_thread) as pool:
        assert pool.apply(train_bpe, (DOCUMENTS, 300)) == TRAINED


def _use_one_thread() -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{}", "not a tokenizer.json"), (b"\xff", "not a tokenizer.json"), (b"[1]", "not a")],
)
def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    """Oracle: the documented error, naming the file."""
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"{message}.*tokenizer.json"):
        prepared(tmp_path, Tokenizer(kind="bpe", file=Path("tokenizer.json")))


def test_a_tokenizer_without_an_end_of_document_is_an_error() -> None:
    """Oracle: the documented error."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(ConfigError, match=r"no token <\|endoftext\|>"):
        BpeEncoder(library.to_str().encode(), "own.json")


def test_text_that_is_not_utf8_is_named() -> None:
    """Oracle: the document's name."""
    with pytest.raises(ConfigError, match=r"not UTF-8.*: latin\.py"):
        BpeEncoder(TRAINED, "trained").encode(Document("latin.py", b"caf\xe9"))


def test_the_stream_is_the_documents_with_ends_between(folder: Path) -> None:
    """Oracle: the files split at token 256, each in exactly one of the two halves."""
    tokens = prepared(folder)
    halves = []
    for array in (tokens.train[0], tokens.held_out[0]):
        assert array.dtype == np.uint16
        assert array[0] == array[-1] == 256
        halves.append(
            [bytes(part[:-1].tolist()) for part in np.split(array, np.flatnonzero(array == 256) + 1)[1:-1]]
        )
    expected = sorted(path.read_bytes() for path in folder.glob("*.txt"))
    assert sorted(halves[0] + halves[1]) == expected
    assert halves[0]
    assert halves[1]
    assert tokens.counts["documents"] == len(halves[0])
    assert tokens.counts["held_out_bytes"] == sum(map(len, halves[1])) == tokens.held_out_bytes[0].sum()  # type: ignore[index]


def test_the_cache_is_used_the_second_time_and_says_the_same(folder: Path) -> None:
    """Oracle: the first time's arrays; the files were not written again."""
    first = prepared(folder, Tokenizer(kind="bpe", vocabulary=300))
    written = {path: path.stat().st_mtime_ns for path in entry(folder).iterdir()}
    second = prepared(folder, Tokenizer(kind="bpe", vocabulary=300))
    assert {path: path.stat().st_mtime_ns for path in entry(folder).iterdir()} == written
    assert (first.train[0] == second.train[0]).all()
    assert first.tokenizer == second.tokenizer
    assert first.tokenizer_file == second.tokenizer_file is not None
    assert first.counts == second.counts


def test_another_corpus_split_or_tokenizer_is_another_entry(folder: Path) -> None:
    """Oracle: the number of entries."""
    prepared(folder)
    prepared(folder, validation=0.3)
    prepared(folder, limit_bytes=2000)
    prepared(folder, Tokenizer(kind="bpe", vocabulary=300))
    prepared(folder, Tokenizer(kind="bpe", vocabulary=301))
    (folder / "00.txt").write_text("changed")
    prepared(folder)
    assert sum(path.is_dir() for path in (folder / "cache").iterdir()) == 6


@pytest.mark.parametrize(
    "name", ["train.bin", "held-out.bin", "held-out-bytes.bin", "tokenizer.json", "tokens.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_cache_is_refused_with_the_remedy(folder: Path, name: str, damage: str) -> None:
    """Oracle: any changed byte, a shorter file and a missing one are all refused, naming file and folder."""
    tokenizer = Tokenizer(kind="bpe", vocabulary=300)
    prepared(folder, tokenizer)
    path = entry(folder) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-2])
    with pytest.raises(VerificationFailed, match=rf"damaged \({name}\): .*cache.*delete this folder"):
        prepared(folder, tokenizer)


def test_processes_that_race_make_one_entry(folder: Path) -> None:
    """Oracle: four processes at once end well and agree; no temporary folder is left."""
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        digests = pool.starmap(_train_digest, [(folder,)] * 4)
    assert len(set(digests)) == 1
    assert not list((folder / "cache").glob(".tmp-*"))
    assert entry(folder).is_dir()


def test_what_a_killed_process_left_is_removed(folder: Path) -> None:
    """Oracle: the temporary folder of the same entry is gone after the next making."""
    prepared(folder)
    made = entry(folder)
    made.rename(made.with_name(f".tmp-{made.name}-dead"))
    prepared(folder)
    assert [path for path in (folder / "cache").iterdir() if path.is_dir()] == [made]


def _train_digest(folder: Path) -> bytes:
    return prepared(folder).train[0].tobytes()


def test_a_split_that_holds_out_nothing_or_all_is_an_error(folder: Path) -> None:
    """Oracle: the documented errors, with the number of documents."""
    with pytest.raises(ConfigError, match="holds out none of 40 documents"):
        prepared(folder, validation=0.0001)
    with pytest.raises(ConfigError, match="no document is left"):
        prepared(folder, validation=0.9999)
    assert len(prepared(folder, validation=0.0).held_out[0]) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(1, 12))
def test_windows_predict_every_token_once_and_never_cross_arrays(lengths: list[int], length: int) -> None:
    """Oracle: plain slices of each array."""
    arrays = tuple(
        np.arange(start * 1000, start * 1000 + size, dtype=np.uint16) for start, size in enumerate(lengths)
    )
    expected = [
        array[start : start + length + 1].tolist()
        for array in arrays
        for start in range(0, len(array) - length, length)
    ]
    windows = Windows(arrays, length)
    assert windows.count == len(expected)
    if expected:
        order = np.random.default_rng(0).permutation(len(expected))
        assert windows.gather(order).tolist() == [expected[index] for index in order]


def write_shard(path: Path, tokens: Any, metadata: dict[str, str], sizes: Any = None) -> None:
    tensors = {"tokens": np.asarray(tokens)} | ({} if sizes is None else {"bytes": np.asarray(sizes)})
    save_file(tensors, path, metadata)


def test_shards_are_mapped_as_they_are(tmp_path: Path) -> None:
    """Oracle: the arrays that safetensors' own writer wrote."""
    write_shard(
        tmp_path / "a.safetensors", np.arange(9, dtype=np.uint16), {"vocabulary": "9", "split": "train"}
    )
    held_out = {"vocabulary": "9", "split": "held-out"}
    write_shard(
        tmp_path / "b.safetensors", np.arange(5, dtype=np.uint32), held_out, np.ones(5, dtype=np.uint8)
    )
    tokens = prepared(tmp_path, kind="tokens", files=["*.safetensors"])
    assert [array.tolist() for array in tokens.train] == [list(range(9))]
    assert [array.tolist() for array in tokens.held_out] == [list(range(5))]
    assert tokens.held_out_bytes is not None
    assert tokens.vocabulary == 9
    assert tokens.tokenizer is None
    assert list(tokens.files) == ["a.safetensors", "b.safetensors"]


GOOD = {"vocabulary": "9", "split": "train"}


def test_more_shards_than_a_process_may_open_are_refused_with_the_limit(tmp_path: Path) -> None:
    """Oracle: the limits that this test sets, at the first of which the folder cannot even be listed; with
    the old one they are all mapped."""
    for number in range(40):
        write_shard(tmp_path / f"{number:02}.safetensors", np.arange(9, dtype=np.uint16), GOOD)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)  # files below it are open: those of this process and its tests
    os.close(lowest)
    for more, where in ((0, f"{tmp_path}; "), (20, "")):
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + more, hard))
        try:
            with pytest.raises(EnvironmentFault, match=f"{where}raise the limit"):
                prepared(tmp_path, kind="tokens", files=["*.safetensors"])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(prepared(tmp_path, kind="tokens", files=["*.safetensors"]).train) == 40


@pytest.mark.parametrize(
    ("tokens", "metadata", "message"),
    [
        (np.arange(9, dtype=np.int64), GOOD, "I64"),
        (np.arange(8, dtype=np.uint16).reshape(2, 4), GOOD, "1-D"),
        (np.arange(10, dtype=np.uint16), GOOD, "token 9 is outside the vocabulary 9"),
        (np.arange(9, dtype=np.uint16), {"split": "train"}, "`vocabulary` is ''"),
        (np.arange(9, dtype=np.uint16), {"vocabulary": "-9", "split": "train"}, "`vocabulary` is '-9'"),
        (np.arange(9, dtype=np.uint16), {"vocabulary": "9"}, "`split` is None"),
        (
            np.arange(9, dtype=np.uint16),
            {"vocabulary": "9", "split": "held-out"},
            "no shard has the split train",
        ),
        (np.arange(9, dtype=np.uint16), {**GOOD, "tokenizer": "ab" * 32}, "made with the tokenizer abab"),
    ],
)
def test_a_bad_shard_is_an_error(tmp_path: Path, tokens: Any, metadata: dict[str, str], message: str) -> None:
    """Oracle: the message of each fault."""
    write_shard(tmp_path / "a.safetensors", tokens, metadata)
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, kind="tokens", files=["*.safetensors"])


def test_bytes_that_are_all_zero_are_an_error(tmp_path: Path) -> None:
    """Oracle: the documented error; bits per byte would be a division by zero."""
    tokens, sizes = np.arange(9, dtype=np.uint16), np.zeros(9, dtype=np.uint8)
    write_shard(tmp_path / "a.safetensors", tokens, {**GOOD, "split": "held-out"}, sizes)
    with pytest.raises(ConfigError, match="`bytes` are all 0"):
        prepared(tmp_path, kind="tokens", files=["*.safetensors"])


def test_shards_name_the_configured_tokenizer(tmp_path: Path) -> None:
    """Oracle: the digest of the byte tokenizer is accepted, and is the identity's."""
    metadata = {**GOOD, "vocabulary": "257", "tokenizer": ByteEncoder.digest}
    write_shard(tmp_path / "a.safetensors", np.arange(9, dtype=np.uint16), metadata)
    assert prepared(tmp_path, kind="tokens", files=["*.safetensors"]).tokenizer == ByteEncoder.digest
