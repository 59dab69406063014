"""An exported folder, examined: its signatures, its files, and the checkpoint that it says it was made of.

That the weights are those of the checkpoint is the word of who has signed the export; whoever has the
checkpoint can export it again, which gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.audit.folders import file_set, payload, sealed
from harness.errors import VerificationFailed
from harness.format import files, layout
from harness.provenance import exports, later, signers, statements
from harness.provenance.exports import ExportStatement
from harness.provenance.findings import Findings
from harness.provenance.policy import rules as policies
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import envelope
from harness.provenance.statements import CheckpointStatement

_SIGNATURES = {layout.MANIFEST, layout.MODEL_SIGNATURE, layout.EXPORT_BUNDLE}


def is_export(path: Path) -> bool:
    """Whether ``path`` looks like a folder that `harness export` has written."""
    return (path / layout.EXPORT_BUNDLE).is_file()


def examine(folder: Path, policy: Policy, findings: Findings) -> tuple[list[payload.Job], list[str]]:
    """Every check but that of payload bytes; returns what is left to hash, and when the export was signed."""
    present = file_set.listing(folder, findings)
    statement = findings.attempt("export statement", _statement, folder, policy)
    if statement is None:
        return [], []
    times = [str(statement.predicate["created"])]
    bundles: set[str] = set()
    for number, named in enumerate(statement.sources):
        bundles |= _check_source(folder, number, named, present, policy, findings)
    manifest = findings.attempt("manifest", sealed.manifest, folder, statement)
    if manifest is None:
        return [], times
    file_set.check_files(folder, manifest, present, _SIGNATURES | bundles, findings)
    file_set.check_headers(folder, manifest, present, findings)
    about = [(str(source["run"]), str(source["name"])) for source in statement.sources]
    sealed.check_model_signature(
        folder, policy, manifest, statement, present, findings, kind=policies.EXPORT, about=about
    )
    made = "merged" if "merge" in statement.predicate else "exported"
    for source in statement.sources:
        of = f"step {source['step']} of the run {source['name']}, checkpoint {source['checkpoint']}"
        findings.note(f"{made} from {of}")
    return payload.jobs(folder, manifest, payload.stamps(manifest, present)), times


def claimed(folder: Path) -> ExportStatement:
    """What ``folder`` says; its format is checked, its signature is not. Raises `VerificationFailed`."""
    where = str(folder / layout.EXPORT_BUNDLE)
    data = files.read_limited(folder / layout.EXPORT_BUNDLE, envelope.LIMIT)
    return exports.parse_export(envelope.unauthenticated_payload(data, where=where), where=where)


def _statement(folder: Path, policy: Policy) -> ExportStatement:
    where = str(folder / layout.EXPORT_BUNDLE)
    data = files.read_limited(folder / layout.EXPORT_BUNDLE, envelope.LIMIT)
    opened = envelope.open_own(data, policy.statement_keys, where=where)
    statement = exports.parse_export(opened.payload, where=where)
    created = str(statement.predicate["created"])
    for source in statement.sources:
        words = (str(source["run"]), str(source["name"]), created, policies.EXPORT)
        sealed.check_signer(policy, opened.key, *words, where=where)
    of = {str(source["checkpoint"]) for source in statement.sources}
    revoked = {statement.subject_id, *of} & policy.revoked
    if revoked:
        raise VerificationFailed(f"{min(revoked)} is revoked", where=where, remedy="use another one")
    return statement


def _check_source(
    folder: Path,
    number: int,
    named: Mapping[str, Any],
    present: Mapping[str, object],
    policy: Policy,
    findings: Findings,
) -> set[str]:
    """That the source ``named`` is signed as the policy wants; returns the paths of all that says so."""
    bundle = layout.source_bundle(number)
    start, _, end = layout.source_countersignature(number, "*").partition("*")
    others = [
        path
        for path in sorted(present)
        if path.startswith(start) and later.kind_of(path[len(start) : -len(end)]) == later.COUNTERSIGNATURE
    ]
    if len(others) > later.MOST:
        findings.bad("sizes", f"holds more than {later.MOST} countersignatures", str(folder))
    found = findings.attempt("source statement", _source, folder / bundle, named, policy)
    if found is not None:
        read = {
            str(folder / path): findings.attempt("sizes", files.read_limited, folder / path, later.LIMIT)
            for path in others[: later.MOST]
        }
        countersigned = {where: data for where, data in read.items() if data is not None}
        signers.check_exported(policy, findings, *found, countersigned, str(folder / bundle))
    return {bundle, *others}


def _source(
    bundle: Path, named: Mapping[str, Any], policy: Policy
) -> tuple[CheckpointStatement, envelope.Opened]:
    """The checkpoint's own statement, which is the one that the export names."""
    where = str(bundle)
    data = files.read_limited(bundle, envelope.LIMIT)
    opened = envelope.open_own(data, policy.statement_keys, where=where)
    told = statements.parse_checkpoint(opened.payload, where=where)
    if exports.source_of(told, hashlib.sha256(data).hexdigest()) != dict(named):
        raise VerificationFailed("is not the statement of the checkpoint that the export names", where=where)
    return told, opened
