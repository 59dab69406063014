"""The statement of an exported folder: in-toto Statement v1, predicate ``urn:harness:predicate:export/v1``.

Its subject is the export's own MANIFEST.json; it names the checkpoint that the weights came from by id, run,
step and the digest of its statement, and how the tensors were renamed. No floats, no unknown fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.provenance import statements
from harness.provenance.statements import CheckpointStatement

PREDICATE_TYPE = "urn:harness:predicate:export/v1"
_TEXT = {"type": "string", "maxLength": 65536}
_HEX64 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def _object(**properties: Any) -> dict[str, Any]:
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": PREDICATE_TYPE,
    "title": "Which checkpoint an exported folder was made of",
    **_object(
        source=_object(
            checkpoint=_HEX64,
            step={"type": "integer", "minimum": 0, "maximum": 2**53},
            run={"type": "string", "pattern": "^[0-9a-f]{32}$"},
            name=_TEXT,
            bundle_sha256=_HEX64,
            state_sha256=_HEX64,
        ),
        layout=_TEXT,
        reason=_TEXT,
        harness=_TEXT,
        created={"type": "string", "pattern": "^[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z$"},
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
    statements.check(predicate, where=f"predicate of {name}", schema=SCHEMA)
    return statements.statement_bytes(export_id, dir_hash, name, PREDICATE_TYPE, predicate)


def parse_export(payload: bytes, *, where: str) -> ExportStatement:
    """The statement in a signed ``payload``. Raises `VerificationFailed` for other types or fields."""
    _, identity, directory, predicate = statements.parse_statement(payload, PREDICATE_TYPE, where=where)
    statements.check(predicate, where=where, schema=SCHEMA)
    return ExportStatement(identity, directory, predicate)
