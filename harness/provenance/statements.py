"""The statements of a checkpoint: in-toto Statement v1 with our own predicate, and SLSA provenance v1 beside.

`SCHEMA` is the one description of ``urn:harness:predicate:checkpoint/v1``: it is published as
docs/schema/checkpoint-v1.schema.json, and `check` holds every predicate against it when it is signed and
when it is read. Unknown fields are refused. Nothing is a float: a number with a fraction is a decimal string,
since JSON parsers do not agree on doubles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import VerificationFailed
from harness.format import strict_json
from harness.provenance.schema import (
    DECIMAL,
    DIALECT,
    FACT,
    FLAG,
    HEX32,
    HEX64,
    NATURAL,
    NULL,
    SCALAR,
    TEXT,
    TIME,
    Repeating,
    Schema,
    check,
    closed,
    either,
    listing,
    mapping,
)

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:harness:predicate:checkpoint/v1"
SLSA_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:harness:training-segment/v1"

_CHECKPOINT = closed(checkpoint=HEX64, step=NATURAL)
_START = closed(checkpoint=HEX64, step=NATURAL, run=HEX32, name=TEXT, bundle_sha256=HEX64)

SCHEMA: Schema = {
    "$schema": DIALECT,
    "$id": PREDICATE_TYPE,
    "title": "What made a checkpoint",
    **closed(
        {"policy": either(closed(name=TEXT, sha256=HEX64), NULL)},
        run=closed(id=HEX32, name=TEXT, seed=NATURAL),
        sequence=NATURAL,
        steps=closed(**{"from": NATURAL, "to": NATURAL}),
        parent=either({"const": "genesis"}, _CHECKPOINT),
        start=either(_START, NULL),
        segment=closed(
            number=NATURAL,
            reason={"enum": ["first launch", "resume"]},
            **{"class": {"enum": ["genesis", "exact", "same-data", "accepted"]}},
            differences=listing(closed(what=TEXT, before=TEXT, after=TEXT)),
            accepted=listing(TEXT),
            skipped=listing(closed(name=TEXT, reason=TEXT, checkpoint=either(HEX64, NULL))),
            resumed_from=either(_CHECKPOINT, NULL),
        ),
        launch=closed(
            command=listing(TEXT),
            launcher=TEXT,
            world_size=NATURAL,
            nodes=NATURAL,
            mesh=mapping(NATURAL),
            precision={"enum": ["fp32", "bf16", "fp16", "fp8"]},
            compile=FLAG,
            parallel=TEXT,
            backend=TEXT,
        ),
        config=closed(sha256=HEX64, text={"type": "string", "maxLength": 1 << 20}),
        code=closed(
            harness=TEXT,
            git_commit=either(TEXT, NULL),
            dirty=either(FLAG, NULL),
            diff_sha256=either(HEX64, NULL),
            task=either(closed(import_path=TEXT, sha256=HEX64), NULL),
        ),
        data=closed(
            {"template_sha256": HEX64},  # of chats
            kind=TEXT,
            corpus_sha256=either(HEX64, NULL),
            tokenizer_sha256=either(HEX64, NULL),
            counts=mapping(NATURAL),
        ),
        cursor=closed(step=NATURAL, samples=NATURAL, tokens=NATURAL, epoch=NATURAL, position=NATURAL),
        environment=mapping(FACT),
        determinism=closed(
            mode={"enum": ["off", "warn", "strict"]},
            settings=mapping(SCALAR),
            ledger=either(
                closed(
                    {"unknown": NATURAL, "refuted": NATURAL},
                    sha256=HEX64,
                    rows=NATURAL,
                    documented=NATURAL,
                    observed=NATURAL,
                    measured=NATURAL,
                    coverage=mapping(SCALAR),
                ),
                NULL,
            ),
        ),
        state=closed(sha256=HEX64, tensors=NATURAL, parameters=NATURAL),
        metrics=closed(
            {"lines": either(HEX64, NULL)},
            chain=either(HEX64, NULL),
            loss=either(DECIMAL, NULL),
            grad_norm=either(DECIMAL, NULL),
            gradients=either(HEX64, NULL),
            state=either(HEX64, NULL),
            evaluation=mapping(DECIMAL),
        ),
        log=either(closed(size=NATURAL, root=HEX64), NULL),
        created=TIME,
        outcome={"enum": ["ok", "nonfinite"]},
    ),
}
"""JSON Schema (draft 2020-12) of the predicate, in the part of it that `check` knows."""

_predicates = Repeating(
    SCHEMA,
    ("code",),
    ("config",),
    ("data",),
    ("determinism", "settings"),
    ("environment",),
    ("launch",),
    ("segment",),
)
"""What a launch says in each of its statements is checked once."""


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
    def created(self) -> str:
        """When it was signed, as its maker says: UTC, to the second."""
        return str(self.predicate["created"])

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
    def policy(self) -> Mapping[str, Any] | None:
        """The policy that the run is made under, by the name of its file and the digest of its copy; None for
        none, and in statements of versions that knew none."""
        policy: Mapping[str, Any] | None = self.predicate.get("policy")
        return policy

    @property
    def segment(self) -> Mapping[str, Any]:
        """How the launch continued the one before."""
        segment: Mapping[str, Any] = self.predicate["segment"]
        return segment


def checkpoint_statement(*, subject_id: str, dir_hash: str, name: str, predicate: Mapping[str, Any]) -> bytes:
    """The bytes to sign. Raises `VerificationFailed` when ``predicate`` departs from `SCHEMA`."""
    check(predicate, where=f"predicate of {name}", schema=SCHEMA)
    return statement_bytes(subject_id, dir_hash, name, PREDICATE_TYPE, predicate)


def slsa_statement(*, subject_id: str, dir_hash: str, name: str, predicate: Mapping[str, Any]) -> bytes:
    """The same facts as SLSA provenance v1 (slsa.dev/spec/v1.0/provenance), for tools that know only that."""
    return strict_json.dumps(slsa_document(subject_id, dir_hash, name, predicate))


def slsa_document(
    checkpoint_id: str, dir_hash: str, name: str, predicate: Mapping[str, Any]
) -> Mapping[str, Any]:
    """`slsa_statement` before it is written; it holds no float."""
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
    return _document(checkpoint_id, dir_hash, name, SLSA_TYPE, provenance)


def parse_checkpoint(payload: bytes, *, where: str) -> CheckpointStatement:
    """The statement in a signed ``payload``. Raises `VerificationFailed` for other types or fields."""
    name, identity, directory, predicate = parse_statement(payload, PREDICATE_TYPE, where=where)
    _predicates.check(predicate, where=where)
    read = CheckpointStatement(name, identity, directory, predicate)
    if read.step_from > read.step_to or (read.parent_step or 0) != read.step_from:
        raise VerificationFailed("has steps that do not follow its parent's", where=where)
    if (read.parent_id is None) != (read.sequence == 0):
        raise VerificationFailed("has a sequence number that does not fit its parent", where=where)
    if read.start is not None and read.start["run"] == read.run_id:
        raise VerificationFailed("says that its run began with a checkpoint of itself", where=where)
    if not _is_sound(read.segment):
        raise VerificationFailed("has a launch whose reason, class and differences disagree", where=where)
    return read


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


_SUBJECT = closed(name=TEXT, digest=closed(sha256=HEX64, dirHash={"type": "string", "pattern": "^h1:"}))


def statement_bytes(
    checkpoint_id: str, dir_hash: str, name: str, predicate_type: str, predicate: Mapping[str, Any]
) -> bytes:
    """An in-toto Statement v1 about one checkpoint: the bytes to sign."""
    return strict_json.dumps(_document(checkpoint_id, dir_hash, name, predicate_type, predicate))


def _document(
    checkpoint_id: str, dir_hash: str, name: str, predicate_type: str, predicate: Mapping[str, Any]
) -> Mapping[str, Any]:
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": checkpoint_id, "dirHash": dir_hash}}],
        "predicateType": predicate_type,
        "predicate": predicate,
    }
