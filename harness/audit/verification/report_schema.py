"""What `harness verify --json` prints, as JSON Schema: published as docs/schema/verification-v1.schema.json.

A report, or the error that kept it from being made. The schema names every field of this version. Later ones
may add some, so a reader ignores what it does not know; a field that goes, or means something else, makes the
format ``harness-verification/2``.
"""

from __future__ import annotations

from typing import get_args

from harness.audit.tiers.rules import TITLES
from harness.format.layout import FolderKind
from harness.provenance.checks import Check
from harness.provenance.schema import (
    DIALECT,
    FLAG,
    HEX32,
    HEX64,
    NATURAL,
    NULL,
    TIME,
    Schema,
    closed,
    either,
    listing,
    mapping,
)

FORMAT = "harness-verification/1"

_TEXT: Schema = {"type": "string"}
_TEXTS = listing(_TEXT)
_FINDING = closed(
    check={"enum": list(get_args(Check))},
    kind={"enum": ["wrong", "missing"]},
    what=_TEXT,
    where=_TEXT,
    remedy=_TEXT,
)
_CHECKPOINT = closed(
    name=_TEXT,
    kind={"enum": list(get_args(FolderKind))},
    checkpoint=HEX64,
    run=HEX32,
    sequence=NATURAL,
    steps=closed(**{"from": NATURAL, "to": NATURAL}),
    policy=either(closed(name=_TEXT, sha256=HEX64), NULL),
    signers=_TEXTS,
    key_id=HEX64,
    bytes=NATURAL,
    shown_at=either(TIME, NULL),
)
_STAMP = closed(size=NATURAL, moment=TIME, authority=_TEXT)
_TIER = closed(
    tier={"enum": list(TITLES)},
    means=_TEXT,
    held=FLAG,
    evidence=_TEXTS,
    missing=_TEXTS,
    reaches=_TEXTS,
)
REPORT = closed(
    format={"const": FORMAT},
    verdict={"enum": ["verified", "FAILED", "cannot tell"]},
    path=_TEXT,
    kind={"enum": ["run", "checkpoint", "export", "corpus"]},
    findings=listing(_FINDING),
    checks=mapping(NATURAL),
    notes=_TEXTS,
    checkpoints=listing(_CHECKPOINT),
    timestamps=listing(_STAMP),
    repeatability=closed(verdict=_TEXT, tiers=listing(_TIER), contradicted_by=_TEXTS),
    since=either(closed(size=NATURAL, root=HEX64, continued=FLAG, not_hashed=_TEXTS), NULL),
    bytes_hashed=NATURAL,
    seconds={"type": "number", "minimum": 0},
)
_ERROR = closed(
    error=closed(what=_TEXT, where=either(_TEXT, NULL), remedy=either(_TEXT, NULL)),
    exit_code={"enum": [1, 2, 3, 4]},
)
SCHEMA: Schema = {
    "$schema": DIALECT,
    "$id": "urn:harness:verification/v1",
    "title": "What `harness verify --json` prints",
    **either(REPORT, _ERROR),
}
