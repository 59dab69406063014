"""Runs killed at random moments and resumed, compared tensor by tensor with a run that nobody interrupted.

python scripts/bench/exactness.py [--rounds 20 10 10] [--contrast 10] [--seed N] [--json FILE]

`--rounds`: how many for 1, 2 and 3 processes. A round starts `harness train`, sends SIGKILL to all its
processes at a random moment after the first checkpoint, starts the same command again until it completes, and
compares every tensor of every checkpoint with the twin's: weights, optimizer, generators. Dropout, generators
of the task's own, a loader process and ten epochs; fp32 and bf16 in turn. `--contrast`: the same for
accelerate's documented loop (accelerate_loop.py), weights only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
kill_tree = importlib.import_module("kill_at_step").kill_tree
STEPS, EVERY = 42, 7
CHECKPOINTS = STEPS // EVERY
CONFIG = f"""\
run: {{dir: run, seed: 3}}
task: {{kind: "toy_task:Toy", options: {{pause: 12}}}}
train: {{steps: {STEPS}, global_batch: 12, micro_batch: 2, data_workers: 1}}
checkpoint: {{every: {EVERY}}}
"""
MOST_STARTS = 6


@dataclass
class Contender:
    """A way to train into a folder, killed and restarted."""

    name: str
    place: Path
    command: list[str]
    """Ends with an argument that the folder of the run completes."""
    pattern: str
    """Of the checkpoint folders."""
    interval: float = 0.0
    """Seconds between the twin's checkpoints."""
    identical: int = 0
    rounds: int = 0
    failures: list[str] = field(default_factory=list)

    def start(self, folder: str) -> subprocess.Popen[bytes]:
        """Train into ``folder``."""
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(self.place)}
        # An outer PYTHONPATH goes first: a frozen copy of the package, while somebody edits this one.
        environ["PYTHONPATH"] = ":".join(filter(None, [environ.get("PYTHONPATH"), str(ROOT / "tests")]))
        words = [*self.command[:-1], self.command[-1] + folder]
        return subprocess.Popen(
            words, cwd=self.place, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def twin(self, folder: str) -> None:
        """Train without an interruption, and take the time from checkpoint to checkpoint."""
        process = self.start(folder)
        self.wait(process, folder, 1)
        began = time.monotonic()
        self.wait(process, folder, CHECKPOINTS - 1)
        self.interval = (time.monotonic() - began) / (CHECKPOINTS - 2)
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{self.name}: {errors.decode()[-2000:]}")

    def wait(self, process: subprocess.Popen[bytes], folder: str, count: int) -> None:
        """Until ``folder`` has ``count`` checkpoints, or the process has ended."""
        while process.poll() is None and len(list((self.place / folder).glob(self.pattern))) < count:
            time.sleep(0.002)

    def round(self, folder: str, twin: str, moment: float) -> None:
        """Kill ``moment`` checkpoints after the first, restart to the end, compare."""
        process = self.start(folder)
        self.wait(process, folder, 1 + int(moment))
        time.sleep(moment % 1 * self.interval)
        if process.poll() is not None:
            raise SystemExit(f"{self.name}: ended before it could be killed")
        kill_tree(process.pid)
        process.communicate()
        for _ in range(MOST_STARTS):
            process = self.start(folder)
            _, errors = process.communicate()
            if process.returncode == 0:
                break
        else:
            raise SystemExit(f"{self.name}: {errors.decode()[-2000:]}")
        self.rounds += 1
        odd = self.differing(folder, twin)
        self.identical += not odd
        self.failures += [f"{folder}: {odd[0]} and {len(odd) - 1} more"] if odd else []

    def differing(self, folder: str, twin: str) -> list[str]:
        """Tensors that are not the same bits in both."""
        names = [
            sorted(path.name for path in (self.place / each).glob(self.pattern)) for each in (folder, twin)
        ]
        if names[0] != names[1] or not names[0]:
            return [f"checkpoints {names[0]}, twin {names[1]}"]
        parent = Path(self.pattern).parent
        pairs = [(self.place / each / parent / name for each in (folder, twin)) for name in names[0]]
        return [line for one, other in pairs for line in differing_files(one, other)]


def differing_files(one: Path, other: Path) -> list[str]:
    """Tensors of two checkpoint folders that are not the same bits, by the safetensors package."""
    odd = []
    for file in sorted({path.name for folder in (one, other) for path in folder.glob("*.safetensors")}):
        left, right = load_file(one / file), load_file(other / file)
        for key in sorted({*left, *right}):
            a, b = left.get(key), right.get(key)
            if a is None or b is None or not same_bits(a, b):
                odd.append(f"{one.name}/{file}/{key}")
    return odd


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)))


def contenders(place: Path, processes: int, contrast: bool) -> list[Contender]:
    """The harness in both precisions, or accelerate's loop."""
    if contrast:
        script = str(Path(__file__).parent / "accelerate_loop.py")
        words = [sys.executable, "-c", f"import sys; sys.argv[1:] = [sys.argv[1], '{STEPS}', '{EVERY}']; "
                 f"import runpy; runpy.run_path({script!r}, run_name='__main__')", ""]  # fmt: skip
        return [Contender("accelerate, 1 process", place, words, "step_*")]
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [
        Contender(
            f"harness, {processes} process{'es' if processes > 1 else ''}, {precision}",
            place,
            [*launch, "harness", "train", "toy.yaml", f"precision={precision}", "run.dir="],
            "checkpoints/step-*",
        )
        for precision in ("fp32", "bf16")
    ]


def measure(processes: int, rounds: int, dice: random.Random, contrast: bool) -> tuple[int, int]:
    """Identical and all rounds; says each."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "toy.yaml").write_text(CONFIG)
        group = contenders(place, processes, contrast)
        for number, each in enumerate(group):
            each.twin(f"twin-{number}")
        for number in range(rounds):
            each = group[number % len(group)]
            moment = dice.uniform(0.0, CHECKPOINTS - 2)
            each.round(f"run-{number}", f"twin-{number % len(group)}", moment)
            print(f"{each.name}: killed {moment:.2f} checkpoints after the first; "
                  f"identical {each.identical} of {each.rounds}", flush=True)  # fmt: skip
        for line in (line for each in group for line in each.failures):
            print(f"  {line}")
        return sum(each.identical for each in group), sum(each.rounds for each in group)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--rounds", type=int, nargs=3, default=[20, 10, 10])
    parser.add_argument("--contrast", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    results = {}
    for processes, rounds in enumerate(arguments.rounds, start=1):
        if rounds:
            results[f"harness, {processes} process(es)"] = measure(processes, rounds, dice, contrast=False)
    if arguments.contrast:
        results["accelerate save_state/load_state, 1 process"] = measure(
            1, arguments.contrast, dice, contrast=True
        )
    for name, (identical, rounds) in results.items():
        print(f"{name}: {identical} of {rounds} identical to the uninterrupted run")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"seed": arguments.seed, **results}, indent=2) + "\n")
    if any(
        identical != rounds for name, (identical, rounds) in results.items() if name.startswith("harness")
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
