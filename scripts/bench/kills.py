"""SIGKILL at random instants over training, save and rotation: what is left, and where the run then ends.

python scripts/bench/kills.py [--kills N] [--ranks 1 2] [--store] [--seed N] [--json FILE] [--set KEY=VALUE …]

A tiny model that saves every second step and keeps two checkpoints, so that nearly every instant is inside
a save or a rotation. A launch is killed at a random moment, the folder is looked at, and the same command
starts again, until the run is complete; then the next run begins. Under torchrun every second kill takes one
rank only: the others have to leave by themselves. Counted after each kill:

- *lost*: the checkpoint that the product opens is older than one that the run had said was saved
- *torn*: a folder with the name of a whole checkpoint that does not verify, tensors included
- *stuck*: the same command does not go on, or ranks that outlive a killed one do not leave in time

Every run that ends is compared with one that nobody interrupted, tensor by tensor, weights, optimizer and
generators, and verified with its log. ``--set`` goes to every launch.

``--store``: checkpoints go to an S3 server on this machine as well (moto, tests/object_store.py). After each
kill the newest checkpoint in the bucket is fetched and verified, and must not be further behind the folder
than the one upload in flight; after every third kill the run folder is removed, so that the run goes on from
the bucket alone; in the end everything in the bucket is fetched and verified.

SIGUSR1 ends the kills early: the run is then completed, judged and reported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import torch
from exactness import ROOT, differing_files, kill_tree
from interleave import keep

from harness.audit.folders.opening import open_checkpoint
from harness.audit.verification.whole_run import verify_run
from harness.checkpoint.candidates import Candidates
from harness.checkpoint.restore import DamagedCheckpoint, Loaded
from harness.errors import EvidenceIncomplete, HarnessError, VerificationFailed
from harness.format.layout import PRUNED, TEMPORARY, RunFolder, parse_checkpoint_name
from harness.provenance.policy.rules import Policy, from_keys
from harness.provenance.signing import keys
from harness.stores.client import ObjectStore
from harness.stores.contents import Contents, newest
from harness.stores.fetch import fetch
from harness.workers import Workers

STEPS = 120
EVERY = 2
CONFIG = f"""\
run: {{dir: run, seed: 3}}
task: {{kind: "toy_task:Toy", options: {{pause: 4}}}}
train: {{steps: {STEPS}, global_batch: 12, micro_batch: 3}}
checkpoint: {{every: {EVERY}, keep: 2}}
"""
TWIN = "twin"
EARLY = 0.1
"""Share of kills that fall before the first step, while the launch resumes."""
LATEST, LATEST_WITH_STORE = 1.5, 8.0
"""Seconds from a launch's entry into training to its kill, at most; a save takes longer with a store."""
BARE = 1 / 3
"""Share of kills after which the run folder is removed, where there is a store."""
LEAVES_WITHIN = 60.0
"""Seconds in which the other ranks must have left after one was killed."""


@dataclass
class Tally:
    """What the kills of one world size have shown."""

    wanted: int = 0
    """Kills to be made."""

    kills: int = 0
    single_rank: int = 0
    bare: int = 0
    """After which the run went on from the store alone."""
    during: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    runs: int = 0
    exact: int = 0
    differing: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing went wrong."""
        wrong = self.lost or self.torn or self.stuck or self.differing or self.unverified
        return not wrong and self.exact == self.runs


class Campaign:
    """Runs at one world size, one after the other, and their twin."""

    def __init__(
        self, place: Path, ranks: int, overrides: Sequence[str], dice: random.Random, bucket: str | None
    ) -> None:
        """``bucket``: URL below which each run has its store."""
        self.place = place
        self.ranks = ranks
        self.overrides = list(overrides)
        self.dice = dice
        self.bucket = bucket
        self.tally = Tally()
        (place / "toy.yaml").write_text(CONFIG)
        keys.create(place / "me")
        self.policy: Policy = from_keys(keys.public_keys(keys.load_signer(place / "me.key")))
        self.number = 0
        self.startup = 0.0
        self._twin()

    def start(self, folder: str) -> subprocess.Popen[bytes]:
        """The command, always the same for one run."""
        launch = [sys.executable, "-m"]
        if self.ranks > 1:
            launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}", "-m"]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(self.place)}
        outer = environ.get("PYTHONPATH", str(ROOT))
        environ["PYTHONPATH"] = f"{outer}:{ROOT / 'tests'}"
        words = ["harness", "train", "toy.yaml", f"run.dir={folder}", "signing.key=me.key", *self.overrides]
        if self.bucket is not None and folder != TWIN:
            words += [f"checkpoint.store={self.bucket}/{folder}", "checkpoint.store_timeout=20"]
        with open(self.place / f"{folder}.txt", "wb") as said:
            return subprocess.Popen([*launch, *words], cwd=self.place, env=environ, stdout=said, stderr=said)

    def run(self) -> None:
        """Kill and restart one run until it is complete or enough kills are reached; then let it end."""
        self.number += 1
        folder = f"run-{self.number}"
        while True:
            process = self.start(folder)
            if self.tally.kills < self.tally.wanted and self._struck(process, folder):
                self.tally.kills += 1
                print(f"{self.ranks}: {self.tally.kills} of {self.tally.wanted} kills", file=sys.stderr)
                self._look(folder)
                if self.bucket is not None:
                    self._look_into_store(folder)
                continue
            process.wait()
            break
        if process.returncode:
            said = (self.place / f"{folder}.txt").read_text().strip()
            self.tally.stuck.append(f"{folder}: exit {process.returncode}: {said[-1000:]}")
            return
        self.tally.runs += 1
        last = f"step-{STEPS:08d}"
        pair = [self.place / each / "checkpoints" / last for each in (TWIN, folder)]
        odd = differing_files(*pair)
        self.tally.exact += not odd
        self.tally.differing += [f"{folder}: {odd[0]} and {len(odd) - 1} more"] if odd else []
        code = verify_run(self.place / folder, self.policy).exit_code
        self.tally.unverified += [f"{folder}: harness verify says {code}"] if code else []
        if self.bucket is not None:
            with tempfile.TemporaryDirectory(dir=self.place) as name:
                fetch(self._store(folder), RunFolder(Path(name)), lambda names: names, quiet=True)
                code = verify_run(Path(name), self.policy).exit_code
            self.tally.unverified += [f"{folder} in the store: harness verify says {code}"] if code else []

    def _store(self, folder: str) -> ObjectStore:
        return ObjectStore(f"{self.bucket}/{folder}")

    def _look_into_store(self, name: str) -> None:
        """What a kill has left in the store; now and then the run has nothing else from then on."""
        folder, store = RunFolder(self.place / name), self._store(name)
        contents = Contents(store.objects())
        if contents.unfinished:
            self.tally.during["upload"] += 1
        there = max([0, *(parse_checkpoint_name(each) or 0 for each in contents.complete)])
        # The next save waits until an upload has ended, so the store is never further behind.
        if there < announced(folder) - EVERY:
            self.tally.lost.append(f"{name}: the store has step {there}, step {announced(folder)} was saved")
        with tempfile.TemporaryDirectory(dir=self.place) as scratch:
            try:
                for each in fetch(store, RunFolder(Path(scratch)), newest, quiet=True).checkpoints:
                    open_checkpoint(RunFolder(Path(scratch)).checkpoints / each, self.policy)
            except (VerificationFailed, EvidenceIncomplete) as error:
                self.tally.torn.append(f"{name} in the store: {error}")
        if there and folder.root.is_dir() and self.dice.random() < BARE:
            shutil.rmtree(folder.root)
            self.tally.bare += 1

    def _twin(self) -> None:
        began = time.monotonic()
        process = self.start(TWIN)
        self._wait_for_launch(process, TWIN, None)
        self.startup = time.monotonic() - began
        if process.wait():
            raise SystemExit((self.place / f"{TWIN}.txt").read_text())

    def _struck(self, process: subprocess.Popen[bytes], folder: str) -> bool:
        """Kill the launch at a random moment; False when it ended before."""
        single = self.ranks > 1 and self.dice.random() < 0.5
        if self.dice.random() < EARLY:
            time.sleep(self.startup * self.dice.uniform(0.6, 1.0))
        else:
            self._wait_for_launch(process, folder, _inode(self.place / folder / "corpus.json"))
            time.sleep(self.dice.uniform(0.0, LATEST if self.bucket is None else LATEST_WITH_STORE))
        workers = _workers(process.pid) if single else []
        if process.poll() is not None:
            return False
        if not workers:
            kill_tree(process.pid)
            process.wait()
            return True
        os.kill(self.dice.choice(workers), 9)
        self.tally.single_rank += 1
        try:
            process.wait(LEAVES_WITHIN)
        except subprocess.TimeoutExpired:
            self.tally.stuck.append(f"{folder}: ranks stay for {LEAVES_WITHIN:.0f} s after one was killed")
            kill_tree(process.pid)
        return True

    def _wait_for_launch(self, process: subprocess.Popen[bytes], folder: str, before: int | None) -> None:
        """Until the launch has resumed: it then writes corpus.json anew."""
        while process.poll() is None and _inode(self.place / folder / "corpus.json") == before:
            time.sleep(0.005)

    def _look(self, name: str) -> None:
        """What the kill has left, by the way in which the product looks for the newest."""
        folder = RunFolder(self.place / name)
        self.tally.during[_moment(folder)] += 1
        said = announced(folder)
        candidates = Candidates(Workers.alone(), folder, self.policy, lambda _: False)
        found = candidates.next()
        try:
            if found.loaded is not None:
                read_whole(found.loaded)
        except DamagedCheckpoint as error:
            self.tally.torn.append(f"{name}: {error}")
        except HarnessError as error:
            self.tally.stuck.append(f"{name}: {error}")
        self.tally.torn += [f"{name}: {item.name}: {item.reason}" for item in found.skipped]
        opened = 0 if found.loaded is None else parse_checkpoint_name(found.loaded.folder.name) or 0
        if opened < said:
            self.tally.lost.append(f"{name}: opens step {opened}, step {said} was saved")


def read_whole(loaded: Loaded) -> None:
    """Read every tensor of a checkpoint. Raises `DamagedCheckpoint` for one that is not what was signed."""
    targets = {
        (group, tensor): torch.empty(shape, dtype=dtype)
        for group in ("model", "optimizer")
        for tensor, (dtype, shape) in loaded.described(group).items()
    }
    loaded.fill(targets)


def announced(folder: RunFolder) -> int:
    """The newest step that the run has said to be saved."""
    newest = 0
    path = folder.events(0)
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        event = orjson.loads(line) if line.endswith(b"\n") and line.startswith(b"{") else {}
        if event.get("event") == "checkpoint":
            newest = max(newest, event["step"])
    return newest


def _moment(folder: RunFolder) -> str:
    """In which part of its work a run was killed, from what it left."""
    if not folder.checkpoints.is_dir():
        return "before the first save"
    if any(entry.name.startswith(TEMPORARY) for entry in folder.checkpoints.iterdir()):
        return "save"
    complete = folder.complete()
    if complete and announced(folder) < (parse_checkpoint_name(complete[-1].name) or 0):
        return "log entry"
    payload = any((pruned / "model.safetensors").exists() for pruned in folder.checkpoints.glob(f"{PRUNED}*"))
    return "rotation" if payload or len(complete) > 2 else "training"


def _workers(root: int) -> list[int]:
    """The ranks that torchrun ``root`` has started."""
    try:
        text = Path(f"/proc/{root}/task/{root}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(word) for word in text.split()]


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


@contextmanager
def served() -> Iterator[str]:
    """An S3 server, known to this process and to those that it starts; the URL of a bucket in it."""
    sys.path.insert(0, str(ROOT / "tests"))
    made = importlib.import_module("object_store")
    server = made.Server()
    try:
        os.environ.update(server.environ)
        made.bucket_of(server, "kills")
        yield "s3://kills/runs"
    finally:
        server.stop()


def report(ranks: int, tally: Tally, seconds: float) -> None:
    """Print one world size."""
    during = ", ".join(f"{name} {count}" for name, count in tally.during.most_common())
    kinds = f"{tally.single_rank} of one rank only, {tally.bare} with the run folder removed"
    print(
        f"{ranks} rank{'s' * (ranks > 1)}: {tally.kills} kills ({kinds}) in "
        f"{seconds:.0f} s; killed in: {during}\n"
        f"  lost {len(tally.lost)}, torn {len(tally.torn)}, stuck {len(tally.stuck)}; "
        f"{tally.exact} of {tally.runs} runs end bit-equal to the uninterrupted one"
    )
    for line in (*tally.lost, *tally.torn, *tally.stuck, *tally.differing, *tally.unverified):
        print(f"  {line}")


def main() -> None:
    """Kill, look, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="at all world sizes together")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--store", action="store_true", help="with an S3 server as second place")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="config of every launch")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kept = {}
    good = True
    with ExitStack() as stack:
        bucket = stack.enter_context(served()) if arguments.store else None
        for index, ranks in enumerate(arguments.ranks):
            began = time.monotonic()
            kills = arguments.kills // len(arguments.ranks)
            with tempfile.TemporaryDirectory(prefix="bench-kills-") as name:
                dice = random.Random(arguments.seed + index)
                store = None if bucket is None else f"{bucket}/{ranks}"
                campaign = Campaign(Path(name), ranks, arguments.set, dice, store)
                campaign.tally.wanted = kills
                signal.signal(signal.SIGUSR1, lambda *_, tally=campaign.tally: vars(tally).update(wanted=0))
                while campaign.tally.kills < campaign.tally.wanted and not campaign.tally.stuck:
                    campaign.run()
            report(ranks, campaign.tally, time.monotonic() - began)
            kept[str(ranks)] = vars(campaign.tally)
            good = good and campaign.tally.good
    keep(arguments.json, {"ranks": kept})
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
