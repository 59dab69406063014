"""From the start of the process to the end of the first step, and peak memory: harness over bare script.

python scripts/bench/startup.py [--rounds 9] [--json FILE]

Both are processes of their own and take turns; one thread, the tiny model of hot_loop.py. The bare script
imports torch and the model, builds model and optimizer and takes 30 steps; the harness does what
`harness train` does, with every audit on. Memory is the kernel's high-water mark of the process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import interleave
import orjson

from harness.provenance.signing import keys

HERE = Path(__file__).parent
STEPS = 30
BARE, HARNESS = "bare script", "harness train"
RATIO, EXTRA_MIB = 1.10, 15.0
SIZES = "layers: 1, width: 32, heads: 2, length: 32"
SCRIPT = f"""
import sys, time
import torch
from table_task import Table
torch.manual_seed(0)
task = Table(seed=0, layers=1, width=32, heads=2, length=32)
model = task.build_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
for number in range({STEPS}):
    loss = task.loss(model, (task.rows[number][None],))
    loss.backward()
    loss.item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if number == 0:
        print(time.time())
"""


def spawn(command: list[str], folder: Path) -> tuple[float, str, float]:
    """Run ``command``; returns when it started (Unix time), what it printed, and its peak memory in MiB."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent.parent}"}
    started = time.time()
    process = subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, text=True)
    if process.stdout is None:
        raise RuntimeError("no pipe")
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return started, printed, usage.ru_maxrss / 1024


class Turns:
    """Both contenders; peak memory is kept on the side."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self.mib: dict[str, list[float]] = {BARE: [], HARNESS: []}

    def bare(self) -> float:
        """Seconds to the first step of the script."""
        started, printed, peak = spawn([sys.executable, "-c", SCRIPT], self._folder)
        self.mib[BARE].append(peak)
        return float(printed.split()[0]) - started

    def harness(self) -> float:
        """Seconds to the first step of `harness train`."""
        self._number += 1
        run = self._folder / f"run-{self._number}"
        command = [sys.executable, "-m", "harness", "train", "tiny.yaml", f"run.dir={run}", "--json"]
        started, _, peak = spawn(command, self._folder)
        self.mib[HARNESS].append(peak)
        with open(run / "metrics.jsonl", "rb") as stream:
            return float(orjson.loads(stream.readline())["time"]) - started


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys.create(folder / "me")
        (folder / "tiny.yaml").write_text(
            f"run: {{dir: x}}\ntask: {{kind: 'table_task:Table', options: {{{SIZES}}}}}\n"
            f"train: {{steps: {STEPS}, global_batch: 1, micro_batch: 1}}\nsigning: {{key: {folder}/me.key}}\n"
        )
        turns = Turns(folder)
        values = interleave.rounds({BARE: turns.bare, HARNESS: turns.harness}, arguments.rounds)
    ratios = interleave.ratios(values, HARNESS, BARE)
    extra = [one - other for one, other in zip(turns.mib[HARNESS], turns.mib[BARE], strict=True)]
    rows = [("process", "seconds to the first step", "peak MiB")]
    for each, seconds in values.items():
        rows.append((each, interleave.spread(seconds, ".2f"), interleave.spread(turns.mib[each], ".0f")))
    print(interleave.table(rows))
    text = f"start-up, harness / bare: {interleave.spread(ratios, '.2f')}, at most {RATIO:.2f} wanted"
    print(interleave.verdict(text, statistics.median(ratios), RATIO))
    text = f"peak memory, harness - bare: {statistics.median(extra):+.0f} MiB, at most {EXTRA_MIB:.0f} wanted"
    print(interleave.verdict(text, statistics.median(extra), EXTRA_MIB))
    interleave.keep(arguments.json, {"seconds": values, "mib": turns.mib})


if __name__ == "__main__":
    main()
