"""Tampered and honest records of a run, each held against a noise floor as `harness replay --floor` does.

python scripts/bench/tampers.py [--segments 5] [--steps 20] [--precision fp32 bf16] [--seed N] [--json FILE]

For fp32 and for bf16: `configs/tiny.yaml`, made smaller, is trained with four micro-batches an update and a
checkpoint every `--steps`. The auditor measures a floor for each segment, as `harness replay --floor` does.
The records that are judged come from other stacks than any of these: two of torch's kernels without AVX-512,
oneDNN for AVX2 and MKL's compatible mode at once, every other one with two threads and the micro-batches
added backwards. Honest ones must be within the floor; those with a learning rate 0.1 % higher, one other
token, one other label, two batches swapped or one step skipped must be outside. Steps are drawn by `--seed`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interleave import keep, table, verdict
from safetensors.torch import load_file, save_file

from harness import config
from harness.audit.replay import noise_floor
from harness.audit.replay.noise_floor import Execution, Measured, Scale
from harness.commands import replay_floor
from harness.format import layout
from harness.training.replay import distance, execution, perturbed
from harness.training.replay.distance import Ended
from harness.training.replay.perturbed import Pass
from harness.training.step import building
from harness.workers import Workers

ROOT = Path(__file__).parent.parent.parent
AVX2, PLAIN = {"ATEN_CPU_CAPABILITY": "avx2"}, {"ATEN_CPU_CAPABILITY": "default"}
ONEDNN, MKL = {"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"MKL_CBWR": "COMPATIBLE"}
STACKS: Mapping[str, Mapping[str, str]] = {
    "AVX2 and MKL": AVX2 | MKL,
    "no vectors and MKL": PLAIN | MKL,
    "AVX2 and oneDNN": AVX2 | ONEDNN,
    "no vectors and oneDNN": PLAIN | ONEDNN,
    "AVX2, oneDNN and MKL": AVX2 | ONEDNN | MKL,
}
OTHERWISE = {"threads": 2, "reverse": True}
HONEST = "honest"


def tampers(first: int, last: int, draw: random.Random) -> dict[str, dict[str, Any]]:
    """What is done to a record of the steps after ``first`` up to ``last``."""
    step = draw.randint(first + 1, last - 1)
    return {
        HONEST: {},
        "learning rate +0.1 %": {"rate": 1.001},
        "one token": {"value": step},
        "one label": {"label": step},
        "two batches swapped": {"swap": step},
        "one step skipped": {"skip": step},
    }


def work(job: Mapping[str, Any]) -> None:
    """Execute the passes of ``job`` in this process; JSON lines on stdout."""
    settings = config.parse(job["config"], "the run's config")
    workers, prepare = Workers.alone(), building.accelerator(settings)
    answer = execution.Answer(Path(os.devnull), workers)
    place = execution.Place(settings, ROOT / "configs", workers, prepare, answer)
    task = place.task()
    for each in job["segments"]:
        file = Path(each["plain"])
        order = execution.Order(
            job["config"], str(place.base), {}, 1, (each["folder"], each["id"]), each["last"], (), (), True,
            False, os.devnull,
        )  # fmt: skip
        if not file.exists():
            _, before, plain = perturbed.executed(place, task, order, Pass("plain"))
            save_file(dict(plain.tensors), file)
            scales = distance.scales(workers, before, plain)
            print(json.dumps({"name": "plain", "last": each["last"], "bits": plain.bits, "scales": scales}))
        known = Ended(load_file(file), frozenset(), "")
        for fields in each["passes"]:
            _, _, found = perturbed.executed(place, task, order, Pass(**fields))
            gaps = distance.gaps(workers, found, known)
            line = {"name": fields["name"], "last": each["last"], "bits": found.bits, "gaps": gaps}
            print(json.dumps(line), flush=True)


def executed(job: Mapping[str, Any], environ: Mapping[str, str]) -> list[dict[str, Any]]:
    """The lines of `work` in a process with other variables."""
    command = [sys.executable, __file__, "--work"]
    done = subprocess.run(
        command,
        input=json.dumps(job),
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def trained(folder: Path, precision: str, steps: int, every: int) -> Path:
    """A run of configs/tiny.yaml in ``folder``."""
    words = [
        f"run.dir={folder}",
        f"precision={precision}",
        f"train.steps={steps}",
        f"checkpoint.every={every}",
    ]
    words += ["evaluate.every=0", "determinism.mode=off", "train.global_batch=16", "train.micro_batch=4"]
    words += ["model.layers=1", "model.width=32", "data.sequence_length=32", "data.limit_bytes=300000"]
    command = [sys.executable, "-m", "harness", "train", str(ROOT / "configs" / "tiny.yaml"), *words]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": str(folder.parent / "config")}
    subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, check=True)
    return folder


def measured(
    run: Path, precision: str, count: int, every: int, draw: random.Random
) -> list[tuple[str, bool, float]]:
    """What was recorded, whether it was found, and its largest distance over what is allowed."""
    base = {"config": (run / "run.yaml").read_text()}
    segments = []
    for number in range(1, count + 1):
        folder = run / "checkpoints" / layout.checkpoint_name(number * every)
        identity = hashlib.sha256((folder / layout.MANIFEST).read_bytes()).hexdigest()
        last = (number + 1) * every
        segments.append(
            {"folder": str(folder), "id": identity, "last": last, "plain": str(run / f"plain-{number}")}
        )
    rates = [{"name": f"rate {share}", "rate": 1 + float(share)} for share in noise_floor.RATES]
    perturbations = replay_floor.perturbations(threads=1)
    lines = executed(
        base | {"segments": [each | {"passes": [*perturbations, *rates]} for each in segments]}, {}
    )
    for name, environ in replay_floor.ENVIRONMENTS.items():
        lines += executed(
            base | {"segments": [each | {"passes": [{"name": name}]} for each in segments]}, environ
        )
    records: list[tuple[str, int, Any]] = []
    for stack, environ in STACKS.items():
        job = []
        for each in segments:
            chosen = tampers(each["last"] - every, each["last"], draw)
            passes = [{"name": what, **fields} for what, fields in chosen.items()]
            passes += [{**fields, **OTHERWISE} for fields in passes if fields["name"] == HONEST]
            job.append(each | {"passes": passes})
        records += [
            (each["name"], each["last"], each) for each in executed(base | {"segments": job}, environ)
        ]
        print(f"{precision}: {stack} done", file=sys.stderr)
    return [
        (what, *judged(lines, last, each, precision, every, perturbations)) for what, last, each in records
    ]


def judged(
    lines: list[dict[str, Any]], last: int, record: Any, precision: str, every: int, perturbations: Any
) -> tuple[bool, float]:
    """Whether ``record`` is beyond the floor of its segment, by the rule of the verdict."""
    own = {each["name"]: each for each in lines if each["last"] == last}
    of = {name: Execution(name, each["bits"], each["gaps"]) for name, each in own.items() if name != "plain"}
    names = [*(each["name"] for each in perturbations), *replay_floor.ENVIRONMENTS]
    scales = {name: Scale(**fields) for name, fields in own["plain"]["scales"].items()}
    facts = Measured(
        precision=precision,
        steps=(last - every, last),
        bits=own["plain"]["bits"],
        scales=scales,
        recorded=record["gaps"],
        perturbed=[of[name] for name in names],
        changed=[("learning rate", share, of[f"rate {share}"]) for share in noise_floor.RATES],
    )
    floor = noise_floor.document(facts)
    if (nothing := noise_floor.unusable(floor)) is not None:
        raise SystemExit(f"the floor of steps {last - every} to {last} says nothing: {nothing}")
    limits = noise_floor.floors(noise_floor.own(facts), scales)
    return noise_floor.beyond(floor) is not None, noise_floor.ratio(record["gaps"], limits, scales)


def main() -> None:
    """Train, execute, judge, print the table of each precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segments", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of a segment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(json.load(sys.stdin))
        return
    kept: dict[str, Any] = {}
    for precision in arguments.precision:
        with tempfile.TemporaryDirectory() as folder:
            steps = (arguments.segments + 1) * arguments.steps
            run = trained(Path(folder) / "run", precision, steps, arguments.steps)
            draw = random.Random(arguments.seed)
            found = measured(run, precision, arguments.segments, arguments.steps, draw)
        rows = [["record", "found", "of", "nearest", "median", "farthest (of what is allowed)"]]
        for what in dict.fromkeys(what for what, _, _ in found):
            hits = [hit for name, hit, _ in found if name == what]
            share = sorted(each for name, _, each in found if name == what)
            rows.append(
                [
                    what,
                    str(sum(hits)),
                    str(len(hits)),
                    *(f"{each:.3g}" for each in (share[0], share[len(share) // 2], share[-1])),
                ]
            )
            kept[f"{precision} {what}"] = {
                "found": sum(hits),
                "of": len(hits),
                "least": share[0],
                "most": share[-1],
            }
        print(f"\n{precision}\n{table(rows)}")
        alarms = sum(hit for what, hit, _ in found if what == HONEST)
        missed = sum(not hit for what, hit, _ in found if what != HONEST)
        print(verdict(f"{precision}: {alarms} false alarms", alarms, 0))
        print(verdict(f"{precision}: {missed} tampered records missed", missed, 0))
    keep(arguments.json, {"seed": arguments.seed, **kept})


if __name__ == "__main__":
    main()
