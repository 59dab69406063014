"""One token changed at a random step of 1,000: how many digests are compared until that step is found.

python scripts/bench/bisection.py [--rounds 10] [--steps 1000] [--every 50] [--seed N] [--json FILE]

A run is trained by `harness train`, then `--rounds` more with the same config, in each of which an undeclared
variable changes one token of one micro-batch after its digest was taken, so that the record of the samples
stays the honest one. `harness replay TAMPERED --against HONEST` bisects the two recorded chains and executes
the steps between the two checkpoints around the step that it finds. Counted are comparisons and executed
steps, and whether both ways find the step in which the token was changed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from interleave import keep, verdict

HERE = Path(__file__).parent
TASK = '''"""The table of these benchmarks; an undeclared variable changes one token of one micro-batch."""

import os

from table_task import Table


class Tampered(Table):
    calls = 0

    def loss(self, model, batch):
        self.calls += 1
        if os.environ.get("TAMPER") == str(self.calls):
            changed = batch[0].clone()
            changed[0, changed.shape[1] // 2] ^= 1
            batch = (changed,)
        return super().loss(model, batch)
'''
PARALLEL = 2
"""Micro-batches of an update."""


def config(run: str, steps: int, every: int) -> str:
    """A run of a small decoder."""
    return "".join(
        [
            f"run: {{dir: {run}, seed: 3}}\n",
            'task: {kind: "tampered:Tampered", options: {layers: 1, width: 16, heads: 2, length: 16}}\n',
            f"train: {{steps: {steps}, global_batch: {2 * PARALLEL}, micro_batch: 2}}\n",
            f"checkpoint: {{every: {every}}}\nevaluate: {{every: 0}}\ndeterminism: {{mode: 'off'}}\n",
        ]
    )


def harness(place: Path, *words: str, tamper: int | None = None, code: int = 0) -> str:
    """What the command prints."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": str(place / "config")}
    environ["PYTHONPATH"] = ":".join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    if tamper is not None:
        environ["TAMPER"] = str(tamper)
    command = [sys.executable, "-m", "harness", *words]
    done = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True)
    if done.returncode != code:
        raise SystemExit(f"{words[0]} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done.stdout


def train(place: Path, run: str, arguments: argparse.Namespace, tamper: int | None = None) -> None:
    """One run in ``place``."""
    (place / f"{run}.yaml").write_text(config(run, arguments.steps, arguments.every))
    harness(place, "train", f"{run}.yaml", tamper=tamper)


def main() -> None:
    """Train, tamper, bisect; the limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    draw, found = random.Random(arguments.seed), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "tampered.py").write_text(TASK)
        train(place, "honest", arguments)
        keys = sorted(str(path) for path in (place / "config").rglob("*.pub"))
        for number in range(arguments.rounds):
            step = draw.randint(1, arguments.steps)
            run = f"run-{number}"
            train(place, run, arguments, tamper=(step - 1) * PARALLEL + draw.randint(1, PARALLEL))
            words = ["replay", run, "--against", "honest", "--json", "--key", *keys]
            told = json.loads(harness(place, *words, code=1))
            (segment,) = told["segments"]
            found.append(
                {
                    "step": step,
                    "bisected": told["against"]["step"],
                    "queries": told["against"]["queries"],
                    "verdict": segment["verdict"],
                    "replayed": segment["first_divergence"]["step"],
                    "executed": segment["steps"]["to"] - segment["steps"]["from"],
                }
            )
            print(f"{found[-1]}", flush=True)
    right = sum(each["step"] == each["bisected"] == each["replayed"] for each in found)
    queries, executed = (max(each[name] for each in found) for name in ("queries", "executed"))
    print(verdict(f"{right} of {len(found)} steps found", right, len(found), at_least=True))
    print(verdict(f"at most {queries} comparisons of digests", queries, 10))
    print(verdict(f"at most {executed} steps executed again", executed, arguments.every))
    keep(arguments.json, {"seed": arguments.seed, "rounds": found})


if __name__ == "__main__":
    main()
