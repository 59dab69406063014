"""Documents: found, checked, digested, cut at the limit and held out."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data.corpus import open_corpus
from harness.data.documents import Document
from harness.errors import ConfigError, EnvironmentFault, HarnessError, VerificationFailed
from harness.settings import Data

OWN_CORPUS = """
from harness.data.documents import Document

class Poems:
    def __init__(self, data, base):
        self.base = base
    def names(self):
        return ["b", "a"]
    def read(self, name):
        return (self.base / name).read_bytes()
    def documents(self, name, content):
        for number, line in enumerate(content.splitlines()):
            yield Document(f"{name}:{number}", line)
"""


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """``files`` under ``folder``."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def documents(folder: Path, **fields: Any) -> list[tuple[str, bytes]]:
    """Names and texts of the corpus with these settings."""
    corpus = open_corpus(Data(**fields), folder)
    return [(document.name, document.text) for document in corpus.documents()]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages folder with the installed package ``poems``."""
    files = {
        "poems/b.py": "b = 1\n",
        "poems/a.py": "a = 'é'\n",
        "poems/empty.py": "",
        "poems/version.py": "v = 1\n",
    }
    files |= {"poems/data.txt": "not code"}
    write(tmp_path, files)
    rows = []
    for name, text in files.items():
        digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        rows.append(f"{name},sha256={digest},{len(text.encode())}")
    record = "\n".join([*rows, "../../bin/poems.py,sha256=AAAA,1", "poems-1.dist-info/RECORD,,"])
    metadata = "Metadata-Version: 2.1\nName: poems\nVersion: 1\n"
    write(tmp_path, {"poems-1.dist-info/METADATA": metadata, "poems-1.dist-info/RECORD": record})
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_wheel_is_its_modules_in_sorted_order_without_build_stamps(wheel: Path) -> None:
    """Oracle: the files written; version.py, data, scripts and the empty module give no document."""
    assert documents(wheel, packages=["poems"]) == [
        ("poems/a.py", "a = 'é'\n".encode()),
        ("poems/b.py", b"b = 1\n"),
    ]


def test_files_that_differ_from_record_are_all_named(wheel: Path) -> None:
    """Oracle: the names of the two files changed."""
    write(wheel, {"poems/a.py": "a = 2\n", "poems/b.py": "b = 2\n"})
    with pytest.raises(VerificationFailed, match=r"2 files differ .*: poems/a.py, poems/b.py"):
        open_corpus(Data(packages=["poems"]), wheel)


def test_a_module_that_is_gone_is_named(wheel: Path) -> None:
    """Oracle: the name of the file deleted."""
    (wheel / "poems/b.py").unlink()
    with pytest.raises(VerificationFailed, match=r"poems/b.py is listed in RECORD"):
        open_corpus(Data(packages=["poems"]), wheel)


@pytest.mark.parametrize(
    "row", ["poems/b.py,,", "poems/b.py,md5=AAAA,3", "poems/b.py,sha256=é,3", "poems/b.py"]
)
def test_a_module_without_a_sha256_cannot_be_checked(wheel: Path, row: str) -> None:
    """Oracle: the same error as for a wrong digest."""
    write(wheel, {"poems-1.dist-info/RECORD": row})
    with pytest.raises(VerificationFailed, match=r"poems/b\.py"):
        open_corpus(Data(packages=["poems"]), wheel)


def test_a_missing_package_says_how_to_get_it(wheel: Path) -> None:
    """Oracle: the pip command."""
    with pytest.raises(EnvironmentFault, match="pip install no-such-package"):
        open_corpus(Data(packages=["no-such-package"]), wheel)


def test_the_installed_torch_matches_its_record(tmp_path: Path) -> None:
    """Oracle: the publisher's digests, in the RECORD of the wheel."""
    corpus = open_corpus(Data(packages=["torch"], limit_bytes=300_000), tmp_path)
    assert sum(len(document.text) for document in corpus.documents()) == 300_000
    assert "torch/version.py" not in corpus.files


def test_the_digest_is_over_sorted_names_and_digests(tmp_path: Path) -> None:
    """Oracle: the documented formula, computed here."""
    write(tmp_path, {"b.txt": "two\n", "a.txt": "one\n"})
    corpus = open_corpus(Data(kind="text", files=["*.txt"]), tmp_path)
    sums = {
        name: hashlib.sha256(text).hexdigest() for name, text in (("a.txt", b"one\n"), ("b.txt", b"two\n"))
    }
    assert dict(corpus.files) == sums
    lines = f"a.txt\0{sums['a.txt']}\nb.txt\0{sums['b.txt']}\n"
    assert corpus.digest == hashlib.sha256(lines.encode()).hexdigest()


def test_a_moved_folder_is_the_same_corpus(tmp_path: Path) -> None:
    """Oracle: the digest of the same files elsewhere."""
    digests = set()
    for place in ("here", "there"):
        folder = write(tmp_path / place, {"x/a.txt": "one\n"})
        digests.add(open_corpus(Data(kind="text", files=["x/*.txt"]), folder).digest)
    assert len(digests) == 1


def test_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    """Oracle: the pieces joined are the file; each but the last is 64 KiB or a little more, at a line end."""
    text = "".join(f"line {number} of a long book\n" for number in range(12_000))
    found = documents(write(tmp_path, {"a.txt": text}), kind="text", files=["a.txt"])
    assert b"".join(piece for _, piece in found) == text.encode()
    assert [name for name, _ in found] == [f"a.txt#{number}" for number in range(len(found))]
    assert all(piece.endswith(b"\n") and 1 << 16 <= len(piece) < (1 << 16) + 40 for _, piece in found[:-1])


def test_jsonl_takes_the_field_of_each_line(tmp_path: Path) -> None:
    """Oracle: the texts written."""
    lines = [json.dumps({"body": "one", "text": 1}), "", json.dumps({"body": "é\u2028two"})]
    write(tmp_path, {"a.jsonl": "\n".join(lines)})
    found = documents(tmp_path, kind="jsonl", files=["a.jsonl"], field="body")
    assert found == [("a.jsonl:1", b"one"), ("a.jsonl:3", "é\u2028two".encode())]


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"text": 1}', "nul", '{"text": "\\ud800"}', "[" * 100_000]
)
def test_a_bad_line_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    """Oracle: file and line in the error."""
    write(tmp_path, {"a.jsonl": '{"text": "good"}\n' + line})
    with pytest.raises(ConfigError, match=r"a\.jsonl:2"):
        documents(tmp_path, kind="jsonl", files=["a.jsonl"])


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_documents_or_a_known_error(content: bytes) -> None:
    """Oracle: no exception but the harness's own, from the JSON lines and the parquet reader."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), {"a": content})
        for kind in ("jsonl", "parquet"):
            with contextlib.suppress(HarnessError):
                documents(Path(folder), kind=kind, files=["a"])


def test_parquet_takes_the_column(tmp_path: Path) -> None:
    """Oracle: the rows written by pyarrow."""
    table = pyarrow.table({"text": ["one", "two"], "n": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = documents(tmp_path, kind="parquet", files=["*.parquet"])
    assert found == [("a.parquet:0", b"one"), ("a.parquet:1", b"two")]
    with pytest.raises(ConfigError, match="no column 'body'"):
        documents(tmp_path, kind="parquet", files=["*.parquet"], field="body")


@pytest.fixture(scope="module", params=["none", "snappy", "zstd"])
def good_parquet(request: pytest.FixtureRequest) -> bytes:
    """A parquet file, in each of the usual compressions."""
    buffer = io.BytesIO()
    table = pyarrow.table({"text": [f"text {number} " * 9 for number in range(60)]})
    pyarrow.parquet.write_table(table, buffer, compression=request.param)
    return buffer.getvalue()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_parquet_file_is_documents_or_one_line_with_its_name(
    good_parquet: bytes, data: st.DataObject
) -> None:
    """Oracle: no exception but the harness's own, of one line, naming the file."""
    place = data.draw(st.integers(0, len(good_parquet) - 1))
    byte = data.draw(st.integers(0, 255))
    damaged = good_parquet[:place] + bytes([byte]) + good_parquet[place + 1 :]
    if data.draw(st.booleans()):
        damaged = good_parquet[:place]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.parquet").write_bytes(damaged)
        said = "a.parquet"
        try:
            documents(Path(folder), kind="parquet", files=["a.parquet"])
        except HarnessError as error:
            said = str(error)
        assert "a.parquet" in said
        assert "\n" not in said


def test_a_file_that_vanished_is_an_error_with_its_name(tmp_path: Path) -> None:
    """Oracle: the documented error."""
    write(tmp_path, {"a.txt": "one"})
    corpus = open_corpus(Data(kind="text", files=["a.txt"]), tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ConfigError, match=r"file cannot be read .*a\.txt"):
        list(corpus.documents())


def test_a_folder_with_brackets_in_its_name_is_searched(tmp_path: Path) -> None:
    """Oracle: the document written."""
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    write(folder, {"a.txt": "one"})
    assert documents(folder, kind="text", files=["*.txt"]) == [("a.txt#0", b"one")]


@pytest.mark.parametrize("files", [[], ["nothing-*.txt"], ["gone.txt"], ["."]])
def test_a_missing_file_or_an_empty_pattern_is_an_error(tmp_path: Path, files: list[str]) -> None:
    """Oracle: the documented error."""
    with pytest.raises(ConfigError, match="`files`"):
        open_corpus(Data(kind="text", files=files), tmp_path)


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=60), st.integers(1, 80))
def test_the_limit_cuts_at_a_character(text: str, limit: int) -> None:
    """Oracle: the longest prefix of characters that fits."""
    raw = text.encode("utf-8", "ignore")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), {"a.txt": raw})
        found = documents(Path(folder), kind="text", files=["a.txt"], limit_bytes=limit)
    assert b"".join(piece for _, piece in found) == raw[:limit].decode("utf-8", "ignore").encode()


def test_files_beyond_the_limit_are_not_part_of_the_corpus(tmp_path: Path) -> None:
    """Oracle: the files that the first 10 bytes come from."""
    write(tmp_path, {"a.txt": "12345\n", "b.txt": "123456\n", "c.txt": "123"})
    corpus = open_corpus(Data(kind="text", files=["*.txt"], limit_bytes=10), tmp_path)
    assert list(corpus.files) == ["a.txt", "b.txt"]
    assert [document.text for document in corpus.documents()] == [b"12345\n", b"1234"]


def test_a_file_that_changes_after_it_was_digested_is_an_error(tmp_path: Path) -> None:
    """Oracle: the name of the file."""
    corpus = open_corpus(Data(kind="text", files=["a.txt"]), write(tmp_path, {"a.txt": "one"}))
    write(tmp_path, {"a.txt": "two"})
    with pytest.raises(VerificationFailed, match=r"a\.txt"):
        list(corpus.documents())


def test_the_held_out_share_is_about_what_was_asked_and_independent_of_the_rest() -> None:
    """Oracle: a binomial of 4,000 at 0.1 is within 5 standard deviations (95) of 400."""
    found = [Document(f"{number}", b"x").held_out(0.1) for number in range(4000)]
    assert abs(sum(found) - 400) < 95
    assert not any(Document(f"{number}", b"x").held_out(0.0) for number in range(100))


def test_an_own_corpus_is_read_in_its_order_and_its_code_is_part_of_it(tmp_path: Path) -> None:
    """Oracle: its names in its order; another source file gives another digest."""
    write(tmp_path, {"poems_corpus.py": OWN_CORPUS, "a": "one\ntwo", "b": "three"})
    corpus = open_corpus(Data(kind="poems_corpus:Poems"), tmp_path)
    assert [document.name for document in corpus.documents()] == ["b:0", "a:0", "a:1"]
    assert set(corpus.files) == {"a", "b", "poems_corpus:Poems"}


def test_an_unknown_kind_names_the_nearest(tmp_path: Path) -> None:
    """Oracle: the suggestion."""
    with pytest.raises(ConfigError, match=r"data.kind 'jsnl' is not known; did you mean 'jsonl'\?"):
        open_corpus(Data(kind="jsnl"), tmp_path)
