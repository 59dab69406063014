"""A research report of one or more runs: curves, results, resumes, kernels, and what could still vary.

Writes report.md, one self-contained report.html and the pictures. Nothing counts as verified unless --key or
--policy is given, and then each run is checked as `harness verify` does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness.audit.verify import verify_run
from harness.commands import Outcome
from harness.commands.trust import add_trust, trusted
from harness.errors import UsageError
from harness.provenance.policy import Policy
from harness.report import claims, html, markdown, report, runs
from harness.report.document import Block, Picture, Status

EXAMPLE = "harness report runs/tiny --out runs/tiny-report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, where to write, and whom to trust."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder; several are compared")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write the report into"
    )
    add_trust(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read, judge, write; exit code 1 when a verification failed, 4 when it could not tell."""
    read = runs.told_apart([runs.read(path) for path in arguments.runs])
    whom = trusted(arguments)
    judged = [(None, 0) if whom is None else _verdict(one, whom) for one in read]
    verdicts = [status for status, _ in judged]
    blocks = report.compose(read, verdicts)
    files = _write(arguments.out, blocks)
    lines = [*(report.summary(one) for one in read), *(one.text for one in verdicts if one)]
    lines.append(f"report: {files['html']}")
    if "loss.svg" in files:
        lines.append(f"loss curve: {files['loss.svg']}")
    document: dict[str, Any] = {
        "runs": [_document(one, verdict) for one, verdict in zip(read, verdicts, strict=True)],
        "files": {name: str(path) for name, path in files.items()},
    }
    return Outcome(document, "\n".join(lines), exit_code=max(code for _, code in judged))


def _verdict(one: runs.Run, whom: Policy) -> tuple[Status, int]:
    """What `harness verify` says of ``one``, and its exit code."""
    judged = verify_run(one.root, whom)
    kind = {0: "good", 1: "bad"}.get(judged.exit_code, "open")
    first = f": {judged.findings[0]}" if judged.findings else ""
    return Status(kind, f"{one.name}: {judged.verdict}{first}"), judged.exit_code


def _write(out: Path, blocks: list[Block]) -> dict[str, Path]:
    """Write the report's files into ``out``; returns them by name."""
    if out.exists() and not out.is_dir():
        raise UsageError("the report goes into a folder", where=str(out))
    title = next(block.text for block in blocks if hasattr(block, "text"))
    texts = {block.file: block.svg + "\n" for block in blocks if isinstance(block, Picture)}
    texts["report.md"] = markdown.render(blocks)
    texts["report.html"] = html.render(blocks, title)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return {name.replace("report.", ""): out / name for name in texts}


def _document(one: runs.Run, verdict: Status | None) -> dict[str, Any]:
    return {
        "run": one.name,
        "folder": str(one.root),
        "ending": claims.ending(one).text,
        "last_step": one.last_step,
        "evaluation": {name: claims.final(one, name) for name in one.evaluation_names},
        "resumes": [item.kind for item in claims.segments(one) if item.resumed_from is not None],
        "verification": "not verified" if verdict is None else verdict.text,
    }
