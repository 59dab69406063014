"""The statement of an exported folder: in-toto Statement v1, predicate ``urn:harness:predicate:export/v1``.

Its subject is the export's own MANIFEST.json; it names the checkpoint that the weights came from by id, run,
step and the digest of its statement, and how the tensors were renamed. No floats, no unknown fields.

A merge is an export with more than one source: ``merge`` names the others, and each one's weight.
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
    HEX32,
    HEX64,
    NATURAL,
    TEXT,
    TIME,
    Schema,
    check,
    closed,
    listing,
)
from harness.provenance.statements import CheckpointStatement

PREDICATE_TYPE = "urn:harness:predicate:export/v1"
AVERAGE = "weighted sum in float64, in the order of the sources, rounded once to the dtype"
"""The only method of a merge in this version."""

_SOURCE = closed(
    checkpoint=HEX64, step=NATURAL, run=HEX32, name=TEXT, bundle_sha256=HEX64, state_sha256=HEX64
)

SCHEMA: Schema = {
    "$schema": DIALECT,
    "$id": PREDICATE_TYPE,
    "title": "Which checkpoint an exported folder was made of",
    **closed(
        {"merge": closed(method={"const": AVERAGE}, weights=listing(DECIMAL), others=listing(_SOURCE))},
        source=_SOURCE,
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

    @property
    def sources(self) -> list[Mapping[str, Any]]:
        """The checkpoint that it was made of, or all that were merged."""
        return [self.source, *self.predicate.get("merge", {}).get("others", [])]


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


def export_statement(*, subject_id: str, dir_hash: str, name: str, predicate: Mapping[str, Any]) -> bytes:
    """The bytes to sign. Raises `VerificationFailed` when ``predicate`` departs from `SCHEMA`."""
    _check(predicate, f"predicate of {name}")
    return statements.statement_bytes(subject_id, dir_hash, name, PREDICATE_TYPE, predicate)


def parse_export(payload: bytes, *, where: str) -> ExportStatement:
    """The statement in a signed ``payload``. Raises `VerificationFailed` for other types or fields."""
    _, identity, directory, predicate = statements.parse_statement(payload, PREDICATE_TYPE, where=where)
    _check(predicate, where)
    return ExportStatement(identity, directory, predicate)


def _check(predicate: Mapping[str, Any], where: str) -> None:
    check(predicate, where=where, schema=SCHEMA)
    merge = predicate.get("merge")
    if merge is not None and (not merge["others"] or len(merge["weights"]) != len(merge["others"]) + 1):
        raise VerificationFailed("merges other checkpoints than it has weights for", where=where)
