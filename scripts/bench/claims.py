"""Whether reports find what is there, refuse what is not, and say how many seeds the rest would take.

python scripts/bench/claims.py [--repetitions 20] [--seeds 5] [--json FILE]

Trains the digits task, many small runs in this process, every one signed and verified. Oracles: two learning
rates a factor of ten apart differ; one config against itself must come out different at most as often as the
error rate says; half of what two nearly equal rates differ by must stay undecided as a margin.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from scipy import stats

from harness import config
from harness.audit.verification.whole_run import verify_run
from harness.provenance.policy.rules import from_keys
from harness.provenance.signing import keys
from harness.report import claim_file, facts, judge, runs, statistics
from harness.report.document import Status
from harness.report.judge import Judged
from harness.report.runs import Run
from harness.training import loop

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
STEPS = (
    "train.steps=30",
    "schedule.warmup=5",
    "checkpoint.every=30",
    "evaluate.every=0",
    "evaluate.batches=8",
)


def main() -> int:
    """Train, judge, print a line a question."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        keys.create(root / "bench")
        seeds = range(arguments.seeds)
        arms = {lr: [train(root, lr, seed) for seed in seeds] for lr in ("3e-3", "3e-4", "2.9e-3")}
        real = compared(root, arms["3e-3"], arms["3e-4"], "3e-4", 0.0)
        margin = max(mean_difference(arms["3e-3"], arms["2.9e-3"]), 0.0) / 2
        undecided = compared(root, arms["3e-3"], arms["2.9e-3"], "2.9e-3", margin)
        false, total = repeated(root, arguments.repetitions, arguments.seeds)
    allowed = int(stats.binom.ppf(0.95, total, judge.ERROR_RATE))
    print(f"a real difference: {real.verdict} ({real.interval}), limit supported")
    print(f"one config against itself: {false} of {total} come out different, limit {allowed} (5 % nominal)")
    print(f"nearly equal: {undecided.verdict} ({undecided.interval}), seeds needed {undecided.seeds_needed}")
    met = real.verdict == "supported" and false <= allowed and undecided.verdict == "undecided"
    numbers: Mapping[str, object] = {
        "real": real.verdict,
        "false": false,
        "repetitions": total,
        "undecided": undecided.verdict,
        "seeds_needed": undecided.seeds_needed,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers) + "\n")
    print("met" if met else "MISSED")
    return 0 if met else 1


def train(root: Path, lr: str, seed: int) -> Run:
    """One run of the digits task."""
    folder = root / f"{lr}-{seed}"
    own = [f"optimizer.lr={lr}", f"run.seed={seed}", f"run.dir={folder}", f"signing.key={root / 'bench.key'}"]
    loop.train(config.load(CONFIG, [*STEPS, *own]), quiet=True)
    return runs.read(folder)


def mean_difference(treatment: Sequence[Run], baseline: Sequence[Run]) -> float:
    """Of the last accuracies."""
    one, other = ([facts.final(run, "accuracy") or 0.0 for run in arm] for arm in (treatment, baseline))
    return fmean(one) - fmean(other)


def compared(root: Path, treatment: Sequence[Run], baseline: Sequence[Run], lr: str, by: float) -> Judged:
    """The claim that the first rate reaches an accuracy that is higher by at least ``by``."""
    text = (
        "format: harness-claims/1\nclaims:\n  - {name: it, says: It is better., metric: accuracy, "
        f"better: higher, by: {by:.6f}, of: {{optimizer.lr: 3e-3}}, than: {{optimizer.lr: {lr}}}}}\n"
    )
    every = [*treatment, *baseline]
    policy = from_keys([keys.load_public(root / f"bench.{kind}.pub") for kind in ("ed25519", "p256")])
    verdicts = [
        Status("good" if verify_run(run.root, policy, quiet=True).exit_code == 0 else "bad", run.name)
        for run in every
    ]
    return judge.judge(claim_file.parse(text, where="claims").claims, every, verdicts)[0]


def repeated(root: Path, repetitions: int, seeds: int) -> tuple[int, int]:
    """How often two halves of the same config, with fresh seeds each, are found to differ."""
    false = 0
    for repetition in range(repetitions):
        first = 1000 + 2 * seeds * repetition
        values = {}
        for seed in range(first, first + 2 * seeds):
            value = facts.final(train(root, "3e-3", seed), "accuracy")
            assert value is not None
            values[seed] = value
        halves = [
            {seed: values[seed] for seed in range(start, start + seeds)} for start in (first, first + seeds)
        ]
        found = statistics.compare(halves[0], halves[1])
        assert found is not None
        false += not found.interval.low <= 0 <= found.interval.high
        print(
            f"repetition {repetition + 1}: difference {found.difference:+.4f} ({found.interval})", flush=True
        )
    return false, repetitions


if __name__ == "__main__":
    raise SystemExit(main())
