"""How to make a checkpoint again, from its statement alone: code, packages, config, environment, launch.

What the record lacks is said first, since it decides whether the same bits can be expected: uncommitted
changes whose text nobody kept, packages that were not recorded, earlier launches that were other ones.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from harness.errors import visible
from harness.provenance.statements import CheckpointStatement

CONFIG, REQUIREMENTS, SCRIPT = "run.yaml", "requirements.txt", "rerun.sh"

_PASSED_ON = (
    *("OMP_", "MKL_", "OPENBLAS_", "KMP_", "CUBLAS_", "NCCL_", "GLOO_"),
    *("NVIDIA_TF32_", "PYTHONHASHSEED", "ATEN_"),
)
"""Beginnings of the recorded variables that can change a bit and are no accident of the job."""


@dataclass(frozen=True)
class Rerun:
    """What it takes to make a checkpoint again."""

    lacking: tuple[str, ...]
    """What is not on record, and what a rerun from the beginning leaves out."""
    steps: tuple[tuple[str, str], ...]
    """What to do, and the command."""
    files: Mapping[str, str]
    """Name → text of the files that the commands use."""
    expected: Mapping[str, Any]
    """What the rerun must show: ``step``, ``state_sha256``, ``corpus_sha256``, ``tokenizer_sha256``."""


def rerun(statement: CheckpointStatement) -> Rerun:
    """The instructions for the checkpoint of ``statement``."""
    facts = statement.predicate
    expected = {
        "step": statement.step_to,
        "state_sha256": facts["state"]["sha256"],
        "corpus_sha256": facts["data"]["corpus_sha256"],
        "tokenizer_sha256": facts["data"]["tokenizer_sha256"],
    }
    files = {
        CONFIG: str(facts["config"]["text"]),
        REQUIREMENTS: "".join(f"{name}=={version}\n" for name, version in _packages(facts) if version),
        SCRIPT: _script(facts, statement.subject_id, statement.step_to),
    }
    return Rerun(tuple(_lacking(facts)), tuple(_steps(facts)), files, expected)


def render(found: Rerun, folder: str) -> str:
    """The instructions for a person; ``folder`` is where the files are."""
    lines = [f"not on record: {visible(text)}" for text in found.lacking]
    for number, (what, command) in enumerate(found.steps, start=1):
        lines += [f"{number}. {what}", f"   {visible(command.replace('DIR', folder))}"]
    step, state = found.expected["step"], found.expected["state_sha256"]
    lines.append(f"expect step {step} with the state {state}; the script compares it")
    for key, words in (("corpus_sha256", "corpus"), ("tokenizer_sha256", "tokenizer")):
        if found.expected[key]:
            lines.append(f"       {words} {found.expected[key]}")
    return "\n".join(lines)


def _lacking(facts: Mapping[str, Any]) -> Iterator[str]:
    code, segment = facts["code"], facts["segment"]
    if code["git_commit"] is None:
        yield f"the git commit; the harness itself was {code['harness']}"
    elif code["dirty"]:
        yield f"the text of the uncommitted changes (sha256 {code['diff_sha256']}); apply them first"
    if not _packages(facts):
        yield "the versions of the packages"
    if segment["class"] == "accepted":
        accepted = ", ".join(segment["accepted"])
        yield f"what came before launch {segment['number']}, which accepted {accepted}"
    elif segment["class"] == "same-data":
        what = ", ".join(item["what"] for item in segment["differences"])
        yield f"the launches before this one (number {segment['number']}) were other ones: {what}"
    if facts["launch"]["nodes"] != 1:
        yield f"the addresses of its {facts['launch']['nodes']} nodes; set them in the launch command"


def _steps(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    code = facts["code"]
    if code["git_commit"] is not None:
        yield "get the code", f"git checkout {code['git_commit']}"
    if _packages(facts):
        python = ".".join(str(facts["environment"].get("python", "3")).split(".")[:2])
        yield (
            f"install what it ran with, into a new environment of Python {python}",
            f"python{python} -m venv DIR/venv && "
            f"DIR/venv/bin/pip install --no-deps -r DIR/{REQUIREMENTS} -e .",
        )
    start = facts.get("start")
    if start is not None:
        yield (
            "get the checkpoint that it began with, to the path in start.checkpoint",
            f"harness verify START --key PUB  # checkpoint {start['checkpoint']}",
        )
    yield "train it again, and compare", f"PATH=DIR/venv/bin:$PATH bash DIR/{SCRIPT}"


def _packages(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = facts["environment"].get("packages")
    if not isinstance(found, Mapping):
        return []
    # A local version (+cpu, +cu130) names an index that pip must be told of; the number alone is enough.
    return [(name, str(version).partition("+")[0]) for name, version in found.items() if version is not None]


def variables(facts: Mapping[str, Any]) -> dict[str, str]:
    """Recorded variables that can change a bit, and the number of threads."""
    found = facts["environment"].get("variables")
    kept = {
        name: str(value)
        for name, value in (found.items() if isinstance(found, Mapping) else ())
        if name.startswith(_PASSED_ON)
    }
    stack = facts["environment"].get("stack")
    threads = stack.get("threads") if isinstance(stack, Mapping) else None
    # A count that torch took from the machine has to be asked for on another one.
    return {"OMP_NUM_THREADS": str(threads), **kept} if threads else kept


def config_place(command: list[str]) -> PurePosixPath:
    """Folder of the config that was named: paths in it and a user's task are relative to it."""
    after = command[command.index("train") + 1 :] if "train" in command else []
    named = next((word for word in after if not word.startswith("-") and "=" not in word), CONFIG)
    return PurePosixPath(named).parent


def _script(facts: Mapping[str, Any], identity: str, step: int) -> str:
    launch = facts["launch"]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(variables(facts).items())]
    place = shlex.quote(str(config_place(list(launch["command"])) / f"rerun-{identity[:12]}.yaml"))
    train = "python -m harness train"
    if launch["launcher"] != "bare" or launch["world_size"] > 1:
        ranks = launch["world_size"] // launch["nodes"]
        nodes = "" if launch["nodes"] == 1 else f"--nnodes {launch['nodes']} "
        train = f"torchrun {nodes}--nproc-per-node {ranks} -m harness train"
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Makes checkpoint {identity} (step {step}) again; run it where the first launch was started.",
            "set -euo pipefail",
            'here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)',
            *exports,
            f'cp "$here/{CONFIG}" {place}',
            f'{train} {place} run.dir="$here/run" signing.key=null',
            'harness() { python -m harness "$@"; }',
            f'found=$(harness show "$here/run/checkpoints/step-{step:08d}" --json)',
            f'case $found in *{facts["state"]["sha256"]}*) echo "equal: step {step}, every tensor" ;;',
            f'    *) echo "DIFFERS at step {step}: see harness diff" >&2; exit 1 ;; esac',
            "",
        ]
    )
