"""Saving and restoring 3 GB of state: the harness beside its peers and the floors of memory and disk.

python scripts/bench/checkpoint.py [--gib 2.9] [--rounds 5] [--folder DIR] [--only NAME …] [--json FILE]

One process, fp32 parameters with Adam's two moments. Every contender saves and then loads the same state, in
rotating order, and says two times for saving: *blocked*, until training could go on, and *durable*, until an
fsync'ed checkpoint is on disk. A peer that does not sync is followed by fsync of what it wrote, in its time.
Only the harness hashes and signs. Loading is into the live tensors of a fresh process, as a resume does, each
from a warm page cache and with `--cold` from a dropped one; only the harness verifies what it loads.

Peers: torch.save, accelerate.save_state, DCP (torch.distributed.checkpoint), DCP async with cached staging,
torchsnapshot where it is installed. safetensors' save_file and load_file stand beside them: they keep
tensors, not a training state (no step, no RNG, no optimizer groups), so they are a floor and judged apart.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from interleave import keep, ratios, rounds, verdict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict

from harness.checkpoint import candidates, state
from harness.checkpoint.memory import HostMemory
from harness.checkpoint.publisher import Publication, Publisher
from harness.checkpoint.shards import FILE_BYTES
from harness.checkpoint.snapshot import Arena
from harness.checkpoint.state import TrainingState
from harness.checkpoint.writer import CheckpointWriter, Save
from harness.format import layout, strict_json
from harness.format.layout import RunFolder
from harness.provenance.policy.rules import from_keys
from harness.provenance.signing import keys
from harness.training.statement import record
from harness.training.statement.record import RunFacts, Segment, StepFacts
from harness.workers import Workers

WIDTH = 2048
LIMITS = {"blocked over memcpy": 1.3, "durable over the fastest peer": 0.5, "durable over a bare write": 1.3}
TENSORS_ONLY = "safetensors"
"""The row that saves no training state."""
SETTLE = 4.0
"""Seconds of rest before each turn: a virtual machine hands gigabytes that were just freed back to its host,
and a copy that runs meanwhile takes up to twice as long, whoever makes it."""


@dataclass
class Timed:
    """What one save took."""

    blocked: float
    durable: float


def training_state(gib: float) -> TrainingState:
    """Square layers and their AdamW state after one step, of ``gib`` GiB together."""
    count = max(1, round(gib * 2**30 / (12 * WIDTH * WIDTH)))
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return TrainingState(model, optimizer)


def synced(folder: Path) -> None:
    """Put everything in ``folder`` on disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Contender:
    """A way to save and load; each save goes to an empty folder."""

    def __init__(self, root: Path, name: str, made: TrainingState) -> None:
        self.folder = root / name.replace(" ", "-")
        self.made = made

    def save(self) -> Timed:
        """Save once; a subclass writes into `folder`."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        started = time.perf_counter()
        self.write()
        synced(self.folder)
        seconds = time.perf_counter() - started
        return Timed(seconds, seconds)

    def write(self) -> None:
        """Save, blocking."""
        raise NotImplementedError

    def load(self) -> None:
        """Load what `save` wrote into the live tensors."""
        raise NotImplementedError


class TorchSave(Contender):
    def _state(self) -> dict[str, Any]:
        return {"model": self.made.model.state_dict(), "optimizer": self.made.optimizer.state_dict()}

    def write(self) -> None:
        torch.save(self._state(), self.folder / "state.pt")

    def load(self) -> None:
        loaded = torch.load(self.folder / "state.pt", weights_only=True)
        self.made.model.load_state_dict(loaded["model"])
        self.made.optimizer.load_state_dict(loaded["optimizer"])


class Safetensors(Contender):
    def write(self) -> None:
        for group, tensors in state.tensors_of(self.made).items():
            save_file(tensors, self.folder / f"{group}.safetensors")

    def load(self) -> None:
        with torch.no_grad():
            for group, tensors in state.tensors_of(self.made).items():
                loaded = load_file(self.folder / f"{group}.safetensors")
                for name, tensor in tensors.items():
                    tensor.copy_(loaded[name])


class Accelerated(Contender):
    def __init__(self, root: Path, name: str, made: TrainingState) -> None:
        super().__init__(root, name, made)
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.prepare(made.model, made.optimizer)

    def write(self) -> None:
        self.accelerator.save_state(str(self.folder))

    def load(self) -> None:
        self.accelerator.load_state(str(self.folder))


class Distributed(Contender):
    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.made.model, self.made.optimizer)
        return {"model": model, "optimizer": optimizer}

    def write(self) -> None:
        dcp.save(self._state(), checkpoint_id=self.folder)

    def load(self) -> None:
        dcp.load(self._state(), checkpoint_id=self.folder)


class DistributedAsync(Distributed):
    def __init__(self, root: Path, name: str, made: TrainingState) -> None:
        super().__init__(root, name, made)
        # Host memory is kept from one save to the next ("cached staging").
        self.stager = DefaultStager(StagingOptions(False, True, False, False))

    def save(self) -> Timed:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        started = time.perf_counter()
        pending = dcp.async_save(self._state(), checkpoint_id=self.folder, async_stager=self.stager)
        blocked = time.perf_counter() - started
        getattr(pending, "upload_completion", pending).result()
        synced(self.folder)
        return Timed(blocked, time.perf_counter() - started)


class Snapshot(Contender):
    def save(self) -> Timed:
        import torchsnapshot

        shutil.rmtree(self.folder, ignore_errors=True)
        started = time.perf_counter()
        pending = torchsnapshot.Snapshot.async_take(str(self.folder), self._state())
        blocked = time.perf_counter() - started
        pending.wait()
        synced(self.folder)
        return Timed(blocked, time.perf_counter() - started)

    def load(self) -> None:
        import torchsnapshot

        torchsnapshot.Snapshot(str(self.folder)).restore(self._state())

    def _state(self) -> dict[str, Any]:
        return {"model": self.made.model, "optimizer": self.made.optimizer}


class Harness(Contender):
    """What `harness train` calls: arena, hashed direct writes, seal, publish, log."""

    def __init__(self, root: Path, name: str, made: TrainingState) -> None:
        super().__init__(root, name, made)
        if not (root / "bench.key").exists():
            keys.create(root / "bench")
        self.signer = keys.load_signer(root / "bench.key")
        self.workers = Workers.alone()
        self.arena = Arena(self.workers)

    def first(self) -> float:
        """Seconds of the first copy, which touches the arena."""
        tensors, parts = self._tensors()
        started = time.perf_counter()
        self.arena.prepare(parts, tensors)
        self.arena.fill(parts, tensors)
        return time.perf_counter() - started

    def _tensors(self) -> tuple[Any, Any]:
        tensors = state.tensors_of(self.made)
        return tensors, state.parts_of(self.made, tensors, 1, FILE_BYTES)

    def begin(self) -> CheckpointWriter:
        """Save into an empty run folder; the write goes on behind the caller."""
        shutil.rmtree(self.folder, ignore_errors=True)
        run = RunFolder(self.folder)
        publisher = Publisher(run, "ab" * 16, self.signer, parent=None, head=None)
        writer = CheckpointWriter(run, self.workers, publisher, step_back=True)
        tensors, parts = self._tensors()
        images = self.arena.fill(parts, tensors)
        writer.save(Save(1, images, _publication(sum(part.size for part in parts))))
        return writer

    def save(self) -> Timed:
        shutil.rmtree(self.folder, ignore_errors=True)
        started = time.perf_counter()
        writer = self.begin()
        blocked = time.perf_counter() - started
        writer.wait()
        return Timed(blocked, time.perf_counter() - started)

    def load(self) -> None:
        policy = from_keys(keys.public_keys(self.signer))
        found = candidates.Candidates(self.workers, RunFolder(self.folder), policy, lambda _: False).next()
        if found.loaded is None:
            raise SystemExit(f"the harness finds no checkpoint: {found.skipped}")
        state.load(self.made, found.loaded, {})


def _publication(size: int) -> Publication:
    cursor = {"step": 1, "samples": 1, "tokens": 1, "epoch": 0, "position": 1}
    facts = RunFacts(
        run={"id": "ab" * 16, "name": "bench", "seed": 0},
        segment=Segment(0, "genesis"),
        launch={
            "command": ["bench"], "launcher": "bare", "world_size": 1, "nodes": 1, "mesh": {},
            "precision": "fp32", "compile": False, "parallel": "ddp", "backend": "none",
        },
        config={"sha256": hashlib.sha256(b"").hexdigest(), "text": ""},
        code={"harness": "0", "git_commit": None, "dirty": None, "diff_sha256": None, "task": None},
        data={"kind": "bench", "corpus_sha256": None, "tokenizer_sha256": None, "counts": {}},
        environment={},
        determinism_mode="off",
        determinism_settings={},
    )  # fmt: skip
    trainer = {"step": 1, "world_size": 1, "segment": 0, "cursor": cursor}
    files = {layout.TRAINER: strict_json.dumps(trainer)}
    now = StepFacts(1, cursor, None, None, None)
    return Publication(files, size, partial(record.predicate, facts, now))


PEERS: dict[str, type[Contender]] = {
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "accelerate": Accelerated,
    "DCP": Distributed,
    "DCP async": DistributedAsync,
    "torchsnapshot": Snapshot,
}

CONTENDERS: dict[str, type[Contender]] = {"harness": Harness, **PEERS}


class Floors:
    """What memory and disk need for the same bytes, without a format."""

    def __init__(self, root: Path, made: TrainingState) -> None:
        self.path = root / "floor.bin"
        self.tensors = [
            tensor for group in state.tensors_of(made).values() for tensor in group.values() if tensor.ndim
        ]
        self.memory = HostMemory(sum(tensor.numel() * 4 for tensor in self.tensors))
        self.memory.touch()

    def memcpy(self) -> float:
        """Seconds to copy the state into memory that was touched before."""
        started = time.perf_counter()
        offset = 0
        for tensor in self.tensors:
            end = offset + tensor.numel() * 4
            self.memory.tensor[offset:end].view(torch.float32).view(tensor.shape).copy_(tensor)
            offset = end
        return time.perf_counter() - started

    def write(self, *, direct: bool = False) -> float:
        """Seconds to write the same bytes to one file, one after the other, and to sync it.

        ``direct``: around the page cache.
        """
        self.path.unlink(missing_ok=True)
        started = time.perf_counter()
        flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0)
        descriptor = os.open(self.path, flags)
        offset = 0
        while offset < self.memory.size:
            offset += os.write(descriptor, self.memory.view[offset : offset + (16 << 20)])
        os.fsync(descriptor)
        os.close(descriptor)
        return time.perf_counter() - started


@dataclass
class Table:
    """Seconds by contender, one a round."""

    blocked: dict[str, list[float]] = field(default_factory=dict)
    durable: dict[str, list[float]] = field(default_factory=dict)
    loading: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, timed: Timed) -> None:
        self.blocked.setdefault(name, []).append(timed.blocked)
        self.durable.setdefault(name, []).append(timed.durable)


def dropped_cache(folder: Path) -> None:
    """Take what lies in ``folder`` out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def warmed_cache(folder: Path) -> None:
    """Read what lies in ``folder`` into the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as stream:
                while stream.read(16 << 20):
                    pass


def loaded_elsewhere(name: str, root: Path, gib: float) -> float:
    """Seconds that a fresh process takes to load what ``name`` has saved, once its model is built."""
    command = [sys.executable, __file__, "--gib", str(gib), "--load", name, "--folder", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} does not load: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def load_here(name: str, root: Path, gib: float) -> float:
    """Seconds to load what ``name`` has saved into a state that was just built."""
    contender = CONTENDERS[name](root, name, training_state(gib))
    started = time.perf_counter()
    contender.load()
    return time.perf_counter() - started


def measured(
    contenders: Mapping[str, Contender], floors: Floors, count: int, *, cold: bool, gib: float
) -> tuple[Table, dict[str, list[float]]]:
    """Every contender saves and loads once a round."""
    table = Table()

    def turn(name: str, contender: Contender) -> float:
        gc.collect()
        os.sync()
        table.add(name, contender.save())
        (dropped_cache if cold else warmed_cache)(contender.folder)
        seconds = loaded_elsewhere(name, contender.folder.parent, gib)
        table.loading.setdefault(name, []).append(seconds)
        shutil.rmtree(contender.folder)
        return seconds

    calls: dict[str, Callable[[], float]] = {
        "memcpy": floors.memcpy,
        "bare write + fsync": floors.write,
        "direct write": partial(floors.write, direct=True),
        **{name: partial(turn, name, contender) for name, contender in contenders.items()},
    }
    timed = rounds(calls, count, settle=SETTLE)
    floor = {name: values for name, values in timed.items() if name not in contenders}
    return table, floor


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """A folder on the disk that is measured, removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def report(table: Table, floor: Mapping[str, list[float]], first: float) -> dict[str, float]:
    """Print medians and the ratios that have a limit; returns those."""
    print(f"{'':<20} {'blocked s':>10} {'durable s':>10} {'load s':>10}")
    for name in table.blocked:
        row = (statistics.median(values[name]) for values in (table.blocked, table.durable, table.loading))
        print(f"{name:<20} " + " ".join(f"{value:>10.2f}" for value in row))
    for name, values in floor.items():
        print(f"{name:<20} {statistics.median(values):>10.2f}")
    print(f"the harness's first save, with memory that nobody has touched: {first:.2f} s")
    both = {**table.durable, **floor}
    peers = [name for name in table.blocked if name not in ("harness", TENSORS_ONLY)]
    found = {
        "blocked over memcpy": statistics.median(ratios({**table.blocked, **floor}, "harness", "memcpy")),
        "durable over a bare write": statistics.median(ratios(both, "harness", "bare write + fsync")),
    }
    for text, values, known in (
        ("blocked", table.blocked, None),
        ("durable", table.durable, LIMITS["durable over the fastest peer"]),
        ("load", table.loading, 1.0),
    ):
        if peers:
            fastest = min(peers, key=lambda name: statistics.median(values[name]))
            found[f"{text} over the fastest peer"] = statistics.median(ratios(values, "harness", fastest))
            limit = 1.0 if known is None else known
            value = found[f"{text} over the fastest peer"]
            print(
                verdict(f"{text} is {value:.2f} of {fastest}, the fastest peer (limit {limit})", value, limit)
            )
        if TENSORS_ONLY in values:
            found[f"{text} over {TENSORS_ONLY}"] = statistics.median(ratios(values, "harness", TENSORS_ONLY))
            print(f"        {text} is {found[f'{text} over {TENSORS_ONLY}']:.2f} of {TENSORS_ONLY}")
    direct = statistics.median(ratios(both, "harness", "direct write"))
    print(f"        durable is {direct:.2f} of a direct write")
    for name in ("blocked over memcpy", "durable over a bare write"):
        print(verdict(f"{name}: {found[name]:.2f} (limit {LIMITS[name]})", found[name], LIMITS[name]))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.9, help="GiB of state (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    parser.add_argument("--only", nargs="*", choices=PEERS, help="these peers")
    parser.add_argument("--cold", action="store_true", help="load from disk, not from the page cache")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--load", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    if arguments.load:
        print(load_here(arguments.load, arguments.folder, arguments.gib))
        return
    chosen = list(PEERS) if arguments.only is None else arguments.only
    if "torchsnapshot" in chosen and importlib.util.find_spec("torchsnapshot") is None:
        print("torchsnapshot is not installed: left out")
        chosen.remove("torchsnapshot")
    made = training_state(arguments.gib)
    with scratch(arguments.folder) as root:
        harness = Harness(root, "harness", made)
        contenders = {"harness": harness, **{name: PEERS[name](root, name, made) for name in chosen}}
        floors = Floors(root, made)
        print(f"{floors.memory.size / 2**30:.2f} GiB, {arguments.rounds} rounds, medians")
        first = harness.first()
        table, floor = measured(contenders, floors, arguments.rounds, cold=arguments.cold, gib=arguments.gib)
        found = report(table, floor, first)
    dist.destroy_process_group()
    keep(arguments.json, {"ratios": found, "seconds": asdict(table), "floors": floor})


if __name__ == "__main__":
    main()
