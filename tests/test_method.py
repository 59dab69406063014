"""docs/method.md names signed fields for each item of the lists; each of them must exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from harness.provenance import corpora, later
from harness.provenance.statements import SCHEMA

TEXT = (Path(__file__).parent.parent / "docs" / "method.md").read_text()
SCHEMAS = {"checkpoint/v1": SCHEMA, "corpus/v1": corpora.SCHEMA, "test-result": later.SCHEMAS["test-result"]}
ITEMS = 24
"""Five questions and nineteen items."""


def has(schema: dict[str, Any], path: list[str]) -> bool:
    """Whether ``schema`` knows the field ``path``."""
    if not path:
        return True
    options = schema.get("anyOf", [schema])
    return any(
        has(option["properties"][path[0]], path[1:])
        for option in options
        if path[0] in option.get("properties", {})
    )


def test_every_field_that_answers_an_item_is_in_the_schema_that_is_named() -> None:
    """Oracle: the published schemas, walked; every row names a field and a schema; a wrong one is found."""
    section = TEXT[TEXT.index("## What the report answers") :]
    rows = [line for line in section.splitlines() if re.match(r"\| [a-z]", line) and " in " in line]
    assert len(rows) == ITEMS
    for row in rows:
        answer = row.split("|")[2]
        for part in answer.split(";"):
            named = re.search(r" in (checkpoint/v1|corpus/v1|test-result)", part)
            fields = re.findall(r"`([\w.]+)`", part)
            if named is None:
                assert not fields, row
                continue
            assert fields, row
            for field in fields:
                assert has(SCHEMAS[named[1]], field.split(".")), (field, row)
    assert not has(SCHEMA, ["code", "commit"])
