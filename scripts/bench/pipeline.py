"""The pipeline of speedrun.sh, once undisturbed and once killed at random places: time, and equal digests.

python scripts/bench/pipeline.py [--kills 5 | --stages STAGE …] [--seed N] [--json FILE]

Two copies of the tree, with this environment instead of the one that `scripts/setup.sh` would make, and one
environment of the auditor that it did make: installing is neither timed nor killed. One copy runs
`bash speedrun.sh` to its end, and its stages are timed. In the other it is killed with SIGKILL, all processes
of it, and started again; the last start ends. A place to kill at is a stage and seconds since it began, so
that what a start repeats before does not move it: either the places where so many random moments of the first
run's time lie, or a random one in each of the named stages. Then everything that is a function of recipe,
config, data and code is compared:

- the id of each prepared corpus
- every tensor file of every checkpoint of base, twin and chat model
- the single results of every signed evaluation

Statements hold times and run ids, so their bytes differ; each was verified by the pipeline itself.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from interleave import keep
from kill_at_step import kill_tree

ROOT = Path(__file__).resolve().parent.parent.parent
TREE = ("harness", "scripts", "configs", "recipes", "speedrun.sh", "pyproject.toml", "README.md", "LICENSE",
        "requirements.lock")  # fmt: skip
RUN = Path("runs/speedrun")
LIMIT = 600.0
"""Seconds that the whole may take."""
POLL_SECONDS = 0.05
TRIES = 3
"""Starts for one kill, each with half of the seconds: where the machine is quicker now, a place is past."""
STAGES = {
    "preflight": "harness doctor",
    "preparation": "prepare recipes/corpus.yaml",
    "base training": "train configs/speedrun.yaml",
    "base evaluation": "--once --folder",
    "twin": "train configs/speedrun.yaml run.dir=",
    "comparison": "harness diff",
    "preparation of chats": "prepare recipes/chats.yaml",
    "child run": "train configs/speedrun-chat.yaml",
    "chat evaluation": " --chats ",
    "audit": "harness verify",
    "report": "harness report",
    "lineage": "harness lineage",
}
"""Stage, in order → what its commands hold. It lasts until the next begins."""

Place = tuple[str, float]
"""A stage, and seconds since it began."""


def copied(target: Path, audit: Path | None) -> Path:
    """A tree that runs with this environment and the auditor's, ``audit``, made when there is none."""
    target.mkdir()
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    if audit is None:
        subprocess.run(["scripts/setup.sh", "audit"], cwd=target, check=True)
    else:
        (target / ".venv-audit").symlink_to(audit)
    (target / ".venv").symlink_to(Path(sys.executable).parent.parent)
    (target / "scripts" / "setup.sh").write_text("#!/usr/bin/env bash\nset -euo pipefail\n")
    return target


def started(tree: Path, output: Path) -> subprocess.Popen[bytes]:
    """`bash speedrun.sh` in ``tree``."""
    environ = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    with output.open("ab") as stream:
        return subprocess.Popen(
            ["bash", "speedrun.sh"],
            cwd=tree, env=environ, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def stage_of(process: int) -> str | None:
    """What the script of ``process`` is at, by the command that it runs now."""
    try:
        commands = [" ".join(each.cmdline()) for each in psutil.Process(process).children()]
    except psutil.Error:
        return None
    found = [stage for stage, words in STAGES.items() if any(words in command for command in commands)]
    return found[-1] if found else None


def finished(tree: Path, output: Path) -> tuple[float, dict[str, float]]:
    """Run to the end: seconds, and stage → when it began. Exits when it failed."""
    begun, beginnings = time.monotonic(), dict[str, float]()
    process = started(tree, output)
    while process.poll() is None:
        stage = stage_of(process.pid)
        if stage is not None:
            beginnings.setdefault(stage, time.monotonic() - begun)
        time.sleep(POLL_SECONDS)
    if process.returncode:
        sys.exit(f"speedrun.sh left with {process.returncode}:\n{output.read_text()[-3000:]}")
    return time.monotonic() - begun, beginnings


def killed_at(tree: Path, output: Path, place: Place) -> bool:
    """Start, and kill at ``place``; False when the script went past it before it could be killed."""
    stage, seconds = place
    later = list(STAGES)[list(STAGES).index(stage) + 1 :]
    process, begun = started(tree, output), None
    while process.poll() is None:
        now = stage_of(process.pid)
        if begun is None and now == stage:
            begun = time.monotonic()
        missed = now in later
        if missed or (begun is not None and time.monotonic() - begun >= seconds):
            kill_tree(process.pid)
            process.wait()
            return not missed
        time.sleep(POLL_SECONDS)
    return False


def places_of(moments: Sequence[float], beginnings: Mapping[str, float]) -> list[Place]:
    """Where ``moments`` of a run lie; before its first stage nothing can be killed."""
    found = []
    for moment in sorted(moments):
        begun = {stage: at for stage, at in beginnings.items() if at <= moment}
        stage = max(begun, key=begun.__getitem__, default=min(beginnings, key=beginnings.__getitem__))
        found.append((stage, max(0.0, moment - beginnings[stage])))
    return found


def moments_in(
    stages: Sequence[str], beginnings: Mapping[str, float], end: float, chance: random.Random
) -> list[float]:
    """A random moment in each of ``stages``. Exits when the run had no such stage."""
    absent = [stage for stage in stages if stage not in beginnings]
    if absent:
        sys.exit(f"the run had no stage {', '.join(absent)}")
    bounds = [*sorted(beginnings.values()), end]
    return [
        chance.uniform(at, bounds[bounds.index(at) + 1]) for at in (beginnings[stage] for stage in stages)
    ]


def digests(tree: Path) -> dict[str, str]:
    """Everything that a kill must not change, by name."""
    run, found = tree / RUN, {}
    for corpus in ("corpus", "chats"):
        found[f"{corpus} id"] = sha256(run / corpus / "MANIFEST.json")
    for model in ("base", "twin", "chat"):
        for path in sorted((run / model / "checkpoints").glob("step-*/*.safetensors")):
            found[str(path.relative_to(run))] = sha256(path)
        for path in sorted((run / model / "checkpoints").glob("step-*/provenance/test-result-*")):
            found[str(path.relative_to(run))] = signed_items(path)
    return found


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def signed_items(bundle: Path) -> str:
    """What a signed evaluation says that its single results are, and its measures."""
    payload = base64.b64decode(json.loads(bundle.read_bytes())["dsseEnvelope"]["payload"])
    told = json.loads(payload)["predicate"]["harness_evaluation"]
    return f"{told['procedure']['settings']['items_sha256']} {told['metrics']}"


def main() -> int:
    """Run both, compare, say so; exit code 1 when they differ or the time is over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--kills", type=int, default=5)
    where.add_argument("--stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole = copied(Path(folder) / "whole", None)
        cut = copied(Path(folder) / "killed", whole / ".venv-audit")
        seconds, beginnings = finished(whole, whole / "output")
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        for stage, at in beginnings.items():
            print(f"  {stage:<20} from {at:.1f} s", flush=True)
        chance = random.Random(arguments.seed)
        moments = (
            moments_in(arguments.stages, beginnings, seconds, chance)
            if arguments.stages
            else [chance.uniform(0, seconds) for _ in range(arguments.kills)]
        )
        places = places_of(moments, beginnings)
        killed: list[dict[str, object]] = []
        for stage, after in places:
            tries = 1
            while not (hit := killed_at(cut, cut / "output", (stage, after))) and tries < TRIES:
                tries, after = tries + 1, after / 2
            if not hit:
                print(f"{stage} had ended before it could be killed", flush=True)
                continue
            last = (cut / "output").read_text(errors="replace").strip().splitlines()[-1:]
            killed.append({"stage": stage, "after": round(after, 1), "last line": "".join(last)[:90]})
            print(f"killed {after:.1f} s into {stage}: {''.join(last)[:90]}", flush=True)
        rest, _ = finished(cut, cut / "output")
        one, other = digests(whole), digests(cut)
        differing = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
        print(f"the last start took {rest:.0f} s; {len(one)} digests compared, {len(differing)} differ")
        for name in differing[:10]:
            print(f"  differs: {name}: {one.get(name)} and {other.get(name)}")
        good = not differing and seconds < LIMIT and len(killed) == len(places)
        print("met" if good else "missed")
        keep(arguments.json, {"seconds": seconds, "kills": killed, "rest": rest, "compared": len(one),
                              "differing": differing, "met": good})  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
