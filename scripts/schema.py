"""Write docs/schema/checkpoint-v1.schema.json from `harness.provenance.statements.SCHEMA`.

python scripts/schema.py [FILE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from harness.provenance.statements import SCHEMA

TARGET = Path(__file__).parent.parent / "docs" / "schema" / "checkpoint-v1.schema.json"


def text() -> str:
    """The file's contents."""
    return json.dumps(SCHEMA, indent=2) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    target.write_text(text())
    print(f"wrote {target}")
