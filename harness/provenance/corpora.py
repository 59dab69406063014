"""The statement of a prepared corpus: in-toto Statement v1, predicate ``urn:harness:predicate:corpus/v1``.

Its subject is the folder's own MANIFEST.json, whose sha256 is the corpus id that checkpoints name as their
``data.corpus_sha256``. It says which files were read, how many documents each filter dropped, how the rest
was split and tokenized. No floats, no unknown fields; numbers that contradict each other are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import VerificationFailed
from harness.provenance import statements
from harness.provenance.schema import (
    DECIMAL,
    DIALECT,
    FLAG,
    HEX64,
    NATURAL,
    NULL,
    TEXT,
    TIME,
    Schema,
    check,
    closed,
    either,
    listing,
)

PREDICATE_TYPE = "urn:harness:predicate:corpus/v1"
SPLIT_RULE = (
    "held out: the first 8 bytes of the document's sha256, big-endian, are below held_out_share * 2^64"
)
"""The only rule of this version. It looks at nothing but the text, so equal texts are in one split."""
SEEN_BEFORE = "seen before"
"""The filter of repeated documents; where the statement counts it, every kept document is another one."""

_COUNT = closed(documents=NATURAL, bytes=NATURAL)
_PART = closed(documents=NATURAL, bytes=NATURAL, tokens=NATURAL, shards=NATURAL)

SCHEMA: Schema = {
    "$schema": DIALECT,
    "$id": PREDICATE_TYPE,
    "title": "What a corpus was prepared from, and how",
    **closed(
        {
            # Of chats: the template, and how many tokens count in the loss.
            "chat": closed(template_sha256=HEX64, counted=closed(train=NATURAL, held_out=NATURAL)),
        },
        name=TEXT,
        recipe=closed(sha256=HEX64, text=TEXT),
        source=closed(kind=TEXT, hub=either(TEXT, NULL), files=NATURAL, bytes=NATURAL, sha256=HEX64),
        documents=closed(read=_COUNT, kept=_COUNT, dropped=listing(closed(filter=TEXT, count=_COUNT))),
        split=closed(
            rule={"const": SPLIT_RULE},
            held_out_share=DECIMAL,
            train=_PART,
            held_out=_PART,
            in_both=NATURAL,
        ),
        tokenizer=closed(
            kind={"enum": ["bytes", "bpe"]},
            origin={"enum": ["built in", "trained on the train split", "given"]},
            sha256=HEX64,
            vocabulary=NATURAL,
            library=either(TEXT, NULL),
        ),
        code=closed(
            harness=TEXT,
            git_commit=either(TEXT, NULL),
            dirty=either(FLAG, NULL),
            diff_sha256=either(HEX64, NULL),
            source=either(HEX64, NULL),
        ),
        license=either(TEXT, NULL),
        url=either(TEXT, NULL),
        created=TIME,
    ),
}
"""JSON Schema (draft 2020-12) of the predicate."""


@dataclass(frozen=True)
class CorpusStatement:
    """A checked ``corpus/v1`` statement."""

    subject_id: str
    """The corpus id: hex sha256 of MANIFEST.json."""
    dir_hash: str
    predicate: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What people call the corpus."""
        return str(self.predicate["name"])


def corpus_statement(*, subject_id: str, dir_hash: str, name: str, predicate: Mapping[str, Any]) -> bytes:
    """The bytes to sign. Raises `VerificationFailed` when a verifier would refuse ``predicate``."""
    _check(predicate, f"predicate of {name}")
    return statements.statement_bytes(subject_id, dir_hash, name, PREDICATE_TYPE, predicate)


def parse_corpus(payload: bytes, *, where: str) -> CorpusStatement:
    """The statement in a signed ``payload``. Raises `VerificationFailed` for other types or fields."""
    _, identity, directory, predicate = statements.parse_statement(payload, PREDICATE_TYPE, where=where)
    _check(predicate, where)
    return CorpusStatement(identity, directory, predicate)


def _check(predicate: Mapping[str, Any], where: str) -> None:
    """Schema, and sums: nothing was lost between reading and splitting."""
    check(predicate, where=where, schema=SCHEMA)
    documents, split = predicate["documents"], predicate["split"]
    for unit in ("documents", "bytes"):
        dropped = sum(each["count"][unit] for each in documents["dropped"])
        if unit == "documents" and documents["kept"][unit] + dropped != documents["read"][unit]:
            raise VerificationFailed("has documents that were neither kept nor dropped", where=where)
        if split["train"][unit] + split["held_out"][unit] != documents["kept"][unit]:
            raise VerificationFailed(f"has {unit} that were kept and are in no split", where=where)
    for part, counted in predicate.get("chat", {}).get("counted", {}).items():
        if counted > split[part]["tokens"]:
            raise VerificationFailed(f"counts more tokens of {part} than it has", where=where)
    if split["in_both"]:
        raise VerificationFailed(f"has {split['in_both']} documents in both splits", where=where)
