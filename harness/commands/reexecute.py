"""Starts the processes that execute steps again, as the run was launched, and reads what they write down."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import privacy
from harness.audit import rerun
from harness.audit.replay.segment import Segment
from harness.errors import EnvironmentFault, EvidenceIncomplete, HarnessError, UsageError
from harness.format.json_lines import Tail
from harness.terminal import progress

_POLL_SECONDS = 0.1
_ERRORS: Mapping[int, type[HarnessError]] = {2: UsageError, 3: EnvironmentFault}
_COUNTED = ("step", "pass")
"""Kinds of lines that are progress."""


def executed(
    chosen: Segment,
    arguments: argparse.Namespace,
    ranks: int,
    module: str = "execution",
    *,
    environ: Mapping[str, str] | None = None,
    count: int | None = None,
    **fields: Any,
) -> list[Mapping[str, Any]]:
    """The lines that ``harness.training.replay.MODULE`` writes. Raises what stopped it.

    ``environ`` changes variables of the signed launch, ``count`` is the number of lines to expect, and
    ``fields`` are those of the order that are not the replay's own.
    """
    with tempfile.TemporaryDirectory(prefix="harness-replay-") as scratch:
        answer, order = Path(scratch) / "answer.jsonl", Path(scratch) / "order.json"
        orders = _order(chosen, arguments, ranks) | {"answer": str(answer)} | fields
        order.write_text(json.dumps(orders))
        with open(Path(scratch) / "console.log", "wb") as console:
            process = subprocess.Popen(
                _command(module, order, ranks),
                env={**os.environ, **rerun.variables(chosen.facts), **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
            try:
                lines = _followed(process, answer, count or len(chosen.steps), quiet=arguments.json)
            finally:
                process.kill()
                process.wait()
        error = next((each for each in lines if each["kind"] == "error"), None)
        if error is not None:
            kind = _ERRORS.get(error["exit_code"], EvidenceIncomplete)
            raise kind(error["what"], where=error["where"], remedy=error["remedy"])
        if process.returncode:
            text = (Path(scratch) / "console.log").read_text(errors="replace").strip().splitlines()
            raise EvidenceIncomplete(
                f"the replay ended with {process.returncode}: {text[-1] if text else 'it printed nothing'}",
                where=str(arguments.run),
            )
    return lines


def _followed(
    process: subprocess.Popen[bytes], answer: Path, steps: int, *, quiet: bool
) -> list[Mapping[str, Any]]:
    tail, lines = Tail(answer), list[Mapping[str, Any]]()
    with progress(steps, "steps", "replay", quiet=quiet) as bar:
        while True:
            ended = process.poll() is not None
            new = tail.read().lines
            lines += new
            bar.advance(sum(each["kind"] in _COUNTED for each in new))
            if ended:
                return lines
            time.sleep(_POLL_SECONDS)


def _command(module: str, order: Path, ranks: int) -> Sequence[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "-m", f"harness.training.replay.{module}", str(order)]


def config_folder(facts: Mapping[str, Any]) -> Path:
    """Where the config lay, as the signed command in ``facts`` names it; `~` is the home of whoever asks."""
    return Path(privacy.expanded(str(rerun.config_place(list(facts["launch"]["command"])))))


def _order(chosen: Segment, arguments: argparse.Namespace, ranks: int) -> dict[str, Any]:
    start = chosen.start
    base = arguments.folder or config_folder(chosen.facts)
    recorded = [step.facts for step in chosen.steps]
    return {
        "config": chosen.facts["config"]["text"],
        "base": str(base),
        "signed": chosen.facts,
        "world_size": ranks,
        "checkpoint": None if start is None else [str(start.folder), start.checkpoint_id],
        "last": chosen.last,
        "gradients": [facts["step"] for facts in recorded if facts.get("gradients")],
        "state": [facts["step"] for facts in recorded if facts.get("state")],
        "differences": arguments.stack_differs,
        "repeat": False,
    }
