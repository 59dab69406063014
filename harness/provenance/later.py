"""Statements that are added to a checkpoint after it was sealed: by its maker, an evaluator, an auditor.

Each lies in ``provenance/KIND-N.sigstore.json``, is about the checkpoint's own subject, and breaks no earlier
signature, since nothing that is signed covers ``provenance/``. Kinds that this version writes, with a closed
schema each (published under docs/schema/):

- ``test-result``: an evaluation, as in-toto test-result v0.1; scores, data and decoding settings in the
  extension field ``harness_evaluation`` (in-toto's parsing rules allow such fields)
- ``replay``: a segment was executed again; the verdict and what it rests on
- ``svr``: somebody has verified the checkpoint, as in-toto Simple Verification Result v0.1
- ``countersignature``: the checkpoint's own statement, the same bytes, under another key

Any other kind is accepted as long as its predicate type ends in ``KIND/v`` and a version: other tools may add
what they like. Sources: github.com/in-toto/attestation, spec/predicates/{test-result,svr}.md, spec/v1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from harness.errors import UsageError, VerificationFailed
from harness.format import strict_json
from harness.provenance import statements
from harness.provenance.schema import (
    DECIMAL,
    DIALECT,
    FACT,
    FLAG,
    HEX64,
    NATURAL,
    NULL,
    SCALAR,
    TEXT,
    TIME,
    Schema,
    check,
    closed,
    either,
    listing,
    mapping,
)
from harness.provenance.statements import CheckpointStatement

TEST_RESULT, REPLAY, SVR, COUNTERSIGNATURE = "test-result", "replay", "svr", "countersignature"
TYPES = {
    TEST_RESULT: "https://in-toto.io/attestation/test-result/v0.1",
    REPLAY: "urn:harness:predicate:replay/v1",
    SVR: "https://in-toto.io/attestation/svr/v0.1",
}
"""Kind → predicate type; a countersignature has that of the checkpoint's statement."""
LIMIT = 1 << 20
"""Bytes of a later statement's bundle."""
MOST = 4096
"""Later statements of one checkpoint that are read."""

_NAME = re.compile(r"([a-z][a-z-]*)-(0|[1-9]\d{0,5})")
_PATH = re.compile(r"provenance/([^/]+)\.sigstore\.json")
_RESERVED = ("checkpoint", "slsa")
_TEXTS = listing(TEXT)
_RESOURCE = closed(
    {
        "name": TEXT,
        "uri": TEXT,
        "digest": mapping(TEXT),
        "mediaType": TEXT,
        "downloadLocation": TEXT,
        "annotations": mapping(FACT),
    }
)
_CHECKPOINT = closed(checkpoint=HEX64, step=NATURAL)
_DIFFERENCE = closed(what=TEXT, before=TEXT, after=TEXT)


def _published(kind: str, title: str, schema: Schema) -> Schema:
    return {"$schema": DIALECT, "$id": TYPES[kind], "title": title, **schema}


SCHEMAS: dict[str, Schema] = {
    TEST_RESULT: _published(
        TEST_RESULT,
        "An evaluation of a checkpoint",
        closed(
            {
                "url": TEXT,
                "passedTests": _TEXTS,
                "warnedTests": _TEXTS,
                "failedTests": _TEXTS,
                "harness_evaluation": closed(
                    metrics=mapping(DECIMAL),
                    examples=either(NATURAL, NULL),
                    dataset=either(closed(name=TEXT, split=TEXT, sha256=either(HEX64, NULL)), NULL),
                    procedure=closed(name=TEXT, version=TEXT, settings=mapping(SCALAR)),
                    decoding=mapping(SCALAR),
                    environment=mapping(FACT),
                    created=TIME,
                ),
            },
            result={"enum": ["PASSED", "WARNED", "FAILED"]},
            configuration=listing(_RESOURCE),
        ),
    ),
    REPLAY: _published(
        REPLAY,
        "A segment of a run, executed again",
        closed(
            verdict={"enum": ["equal", "within floor", "outside", "inconclusive"]},
            reason=TEXT,
            steps=closed(**{"from": NATURAL, "to": NATURAL}),
            started_from=either(_CHECKPOINT, NULL),
            compared=listing(
                closed(
                    what=TEXT,
                    count=NATURAL,
                    equal=FLAG,
                    recorded=either(TEXT, NULL),
                    replayed=either(TEXT, NULL),
                )
            ),
            first_divergence=either(closed(step=NATURAL, what=TEXT, where=either(TEXT, NULL)), NULL),
            suspects=listing(
                closed(op=TEXT, evidence={"enum": ["documented", "observed", "measured"]}, reason=TEXT)
            ),
            fingerprint=closed(same=FLAG, differences=listing(_DIFFERENCE)),
            floor=either(
                closed(
                    {
                        "precision": TEXT,
                        "weak": FLAG,
                        "distance": either(DECIMAL, NULL),
                        "tensors": listing(closed(name=TEXT, floor=DECIMAL, distance=DECIMAL)),
                        "members": listing(closed(name=TEXT, distance=DECIMAL, own=FLAG, apart=FLAG)),
                        "detectable": closed(
                            {"tried": listing(closed(what=TEXT, size=TEXT, ratio=DECIMAL, found=FLAG))},
                            what=TEXT,
                            least=either(DECIMAL, NULL),
                        ),
                    },
                    measure=TEXT,
                    measured=DECIMAL,
                    bound=DECIMAL,
                    samples=NATURAL,
                    source=TEXT,
                ),
                NULL,
            ),
            checkpoints=listing(_CHECKPOINT),
            replayer=closed(harness=TEXT, environment=mapping(FACT)),
            created=TIME,
        ),
    ),
    SVR: _published(
        SVR,
        "A checkpoint was verified",
        closed(verifier=closed({"policy": _RESOURCE}, id=TEXT), timeCreated=TIME, properties=_TEXTS),
    ),
}
"""Kind → JSON Schema of its predicate."""


@dataclass(frozen=True)
class Later:
    """A checked later statement."""

    name: str
    """``replay-0``: its file's name without the ending."""
    kind: str
    predicate: Mapping[str, Any]

    @property
    def created(self) -> str | None:
        """When its signer says that it was made; None for a kind that is none of ours, or does not say."""
        facts = self.predicate
        if self.kind == TEST_RESULT:
            facts = facts.get("harness_evaluation", {})
        return facts.get("timeCreated" if self.kind == SVR else "created") if self.kind in SCHEMAS else None

    @property
    def is_favourable(self) -> bool:
        """Whether it says something good of the checkpoint, as far as its kind can say otherwise."""
        if self.kind == TEST_RESULT:
            return bool(self.predicate["result"] != "FAILED")
        return self.kind != REPLAY or self.predicate["verdict"] in ("equal", "within floor")

    @property
    def summary(self) -> str:
        """The result in a few words; empty when its kind is none of ours."""
        facts = self.predicate
        if self.kind == TEST_RESULT:
            scores = facts.get("harness_evaluation", {}).get("metrics", {})
            return " ".join([str(facts["result"]), *(f"{name} {value}" for name, value in scores.items())])
        if self.kind == REPLAY:
            return f"{facts['verdict']}, steps {facts['steps']['from']} to {facts['steps']['to']}"
        return ", ".join(facts["properties"]) if self.kind == SVR else ""


def path_of(name: str) -> str:
    """``provenance/replay-0.sigstore.json`` for ``replay-0``."""
    return f"provenance/{name}.sigstore.json"


def name_of(path: str) -> str | None:
    """``replay-0`` for the path of a later statement; None for any other path."""
    match = _PATH.fullmatch(path)
    return match[1] if match is not None and kind_of(match[1]) is not None else None


def kind_of(name: str) -> str | None:
    """``replay`` for ``replay-0``; None for a name that no later statement may have."""
    match = _NAME.fullmatch(name)
    return match[1] if match is not None and match[1] not in _RESERVED else None


def build(
    kind: str,
    predicate: Mapping[str, Any],
    checkpoint: CheckpointStatement,
    predicate_type: str | None = None,
) -> bytes:
    """The statement to sign about ``checkpoint``; ``predicate_type`` only for a kind that is none of ours.

    Raises `VerificationFailed` for a predicate that departs from the kind's schema, `UsageError` for a kind
    or a type that a verifier would refuse.
    """
    if kind_of(f"{kind}-0") is None or kind == COUNTERSIGNATURE:
        raise UsageError(
            f"{kind!r} is no kind of statement with a predicate of its own",
            remedy=f"known: {', '.join(SCHEMAS)}; others: small letters and hyphens, with a predicate type",
        )
    known = TYPES.get(kind)
    if known is not None and predicate_type not in (None, known):
        raise UsageError(f"a {kind} has the predicate type {known}, not {predicate_type}")
    uri = known or predicate_type
    if uri is None:
        raise UsageError(
            f"{kind} is none of this version's kinds", remedy=f"name its type, which ends in {kind}/v1"
        )
    data = statements.statement_bytes(
        checkpoint.subject_id, checkpoint.dir_hash, checkpoint.name, uri, predicate
    )
    parse(data, f"{kind}-0", checkpoint, where=f"predicate of the {kind}")
    return data


def parse(payload: bytes, name: str, checkpoint: CheckpointStatement, *, where: str) -> Later:
    """The signed ``payload`` of the file ``name``, which must be about ``checkpoint``.

    A file's name is not signed, so the predicate type must name the same kind. Raises `VerificationFailed`.
    """
    kind = kind_of(name)
    document = strict_json.loads(payload, where=where)
    found = str(document.get("predicateType") if isinstance(document, dict) else None)
    if kind is None or not _is_of_kind(found, kind):
        raise VerificationFailed(f"is no statement of kind {kind}, its predicate is {found!r}", where=where)
    _, identity, directory, predicate = statements.parse_statement(payload, found, where=where)
    if (identity, directory) != (checkpoint.subject_id, checkpoint.dir_hash):
        raise VerificationFailed("is about another checkpoint", where=where)
    if kind in SCHEMAS:
        check(predicate, where=where, schema=SCHEMAS[kind])
        _check_sense(kind, predicate, where)
    elif not isinstance(predicate, dict):
        raise VerificationFailed("has a predicate that is no object", where=where)
    return Later(name, kind, predicate)


def _is_of_kind(predicate_type: str, kind: str) -> bool:
    if kind in TYPES:
        return predicate_type == TYPES[kind]
    return re.fullmatch(rf"(.*[/:])?{kind}/v[0-9.]+", predicate_type) is not None


def _check_sense(kind: str, predicate: Mapping[str, Any], where: str) -> None:
    """What a schema cannot say: a verdict that contradicts what it rests on."""
    if kind == TEST_RESULT and predicate["result"] == "PASSED" and predicate.get("failedTests"):
        raise VerificationFailed("has the result PASSED and failed tests", where=where)
    if kind == REPLAY:
        equal = predicate["verdict"] == "equal"
        differs = predicate["first_divergence"] or not all(each["equal"] for each in predicate["compared"])
        if predicate["steps"]["from"] >= predicate["steps"]["to"]:
            raise VerificationFailed("has steps that end before they begin", where=where)
        if equal and (differs or not predicate["compared"]):
            raise VerificationFailed("says equal, and has a difference or compared nothing", where=where)
        if predicate["verdict"] == "within floor":
            floor = predicate["floor"]
            if floor is None:
                raise VerificationFailed("says within floor, and has none", where=where)
            if Decimal(floor.get("distance") or 0) > Decimal(floor["bound"]):
                raise VerificationFailed("says within floor, and is farther than its bound", where=where)
