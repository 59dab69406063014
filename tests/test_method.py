"""docs/method.md names signed fields for each item of the lists; each of them must exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from harness import environment, settings
from harness.provenance import corpora, later
from harness.provenance.statements import SCHEMA

TEXT = (Path(__file__).parent.parent / "docs" / "method.md").read_text()
SCHEMAS = {
    "checkpoint/v1": SCHEMA,
    "corpus/v1": corpora.SCHEMA,
    "test-result": later.SCHEMAS["test-result"],
    "replay/v1": later.SCHEMAS["replay"],
}
ITEMS = 27
"""Five questions and twenty-two items."""


def has(schema: dict[str, Any], path: list[str]) -> bool:
    """Whether ``schema`` knows the field ``path``; `environment` is open, and has what this machine has."""
    if not path:
        return True
    if path[0] == "environment" and path[1:]:
        return path[1] in {**environment.facts(), "stack": {}}
    options = [schema, *schema.get("anyOf", [])]
    return any(
        has(option["properties"][path[0]], path[1:])
        for option in options
        if path[0] in option.get("properties", {})
    )


def is_key(name: str) -> bool:
    """Whether a config has the section or key ``name``."""
    if "." not in name:
        return settings.section_of(name) is not None
    return bool(settings.field_of(name))


def test_every_field_that_answers_an_item_is_in_the_schema_that_is_named() -> None:
    """Oracle: the published schemas, walked, and the config's keys; every row names a field and a schema; a
    wrong one is found."""
    section = TEXT[TEXT.index("## What the report answers") :]
    rows = [line for line in section.splitlines() if re.match(r"\| [a-z]", line) and " in " in line]
    assert len(rows) == ITEMS
    for row in rows:
        answer = row.split("|")[2]
        for part in answer.split(";"):
            named = re.search(r" in (checkpoint/v1|corpus/v1|test-result|replay/v1)", part)
            keys = re.search(r"`config.text` \(([^)]*)\)", part)
            fields = re.findall(r"`([\w.]+)`", part.replace(keys[1], "") if keys else part)
            if named is None:
                assert not fields, row
                continue
            assert fields, row
            for field in fields:
                assert has(SCHEMAS[named[1]], field.split(".")), (field, row)
            for key in re.findall(r"`([\w.]+)`", keys[1]) if keys else ():
                assert is_key(key), (key, row)
    assert not has(SCHEMA, ["code", "commit"])
    assert not has(SCHEMA, ["environment", "weather"])
