"""A research report: results, uncertainty over seeds, claims held against evidence, what could still vary.

RUN may also be the folder of a sweep. Writes report.md, one self-contained report.html and the pictures.
Nothing counts as verified unless --key or --policy is given; each run is then checked as by `harness verify`.
--claims names a file of claims (docs/method.md); one that says more than its evidence is marked, with the
narrower sentence that the evidence supports. --with names prepared corpora, which say what was left out.
It says when and by what it was made; with $SOURCE_DATE_EPOCH set it is the same bytes when made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
from harness.audit.folders import prepared
from harness.audit.run import own_files
from harness.audit.tiers import text as tier_text
from harness.audit.tiers.rules import Tiers
from harness.audit.verification.report import Report
from harness.audit.verification.whole_run import verify_run
from harness.commands import Outcome
from harness.commands.trust import add_trust, trusted
from harness.errors import UsageError, VerificationFailed
from harness.format import files, layout, moments
from harness.provenance import later
from harness.provenance.corpora import CorpusStatement
from harness.provenance.findings import Findings
from harness.provenance.policy.rules import Policy
from harness.report import claim_file, facts, html, markdown, report, runs, verified
from harness.report.document import Block, Picture, Status
from harness.report.judge import Judged
from harness.report.study import study
from harness.sweeps import register
from harness.sweeps.register import Plan

EXAMPLE = "harness report runs/tiny --out runs/tiny-report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, where to write, what is claimed, and whom to trust."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folder, or folder of a sweep; several are compared",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write the report into"
    )
    parser.add_argument("--claims", type=Path, metavar="FILE", help="claims to check (docs/method.md)")
    parser.add_argument(
        "--with", dest="beside", nargs="+", default=[], type=Path, metavar="CORPUS",
        help="prepared corpora that runs were trained on: checked, and told (needs --key or --policy)",
    )  # fmt: skip
    add_trust(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read, judge, write; exit code 1 when a verification failed, 4 when it could not tell."""
    return write_report(arguments.runs, arguments.out, trusted(arguments), arguments.claims, arguments.beside)


def write_report(
    paths: Sequence[Path],
    out: Path,
    whom: Policy | None,
    claimed: Path | None,
    beside: Sequence[Path] = (),
) -> Outcome:
    """The report on ``paths`` in the folder ``out``; ``whom`` to trust, ``claimed`` the file of claims,
    ``beside`` the corpora to tell of."""
    wanted = None if claimed is None else claim_file.load(claimed)
    folders, plans, absent, alone = _expanded(paths)
    found = [_read(path, whom) for path in folders]
    read = runs.told_apart([one for one, _ in found])
    reports = [judged for _, judged in found if judged is not None]
    verdicts = _verdicts(read, reports)
    evidence = [found.evidence for found in reports]
    corpora = [_corpus(folder, whom, read) for folder in beside]
    about = study(read, verdicts, wanted, plans, absent, alone, evidence, corpora)
    made = moments.of_document()
    files = _write(out, report.compose(about, f"Made at {made} by harness {harness.__version__}."))
    lines = [*(report.summary(one) for one in read), *(one.text for one in verdicts if one)]
    lines += [
        f"{one.claim.name}: {one.verdict}" + (f": {one.reasons[0]}" if one.reasons else "")
        for one in about.judged
    ]
    lines.append(f"report: {files['html']}")
    if "loss.svg" in files:
        lines.append(f"loss curve: {files['loss.svg']}")
    document: dict[str, Any] = {
        "made": made,
        "harness": harness.__version__,
        "runs": [_document(*each) for each in zip(read, verdicts, about.tiers, strict=True)],
        "evaluations": [
            {**_statement(one, each), "signer": each.signer, **each.facts} for one, each in about.evaluations
        ],
        "claims": [_judged(one) for one in about.judged],
        "corpora": [{"corpus": each.subject_id, **each.predicate} for each in corpora],
        "files": {name: str(path) for name, path in files.items()},
    }
    return Outcome(document, "\n".join(lines), exit_code=max([0, *(each.exit_code for each in reports)]))


def _read(root: Path, whom: Policy | None) -> tuple[runs.Run, Report | None]:
    """A run and the verdict on it; what was verified of it is what the report tells."""
    read = runs.read(root)
    if whom is None:
        return read, None
    kept = own_files.Kept()
    judged = verify_run(root, whom, keep=kept)
    if judged.exit_code == 1:
        return read, judged
    return replace(verified.of(read, judged, kept), evaluated=tuple(_evaluated(judged))), judged


def _corpus(folder: Path, whom: Policy | None, read: Sequence[runs.Run]) -> CorpusStatement:
    """What the prepared corpus ``folder`` says, every check but that of payload bytes made.

    Raises the first failure, `UsageError` without anybody to trust and for a corpus of none of the runs.
    """
    if not prepared.is_corpus(folder):
        raise UsageError("no prepared corpus", where=str(folder), remedy="name a folder of harness prepare")
    if whom is None:
        raise UsageError("whom to trust is not said", where="--with", remedy="give --key or --policy")
    findings = Findings()
    statement, *_ = prepared.examine(folder, whom, findings)
    findings.raise_first()
    if statement is None:
        raise VerificationFailed("could not be examined", where=str(folder))
    used = {run.newest["data"]["corpus_sha256"] for run in read if run.newest is not None}
    if statement.subject_id not in used:
        raise UsageError("none of the runs was trained on this corpus", where=str(folder))
    return statement


def _expanded(paths: Sequence[Path]) -> tuple[list[Path], list[Plan], list[str], list[str]]:
    """Run folders, with a sweep's members for its folder; its plans; planned members that never began; runs
    that no sweep has."""
    folders, plans, absent, alone = list[Path](), list[Plan](), list[str](), list[str]()
    for path in paths:
        found = register.read(path)
        if found is None:
            folders.append(path)
            alone.append(str(path))
            continue
        plans += found.plans
        for name in found.names:
            begun = (path / name / "metrics.jsonl").exists() or (path / name / "checkpoints").exists()
            folders += [path / name] if begun else []
            absent += [] if begun else [name]
    if not folders:
        raise UsageError("no member of the sweep has begun", where=str(paths[0]))
    return folders, plans, absent, alone


def _evaluated(judged: Report) -> Iterator[runs.Evaluated]:
    """The accepted test-results of a run whose verification found nothing wrong."""
    for opened in judged.checkpoints if not judged.findings else ():
        for each in sorted(opened.added, key=lambda one: (len(one.statement.name), one.statement.name)):
            if each.statement.kind == later.TEST_RESULT:
                name, facts = each.statement.name, dict(each.statement.predicate)
                step, digest = opened.statement.step_to, opened.later[name]
                yield runs.Evaluated(opened.folder.name, name, digest, step, each.signer, facts)


def _verdicts(read: Sequence[runs.Run], reports: Sequence[Report]) -> list[Status | None]:
    if not reports:
        return [None] * len(read)
    return [_verdict(one, judged) for one, judged in zip(read, reports, strict=True)]


def _verdict(one: runs.Run, judged: Report) -> Status:
    """What `harness verify` says of ``one``."""
    kind = {0: "good", 1: "bad"}.get(judged.exit_code, "open")
    first = f": {judged.findings[0]}" if judged.findings else ""
    return Status(kind, f"{one.name}: {judged.verdict}{first}")


def _write(out: Path, blocks: list[Block]) -> dict[str, Path]:
    """Write the report's files into ``out``; returns them by name."""
    if out.exists() and not out.is_dir():
        raise UsageError("the report goes into a folder", where=str(out))
    layout.require_unsigned(out)
    title = next(block.text for block in blocks if hasattr(block, "text"))
    texts = {block.file: block.svg + "\n" for block in blocks if isinstance(block, Picture)}
    texts["report.md"] = markdown.render(blocks)
    texts["report.html"] = html.render(blocks, title)
    files.write_together(out, {name: text.encode() for name, text in texts.items()})
    return {name.replace("report.", ""): out / name for name in texts}


def _statement(one: runs.Run, evaluated: runs.Evaluated) -> dict[str, Any]:
    """Which file a signed evaluation is."""
    return {
        "run": one.name,
        "checkpoint": evaluated.checkpoint,
        "statement": evaluated.statement,
        "statement_sha256": evaluated.sha256,
    }


def _judged(one: Judged) -> dict[str, Any]:
    return {
        "name": one.claim.name,
        "says": one.claim.says,
        "verdict": one.verdict,
        "reasons": list(one.reasons),
        "narrower": one.narrower,
        "interval": None if one.interval is None else [one.interval.low, one.interval.high],
        "level": None if one.interval is None else one.interval.level,
        "seeds_needed": one.seeds_needed,
        "evidence": [_statement(*each) for each in one.evidence],
    }


def _document(one: runs.Run, verdict: Status | None, told: Tiers) -> dict[str, Any]:
    return {
        "run": one.name,
        "folder": str(one.root),
        "ending": facts.ending(one).text,
        "last_step": one.last_step,
        "evaluation": {name: facts.final(one, name) for name in one.evaluation_names},
        "resumes": [item.kind for item in facts.segments(one) if item.resumed_from is not None],
        "verification": "not verified" if verdict is None else verdict.text,
        "repeatability": tier_text.document(told),
    }
