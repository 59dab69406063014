"""The pipeline of speedrun.sh, once undisturbed and once killed at random places: time, and equal digests.

python scripts/bench/pipeline.py [--kills 5] [--seed N] [--json FILE]

Two copies of the tree, with this environment instead of the one that `scripts/setup.sh` would make, and one
environment of the auditor that it did make: installing is neither timed nor killed. One copy runs
`bash speedrun.sh` to its end. In the other it is killed with SIGKILL, all processes of it, at random moments
that are spread over the time that the first one took, and started again; the last start ends. Then everything
that is a function of recipe, config, data and code is compared:

- the id of each prepared corpus
- every tensor file of every checkpoint of base, twin and chat model
- the single results of every signed evaluation

Statements hold times and run ids, so their bytes differ; each was verified by the pipeline itself.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from interleave import keep
from kill_at_step import kill_tree

ROOT = Path(__file__).resolve().parent.parent.parent
TREE = ("harness", "scripts", "configs", "recipes", "speedrun.sh", "pyproject.toml", "README.md", "LICENSE",
        "requirements.lock")  # fmt: skip
RUN = Path("runs/speedrun")
LIMIT = 600.0
"""Seconds that the whole may take: issue 7."""


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


def finished(tree: Path, output: Path) -> float:
    """Run to the end; seconds. Exits when it failed."""
    begun = time.monotonic()
    code = started(tree, output).wait()
    if code:
        sys.exit(f"speedrun.sh left with {code}:\n{output.read_text()[-3000:]}")
    return time.monotonic() - begun


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
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole = copied(Path(folder) / "whole", None)
        cut = copied(Path(folder) / "killed", whole / ".venv-audit")
        seconds = finished(whole, whole / "output")
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        chance = random.Random(arguments.seed)
        killed: list[dict[str, object]] = []
        # Places in the undisturbed run: each start works from one to the next.
        places = sorted(chance.uniform(0, seconds) for _ in range(arguments.kills))
        for number, (before, place) in enumerate(itertools.pairwise([0.0, *places])):
            moment = place - before
            process = started(cut, cut / "output")
            time.sleep(moment)
            if process.poll() is not None:
                print(f"start {number + 1} had ended before it could be killed")
                break
            kill_tree(process.pid)
            process.wait()
            last = (cut / "output").read_text(errors="replace").strip().splitlines()[-1:]
            killed.append({"after": round(moment, 1), "last line": "".join(last)[:90]})
            print(f"killed after {moment:.1f} s: {''.join(last)[:90]}", flush=True)
        rest = finished(cut, cut / "output")
        one, other = digests(whole), digests(cut)
        differing = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
        print(f"the last start took {rest:.0f} s; {len(one)} digests compared, {len(differing)} differ")
        for name in differing[:10]:
            print(f"  differs: {name}: {one.get(name)} and {other.get(name)}")
        good = not differing and seconds < LIMIT and len(killed) == arguments.kills
        print("met" if good else "missed")
        keep(arguments.json, {"seconds": seconds, "kills": killed, "rest": rest, "compared": len(one),
                              "differing": differing, "met": good})  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
