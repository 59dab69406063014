"""What lies in a run's log folder: nothing that the signed head does not account for.

- the head, and the tiles of a log of its size (`harness.provenance.transparency.log.read` has checked those)
- a timestamp of a head that the log has or had, by its name (`harness.audit.run.stamps` looks into it)
- a partial tile that a newer one has replaced: the newer one begins with it
- what an append that was cut off has left beyond the head or under a temporary name: told, since a crash
  leaves that behind, and no reader looks at it

Everything else is a finding.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format import files, layout
from harness.provenance.checks import Check
from harness.provenance.findings import Findings
from harness.provenance.transparency import log, tiles, timestamp
from harness.provenance.transparency.log import Log

CHECK: Check = "log files"
_MOST = 1_000_000
_TILE = re.compile(r"tile/(entries|\d)/((?:x\d{3}/)*\d{3})(?:\.p/([1-9]\d{0,2}))?")


def check(folder: Path, book: Log, findings: Findings) -> None:
    """Every file of ``folder`` against ``book``, which was read from it. Raises `OSError` for a bad disk."""
    before = len(findings.failed)
    known = {log.HEAD, *tiles.paths(book.head.size)}
    for path in findings.attempt(CHECK, _files, folder) or ():
        if path in known:
            continue
        if os.path.basename(path).startswith(layout.TEMPORARY):
            findings.note(f"not checked: log/{path} (an append that was cut off)")
            continue
        size = timestamp.size_of(path)
        if size is not None:
            _fits(folder, path, size, book.head.size, findings)
            continue
        expected = _expected(path, book)
        if expected is None:
            findings.bad(CHECK, f"is no file of a log of {book.head.size} records", str(folder / path))
        elif expected == b"":
            findings.note(f"not checked: log/{path} (beyond the head: an append that was cut off)")
        else:
            _compare(folder / path, expected, findings)
    if len(findings.failed) == before:
        findings.passed.append(CHECK)


def _fits(folder: Path, path: str, stamped: int, size: int, findings: Findings) -> None:
    """A timestamp is a plain file of no more records than there are; a job may enter some meanwhile."""
    try:
        odd = files.oddity(os.lstat(folder / path))
    except FileNotFoundError:
        odd = None  # a job has just replaced it
    if odd is not None:
        findings.bad(CHECK, odd, str(folder / path), "remove it, or get the log folder from its maker again")
    if stamped <= size:
        return
    head = folder / log.HEAD
    if stamped > log.claimed_size(files.read_limited(head, log.NOTE_LIMIT), where=str(head)):
        what = f"is a timestamp of {stamped} records, and the log has {size}: it was rolled back"
        findings.bad(CHECK, what, str(folder / path), "get the newest state of the run from its maker")


def _files(folder: Path) -> list[str]:
    """Every file by its relative path; links to folders count as files. Raises `VerificationFailed` for more
    than are looked at."""
    found: list[str] = []
    for here, folders, names in files.walk(folder):
        links = [name for name in folders if os.path.islink(here / name)]
        found += [os.path.relpath(here / name, folder) for name in sorted([*names, *links])]
        if len(found) > _MOST:
            raise VerificationFailed(f"holds more than {_MOST} files", where=str(folder))
    return found


def _expected(path: str, book: Log) -> bytes | None:
    """What a partial tile held before a newer one replaced it; nothing for one beyond the head; None for what
    is no tile."""
    match = _TILE.fullmatch(path)
    if match is None:
        return None
    index = int(match[2].replace("x", "").replace("/", ""))
    width = int(match[3] or tiles.WIDTH)
    level = 0 if match[1] == "entries" else int(match[1])
    total = len(book.records) // tiles.WIDTH**level
    start, end = index * tiles.WIDTH, index * tiles.WIDTH + width
    if width > tiles.WIDTH or (match[3] is not None and width == tiles.WIDTH):
        return None
    if end > total:
        return b""
    if match[1] == "entries":
        return tiles.entries(book.records[start:end])
    newer = tiles.hash_path(level, index, min(tiles.WIDTH, total - start))
    return book.hash_tiles[newer][: width * tiles.HASH]


def _compare(path: Path, expected: bytes, findings: Findings) -> None:
    try:
        data = files.read_limited(path, tiles.FILE_LIMIT)
    except EvidenceIncomplete:
        return  # an append has just removed it
    except VerificationFailed as error:
        findings.bad(CHECK, error.what, str(path))
        return
    if data != expected:
        findings.bad(CHECK, "is an older tile, and the newer one does not begin with it", str(path))
