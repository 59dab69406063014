"""How to make a checkpoint again, from its statement alone: code, packages, data, parent, config, environment
and launch; then its evaluations, from the statements that were added to it.

What the record lacks is said first, since it decides whether the same bits can be expected: uncommitted
changes whose text nobody kept, packages that were not recorded, earlier launches that were other ones.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import normpath
from pathlib import PurePosixPath
from typing import Any

from harness import strict_yaml
from harness.errors import ConfigError, VerificationFailed, visible
from harness.format import layout
from harness.provenance import later
from harness.provenance.signers import Added
from harness.provenance.statements import CheckpointStatement

CONFIG, REQUIREMENTS, SCRIPT = "run.yaml", "requirements.txt", "rerun.sh"

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._!-]*")
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
    """What the rerun must show: ``step``, ``state_sha256``, ``corpus_sha256``, ``tokenizer_sha256``, and the
    measures of each of its ``evaluations``, by the name of the statement."""


def rerun(statement: CheckpointStatement, folder: str, added: Sequence[Added] = ()) -> Rerun:
    """The instructions for the checkpoint of ``statement``, and for the evaluations among the verified
    statements ``added``; the files will lie in ``folder``.

    Raises `VerificationFailed` for a package whose name or version is none.
    """
    facts = statement.predicate
    evaluations = {
        each.statement.name: each.statement.predicate["harness_evaluation"]
        for each in added
        if each.statement.kind == later.TEST_RESULT and "harness_evaluation" in each.statement.predicate
    }
    expected = {
        "step": statement.step_to,
        "state_sha256": facts["state"]["sha256"],
        "corpus_sha256": facts["data"]["corpus_sha256"],
        "tokenizer_sha256": facts["data"]["tokenizer_sha256"],
        "evaluations": {name: dict(told["metrics"]) for name, told in evaluations.items()},
    }
    place = _quoted(folder)
    steps = [*_steps(facts, place), *_evaluations(facts, place, statement.step_to, evaluations)]
    files = {
        CONFIG: str(facts["config"]["text"]),
        REQUIREMENTS: "".join(f"{name}=={version}\n" for name, version in _packages(facts) if version),
        SCRIPT: _script(facts, statement.subject_id, statement.step_to),
    }
    return Rerun(tuple(_lacking(facts)), tuple(steps), files, expected)


def render(found: Rerun) -> str:
    """The instructions for a person."""
    lines = [f"not on record: {visible(text)}" for text in found.lacking]
    for number, (what, command) in enumerate(found.steps, start=1):
        lines += [f"{number}. {what}", f"   {visible(command)}"]
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


def _steps(facts: Mapping[str, Any], folder: str) -> Iterator[tuple[str, str]]:
    code = facts["code"]
    if code["git_commit"] is not None:
        yield "get the code", f"git checkout {_quoted(code['git_commit'])}"
    if _packages(facts):
        python = ".".join(str(facts["environment"].get("python", "3")).split(".")[:2])
        yield (
            f"install what it ran with, into a new environment of Python {python}",
            f"{_quoted(f'python{python}')} -m venv {folder}/venv && "
            f"{folder}/venv/bin/pip install --no-deps -r {folder}/{REQUIREMENTS} -e .",
        )
    corpus = _corpus(facts)
    if corpus is not None:
        what = f"get the corpus {facts['data']['corpus_sha256']}, or prepare it again"
        yield what, f"harness verify {_quoted(corpus)} --key PUB"
    elif _data(facts).get("files"):
        names = " ".join(_quoted(_place(facts) / str(each)) for each in _data(facts)["files"])
        yield "put the files there that the data were read from", f"ls -d -- {names}"
    start, more = facts.get("start"), ""
    if start is not None:
        what = f"get the checkpoint that it began with, {start['checkpoint']}"
        yield what, f"harness verify {_quoted(_start(facts))} --key PUB"
        more = "; if its key is not yours, append 'start.key=[PUB]'"
    yield f"train it again, and compare{more}", f"PATH={folder}/venv/bin:$PATH bash {folder}/{SCRIPT}"


def _evaluations(
    facts: Mapping[str, Any], folder: str, step: int, evaluations: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """How each was asked: what `harness evaluate` was given, suites by their digests."""
    for name, told in evaluations.items():
        settings, decoding, data = told["procedure"]["settings"], told["decoding"], told["dataset"] or {}
        made = f"{folder}/run/{layout.CHECKPOINTS}/{layout.checkpoint_name(step)}"
        words = list[str]()
        described = f"{data.get('split')} of {data.get('name')}, sha256 {data.get('sha256')}"
        suite = f"SUITE  # {visible(described)}"
        if "limit" in settings:
            words += ["--examples", str(settings["limit"])]
        if "lm_eval" in settings:
            tail = f"--lm-eval {shlex.join(str(data.get('name')).split(', '))} --tasks {suite}"
        elif "new_tokens" in decoding:
            words += ["--new-tokens", str(decoding["new_tokens"])]
            for option in ("temperature", "seed"):
                words += [f"--{option}", str(decoding[option])] if option in decoding else []
            tail = f"--chats {suite}"
        else:
            tail = f"--folder {_quoted(_place(facts))}"
        measures = ", ".join(f"{measure} {value}" for measure, value in told["metrics"].items())
        yield (
            f"evaluate it again ({name}), and expect {measures}",
            " ".join(
                (
                    f"PATH={folder}/venv/bin:$PATH harness evaluate {made}",
                    shlex.join(words),
                    f"--key PUB {tail}",
                )
            ),
        )


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it was signed; empty when it is no YAML mapping."""
    try:
        found = strict_yaml.read(str(facts["config"]["text"]), CONFIG).value
    except ConfigError:
        return {}
    return found if isinstance(found, dict) else {}


def _data(facts: Mapping[str, Any]) -> dict[str, Any]:
    found = _settings(facts).get("data")
    return found if isinstance(found, dict) else {}


def _place(facts: Mapping[str, Any]) -> PurePosixPath:
    return config_place(list(facts["launch"]["command"]))


def _corpus(facts: Mapping[str, Any]) -> str | None:
    """Where the prepared corpus lay; None for other data."""
    data = _data(facts)
    if data.get("kind") != "prepared" or not data.get("files"):
        return None
    return normpath(_place(facts) / str(data["files"][0]))


def _start(facts: Mapping[str, Any]) -> str:
    """Where the checkpoint lay that the run began with."""
    start = _settings(facts).get("start")
    return str(start.get("checkpoint", "START")) if isinstance(start, dict) else "START"


def _quoted(path: str | PurePosixPath) -> str:
    """As one word of a shell, which finds the home folder that ``~/`` stands for in a statement."""
    text = str(path)
    return f"~/{shlex.quote(text[2:])}" if text.startswith("~/") else shlex.quote(text)


def _packages(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = facts["environment"].get("packages")
    if not isinstance(found, Mapping):
        return []
    # A local version (+cpu, +cu130) names an index that pip must be told of; the number alone is enough.
    packages = [(str(name), str(version).partition("+")[0]) for name, version in found.items() if version]
    for each in packages:
        # pip reads a line that begins with two dashes as an option.
        if not all(map(_WORD.fullmatch, each)):
            raise VerificationFailed(
                f"names the package {each[0]!r} of version {each[1]!r}", where="packages"
            )
    return packages


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
    place = _quoted(_place(facts) / f"rerun-{identity[:12]}.yaml")
    before, after = [], []
    corpus, start = _corpus(facts), facts.get("start")
    if corpus is not None:
        found = f'"$(sha256sum {_quoted(f"{corpus}/{layout.MANIFEST}")})"'
        before.append(f"expect 'the corpus' {found} {facts['data']['corpus_sha256']}")
    elif facts["data"]["corpus_sha256"]:
        after.append(f"expect 'the data' \"$found\" {facts['data']['corpus_sha256']}")
    if start is not None:
        found = f'"$(harness show {_quoted(_start(facts))} --json)"'
        before.append(f"expect 'the checkpoint that it began with' {found} {start['checkpoint']}")
    unset = "signing.key=null" if facts.get("policy") is None else "signing.key=null signing.policy=null"
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
            'harness() { python -m harness "$@"; }',
            'expect() { case $2 in *"$3"*) ;; *)',
            f'    echo "DIFFERS at step {step}: $1 is not what was signed" >&2; exit 1 ;; esac; }}',
            *before,
            f'cp "$here/{CONFIG}" {place}',
            f'{train} {place} run.dir="$here/run" {unset} "$@"',
            f'found=$(harness show "$here/run/checkpoints/{layout.checkpoint_name(step)}" --json)',
            *after,
            f"expect 'the state' \"$found\" {facts['state']['sha256']}",
            f'echo "equal: step {step}, every tensor"',
            "",
        ]
    )
