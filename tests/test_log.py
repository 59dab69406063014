"""The transparency log: RFC 6962 hashing, C2SP tiles and signed notes, each beside another oracle."""

from __future__ import annotations

import base64
import hashlib
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import accepted

from harness.errors import EvidenceIncomplete, UsageError, VerificationFailed
from harness.format import files
from harness.provenance.signing import keys
from harness.provenance.signing.keys import Signer
from harness.provenance.transparency import log, merkle, tiles

SIGNER = Signer(Ed25519PrivateKey.generate(), None)
KEYS = keys.public_keys(SIGNER)
STRANGER = Signer(Ed25519PrivateKey.generate(), None)
ORIGIN = "harness/run/0123"

VECTOR = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def leaves(count: int) -> list[bytes]:
    """Distinct leaf hashes."""
    return [merkle.leaf_hash(str(number).encode()) for number in range(count)]


def root_by_stack(hashes: list[bytes]) -> bytes:
    """The root by merging equal heights from the left, RFC 9162 section 2.1.2: another way than ours."""
    stack: list[bytes] = []
    for number, leaf in enumerate(hashes):
        stack.append(leaf)
        while number & 1:
            right, left = stack.pop(), stack.pop()
            stack.append(hashlib.sha256(b"\x01" + left + right).digest())
            number >>= 1
    while len(stack) > 1:
        right, left = stack.pop(), stack.pop()
        stack.append(hashlib.sha256(b"\x01" + left + right).digest())
    return stack[0] if stack else hashlib.sha256(b"").digest()


@pytest.mark.parametrize("size", range(1, 9))
def test_the_root_is_that_of_certificate_transparency(size: int) -> None:
    """Oracle: the test vector of google/certificate-transparency, merkle_tree_test."""
    assert merkle.root_hash([merkle.leaf_hash(record) for record in VECTOR[:size]]).hex() == ROOTS[size - 1]


def test_the_empty_tree_is_the_digest_of_nothing() -> None:
    """Oracle: RFC 6962 section 2.1."""
    assert merkle.root_hash([]) == hashlib.sha256(b"").digest()


@given(st.integers(0, 300))
@settings(deadline=None, max_examples=50)
def test_the_root_is_that_of_another_algorithm(size: int) -> None:
    """Oracle: the stack algorithm."""
    assert merkle.root_hash(leaves(size)) == root_by_stack(leaves(size))


def test_a_note_is_signed_as_gos_note_package_signs() -> None:
    """Oracle: the example key of golang.org/x/mod/sumdb/note: PeterNeumann has the key hash c74f20a3."""
    seed = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
    signer = Signer(Ed25519PrivateKey.from_private_bytes(seed), None)
    text, signature = log.sign_note(log.Head(5, bytes(32), "PeterNeumann"), signer).decode().split("\n\n")
    dash, name, encoded = signature.removesuffix("\n").split(" ")
    assert (dash, name) == ("\N{EM DASH}", "PeterNeumann")
    assert base64.b64decode(encoded)[:4].hex() == "c74f20a3"
    signer.ed25519.public_key().verify(base64.b64decode(encoded)[4:], f"{text}\n".encode())


@given(st.integers(0, 2**53), st.binary(min_size=32, max_size=32), st.sampled_from([ORIGIN, "a", "ä/1"]))
@settings(deadline=None, max_examples=50)
def test_a_head_is_read_back_from_its_note(size: int, root: bytes, origin: str) -> None:
    """Oracle: the head itself; a stranger's key does not open it."""
    head = log.Head(size, root, origin)
    note = log.sign_note(head, SIGNER)
    assert log.open_note(note, KEYS, where="x") == head
    with pytest.raises(VerificationFailed, match="signed by none"):
        log.open_note(note, keys.public_keys(STRANGER), where="x")


def test_a_note_may_have_signatures_of_others() -> None:
    """Oracle: c2sp.org/signed-note: unknown signatures are ignored, one known suffices."""
    head = log.Head(5, bytes(32), ORIGIN)
    text, ours = log.sign_note(head, SIGNER).decode().split("\n\n")
    witness = log.sign_note(head, STRANGER).decode().split("\n\n")[1]
    assert log.open_note(f"{text}\n\n{witness}{ours}".encode(), KEYS, where="x") == head


NOTE = log.sign_note(log.Head(1234, bytes(range(32)), ORIGIN), SIGNER)


@given(st.integers(0, len(NOTE) - 1), st.integers(0, 255))
@settings(deadline=None, max_examples=500)
def test_a_changed_byte_never_changes_the_head(place: int, value: int) -> None:
    """Oracle: what still opens is the same head; else our exception, no other."""
    data = bytearray(NOTE)
    data[place] = value
    for head in accepted(log.open_note, bytes(data), KEYS):
        assert head == log.Head(1234, bytes(range(32)), ORIGIN)


@given(st.binary(max_size=80) | st.text("\n— a1=Zz+", max_size=80).map(str.encode))
@settings(deadline=None, max_examples=500)
def test_any_bytes_are_no_note(data: bytes) -> None:
    """Oracle: nobody guesses a note; no other exception than ours."""
    with pytest.raises(VerificationFailed):
        log.open_note(data, KEYS, where="x")


def test_the_root_of_a_prefix_is_the_root_of_its_records() -> None:
    """Oracle: `root_hash`, which RFC 6962's recursion defines."""
    records = tuple(str(number).encode() for number in range(70))
    book = log.Log(log.Head(70, b""), records)
    for size in range(71):
        assert book.root_of_prefix(size) == merkle.root_hash(leaves(size))
    for size in (-1, 71):
        with pytest.raises(VerificationFailed, match=f"has 70 records, not {size}"):
            book.root_of_prefix(size)


def test_a_log_is_read_back_as_it_was_appended(tmp_path: Path) -> None:
    """Oracle: the records, and the head that each append returned as the root of that prefix."""
    records = [f"record {number}".encode() for number in range(9)] + [b""]
    heads = [log.append(tmp_path / "log", record, SIGNER, ORIGIN) for record in records]
    book = log.read(tmp_path / "log", KEYS)
    assert book.records == tuple(records)
    assert book.head == heads[-1]
    for head in heads:
        assert book.root_of_prefix(head.size) == head.root
    with pytest.raises(VerificationFailed, match="has 10 records, not 11"):
        book.root_of_prefix(11)


def test_a_record_that_an_append_has_left_is_not_entered_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the records; the disk failed after the head had its name, and the append is tried again."""
    log.append(tmp_path / "log", b"one", SIGNER, ORIGIN)
    sync = files.fsync_folder

    def failing(path: Path) -> None:
        if path == tmp_path / "log":
            raise OSError(5, "Input/output error")
        sync(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "fsync_folder", failing)
        with pytest.raises(OSError, match="Input/output"):
            log.append(tmp_path / "log", b"two", SIGNER, ORIGIN)
    log.append(tmp_path / "log", b"two", SIGNER, ORIGIN)
    assert log.read(tmp_path / "log", KEYS).records == (b"one", b"two")


def quick(path: Path, data: bytes) -> None:
    """`files.write_durable` without waiting for a disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_tiles_lie_and_hold_what_c2sp_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: c2sp.org/tlog-tiles: 256 hashes a tile, `.p/W` for a partial one, level 1 over full tiles."""
    monkeypatch.setattr(files, "write_durable", quick)
    folder = tmp_path / "log"
    for number in range(258):
        log.append(folder, str(number).encode(), SIGNER, ORIGIN)
    hashes = leaves(258)
    assert (folder / "tile" / "0" / "000").read_bytes() == b"".join(hashes[:256])
    assert (folder / "tile" / "0" / "001.p" / "2").read_bytes() == b"".join(hashes[256:])
    assert (folder / "tile" / "1" / "000.p" / "1").read_bytes() == root_by_stack(hashes[:256])
    assert (folder / "tile" / "entries" / "001.p" / "2").read_bytes() == b"\0\x03256\0\x03257"
    assert (folder / "tile" / "entries" / "000").read_bytes().startswith(b"\0\x010\0\x011")
    assert log.read(folder, KEYS).head.root == root_by_stack(hashes)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 300, 511, 512, 65_535, 65_536, 65_537])
def test_the_newest_tiles_have_the_root_of_all_records(size: int) -> None:
    """Oracle: `root_hash` over all leaves, and each tile that `hash_tiles` cuts out of them."""
    edge = tiles.Edge()
    for number in range(size):
        edge.add(str(number).encode())
    hashes = leaves(size)
    assert edge.root() == merkle.root_hash(hashes)
    whole = tiles.hash_tiles(hashes)
    newest = {path: data for path, data in edge.files().items() if "entries" not in path}
    assert newest == {path: whole[path] for path in newest}
    assert len(newest) == len({path.split("/")[1] for path in whole})


def test_an_append_reads_and_leaves_the_newest_tiles_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the files of a log of that size, all of them, and those that were opened meanwhile."""
    monkeypatch.setattr(files, "write_durable", quick)
    folder = tmp_path / "log"
    for number in range(600):
        log.append(folder, str(number).encode(), SIGNER, ORIGIN)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"checkpoint", *tiles.paths(600)}
    opened: list[str] = []
    read = files.read_limited
    monkeypatch.setattr(
        files, "read_limited", lambda path, limit: opened.append(path.name) or read(path, limit)
    )
    log.append(folder, b"600", SIGNER, ORIGIN)
    assert sorted(opened) == ["2", "88", "88", "checkpoint"]


@pytest.mark.parametrize("name", ["tile/0/000.p/2", "tile/entries/000.p/2"])
def test_an_append_refuses_newest_tiles_that_the_head_does_not_sign(tmp_path: Path, name: str) -> None:
    """Oracle: the log that is left as it was."""
    folder = tmp_path / "log"
    log.append(folder, b"one", SIGNER, ORIGIN)
    head = log.append(folder, b"two", SIGNER, ORIGIN)
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(VerificationFailed, match="newest tile"):
        log.append(folder, b"three", SIGNER, ORIGIN)
    assert log.open_note((folder / "checkpoint").read_bytes(), KEYS, where="x") == head


def test_a_log_that_grows_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the newer log; the append removed the tiles that the first head names."""
    folder = tmp_path / "log"
    log.append(folder, b"one", SIGNER, ORIGIN)
    parse = log.open_note

    def slow(data: bytes, trusted: object, *, where: str) -> log.Head:
        head = parse(data, KEYS, where=where)
        if head.size == 1:
            monkeypatch.setattr(log, "open_note", parse)
            log.append(folder, b"two", SIGNER, ORIGIN)
        return head

    monkeypatch.setattr(log, "open_note", slow)
    assert log.read(folder, KEYS).records == (b"one", b"two")


def test_an_append_that_was_cut_off_is_ignored_and_then_overwritten(tmp_path: Path) -> None:
    """Oracle: the head decides: entries beyond it do not count, and do not stop the next append."""
    folder = tmp_path / "log"
    log.append(folder, b"one", SIGNER, ORIGIN)
    before = shutil.copytree(folder, tmp_path / "before")
    log.append(folder, b"lost", SIGNER, ORIGIN)
    shutil.copytree(before, folder, dirs_exist_ok=True)
    assert log.read(folder, KEYS).records == (b"one",)
    log.append(folder, b"two", SIGNER, ORIGIN)
    assert log.read(folder, KEYS).records == (b"one", b"two")


def test_a_log_of_somebody_else_is_not_continued(tmp_path: Path) -> None:
    """Oracle: another key or origin is refused, and the log stays as it was."""
    folder = tmp_path / "log"
    log.append(folder, b"one", SIGNER, ORIGIN)
    with pytest.raises(VerificationFailed, match="signed by none"):
        log.append(folder, b"two", STRANGER, ORIGIN)
    with pytest.raises(VerificationFailed, match="the log is that of"):
        log.append(folder, b"two", SIGNER, "harness/run/other")
    assert log.read(folder, KEYS).records == (b"one",)


def test_a_record_is_at_most_65535_bytes(tmp_path: Path) -> None:
    """Oracle: the two length bytes of tlog-tiles."""
    assert log.append(tmp_path / "log", b"x" * 65535, SIGNER, ORIGIN).size == 1
    with pytest.raises(UsageError, match="over the limit"):
        log.append(tmp_path / "log", b"x" * 65536, SIGNER, ORIGIN)


def test_a_log_without_head_is_evidence_that_is_incomplete(tmp_path: Path) -> None:
    """Oracle: tiles alone are signed by nobody."""
    log.append(tmp_path / "log", b"one", SIGNER, ORIGIN)
    (tmp_path / "log" / "checkpoint").unlink()
    with pytest.raises(EvidenceIncomplete, match="is missing"):
        log.read(tmp_path / "log", KEYS)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_changed_byte_in_any_file_of_the_log_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Oracle: the log before; what reads at all has the same records and head."""
    folder = tmp_path_factory.mktemp("log")
    for record in (b"one", b"two", b"three"):
        log.append(folder, record, SIGNER, ORIGIN)
    good = log.read(folder, KEYS)
    parts = [folder / "checkpoint", folder / "tile/entries/000.p/3", folder / "tile/0/000.p/3"]
    path = data.draw(st.sampled_from(parts))
    changed = bytearray(path.read_bytes())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(changed))
    try:
        assert log.read(folder, KEYS) == good
    except VerificationFailed:
        assert path.is_file()
    shutil.rmtree(folder)
