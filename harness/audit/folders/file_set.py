"""The files of a signed folder against its manifest: which there are, how large, what their headers say.

The folder holds exactly the manifest's files: regular, one link, of the listed sizes, and nothing else but
signatures. Headers of safetensors describe exactly the manifest's tensors.
"""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

from harness.errors import VerificationFailed
from harness.format import files, safetensors_header
from harness.format.manifest import FileEntry, Manifest
from harness.provenance.findings import Findings

MANIFEST_LIMIT = 64 << 20
"""Largest MANIFEST.json that is read, in bytes."""
SMALL_LIMIT = 64 << 20
"""Largest file of the payload that is read as a whole, in bytes."""
ENTRY_LIMIT = 1_000_000
"""Most files and folders of a checkpoint that are looked at."""
_PATH_LIMIT = 3072
"""Bytes of a folder's path; with the longest name it stays below the 4096 of Linux."""
_name = operator.attrgetter("name")


def listing(folder: Path, findings: Findings) -> dict[str, os.stat_result]:
    """Every plain file under ``folder`` by relative path; anything else is a finding."""
    found: dict[str, os.stat_result] = {}
    before = len(findings.failed)
    for number, (path, status) in enumerate(_walk(folder, findings)):
        if number >= ENTRY_LIMIT:
            findings.bad("file set", f"holds more than {ENTRY_LIMIT} files", str(folder))
            break
        odd = files.oddity(status)
        if odd is None:
            found[path] = status
        else:
            findings.bad("plain files", odd, f"{folder}/{path}")
    if len(findings.failed) == before:
        findings.passed.append("plain files")
    return found


def check_files(
    folder: Path,
    manifest: Manifest,
    present: Mapping[str, os.stat_result],
    signatures: Set[str],
    findings: Findings,
    *,
    whole: bool = True,
) -> None:
    """The folder holds the files of ``manifest``, in their sizes, and those of ``signatures`` that are there;
    unless ``whole``, payload may be absent."""
    findings.all_of("file set", _departures(folder, manifest, present, signatures, whole))


def check_headers(
    folder: Path, manifest: Manifest, present: Mapping[str, os.stat_result], findings: Findings
) -> None:
    """`check_header` of each safetensors file of ``manifest`` that is there."""
    for entry in manifest.files:
        if entry.path.endswith(".safetensors") and entry.path in present:
            findings.attempt("headers", check_header, folder, entry.path, manifest)


def check_header(folder: Path, path: str, manifest: Manifest) -> None:
    """Raise `VerificationFailed` when a safetensors file describes other tensors than ``manifest`` lists."""
    header = safetensors_header.read_header(folder / path)
    found = {(span.name, span.dtype, span.shape, span.start, span.end) for span in header.tensors}
    listed = {
        (entry.name, entry.dtype, entry.shape, entry.start, entry.end)
        for entry in manifest.tensors
        if entry.file == path
    }
    if found != listed:
        odd = min(item[0] for item in found ^ listed)
        what = f"the header describes other tensors than the manifest, first `{odd}`"
        raise VerificationFailed(what, where=str(folder / path))


def read_listed(folder: Path, entry: FileEntry, limit: int = SMALL_LIMIT) -> bytes:
    """A payload file in memory. Raises `VerificationFailed` for other bytes than the manifest lists, so that
    nobody parses them, and as `files.read_limited` for more than ``limit`` of them."""
    data = files.read_limited(folder / entry.path, limit)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise VerificationFailed("the sha256 is not the one in MANIFEST.json", where=str(folder / entry.path))
    return data


def _walk(folder: Path, findings: Findings) -> Iterator[tuple[str, os.stat_result]]:
    """Every entry that is no folder, with its status. No manifest can list an empty folder: a finding."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        place = f"{folder}/{prefix}"
        if len(os.fsencode(place)) > _PATH_LIMIT:
            findings.bad("file set", "holds folders that are nested too deeply", str(folder))
            continue
        with os.scandir(place) as entries:
            inside = sorted(entries, key=_name)
        if not inside:
            findings.bad("file set", "is an empty folder", place.rstrip("/"), "remove it")
        for entry in inside:
            if entry.is_dir(follow_symlinks=False):
                pending.append(f"{prefix}{entry.name}/")
            else:
                yield f"{prefix}{entry.name}", entry.stat(follow_symlinks=False)


def _departures(
    folder: Path,
    manifest: Manifest,
    present: Mapping[str, os.stat_result],
    signatures: Set[str],
    whole: bool,
) -> Iterator[tuple[str, str]]:
    """Whatever is too many, too few or of another size."""
    expected = {entry.path: entry.size for entry in manifest.files}
    for path in sorted(present):
        size = present[path].st_size
        if path in expected and size != expected[path]:
            yield f"has {size} bytes, the manifest says {expected[path]}", f"{folder}/{path}"
        elif path not in expected and path not in signatures:
            yield "is not in the manifest", f"{folder}/{path}"
    for path in sorted(set(expected) - set(present)) if whole else ():
        yield "is in the manifest, not in the folder", f"{folder}/{path}"
