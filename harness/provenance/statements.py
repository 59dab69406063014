"""The statements of a checkpoint: in-toto Statement v1 with our own predicate, and SLSA provenance v1 beside.

`SCHEMA` is the one description of ``urn:harness:predicate:checkpoint/v1``: it is published as
docs/schema/checkpoint-v1.schema.json, and `check` holds every predicate against it when it is signed and
when it is read. Unknown fields are refused. Nothing is a float: a number with a fraction is a decimal string,
since JSON parsers do not agree on doubles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import VerificationFailed
from harness.format import strict_json

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:harness:predicate:checkpoint/v1"
SLSA_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:harness:training-segment/v1"

Schema = dict[str, Any]

_NATURAL: Schema = {"type": "integer", "minimum": 0, "maximum": 2**53}
_TEXT: Schema = {"type": "string", "maxLength": 65536}
_FLAG: Schema = {"type": "boolean"}
_NULL: Schema = {"type": "null"}
_HEX64: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_HEX32: Schema = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
_DECIMAL: Schema = {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?$"}


def _object(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _either(*options: Schema) -> Schema:
    return {"anyOf": list(options)}


_SCALAR = _either(_TEXT, {**_NATURAL, "minimum": -(2**53)}, _FLAG, _NULL)
_FACT = _either(*_SCALAR["anyOf"], _list(_TEXT), _map(_SCALAR))
_CHECKPOINT = _object(checkpoint=_HEX64, step=_NATURAL)
_START = _object(checkpoint=_HEX64, step=_NATURAL, run=_HEX32, name=_TEXT, bundle_sha256=_HEX64)

SCHEMA: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": PREDICATE_TYPE,
    "title": "What made a checkpoint",
    **_object(
        run=_object(id=_HEX32, name=_TEXT, seed=_NATURAL),
        sequence=_NATURAL,
        steps=_object(**{"from": _NATURAL, "to": _NATURAL}),
        parent=_either({"const": "genesis"}, _CHECKPOINT),
        start=_either(_START, _NULL),
        segment=_object(
            number=_NATURAL,
            reason={"enum": ["first launch", "resume"]},
            **{"class": {"enum": ["genesis", "exact", "same-data", "accepted"]}},
            differences=_list(_object(what=_TEXT, before=_TEXT, after=_TEXT)),
            accepted=_list(_TEXT),
            skipped=_list(_object(name=_TEXT, reason=_TEXT, checkpoint=_either(_HEX64, _NULL))),
            resumed_from=_either(_CHECKPOINT, _NULL),
        ),
        launch=_object(
            command=_list(_TEXT),
            launcher=_TEXT,
            world_size=_NATURAL,
            nodes=_NATURAL,
            mesh=_map(_NATURAL),
            precision={"enum": ["fp32", "bf16", "fp16", "fp8"]},
            compile=_FLAG,
            parallel=_TEXT,
            backend=_TEXT,
        ),
        config=_object(sha256=_HEX64, text={"type": "string", "maxLength": 1 << 20}),
        code=_object(
            harness=_TEXT,
            git_commit=_either(_TEXT, _NULL),
            dirty=_either(_FLAG, _NULL),
            diff_sha256=_either(_HEX64, _NULL),
            task=_either(_object(import_path=_TEXT, sha256=_HEX64), _NULL),
        ),
        data=_object(
            kind=_TEXT,
            corpus_sha256=_either(_HEX64, _NULL),
            tokenizer_sha256=_either(_HEX64, _NULL),
            counts=_map(_NATURAL),
        ),
        cursor=_object(step=_NATURAL, samples=_NATURAL, tokens=_NATURAL, epoch=_NATURAL, position=_NATURAL),
        environment=_map(_FACT),
        determinism=_object(
            mode={"enum": ["off", "warn", "strict"]},
            settings=_map(_SCALAR),
            ledger=_either(
                _object(
                    sha256=_HEX64,
                    rows=_NATURAL,
                    documented=_NATURAL,
                    observed=_NATURAL,
                    measured=_NATURAL,
                    coverage=_map(_SCALAR),
                ),
                _NULL,
            ),
        ),
        state=_object(sha256=_HEX64, tensors=_NATURAL, parameters=_NATURAL),
        metrics=_object(
            chain=_either(_HEX64, _NULL),
            loss=_either(_DECIMAL, _NULL),
            grad_norm=_either(_DECIMAL, _NULL),
            gradients=_either(_HEX64, _NULL),
            state=_either(_HEX64, _NULL),
            evaluation=_map(_DECIMAL),
        ),
        log=_either(_object(size=_NATURAL, root=_HEX64), _NULL),
        created={"type": "string", "pattern": "^[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z$"},
        outcome={"enum": ["ok", "nonfinite"]},
    ),
}
"""JSON Schema (draft 2020-12) of the predicate, in the part of it that `check` knows."""


@dataclass(frozen=True)
class CheckpointStatement:
    """A checked ``checkpoint/v1`` statement."""

    name: str
    """Name of the checkpoint folder when it was signed."""
    subject_id: str
    """Checkpoint id that the statement is about."""
    dir_hash: str
    predicate: Mapping[str, Any]

    @property
    def run_id(self) -> str:
        """Identity of the run, hex."""
        return str(self.predicate["run"]["id"])

    @property
    def run_name(self) -> str:
        """What people call the run."""
        return str(self.predicate["run"]["name"])

    @property
    def sequence(self) -> int:
        """Number of the commit in the run's lineage, genesis 0."""
        return int(self.predicate["sequence"])

    @property
    def step_from(self) -> int:
        """Updates that the parent had."""
        return int(self.predicate["steps"]["from"])

    @property
    def step_to(self) -> int:
        """Updates that this checkpoint has."""
        return int(self.predicate["steps"]["to"])

    @property
    def parent_id(self) -> str | None:
        """Checkpoint id of the parent; None for genesis."""
        parent = self.predicate["parent"]
        return None if parent == "genesis" else str(parent["checkpoint"])

    @property
    def parent_step(self) -> int | None:
        """Step of the parent; None for genesis."""
        parent = self.predicate["parent"]
        return None if parent == "genesis" else int(parent["step"])

    @property
    def start(self) -> Mapping[str, Any] | None:
        """The checkpoint of another run whose weights this run began with."""
        start: Mapping[str, Any] | None = self.predicate["start"]
        return start

    @property
    def segment(self) -> Mapping[str, Any]:
        """How the launch continued the one before."""
        segment: Mapping[str, Any] = self.predicate["segment"]
        return segment


def checkpoint_statement(
    *, checkpoint_id: str, dir_hash: str, name: str, predicate: Mapping[str, Any]
) -> bytes:
    """The bytes to sign. Raises `VerificationFailed` when ``predicate`` departs from `SCHEMA`."""
    check(predicate, where=f"predicate of {name}")
    return statement_bytes(checkpoint_id, dir_hash, name, PREDICATE_TYPE, predicate)


def slsa_statement(*, checkpoint_id: str, dir_hash: str, name: str, predicate: Mapping[str, Any]) -> bytes:
    """The same facts as SLSA provenance v1 (slsa.dev/spec/v1.0/provenance), for tools that know only that."""
    data, code, parent, start = (predicate[name] for name in ("data", "code", "parent", "start"))
    dependencies: list[dict[str, Any]] = []
    if data["corpus_sha256"]:
        dependencies.append({"name": "corpus", "digest": {"sha256": data["corpus_sha256"]}})
    if data["tokenizer_sha256"]:
        dependencies.append({"name": "tokenizer", "digest": {"sha256": data["tokenizer_sha256"]}})
    if code["git_commit"]:
        dependencies.append({"name": "code", "digest": {"gitCommit": code["git_commit"]}})
    if parent != "genesis":
        dependencies.append({"name": "parent checkpoint", "digest": {"sha256": parent["checkpoint"]}})
    if start is not None:
        told = {"run": start["run"], "step": start["step"], "statement_sha256": start["bundle_sha256"]}
        digest = {"sha256": start["checkpoint"]}
        dependencies.append({"name": "start checkpoint", "digest": digest, "annotations": told})
    provenance = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "config": predicate["config"],
                "command": predicate["launch"]["command"],
                "seed": predicate["run"]["seed"],
            },
            "internalParameters": {
                "launch": {key: value for key, value in predicate["launch"].items() if key != "command"},
                "steps": predicate["steps"],
            },
            "resolvedDependencies": dependencies,
        },
        "runDetails": {
            "builder": {"id": BUILD_TYPE, "version": {"harness": code["harness"]}},
            "metadata": {
                "invocationId": f"{predicate['run']['id']}/{predicate['segment']['number']}",
                "finishedOn": predicate["created"],
            },
        },
    }
    return statement_bytes(checkpoint_id, dir_hash, name, SLSA_TYPE, provenance)


def parse_checkpoint(payload: bytes, *, where: str) -> CheckpointStatement:
    """The statement in a signed ``payload``. Raises `VerificationFailed` for other types or fields."""
    name, identity, directory, predicate = parse_statement(payload, PREDICATE_TYPE, where=where)
    check(predicate, where=where)
    statement = CheckpointStatement(name, identity, directory, predicate)
    if statement.step_from > statement.step_to or (statement.parent_step or 0) != statement.step_from:
        raise VerificationFailed("has steps that do not follow its parent's", where=where)
    if (statement.parent_id is None) != (statement.sequence == 0):
        raise VerificationFailed("has a sequence number that does not fit its parent", where=where)
    if statement.start is not None and statement.start["run"] == statement.run_id:
        raise VerificationFailed("says that its run began with a checkpoint of itself", where=where)
    if not _is_sound(statement.segment):
        raise VerificationFailed("has a launch whose reason, class and differences disagree", where=where)
    return statement


def _is_sound(segment: Mapping[str, Any]) -> bool:
    first = (
        segment["reason"] == "first launch",
        segment["class"] == "genesis",
        segment["resumed_from"] is None,
    )
    return len(set(first)) == 1 and not (segment["class"] == "exact" and segment["differences"])


def parse_statement(payload: bytes, predicate_type: str, *, where: str) -> tuple[str, str, str, Any]:
    """Name, checkpoint id, dirHash and predicate of a ``predicate_type`` statement about one checkpoint."""
    document = strict_json.loads(payload, where=where)
    if not isinstance(document, dict) or set(document) != {"_type", "subject", "predicateType", "predicate"}:
        raise VerificationFailed("is no in-toto statement", where=where)
    if document["_type"] != STATEMENT_TYPE or document["predicateType"] != predicate_type:
        raise VerificationFailed(f"is a {document['predicateType']!r}, not {predicate_type}", where=where)
    subjects = document["subject"]
    subject: Any = subjects[0] if isinstance(subjects, list) and len(subjects) == 1 else None
    check(subject, where=where, schema=_SUBJECT)
    digest = subject["digest"]
    return subject["name"], digest["sha256"], digest["dirHash"], document["predicate"]


_SUBJECT = _object(name=_TEXT, digest=_object(sha256=_HEX64, dirHash={"type": "string", "pattern": "^h1:"}))


def statement_bytes(
    checkpoint_id: str, dir_hash: str, name: str, predicate_type: str, predicate: Mapping[str, Any]
) -> bytes:
    return strict_json.dumps(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": name, "digest": {"sha256": checkpoint_id, "dirHash": dir_hash}}],
            "predicateType": predicate_type,
            "predicate": predicate,
        }
    )


def check(value: Any, *, where: str, schema: Schema = SCHEMA) -> None:
    """Raise `VerificationFailed` with the path of the first place where ``value`` departs from ``schema``."""
    reason = _departure(value, schema, "")
    if reason is not None:
        raise VerificationFailed(reason, where=where)


_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": (list, tuple),
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
}


def _departure(value: Any, schema: Schema, path: str) -> str | None:
    """What is wrong with ``value``, or None; knows the keywords that `SCHEMA` uses."""
    place = path or "it"
    if "anyOf" in schema:
        reasons = [_departure(value, option, path) for option in schema["anyOf"]]
        return None if None in reasons else max(map(str, reasons), key=len)
    if "const" in schema:
        return None if value == schema["const"] else f"{place} is not {schema['const']!r}"
    if "enum" in schema:
        known = isinstance(value, str) and value in schema["enum"]
        return None if known else f"{place} is none of {', '.join(schema['enum'])}"
    kind = schema["type"]
    if not _is_a(kind, value):
        return f"{place} is no {kind}"
    if kind == "integer":
        low, high = schema["minimum"], schema["maximum"]
        return None if low <= value <= high else f"{place} is {value}, outside {low} to {high}"
    if kind == "string":
        return _string_departure(value, schema, place)
    if kind == "array":
        reasons = [
            _departure(item, schema["items"], f"{place}[{number}]") for number, item in enumerate(value)
        ]
        return next((reason for reason in reasons if reason is not None), None)
    return _object_departure(value, schema, path) if kind == "object" else None


def _is_a(kind: str, value: object) -> bool:
    return isinstance(value, _TYPES[kind]) and not (kind == "integer" and isinstance(value, bool))


def _string_departure(value: str, schema: Schema, place: str) -> str | None:
    if len(value) > schema.get("maxLength", len(value)):
        return f"{place} is longer than {schema['maxLength']}"
    # JSON Schema's `$` is the end of the string, python's also matches before a final newline.
    pattern = schema.get("pattern", "").removesuffix("$")
    matches = re.fullmatch if schema.get("pattern", "").endswith("$") else re.match
    return None if not pattern or matches(pattern, value, re.ASCII) else f"{place} is {value[:40]!r}"


def _object_departure(value: dict[str, Any], schema: Schema, path: str) -> str | None:
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            return f"{path}.{name} is missing".lstrip(".")
    for name, item in value.items():
        inner = properties.get(name, others)
        if inner is False:
            return f"{path}.{name} is not a known field".lstrip(".")
        reason = _departure(item, inner, f"{path}.{name}".lstrip(".")) if isinstance(inner, dict) else None
        if reason is not None:
            return reason
    return None
