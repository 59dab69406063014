"""What P-256 keys alone can tell: that model.sig signs exactly the files of a folder, and every byte of them.

Statements, lineage and log are signed with Ed25519 keys. Without one nothing says which run, step and data
the files are from, so such a verification is free of faults at best, and never good (exit code 4). Rules:

- model.sig carries a good signature of one of the keys, in the only form that is accepted
- MANIFEST.json is the one that it signs, and lists exactly the other files that it signs
- the folder holds exactly these, with the headers and the bytes that are listed; nothing below provenance/ is
  read, and the payload of a pruned checkpoint may be gone
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from harness.audit.folders import file_set, payload
from harness.audit.verification import report, whole_run
from harness.audit.verification.report import Report
from harness.errors import VerificationFailed
from harness.format import files, layout
from harness.format.layout import RunFolder
from harness.format.manifest import Manifest, checkpoint_id
from harness.provenance.findings import Findings
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import model_signature


def verify(path: Path, policy: Policy, *, quiet: bool = False) -> Report:
    """What the P-256 keys of ``policy`` alone can tell of a run or of one folder: ``cannot tell`` at best.

    Raises `EnvironmentFault` for a disk that cannot be read.
    """
    started = time.perf_counter()
    findings = Findings()
    kind = report.kind_of(path)
    try:
        folders = whole_run.folders_of(RunFolder(path), findings) if kind == "run" else [path]
        work = [job for folder in folders for job in _examine(folder, policy, findings)]
        hashed = payload.check(work, findings, quiet=quiet)
    except OSError as error:
        raise files.unreadable(error, str(error.filename or path)) from error
    what = "no Ed25519 key was given: nothing tells which run, step and data the files are from"
    findings.missing("signature", what, str(path), "add --key NAME.ed25519.pub")
    return report.of(path, kind, findings, [], hashed, started)


def _examine(folder: Path, policy: Policy, findings: Findings) -> list[payload.Job]:
    """Every check of ``folder`` but that of payload bytes; returns what is left to hash."""
    present = file_set.listing(folder, findings)
    signed = findings.attempt("model signature", _signed, folder, policy)
    manifest = None if signed is None else findings.attempt("manifest", _manifest, folder, signed)
    if manifest is None:
        return []
    beside = {path for path in present if path.startswith(f"{layout.PROVENANCE}/")}
    whole = layout.kind_of_name(layout.name_of(folder))[0] != "pruned"
    signatures = {layout.MANIFEST, layout.MODEL_SIGNATURE, *beside}
    file_set.check_files(folder, manifest, present, signatures, findings, whole=whole)
    file_set.check_headers(folder, manifest, present, findings)
    return payload.jobs(folder, manifest, payload.stamps(manifest, present))


def _signed(folder: Path, policy: Policy) -> Mapping[str, str]:
    path = folder / layout.MODEL_SIGNATURE
    data = files.read_limited(path, file_set.MANIFEST_LIMIT)
    return model_signature.verify(data, policy.model_keys, where=str(path))


def _manifest(folder: Path, signed: Mapping[str, str]) -> Manifest:
    where = str(folder / layout.MANIFEST)
    data = files.read_limited(folder / layout.MANIFEST, file_set.MANIFEST_LIMIT)
    identity = checkpoint_id(data)
    if signed.get(layout.MANIFEST) != identity:
        raise VerificationFailed("is not the manifest that model.sig signs", where=where)
    manifest = Manifest.parse(data, where=where)
    if {**manifest.digests, layout.MANIFEST: identity} != signed:
        raise VerificationFailed("lists other files than model.sig signs", where=where)
    return manifest
