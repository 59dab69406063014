"""The statement of an exported folder: in-toto Statement v1, predicate ``urn:harness:predicate:export/v1``.

Its subject is the export's own MANIFEST.json; it names the checkpoint that the weights came from by id, run,
step and the digest of its statement, and how the tensors were renamed. No floats, no unknown fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.provenance import statements
from harness.provenance.schema import DIALECT, HEX32, HEX64, NATURAL, TEXT, TIME, Schema, check, closed
from harness.provenance.statements import CheckpointStatement

PREDICATE_TYPE = "urn:harness:predicate:export/v1"

SCHEMA: Schema = {
    "$schema": DIALECT,
    "$id": PREDICATE_TYPE,
    "title": "Which checkpoint an exported folder was made of",
    **closed(
        source=closed(
            checkpoint=HEX64,
            step=NATURAL,
            run=HEX32,
            name=TEXT,
            bundle_sha256=HEX64,
            state_sha256=HEX64,
        ),
        layout=TEXT,
        reason=TEXT,
        harness=TEXT,
        created=TIME,
    ),
}
"""JSON Schema (draft 2020-12) of the predicate."""


@dataclass(frozen=True)
class ExportStatement:
    """A checked ``export/v1`` statement."""

    subject_id: str
    """Hex sha256 of the export's MANIFEST.json."""
    dir_hash: str
    predicate: Mapping[str, Any]

    @property
    def source(self) -> Mapping[str, Any]:
        """The checkpoint that it was made of."""
        source: Mapping[str, Any] = self.predicate["source"]
        return source


def source_of(statement: CheckpointStatement, bundle_sha256: str) -> dict[str, Any]:
    """How an export names the checkpoint of ``statement``."""
    return {
        "checkpoint": statement.subject_id,
        "step": statement.step_to,
        "run": statement.run_id,
        "name": statement.run_name,
        "bundle_sha256": bundle_sha256,
        "state_sha256": statement.predicate["state"]["sha256"],
    }


def export_statement(*, export_id: str, dir_hash: str, name: str, predicate: Mapping[str, Any]) -> bytes:
    """The bytes to sign. Raises `VerificationFailed` when ``predicate`` departs from `SCHEMA`."""
    check(predicate, where=f"predicate of {name}", schema=SCHEMA)
    return statements.statement_bytes(export_id, dir_hash, name, PREDICATE_TYPE, predicate)


def parse_export(payload: bytes, *, where: str) -> ExportStatement:
    """The statement in a signed ``payload``. Raises `VerificationFailed` for other types or fields."""
    _, identity, directory, predicate = statements.parse_statement(payload, PREDICATE_TYPE, where=where)
    check(predicate, where=where, schema=SCHEMA)
    return ExportStatement(identity, directory, predicate)
