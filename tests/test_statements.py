"""`harness.provenance.statements`: our checker beside jsonschema, over the schema that is published."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import run_folder
import schema as schema_script
from attack import payload_of
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import accepted

from harness.errors import VerificationFailed
from harness.format import layout, strict_json
from harness.provenance import statements
from harness.provenance.schema import Repeating, check
from harness.provenance.statements import SCHEMA

DOCS = Path(__file__).parent.parent / "docs"
_OTHERS = ("policy-v1", "verification-v1")
STATEMENTS = {name: schema for name, schema in schema_script.SCHEMAS.items() if name not in _OTHERS}
"""Those that `harness.provenance.schema` checks; a policy has a reader of its own, a report has none."""
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
ID, DIR_HASH, NAME = "a" * 64, "h1:x", "step-00000020"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a resume in it."""
    folder = tmp_path_factory.mktemp("statements")
    return run_folder.build(folder / "run", run_folder.identity(folder / "me"), resumes={20: "same-data"})


@pytest.fixture(scope="module")
def good(run: Path) -> dict[str, Any]:
    """The predicate of its last checkpoint."""
    predicate: dict[str, Any] = statement_of(run)["predicate"]
    return predicate


def statement_of(run: Path, name: str = layout.CHECKPOINT_BUNDLE) -> dict[str, Any]:
    """A statement of the last checkpoint."""
    return payload_of(run_folder.checkpoint(run, 30) / name)


def accepts(predicate: Any) -> bool:
    """Whether our checker does."""
    return bool(accepted(functools.partial(check, schema=SCHEMA), predicate))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in ``value``."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


@pytest.mark.parametrize("schema", STATEMENTS.values(), ids=STATEMENTS)
def test_a_schema_is_valid_and_only_uses_what_we_check(schema: dict[str, Any]) -> None:
    """Oracle: the metaschema of draft 2020-12, and the list of keywords that `check` knows."""
    jsonschema.Draft202012Validator.check_schema(schema)
    known = {"type", "properties", "required", "additionalProperties", "items", "anyOf", "const", "enum"}
    known |= {"minimum", "maximum", "maxLength", "pattern", "$schema", "$id", "title"}
    pending, found = [schema], set()
    while pending:
        schema = pending.pop()
        found |= set(schema)
        pending += [*schema.get("properties", {}).values(), *schema.get("anyOf", ())]
        pending += [
            schema[key] for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)
        ]
    assert found <= known


def test_the_published_schemas_are_current() -> None:
    """Oracle: the files; `python scripts/schema.py` writes them."""
    texts = schema_script.texts()
    assert {path.name for path in (DOCS / "schema").iterdir()} == set(texts)
    for name, text in texts.items():
        assert (DOCS / "schema" / name).read_text() == text


def test_every_field_is_documented() -> None:
    """Oracle: docs/statements.md has a line for each field of the predicate, in the schema's order."""
    text = (DOCS / "statements.md").read_text()
    found = [text.find(f"| `{name}` |") for name in SCHEMA["properties"]]
    assert -1 not in found
    assert found == sorted(found)


def test_a_good_predicate_is_accepted_by_both(good: dict[str, Any]) -> None:
    """Oracle: jsonschema."""
    assert accepts(good)
    VALIDATOR.validate(good)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 2**53, 2**53 + 1, -(2**53) - 1, 10**30]),
    st.sampled_from(
        ["", "genesis", "ok", "a" * 64, "A" * 64, "a" * 32, "1.5", "1e5", "٣", "nan", "x" * 65537]
    ),
    st.sampled_from([[], {}, [[]], [{}], {"a": "b"}, {"checkpoint": "a" * 64, "step": 1}, {"a": ["b"]}]),
).map(copy.deepcopy)


@given(data=st.data())
@settings(deadline=None, max_examples=600)
def test_our_checker_and_jsonschema_agree_on_changed_predicates(
    good: dict[str, Any], data: st.DataObject
) -> None:
    """Oracle: jsonschema, after a value is replaced, removed or added anywhere."""
    predicate = altered(good, data)
    assert accepts(predicate) == VALIDATOR.is_valid(predicate)


PATHS = [(name,) for name in ("code", "config", "cursor", "environment", "run")]
PATHS += [("determinism", name) for name in ("mode", "settings", "ledger")]


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_whatever_repeats_is_judged_as_if_it_came_for_the_first_time(
    good: dict[str, Any], data: st.DataObject
) -> None:
    """Oracle: `check` of each alone, and its bytes before; between two of them the good one comes again."""
    checker = Repeating(SCHEMA, *data.draw(st.lists(st.sampled_from(PATHS), unique=True)))
    for _ in range(2):
        for predicate in (copy.deepcopy(good), altered(good, data, ODD.filter(is_json))):
            before = json.dumps(predicate)
            assert bool(accepted(checker.check, predicate)) == accepts(predicate)
            assert json.dumps(predicate) == before


def test_what_repeats_is_one_object(good: dict[str, Any]) -> None:
    """Oracle: identity, and equal bytes only: Python takes 1, 1.0 and true for equal."""
    checker = Repeating(SCHEMA, ("environment",), ("determinism", "settings"))
    first, second, third = (copy.deepcopy(good) for _ in range(3))
    first["environment"], second["environment"], third["environment"] = {"a": 1}, {"a": 1}, {"a": True}
    for predicate in (first, second, third):
        checker.check(predicate, where="x")
    assert first["environment"] is second["environment"]
    assert first["determinism"]["settings"] is third["determinism"]["settings"]
    assert third["environment"]["a"] is True


def is_json(value: Any) -> bool:
    """Whether strict JSON has such a value."""
    return not isinstance(value, int) or abs(value) <= 2**53


def altered(good: dict[str, Any], data: st.DataObject, odd: st.SearchStrategy[Any] = ODD) -> dict[str, Any]:
    """``good`` with something replaced, removed or added in one or two places."""
    predicate = copy.deepcopy(good)
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = data.draw(st.sampled_from(list(places(predicate))))
        action = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            container[key] = data.draw(odd)
        elif action == "remove":
            del container[key]
        elif isinstance(container, dict):
            container["odd"] = data.draw(odd)
        else:
            container.append(data.draw(odd))
    return predicate


@pytest.mark.parametrize("field", SCHEMA["required"])
def test_every_field_is_needed(good: dict[str, Any], field: str) -> None:
    """Oracle: a predicate without the field; the reason names it."""
    with pytest.raises(VerificationFailed, match=f"^{field} is missing"):
        check({name: value for name, value in good.items() if name != field}, where="x", schema=SCHEMA)


def test_values_of_a_subclass_are_those_of_their_type(good: dict[str, Any]) -> None:
    """Oracle: torch's version, which is a string of a class of its own, is written as a string."""

    class Version(str):
        pass

    changed = {**good, "environment": {"torch": Version("2.13.0"), "all": [Version("1")]}}
    assert accepts(changed)
    assert strict_json.loads(strict_json.dumps(changed), where="x") == changed


@pytest.mark.parametrize("value", [3.0, 1.5, float("nan")])
def test_a_float_is_refused_even_where_json_schema_takes_it_for_an_integer(
    good: dict[str, Any], value: float
) -> None:
    """Oracle: the module's rule that nothing is a float; JSON Schema calls 3.0 an integer."""
    changed = copy.deepcopy(good)
    changed["run"]["seed"] = value
    assert not accepts(changed)


def test_a_final_newline_is_no_end_of_a_pattern(good: dict[str, Any]) -> None:
    """Oracle: ECMA 262, whose `$` is the end; Python's `$` also matches before a newline."""
    changed = copy.deepcopy(good)
    changed["config"]["sha256"] += "\n"
    assert not accepts(changed)


def test_a_statement_is_read_back_as_it_was_written(good: dict[str, Any]) -> None:
    """Oracle: the facts that went in."""
    data = statements.checkpoint_statement(subject_id=ID, dir_hash=DIR_HASH, name=NAME, predicate=good)
    read = statements.parse_checkpoint(data, where="x")
    assert (read.subject_id, read.dir_hash, read.name, read.predicate) == (ID, DIR_HASH, NAME, good)
    assert (read.step_from, read.step_to, read.sequence) == (20, 30, 2)
    assert (read.parent_id, read.parent_step) == (good["parent"]["checkpoint"], 20)
    assert (read.run_id, read.run_name) == (good["run"]["id"], "sample")
    assert read.segment["class"] == "same-data"


def test_an_unsound_predicate_is_not_signed(good: dict[str, Any]) -> None:
    """Oracle: the schema, before anything is signed."""
    changed = copy.deepcopy(good)
    changed["metrics"]["evaluation"]["accuracy"] = 0.5
    with pytest.raises(VerificationFailed, match="accuracy is no string"):
        statements.checkpoint_statement(subject_id=ID, dir_hash=DIR_HASH, name=NAME, predicate=changed)


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_any_changed_statement_is_read_or_refused(run: Path, data: st.DataObject) -> None:
    """Oracle: no other exception than ours."""
    statement = statement_of(run)
    container, key = data.draw(st.sampled_from(list(places(statement))))
    container[key] = data.draw(ODD.filter(is_json))
    for read in accepted(statements.parse_checkpoint, strict_json.dumps(statement)):
        assert accepts(read.predicate)


@given(st.binary(max_size=100))
@settings(deadline=None)
def test_any_bytes_are_refused(data: bytes) -> None:
    """Oracle: nobody guesses a statement; no other exception than ours."""
    with pytest.raises(VerificationFailed):
        statements.parse_checkpoint(data, where="x")


def test_the_slsa_statement_has_the_required_fields_and_the_same_subject(run: Path) -> None:
    """Oracle: slsa.dev/spec/v1.0/provenance: required fields, and ResourceDescriptors with a digest."""
    ours, slsa = statement_of(run), statement_of(run, layout.SLSA_BUNDLE)
    assert slsa["subject"] == ours["subject"]
    assert slsa["predicateType"] == "https://slsa.dev/provenance/v1"
    definition, details = slsa["predicate"]["buildDefinition"], slsa["predicate"]["runDetails"]
    assert definition["buildType"].startswith("urn:")
    assert definition["externalParameters"]["config"] == ours["predicate"]["config"]
    assert details["builder"]["id"]
    by_name = {each["name"]: each["digest"] for each in definition["resolvedDependencies"]}
    assert by_name == {
        "corpus": {"sha256": "e" * 64},
        "code": {"gitCommit": "d" * 40},
        "parent checkpoint": {"sha256": ours["predicate"]["parent"]["checkpoint"]},
    }
