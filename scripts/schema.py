"""Write docs/schema/*.schema.json from the schemas of statements, policies and reports.

python scripts/schema.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from harness.audit.verification import report_schema
from harness.provenance import corpora, exports, later
from harness.provenance.policy import policy_schema, rotation
from harness.provenance.statements import SCHEMA

TARGET = Path(__file__).parent.parent / "docs" / "schema"
SCHEMAS = {
    "checkpoint-v1": SCHEMA,
    "corpus-v1": corpora.SCHEMA,
    "export-v1": exports.SCHEMA,
    "key-rotation-v1": rotation.SCHEMA,
    "policy-v1": policy_schema.SCHEMA,
    "replay-v1": later.SCHEMAS[later.REPLAY],
    "svr-v0.1": later.SCHEMAS[later.SVR],
    "test-result-v0.1": later.SCHEMAS[later.TEST_RESULT],
    "verification-v1": report_schema.SCHEMA,
}


def texts() -> dict[str, str]:
    """File name → contents."""
    return {f"{name}.schema.json": json.dumps(schema, indent=2) + "\n" for name, schema in SCHEMAS.items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    for name, text in texts().items():
        (folder / name).write_text(text)
        print(f"wrote {folder / name}")
