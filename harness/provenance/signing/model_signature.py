"""model.sig: an OpenSSF Model Signing bundle over payload and MANIFEST.json (ossf/model-signing-spec v1.0).

Written with ``cryptography`` alone from digests that are known already; the official ``model_signing verify
key`` accepts it. Its verifier handles method files with sha256 only, and its root digest binds no names, so
it is never used as an id.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.errors import VerificationFailed
from harness.format import layout, strict_json
from harness.provenance.signing import envelope
from harness.provenance.signing.keys import PrivateKey, PublicKey

PREDICATE_TYPE = "https://model_signing/signature/v1.0"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
SERIALIZATION = {
    "method": "files",
    "hash_type": "sha256",
    "allow_symlinks": False,
    "ignore_paths": [layout.MODEL_SIGNATURE, layout.PROVENANCE],
}
"""The only form that is written and accepted: nothing but the signatures themselves is ignored."""

_HEX = re.compile(r"[0-9a-f]{64}")


def sign(files: Iterable[tuple[str, str]], p256: PrivateKey, key: PublicKey, name: str) -> bytes:
    """The bundle over ``files`` (path, hex sha256) of the model folder ``name``."""
    return envelope.sign(strict_json.dumps(_statement(sorted(files), name)), p256, key)


def verify(data: bytes, keys: Sequence[PublicKey], *, where: str) -> Mapping[str, str]:
    """Path → hex sha256 of every file that one of the P-256 ``keys`` has signed.

    Raises `VerificationFailed`, also for a signer's choice to ignore paths, follow links or sign nothing.
    """
    return _read(opened(data, keys, where=where).payload, where)


def check(data: bytes, keys: Sequence[PublicKey], files: Mapping[str, str], name: str, *, where: str) -> None:
    """That exactly ``files`` (path → hex sha256) are signed. Raises as `opened` and `compare`."""
    compare(opened(data, keys, where=where).payload, files, name, where=where)


def opened(data: bytes, keys: Sequence[PublicKey], *, where: str) -> envelope.Opened:
    """The bundle, signed by one of the P-256 ``keys``; what it says is not read. Raises
    `VerificationFailed`."""
    return envelope.open_own(data, [key for key in keys if key.algorithm == "p256"], where=where)


def compare(payload: bytes, files: Mapping[str, str], name: str, *, where: str) -> None:
    """That an `opened` payload signs exactly ``files``; the folder's ``name`` is not looked at, it saves
    reading what `sign` has written for it. Raises as `verify`, and `VerificationFailed` for other files."""
    if payload == strict_json.rewritten(_statement(sorted(files.items()), name)):
        return
    if _read(payload, where) != files:
        raise VerificationFailed("signs other files than the manifest lists", where=where)


def _statement(ordered: Sequence[tuple[str, str]], name: str) -> Mapping[str, Any]:
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": _root(digest for _, digest in ordered)}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": SERIALIZATION,
            "resources": [
                {"name": path, "algorithm": "sha256", "digest": digest} for path, digest in ordered
            ],
        },
    }


def _read(payload: bytes, where: str) -> Mapping[str, str]:
    """Path → hex sha256 of the files of a signed statement."""
    statement = strict_json.loads(payload, where=where)
    if not isinstance(statement, dict) or statement.get("_type") != STATEMENT_TYPE:
        raise VerificationFailed("is no in-toto statement", where=where)
    if statement.get("predicateType") != PREDICATE_TYPE:
        raise VerificationFailed("is no model signature v1.0", where=where)
    predicate = statement.get("predicate")
    if not isinstance(predicate, dict) or set(predicate) != {"serialization", "resources"}:
        raise VerificationFailed("has other fields than serialization and resources", where=where)
    if not _is_our_form(predicate["serialization"]):
        raise VerificationFailed(
            "ignores paths or hashes in another way than method files, sha256", where=where
        )
    resources = _resources(predicate["resources"], where)
    subjects = statement.get("subject")
    root = _root(digest for _, digest in sorted(resources.items()))
    if not isinstance(subjects, list) or [_subject_digest(item) for item in subjects] != [root]:
        raise VerificationFailed("has a root digest that is not that of its files", where=where)
    return resources


def _is_our_form(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("ignore_paths"), list):
        return False
    # In Python 0 equals False; everything else in the form is text.
    ordered = {**value, "ignore_paths": sorted(value["ignore_paths"], key=str)}
    return ordered == SERIALIZATION and value["allow_symlinks"] is False


def _resources(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, list) or not value:
        raise VerificationFailed("signs no file", where=where)
    found: dict[str, str] = {}
    for item in value:
        if not isinstance(item, dict) or set(item) != {"name", "algorithm", "digest"}:
            raise VerificationFailed(
                "has a resource with other fields than name, algorithm, digest", where=where
            )
        name, digest = item["name"], item["digest"]
        well_formed = isinstance(name, str) and isinstance(digest, str) and bool(_HEX.fullmatch(digest))
        if not well_formed or item["algorithm"] != "sha256" or name in found:
            raise VerificationFailed(f"has the broken or repeated resource {name!r}", where=where)
        found[name] = digest
    return found


def _subject_digest(subject: Any) -> Any:
    digest = subject.get("digest") if isinstance(subject, dict) else None
    return digest.get("sha256") if isinstance(digest, dict) and set(digest) == {"sha256"} else None


def _root(digests: Iterable[str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()
