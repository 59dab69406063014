"""A corpus that `harness prepare` made, examined: signatures, files, and that no document is in two splits.

The split is a function of each document's sha256 alone. ``documents/*.bin`` hold those digests, sorted, 32
bytes each, so the proof is short: each list is strictly ascending, has as many entries as documents were
kept, and lies on its own side of the share. That the shards hold these documents is the word of who has
signed; whoever has the sources can prepare them again, which gives the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.audit.folders import file_set, payload, sealed
from harness.errors import VerificationFailed
from harness.format import files, layout, strict_json
from harness.format.manifest import FileEntry, Manifest
from harness.provenance import corpora
from harness.provenance.corpora import CorpusStatement
from harness.provenance.findings import Findings
from harness.provenance.policy import rules as policies
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import envelope

SOURCES, RECIPE, TOKENIZER = "sources.json", "recipe.yaml", "tokenizer.json"
DOCUMENTS = {"train": "documents/train.bin", "held_out": "documents/held-out.bin"}
"""Split → its sorted digests."""
DIGEST_BYTES = 32

_SIGNATURES = frozenset({layout.MANIFEST, layout.MODEL_SIGNATURE, layout.CORPUS_BUNDLE})


def is_corpus(path: Path) -> bool:
    """Whether ``path`` looks like a folder that `harness prepare` has made."""
    return (path / layout.CORPUS_BUNDLE).is_file()


def claimed(folder: Path) -> CorpusStatement:
    """What ``folder`` says; its format is checked, its signature is not. Raises `VerificationFailed`."""
    where = str(folder / layout.CORPUS_BUNDLE)
    data = files.read_limited(folder / layout.CORPUS_BUNDLE, envelope.LIMIT)
    return corpora.parse_corpus(envelope.unauthenticated_payload(data, where=where), where=where)


def examine(
    folder: Path, policy: Policy, findings: Findings
) -> tuple[CorpusStatement | None, list[payload.Job], list[str]]:
    """Every check but that of payload bytes: the statement, if it is authentic, what is left to hash, and
    when it was signed."""
    present = file_set.listing(folder, findings)
    statement = findings.attempt("corpus statement", _statement, folder, policy)
    if statement is None:
        return None, [], []
    times = [str(statement.predicate["created"])]
    manifest = findings.attempt("manifest", sealed.manifest, folder, statement)
    if manifest is None:
        return statement, [], times
    before = len(findings.failed)
    file_set.check_files(folder, manifest, present, _SIGNATURES, findings)
    about = [(statement.subject_id, statement.name)]
    sealed.check_model_signature(
        folder, policy, manifest, statement, present, findings, kind=policies.CORPUS, about=about
    )
    if len(findings.failed) == before:
        findings.all_of("corpus facts", _facts(manifest, folder, statement))
        findings.all_of("split", _split(manifest, folder, statement))
    if len(findings.failed) == before:
        split = statement.predicate["split"]
        findings.note(
            f"corpus {statement.name}: {split['train']['documents']} documents to train on, "
            f"{split['held_out']['documents']} held out, none in both"
        )
    return statement, payload.jobs(folder, manifest, payload.stamps(manifest, present)), times


def _statement(folder: Path, policy: Policy) -> CorpusStatement:
    where = str(folder / layout.CORPUS_BUNDLE)
    data = files.read_limited(folder / layout.CORPUS_BUNDLE, envelope.LIMIT)
    opened = envelope.open_own(data, policy.statement_keys, where=where)
    statement = corpora.parse_corpus(opened.payload, where=where)
    created = str(statement.predicate["created"])
    words = (statement.subject_id, statement.name, created, policies.CORPUS)
    sealed.check_signer(policy, opened.key, *words, where=where)
    if statement.subject_id in policy.revoked:
        raise VerificationFailed(f"{statement.subject_id} is revoked", where=where, remedy="use another one")
    return statement


def _facts(manifest: Manifest, folder: Path, statement: CorpusStatement) -> Iterator[tuple[str, str]]:
    """Digests that the statement names are those of the listed files."""
    listed = manifest.digests
    facts = statement.predicate
    if listed.get(RECIPE) != facts["recipe"]["sha256"] or listed.get(RECIPE) != _sha256(
        facts["recipe"]["text"]
    ):
        yield "is not the recipe of the statement", str(folder / RECIPE)
    if facts["tokenizer"]["kind"] == "bpe" and listed.get(TOKENIZER) != facts["tokenizer"]["sha256"]:
        yield "is not the tokenizer of the statement", str(folder / TOKENIZER)
    if listed.get(layout.CHAT_TEMPLATE) != facts.get("chat", {}).get("template_sha256"):
        yield "is not the template of the statement", str(folder / layout.CHAT_TEMPLATE)
    try:
        names = _sources(manifest, folder)
    except VerificationFailed as error:
        yield error.what, str(folder / SOURCES)
        return
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(names.items()))
    if _sha256(lines) != facts["source"]["sha256"] or len(names) != facts["source"]["files"]:
        yield "lists other files than the statement was made for", str(folder / SOURCES)


def _sources(manifest: Manifest, folder: Path) -> dict[str, str]:
    document = strict_json.loads(file_set.read_listed(folder, _entry(manifest, SOURCES)), where=SOURCES)
    names: Any = document.get("files") if isinstance(document, dict) else None
    if not isinstance(names, dict) or not all(isinstance(each, str) for each in names.values()):
        raise VerificationFailed("is no list of files", where=SOURCES)
    return names


def _entry(manifest: Manifest, path: str) -> FileEntry:
    found = next((entry for entry in manifest.files if entry.path == path), None)
    if found is None:
        raise VerificationFailed("is not in the manifest", where=path)
    return found


def _split(manifest: Manifest, folder: Path, statement: CorpusStatement) -> Iterator[tuple[str, str]]:
    """Each list is sorted without repetition, as long as was said, and on its side of the share."""
    facts = statement.predicate
    bound = float(facts["split"]["held_out_share"]) * 2**64
    distinct = any(each["filter"] == corpora.SEEN_BEFORE for each in facts["documents"]["dropped"])
    for split, path in DOCUMENTS.items():
        where, count = str(folder / path), facts["split"][split]["documents"]
        try:
            digests = _digests(folder, _entry(manifest, path))
        except VerificationFailed as error:
            yield error.what, where
            continue
        if len(digests) != count:
            yield f"has {len(digests)} documents, the statement says {count}", where
        pairs = itertools.pairwise(digests)
        if any(one > other or (distinct and one == other) for one, other in pairs):
            yield "is not sorted, or holds a document twice", where
        if any((int.from_bytes(each[:8], "big") < bound) != (split == "held_out") for each in digests):
            yield "holds a document of the other split", where


def _digests(folder: Path, entry: FileEntry) -> list[bytes]:
    data = file_set.read_listed(folder, entry, entry.size)
    return [data[start : start + DIGEST_BYTES] for start in range(0, len(data), DIGEST_BYTES)]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
