"""A transparency log in a folder: every checkpoint's statement, in order, under one signed head.

Formats, so that other tools read it: C2SP tlog-tiles (c2sp.org/tlog-tiles) for hashes and entries, a C2SP
tlog-checkpoint in a signed note (c2sp.org/signed-note, Ed25519) for the head, RFC 6962 hashing.

    LOG/checkpoint                    origin, size, root; signed
    LOG/tile/0/000, …/000.p/5         256 leaf hashes, or the newest partial tile
    LOG/tile/entries/000, …/000.p/5   the records, each after its length as two big-endian bytes

The head is written last. An append that was cut off leaves entries beyond the head, which readers ignore and
the next append writes anew.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

from harness.errors import EvidenceIncomplete, UsageError, VerificationFailed
from harness.format import files
from harness.provenance.signing.keys import PublicKey, Signer, public_keys, sign_with
from harness.provenance.transparency import tiles
from harness.provenance.transparency.merkle import leaf_hash, node_hash, root_hash
from harness.provenance.transparency.tiles import Edge

HEAD = "checkpoint"
RECORD_LIMIT = 0xFFFF
NOTE_LIMIT = 1 << 20
_ED25519_NOTE = b"\x01"
"""Signature type of Ed25519 in a signed note."""


@dataclass(frozen=True)
class Head:
    """The size of a log and the root hash of its tree."""

    size: int
    root: bytes
    origin: str = ""


@dataclass(frozen=True)
class Log:
    """A log whose head is signed by an accepted key and agrees with its records and tiles."""

    head: Head
    records: tuple[bytes, ...]

    @cached_property
    def leaves(self) -> list[bytes]:
        """The hash of each record."""
        return [leaf_hash(record) for record in self.records]

    @cached_property
    def hash_tiles(self) -> Mapping[str, bytes]:
        """Path → contents of every hash tile."""
        return tiles.hash_tiles(self.leaves)

    def root_of_prefix(self, size: int) -> bytes:
        """The root that the head had at ``size`` records."""
        if not 0 <= size <= len(self.records):
            raise VerificationFailed(f"the log has {len(self.records)} records, not {size}", where="log")
        return self._roots[size]

    @cached_property
    def _roots(self) -> list[bytes]:
        """The root after each number of records; subtrees are merged once, not again for each prefix."""
        roots = [root_hash([])]
        subtrees: list[bytes] = []
        for number, node in enumerate(self.leaves):
            while number & 1:
                node = node_hash(subtrees.pop(), node)
                number >>= 1
            subtrees.append(node)
            roots.append(reduce(lambda right, left: node_hash(left, right), reversed(subtrees)))
        return roots


def append(
    folder: Path, record: bytes, signer: Signer, origin: str, *, opened_by: Sequence[PublicKey] = ()
) -> Head:
    """Add ``record`` and return the new head, on disk when this returns.

    Reads the head and the newest tile of each level, which the head's root vouches for, so the time does not
    grow with the log; `read` checks all of it. Tiles that the new ones replace are removed when the head is
    on disk.

    ``opened_by``: keys of which one has signed the head that is there, when it is not ``signer``: it hands
    over (`harness.provenance.policy.rotation`).

    Raises `UsageError` for a record beyond 65,535 bytes (tlog-tiles), `VerificationFailed` when the log that
    is there is not one of this signer and ``origin``.
    """
    if len(record) > RECORD_LIMIT:
        raise UsageError(f"a log record of {len(record)} bytes is over the limit of {RECORD_LIMIT}")
    files.make_folder(folder)
    # A statement may be entered while a run trains.
    with files.locked(folder):
        return _append(folder, record, signer, origin, [*opened_by, *public_keys(signer)])


def _append(folder: Path, record: bytes, signer: Signer, origin: str, keys: Sequence[PublicKey]) -> Head:
    edge = Edge()
    if (folder / HEAD).exists():
        note = files.read_limited(folder / HEAD, NOTE_LIMIT)
        head = open_note(note, keys, where=str(folder / HEAD))
        if head.origin != origin:
            raise VerificationFailed(f"the log is that of {head.origin!r}", where=str(folder))
        edge = tiles.read_edge(folder, head.size)
        if edge.root() != head.root:
            raise VerificationFailed(
                "the newest tiles do not have the root that the head signs", where=str(folder)
            )
    before = edge.files()
    if edge.last_record != record:
        # It is there already when the disk failed after the head was replaced, and the caller tries again.
        edge.add(record)
    after = edge.files()
    for path, data in after.items():
        target = folder / path
        if not target.exists() or target.read_bytes() != data:
            files.write_durable(target, data)
    head = Head(edge.size, edge.root(), origin)
    files.write_durable(folder / HEAD, sign_note(head, signer))
    _remove_replaced(folder, [path for path in before if path not in after and tiles.is_partial(path)])
    return head


def _remove_replaced(folder: Path, paths: Sequence[str]) -> None:
    """Tiles that were partial and whose hashes are in newer ones: a log of N records would hold N of them."""
    for path in paths:
        (folder / path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (folder / path).parent.rmdir()  # as soon as the full tile stands beside it


def read(folder: Path, keys: Sequence[PublicKey], claimed: Log | None = None) -> Log:
    """The log in ``folder``, recomputed from its records.

    ``claimed``: what `read_claimed` has found there; it is not read again unless the head has changed since.

    Raises `EvidenceIncomplete` when there is none, `VerificationFailed` when head, records and tiles disagree
    or no Ed25519 key of ``keys`` has signed the head.
    """
    return _read_now(folder, lambda note: open_note(note, keys, where=str(folder / HEAD)), claimed)


def read_claimed(folder: Path) -> Log:
    """The log in ``folder`` as it claims to be: consistent, by nobody's signature. Raises as `read`."""
    return _read_now(folder, lambda note: claimed(note, where=str(folder / HEAD)))


def _read_now(folder: Path, head_of: Callable[[bytes], Head], earlier: Log | None = None) -> Log:
    """The log under the head that is there, ``earlier`` if that has it; read again where an append has
    replaced the tiles meanwhile."""
    note = files.read_limited(folder / HEAD, NOTE_LIMIT)
    while True:
        head = head_of(note)
        if earlier is not None and earlier.head == head:
            return earlier
        try:
            return read_under(folder, head)
        except EvidenceIncomplete:
            newer = files.read_limited(folder / HEAD, NOTE_LIMIT)
            if newer == note:
                raise
            note = newer


def claimed_size(note: bytes, *, where: str) -> int:
    """The size that a head claims. Raises `VerificationFailed` for what is no head."""
    return claimed(note, where=where).size


def claimed(note: bytes, *, where: str) -> Head:
    """The head in ``note``, whoever signed it. Raises `VerificationFailed` for what is no signed note."""
    return _parsed(note, where)[0]


def read_under(folder: Path, head: Head) -> Log:
    """The log in ``folder`` under a ``head`` whose signature is the caller's business. Raises as `read`."""
    records: list[bytes] = []
    for index, width in tiles.row(head.size):
        path = folder / tiles.entries_path(index, width)
        records += tiles.parse_entries(files.read_limited(path, tiles.FILE_LIMIT), width, str(path))
    book = Log(head, tuple(records))
    if root_hash(book.leaves) != head.root:
        raise VerificationFailed("the records do not have the root that the head signs", where=str(folder))
    for name, data in book.hash_tiles.items():
        path = folder / name
        if files.read_limited(path, tiles.FILE_LIMIT) != data:
            raise VerificationFailed("the tile does not hold the hashes of the records", where=str(path))
    return book


def text_of(head: Head) -> bytes:
    """What the note of ``head`` says, and what is signed and stamped: three lines."""
    return f"{head.origin}\n{head.size}\n{base64.b64encode(head.root).decode()}\n".encode()


def sign_note(head: Head, signer: Signer) -> bytes:
    """The signed note of ``head``: a tlog-checkpoint, named by its origin."""
    text = text_of(head)
    signature = _note_id(head.origin, public_keys(signer)[0]) + sign_with(signer.ed25519, text)
    return text + f"\n— {head.origin} {base64.b64encode(signature).decode()}\n".encode()


def open_note(data: bytes, keys: Sequence[PublicKey], *, where: str) -> Head:
    """The head of a note that an Ed25519 key of ``keys`` has signed. Raises `VerificationFailed`."""
    head, text, signatures = _parsed(data, where)
    for name, blob in signatures:
        for key in keys:
            ours = key.algorithm == "ed25519" and name == head.origin and blob[:4] == _note_id(name, key)
            if ours and key.verifies(blob[4:], text):
                return head
    remedy = "check the key or the policy"
    raise VerificationFailed(
        "the log's head is signed by none of the accepted keys", where=where, remedy=remedy
    )


def _parsed(data: bytes, where: str) -> tuple[Head, bytes, list[tuple[str, bytes]]]:
    """The head of a signed note, what is signed, and name and blob of every signature.

    Every line is looked at, whoever's it is: anybody can add some to a note, and a note gets printed.
    """
    try:
        text, signatures = data.decode("utf-8").split("\n\n", 1)
    except ValueError as error:
        raise VerificationFailed("is no log head, which is a signed note", where=where) from error
    text += "\n"
    head = _parse_head(text, where)
    if not signatures.endswith("\n"):
        raise VerificationFailed("does not end with a newline", where=where)
    found = []
    for line in signatures[:-1].split("\n"):
        if not line.startswith("— ") or line.count(" ") != 2 or not line.isprintable():
            raise VerificationFailed("has a signature line that is none", where=where)
        name, encoded = line.removeprefix("— ").split(" ")
        found.append((name, _decode(encoded, where)))
    return head, text.encode(), found


def _parse_head(text: str, where: str) -> Head:
    lines = text.split("\n")
    is_number = len(lines) == 4 and lines[1].isascii() and lines[1].isdigit()
    if not is_number or lines[3] or not lines[0] or not lines[0].isprintable():
        raise VerificationFailed("is no log head of origin, size and root", where=where)
    root = _decode(lines[2], where)
    if len(root) != 32 or len(lines[1]) > 16 or str(int(lines[1])) != lines[1]:
        raise VerificationFailed("has a broken size or root", where=where)
    return Head(int(lines[1]), root, lines[0])


def _note_id(name: str, key: PublicKey) -> bytes:
    """The first four bytes of the key's note id (c2sp.org/signed-note, "Signatures")."""
    return hashlib.sha256(name.encode() + b"\n" + _ED25519_NOTE + key.raw).digest()[:4]


def _decode(text: str, where: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise VerificationFailed("has broken base64", where=where) from error
    if base64.b64encode(data).decode() != text:
        raise VerificationFailed("has base64 with bits beyond its end", where=where)
    return data
