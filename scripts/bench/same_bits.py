"""Elastic runs: whether every world size, sharding and change of them gives one digest, and what that costs.

python scripts/bench/same_bits.py [--steps 200] [--ranks 1 2 4 8] [--variants fp32 bf16]
                                  [--modes eager compiled] [--cost 2 4] [--memory 1 2 4] [--rounds 20]
                                  [--json FILE]

Bits: a decoder of two layers and width 64, dropout and clipping on, 8 logical shards. For each arithmetic,
eager and compiled, it runs on each number of ranks with DDP and FSDP2, and once more with another number of
ranks after each of five kills. What is compared is the chain over the digests of every step (samples,
generators, gradients, state) and every tensor of the last checkpoint. `--cost`: on so many ranks the
gradients of a decoder of 10.8M parameters (43 MB fp32) by the tree's all-to-all, additions and all-gather,
over one all-reduce, in turn in one process group (gloo); and a step of 512 tokens a rank in both ways, each
overlapped with the backward pass, without the optimizer. `--memory`: on so many ranks the peak of a rank's
memory over updates of 8 shards of that decoder, by the tree and by DDP, each in processes of its own, and
what the tree adds over the number that `harness plan` calls elastic.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from interleave import keep, rounds, spread, verdict
from table_task import Table
from torch.nn.parallel import DistributedDataParallel

from harness.determinism import tree
from harness.settings import Settings
from harness.training import plan
from harness.training.elastic.tree_sums import ShardSums, all_gather
from harness.workers import Workers

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
kill_tree = importlib.import_module("kill_at_step").kill_tree
SHARDS = 8
LIMIT = 2.5
"""Times the communication of an all-reduce, on gloo (facts/determinism.md, section 5: 2.2 to 2.4 there)."""
MEMORY_LIMIT = 1.1
"""Times the bytes that `harness plan` names."""
CONFIG = f"""\
run: {{seed: 3}}
model: {{layers: 2, width: 64, heads: 2, dropout: 0.1}}
data: {{limit_bytes: 200000, sequence_length: 32}}
optimizer: {{lr: 3e-3, clip: 0.5}}
train: {{global_batch: {SHARDS}, micro_batch: 1}}
determinism: {{elastic: true, shards: {SHARDS}}}
"""
CHANGES = ((1, "ddp"), (4, "fsdp2"), (2, "ddp"), (8, "fsdp2"), (2, "fsdp2"), (1, "ddp"))
"""Ranks and sharding of a run before its first kill, and after each."""
SIZES = {"layers": 6, "width": 384, "heads": 6, "length": 128}
BATCH = 4


def launched(folder: Path, run: str, ranks: int, *settings: str, until: str | None = None) -> None:
    """Launch `harness train` into ``run``: to its end, or killed once the checkpoint ``until`` is there."""
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command += ["harness", "train", "same.yaml", f"run.dir={folder / run}", *settings]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    with open(folder / f"{run}.log", "ab") as log:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)
    while process.poll() is None:
        if until is not None and (folder / run / "checkpoints" / until).exists():
            kill_tree(process.pid)
            process.wait()
            return
        time.sleep(0.01)
    if process.returncode or until is not None:
        raise SystemExit(
            f"{run} ended with {process.returncode}: {(folder / f'{run}.log').read_text()[-3000:]}"
        )


def digest(run: Path) -> str:
    """Of the chain over all steps and of every tensor of the newest checkpoint, generators included."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    newest = max((run / "checkpoints").iterdir())
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    tensors = sorted([each["name"], each["shape"], each["digest"]] for each in manifest["tensors"])
    return hashlib.sha256(json.dumps([last["step"], last["chain"], tensors]).encode()).hexdigest()[:12]


def compared(folder: Path, steps: int, ranks: list[int], precision: str, mode: str) -> dict[str, str]:
    """Run → digest, for every number of ranks with both shardings, and for the run that changes."""
    changes = [each for each in CHANGES if each[0] in ranks]
    # Every checkpoint adds a digest of the state to the chain, so all runs make them at the same steps.
    every = steps // len(changes)
    common = [f"precision={precision}", f"compile={str(mode == 'compiled').lower()}"]
    common += [f"train.steps={steps}", f"checkpoint.every={every}"]
    found = {}
    for parallel in ("ddp", "fsdp2"):
        for count in ranks:
            if count == 1 and parallel == "fsdp2":
                continue
            name = f"{precision}-{mode}-{parallel}-{count}"
            begun = time.monotonic()
            launched(folder, name, count, f"parallel={parallel}", *common)
            found[f"{parallel} {count}"] = digest(folder / name)
            print(f"{name}  {found[f'{parallel} {count}']}  {time.monotonic() - begun:.0f} s", flush=True)
    name = f"{precision}-{mode}-changing"
    for number, (count, parallel) in enumerate(changes, 1):
        until = None if number == len(changes) else f"step-{every * number:08d}"
        launched(folder, name, count, f"parallel={parallel}", *common, until=until)
    found["changing"] = digest(folder / name)
    print(f"{name}  {found['changing']}", flush=True)
    return found


def contenders(workers: Workers) -> dict[str, Callable[[], float]]:
    """Seconds of bringing gradients together, and of a step, by the tree and by an all-reduce."""
    torch.manual_seed(0)
    task = Table(seed=0, **SIZES)
    one, other = task.build_model(), task.build_model()
    sums = ShardSums(workers, list(one.named_parameters()), 1)
    stock = DistributedDataParallel(other, gradient_as_bucket_view=True)
    rows = (task.rows[:BATCH],)
    flat = torch.randn(sum(each.numel() for each in one.parameters()))
    flat = flat[: len(flat) // workers.world_size * workers.world_size]
    received = torch.empty_like(flat).view(workers.world_size, -1)

    def by_tree() -> None:
        dist.all_to_all_single(received, flat.view(received.shape))
        all_gather(flat, tree.folded(received))

    def step_by_tree() -> None:
        with sums.last():
            loss = task.loss(one, rows)
            loss.backward()
        sums.take(loss.detach())
        sums.finish()
        one.zero_grad(set_to_none=True)

    def stock_step() -> None:
        task.loss(stock, rows).backward()
        stock.zero_grad(set_to_none=True)

    def timed(function: Callable[[], object]) -> Callable[[], float]:
        def seconds() -> float:
            dist.barrier()
            begun = time.perf_counter()
            function()
            dist.barrier()
            return time.perf_counter() - begun

        return seconds

    calls = {
        "all-reduce": lambda: dist.all_reduce(flat),
        "tree": by_tree,
        "step, all-reduce (DDP)": stock_step,
        "step, tree": step_by_tree,
    }
    for call in calls.values():
        for _ in range(3):
            call()
    if workers.first:
        print(
            f"gradients {4 * len(flat) / 2**20:.1f} MiB, buckets {sums.bytes / 2**20:.1f} MiB",
            file=sys.stderr,
        )
    return {name: timed(call) for name, call in calls.items()}


def peak(way: str) -> None:
    """One rank of the measurement of memory; rank 0 prints the largest peak of a rank in bytes."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    workers = Workers(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", None, 1)
    torch.manual_seed(0)
    task = Table(seed=0, **SIZES)
    model = task.build_model()
    rows = (task.rows[:BATCH],)
    count = SHARDS // workers.world_size
    sums = ShardSums(workers, list(model.named_parameters()), count) if way == "tree" else None
    stock = (
        model
        if sums or workers.world_size == 1
        else DistributedDataParallel(model, gradient_as_bucket_view=True)
    )
    for _ in range(3):
        for number in range(count):
            last = number == count - 1
            if sums is not None:
                with sums.last() if last else nullcontext():
                    loss = task.loss(model, rows)
                    loss.backward()
                sums.take(loss.detach())
            else:
                with nullcontext() if last or stock is model else stock.no_sync():
                    task.loss(stock, rows).backward()
        if sums is not None:
            sums.finish()
        model.zero_grad(set_to_none=True)
    peaks = workers.gather_bytes(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10).encode())
    if workers.first:
        gradients = sum(each.nbytes for each in model.parameters())
        print(json.dumps([max(int(each) for each in peaks), gradients]))
    dist.barrier()
    dist.destroy_process_group()


def memory(ranks: int) -> dict[str, int]:
    """Peak bytes of a rank by the tree and by DDP, and the bytes that are planned for the tree."""
    # Memory that is freed goes back at once, so that the peak is that of what was held.
    (by_tree, gradients), (stock, _) = (
        launched_worker(ranks, "--peak", way, MALLOC_MMAP_THRESHOLD_="65536") for way in ("tree", "ddp")
    )
    train = {"steps": 1, "global_batch": SHARDS, "micro_batch": 1}
    settings = Settings.model_validate({"run": {"dir": "run"}, "train": train})
    return {"tree": by_tree, "ddp": stock, "planned": plan.elastic(gradients, ranks, settings).held_bytes}


def worker(count: int) -> None:
    """One rank of the measurement; rank 0 prints seconds by name as JSON."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    workers = Workers(rank, dist.get_world_size(), torch.device("cpu"), "gloo", None, 1)
    values = rounds(contenders(workers), count)
    if rank == 0:
        print(json.dumps(values))
    dist.barrier()
    dist.destroy_process_group()


def cost(ranks: int, count: int) -> dict[str, list[float]]:
    """Seconds of each contender on so many ranks, round by round."""
    values: dict[str, list[float]] = launched_worker(ranks, "--worker", "--rounds", str(count))
    return values


def launched_worker(ranks: int, *arguments: str, **variables: str) -> Any:
    """This script on so many ranks; what its rank 0 prints last, as JSON."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [*command, __file__, *arguments], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure what is asked for, print it, keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--variants", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--modes", nargs="*", default=["eager", "compiled"])
    parser.add_argument("--cost", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--memory", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=("tree", "ddp"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        peak(asked.peak)
        return
    if asked.worker:
        worker(asked.rounds)
        return
    digests: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "same.yaml").write_text(CONFIG)
        for precision in asked.variants if asked.ranks else ():
            for mode in asked.modes:
                found = compared(folder, asked.steps, asked.ranks, precision, mode)
                digests[f"{precision} {mode}"] = found
                text = f"{precision}, {mode}: {len(set(found.values()))} digest of {len(found)} runs"
                print(verdict(text, len(set(found.values())), 1))
    costs = {ranks: cost(ranks, asked.rounds) for ranks in asked.cost}
    for ranks, values in costs.items():
        for tree_name, stock, limit in (
            ("tree", "all-reduce", LIMIT),
            ("step, tree", "step, all-reduce (DDP)", None),
        ):
            share = [one / other for one, other in zip(values[tree_name], values[stock], strict=True)]
            text = f"{ranks} ranks: {tree_name} over {stock} {spread(share, '.2f')}"
            text += f", {1000 * statistics.median(values[stock]):.0f} ms"
            print(text if limit is None else verdict(text, statistics.median(share), limit))
    peaks = {ranks: memory(ranks) for ranks in asked.memory}
    for ranks, found in peaks.items():
        added = found["tree"] - found["ddp"]
        text = f"{ranks} ranks: memory added to {found['ddp'] / 2**20:.0f} MiB: {added / 2**20:.0f} MiB"
        share = added / found["planned"]
        print(verdict(f"{text}, {share:.2f} of what is planned", share, MEMORY_LIMIT))
    keep(asked.json, {"steps": asked.steps, "digests": digests, "seconds": costs, "bytes": peaks})


if __name__ == "__main__":
    main()
