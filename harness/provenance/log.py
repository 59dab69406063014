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
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from harness.errors import UsageError, VerificationFailed
from harness.format import files
from harness.provenance.keys import PublicKey, Signer, public_keys

HEAD = "checkpoint"
WIDTH = 256
"""Hashes of a full tile."""
RECORD_LIMIT = 0xFFFF
_FILE_LIMIT = 32 << 20
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
        for number, record in enumerate(self.records):
            node = leaf_hash(record)
            while number & 1:
                node = node_hash(subtrees.pop(), node)
                number >>= 1
            subtrees.append(node)
            roots.append(reduce(lambda right, left: node_hash(left, right), reversed(subtrees)))
        return roots


def leaf_hash(record: bytes) -> bytes:
    """RFC 6962 section 2.1."""
    return hashlib.sha256(b"\x00" + record).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """RFC 6962 section 2.1."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_hash(leaves: Sequence[bytes]) -> bytes:
    """The Merkle tree hash of leaf hashes (RFC 6962 section 2.1)."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = _split(len(leaves))
    return node_hash(root_hash(leaves[:split]), root_hash(leaves[split:]))


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The audit path of leaf ``index`` (RFC 6962 section 2.1.1)."""
    if len(leaves) <= 1:
        return []
    split = _split(len(leaves))
    if index < split:
        return [*inclusion_proof(leaves[:split], index), root_hash(leaves[split:])]
    return [*inclusion_proof(leaves[split:], index - split), root_hash(leaves[:split])]


def consistency_proof(leaves: Sequence[bytes], size: int) -> list[bytes]:
    """The proof that the tree of the first ``size`` leaves is a prefix (RFC 6962 section 2.1.2)."""
    return _subproof(leaves, size, True) if 0 < size < len(leaves) else []


def _subproof(leaves: Sequence[bytes], size: int, whole: bool) -> list[bytes]:
    if size == len(leaves):
        return [] if whole else [root_hash(leaves)]
    split = _split(len(leaves))
    if size <= split:
        return [*_subproof(leaves[:split], size, whole), root_hash(leaves[split:])]
    return [*_subproof(leaves[split:], size - split, False), root_hash(leaves[:split])]


def _split(size: int) -> int:
    """The largest power of two below ``size``."""
    return 1 << (size - 1).bit_length() - 1


def append(folder: Path, record: bytes, signer: Signer, origin: str) -> Head:
    """Add ``record`` and return the new head, on disk when this returns.

    Raises `UsageError` for a record beyond 65,535 bytes (tlog-tiles), `VerificationFailed` when the log that
    is there is not one of this signer and ``origin``.
    """
    if len(record) > RECORD_LIMIT:
        raise UsageError(f"a log record of {len(record)} bytes is over the limit of {RECORD_LIMIT}")
    files.make_folder(folder)
    # A statement may be entered while a run trains.
    with files.locked(folder):
        return _append(folder, record, signer, origin)


def _append(folder: Path, record: bytes, signer: Signer, origin: str) -> Head:
    records: tuple[bytes, ...] = ()
    if (folder / HEAD).exists():
        log = read(folder, public_keys(signer))
        if log.head.origin != origin:
            raise VerificationFailed(f"the log is that of {log.head.origin!r}", where=str(folder))
        records = log.records
    if not records or records[-1] != record:
        # It is there already when the disk failed after the head was replaced, and the caller tries again.
        records = (*records, record)
    _write_tiles(folder, records)
    head = Head(len(records), root_hash([leaf_hash(each) for each in records]), origin)
    files.write_durable(folder / HEAD, sign_note(head, signer))
    return head


def read(folder: Path, keys: Sequence[PublicKey]) -> Log:
    """The log in ``folder``, recomputed from its records.

    Raises `EvidenceIncomplete` when there is none, `VerificationFailed` when head, records and tiles disagree
    or no Ed25519 key of ``keys`` has signed the head.
    """
    head = open_note(files.read_limited(folder / HEAD, NOTE_LIMIT), keys, where=str(folder / HEAD))
    return read_under(folder, head)


def read_claimed(folder: Path) -> Log:
    """The log in ``folder`` as it claims to be: consistent, by nobody's signature. Raises as `read`."""
    return read_under(
        folder, claimed(files.read_limited(folder / HEAD, NOTE_LIMIT), where=str(folder / HEAD))
    )


def claimed_size(note: bytes, *, where: str) -> int:
    """The size that a head claims. Raises `VerificationFailed` for what is no head."""
    return claimed(note, where=where).size


def claimed(note: bytes, *, where: str) -> Head:
    """The head in ``note``, whoever signed it. Raises `VerificationFailed` for what is no head."""
    return _parse_head(note.partition(b"\n\n")[0].decode("utf-8", "replace") + "\n", where)


def paths(size: int) -> list[str]:
    """The files of a log of ``size`` records besides its head, relative to its folder."""
    entries = [f"tile/entries/{_tile_name(*tile)}" for tile in _tiles(size)]
    width, level = size, 0
    while width:
        entries += [f"tile/{level}/{_tile_name(*tile)}" for tile in _tiles(width)]
        width, level = width // WIDTH, level + 1
    return entries


def read_under(folder: Path, head: Head) -> Log:
    """The log in ``folder`` under a ``head`` whose signature is the caller's business. Raises as `read`."""
    records: list[bytes] = []
    for index, width in _tiles(head.size):
        path = folder / "tile" / "entries" / _tile_name(index, width)
        records += _parse_entries(files.read_limited(path, _FILE_LIMIT), width, str(path))
    leaves = [leaf_hash(record) for record in records]
    if root_hash(leaves) != head.root:
        raise VerificationFailed("the records do not have the root that the head signs", where=str(folder))
    for name, data in _hash_tiles(leaves).items():
        path = folder / "tile" / name
        if files.read_limited(path, _FILE_LIMIT) != data:
            raise VerificationFailed("the tile does not hold the hashes of the records", where=str(path))
    return Log(head, tuple(records))


def sign_note(head: Head, signer: Signer) -> bytes:
    """The signed note of ``head``: a tlog-checkpoint, named by its origin."""
    text = f"{head.origin}\n{head.size}\n{base64.b64encode(head.root).decode()}\n"
    key: Ed25519PrivateKey = signer.ed25519
    signature = _note_id(head.origin, public_keys(signer)[0]) + key.sign(text.encode())
    return f"{text}\n— {head.origin} {base64.b64encode(signature).decode()}\n".encode()


def open_note(data: bytes, keys: Sequence[PublicKey], *, where: str) -> Head:
    """The head of a note that an Ed25519 key of ``keys`` has signed. Raises `VerificationFailed`."""
    try:
        text, signatures = data.decode("utf-8").split("\n\n", 1)
    except ValueError as error:
        raise VerificationFailed("is no signed note", where=where) from error
    text += "\n"
    head = _parse_head(text, where)
    if not signatures.endswith("\n"):
        raise VerificationFailed("does not end with a newline", where=where)
    for line in signatures[:-1].split("\n"):
        if not line.startswith("— ") or line.count(" ") != 2:
            raise VerificationFailed("has a signature line that is none", where=where)
        name, encoded = line.removeprefix("— ").split(" ")
        blob = _decode(encoded, where)
        for key in keys:
            ours = key.algorithm == "ed25519" and name == head.origin and blob[:4] == _note_id(name, key)
            if ours and key.verifies(blob[4:], text.encode()):
                return head
    remedy = "check the key or the policy"
    raise VerificationFailed(
        "the log's head is signed by none of the accepted keys", where=where, remedy=remedy
    )


def _parse_head(text: str, where: str) -> Head:
    lines = text.split("\n")
    if len(lines) != 4 or lines[3] or not lines[0] or not lines[1].isascii() or not lines[1].isdigit():
        raise VerificationFailed("is no log head of origin, size and root", where=where)
    root = _decode(lines[2], where)
    if len(root) != 32 or len(lines[1]) > 16 or str(int(lines[1])) != lines[1]:
        raise VerificationFailed("has a broken size or root", where=where)
    return Head(int(lines[1]), root, lines[0])


def _note_id(name: str, key: PublicKey) -> bytes:
    """The first four bytes of the key's note id (c2sp.org/signed-note, "Signatures")."""
    return hashlib.sha256(name.encode() + b"\n" + _ED25519_NOTE + key.raw).digest()[:4]


def _write_tiles(folder: Path, records: Sequence[bytes]) -> None:
    """Write the tiles that the newest record touches; full ones before it are on disk already."""
    index, width = _tiles(len(records))[-1]
    bundle = b"".join(struct.pack(">H", len(each)) + each for each in records[index * WIDTH :])
    files.write_durable(folder / "tile" / "entries" / _tile_name(index, width), bundle)
    for path, data in _hash_tiles([leaf_hash(each) for each in records]).items():
        target = folder / "tile" / path
        if not target.exists() or target.read_bytes() != data:
            files.write_durable(target, data)


def _hash_tiles(leaves: Sequence[bytes]) -> dict[str, bytes]:
    """Path under ``tile/`` → contents of every hash tile of a tree of ``leaves``."""
    tiles: dict[str, bytes] = {}
    hashes, level = list(leaves), 0
    while hashes:
        for index, width in _tiles(len(hashes)):
            data = b"".join(hashes[index * WIDTH : index * WIDTH + width])
            tiles[f"{level}/{_tile_name(index, width)}"] = data
        full = len(hashes) // WIDTH
        hashes = [root_hash(hashes[start * WIDTH : (start + 1) * WIDTH]) for start in range(full)]
        level += 1
    return tiles


def _tiles(size: int) -> list[tuple[int, int]]:
    """(index, width) of each tile of a row of ``size``; only the last can be partial."""
    tiles = [(index, WIDTH) for index in range(size // WIDTH)]
    return tiles + ([(size // WIDTH, size % WIDTH)] if size % WIDTH else [])


def _tile_name(index: int, width: int) -> str:
    """``x001/234`` for 1234, with ``.p/W`` when partial (c2sp.org/tlog-tiles, "Merkle Tree")."""
    name = f"{index % 1000:03d}"
    while index >= 1000:
        index //= 1000
        name = f"x{index % 1000:03d}/{name}"
    return name if width == WIDTH else f"{name}.p/{width}"


def _parse_entries(data: bytes, width: int, where: str) -> list[bytes]:
    records = []
    offset = 0
    for _ in range(width):
        if offset + 2 > len(data):
            raise VerificationFailed(f"has fewer than {width} records", where=where)
        (length,) = struct.unpack_from(">H", data, offset)
        records.append(data[offset + 2 : offset + 2 + length])
        offset += 2 + length
    if offset != len(data):
        raise VerificationFailed("has bytes before or after its records", where=where)
    return records


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise VerificationFailed("has broken base64", where=where) from error
