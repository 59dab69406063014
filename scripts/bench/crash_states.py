"""What a crash in a save leaves behind, for every operation of the save: the harness beside its peers.

python scripts/bench/crash_states.py [--only NAME …] [--sample N] [--json FILE]

Each saver saves three states, one after the other, into an empty folder, while every change of a file is
recorded; then the folder is rebuilt as a crash after each operation may have left it, under the three models
of file_operations.py, and the saver's own rule opens what is there:

- *old*, *new*: the state that was saved last, or the one that was being saved, is loaded, all of it
- *stuck*: the rule takes something that does not load
- *lost*: what was saved is not found; an older state, or none, is taken
- *other*: a state loads without an error, and is not one that was saved

For the harness it is `harness train` itself, with ``checkpoint.keep: 1``: the same command starts on what the
crash has left, and must go on from the old or the new checkpoint, end with the tensors of a run that nobody
interrupted, and verify, its log included. ``--sample``: only every so many states of each.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import forked
import orjson
import torch
from exactness import ROOT, differing_files
from file_operations import MODELS, Crash, Library, Operation, compiled, crashes, read
from interleave import keep, table
from savers import PEERS, Saved, truth
from torch.distributed.checkpoint.api import CheckpointException

from harness import cli
from harness.audit.verification.whole_run import verify_run
from harness.provenance.policy.rules import from_keys
from harness.provenance.signing import keys

HARNESS = "harness"
STEPS = 3
CONFIG = f"""\
run: {{dir: run, seed: 3}}
task: {{kind: "toy_task:Toy"}}
train: {{steps: {STEPS}, global_batch: 6, micro_batch: 6}}
checkpoint: {{every: 1, keep: 1}}
evaluate: {{every: 0}}
"""
VERDICTS = ("old", "new", "stuck", "lost", "other")
BAD = VERDICTS[2:]

Key = tuple[bytes, int]
"""The digest of a state, and the step that was saved by then."""


@dataclass
class Counted:
    """Verdicts of one saver under one model."""

    verdicts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first of each bad verdict."""

    def add(self, verdict: str, why: str) -> None:
        """Count one state."""
        self.verdicts[verdict] += 1
        if verdict in BAD:
            self.examples.setdefault(verdict, why)


def record(name: str, root: Path, log: Path) -> None:
    """Save `STEPS` states below ``root``; in a process that was started with the library."""
    library = Library()
    root.mkdir()
    if name == HARNESS:
        library.watch(root, log)
        if code := cli.main(_train(root)):
            raise SystemExit(code)
        return
    made = Saved()
    saver = PEERS[name](root, made)
    library.watch(root, log)
    for step in range(1, STEPS + 1):
        made.advance(step)
        saver.save()
        library.mark(f"saved {step}")


def _train(root: Path) -> list[str]:
    """The command, the same for every launch; ``root`` is the run folder."""
    place = root.parent.parent if root.parent.name == "states" else root.parent
    return ["train", f"{place}/toy.yaml", "--json", f"run.dir={root}", f"signing.key={place}/me.key"]


def recorded(name: str, place: Path, library: Path) -> tuple[Operation, ...]:
    """The operations of ``name``, which saves into ``place/run`` in a process of its own."""
    root, log = place / "run", place / "operations.log"
    environ = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HOME": str(place)}
    words = [sys.executable, __file__, "--record", name, str(root), str(log)]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return read(log, root)


def saved_after(operations: Sequence[Operation]) -> list[int]:
    """For each number of operations made, the newest step that the saver had said to be saved."""
    saved = [0]
    for operation in operations:
        step = 0
        if operation.kind == "mark":
            step = int(operation.name.removeprefix("saved "))
        elif operation.kind == "data" and b'"event":"checkpoint"' in operation.data:
            step = int(orjson.loads(operation.data)["step"])
        saved.append(max(saved[-1], step))
    return saved


def judge(opened: int | None, saved: int, same: bool) -> str:
    """The verdict on a state of step ``opened``, None for none found, after ``saved`` was saved."""
    found = opened or 0
    if found < saved:
        return "lost"
    if found and not same:
        return "other"
    return "old" if found == saved else "new"


def open_peer(
    name: str, truths: Mapping[int, Any], crash: Crash, saved: int, folder: Path
) -> tuple[str, str]:
    """Open what ``crash`` has left by the rule of the peer ``name``."""
    shutil.rmtree(folder, ignore_errors=True)
    crash.disk.write(folder)
    made = Saved()
    made.advance(99)
    try:
        found = PEERS[name](folder, made).newest()
    except (Exception, CheckpointException) as error:  # DCP's own is no Exception
        return "stuck", f"{type(error).__name__}: {str(error)[:200]}"
    same = found and made.contents() == truths.get(made.step)
    return judge(made.step if found else None, saved, same), f"step {made.step}"


def open_harness(place: Path, item: tuple[Crash, int], said: Path) -> tuple[str, str]:
    """Start the same command on what ``crash`` has left; in a fork."""
    crash, saved = item
    folder = place / "states" / f"run-{os.getpid()}"
    crash.disk.write(folder)
    try:
        torch.set_num_threads(1)
        code = cli.main(_train(folder))
        text = said.read_text().strip().splitlines()
        if code:
            return "stuck", f"exit {code}: {text[-1] if text else ''}"
        last = f"checkpoints/step-{STEPS:08d}"
        odd = differing_files(folder / last, place / "run" / last)
        policy = from_keys(keys.public_keys(keys.load_signer(place / "me.key")))
        verified = verify_run(folder, policy).exit_code
        first = int(orjson.loads(text[-1])["first_step"])
        why = f"from step {first}; differs: {odd[:3]}; harness verify says {verified}"
        return judge(first, saved, not odd and not verified), why
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(name: str, place: Path, library: Path, sample: int) -> dict[str, Counted]:
    """Every crash of one saver, by model."""
    counts = {model: Counted() for model in MODELS}
    operations = recorded(name, place, library)
    saved = saved_after(operations)
    if saved[-1] != STEPS:
        raise SystemExit(f"{name}: the record says {saved[-1]} of {STEPS} states saved")
    verdicts: dict[Key, tuple[str, str]] = {}
    wanted = [crash for number, crash in enumerate(crashes(operations)) if number % sample == 0]
    keyed = [(crash, (_digest(crash), saved[crash.after])) for crash in wanted]
    fresh = {key: (crash, saved[crash.after]) for crash, key in reversed(keyed)}
    for key, verdict in _verdicts(name, place, fresh):
        verdicts[key] = verdict
        if len(verdicts) % 100 == 0:
            print(f"{name}: {len(verdicts)} of {len(fresh)} states", file=sys.stderr, flush=True)
    for crash, key in keyed:
        verdict, why = verdicts[key]
        counts[crash.model].add(verdict, f"after {crash.after} without {crash.lost}: {why}")
    return counts


def _digest(crash: Crash) -> bytes:
    """Equal for states that no saver can tell apart: events/ is a diary that is never read back."""
    return crash.disk.digest(without="events/")


def _verdicts(
    name: str, place: Path, states: Mapping[Key, tuple[Crash, int]]
) -> Iterator[tuple[Key, tuple[str, str]]]:
    """The verdict on each distinct state."""
    if name == HARNESS:
        (place / "states").mkdir()
        os.environ["HOME"] = str(place)
        forked.prepare(lambda: cli.main(_train(place / "states" / "first")), place)
        numbers = {id(state): key for key, state in states.items()}
        for state, result in forked.each(states.values(), partial(open_harness, place), place):
            died = isinstance(result, dict)
            yield numbers[id(state)], ("stuck", str(result)) if died else tuple(result)
        return
    truths = {step: truth(step) for step in range(1, STEPS + 1)}
    for key, (crash, saved) in states.items():
        yield key, open_peer(name, truths, crash, saved, place / "state")


def report(results: Mapping[str, Mapping[str, Counted]]) -> None:
    """The table, and an example of everything bad."""
    rows = [["", "model", "states", *VERDICTS]]
    for name, counts in results.items():
        for model, counted in counts.items():
            total = sum(counted.verdicts.values())
            rows.append([name, model, str(total), *(str(counted.verdicts[each]) for each in VERDICTS)])
    print(table(rows))
    for name, counts in results.items():
        for model, counted in counts.items():
            for verdict, why in counted.examples.items():
                print(f"{name}, {model}, {verdict}: {why}")


def main() -> None:
    """Record, rebuild, open, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=[HARNESS, *PEERS], help="these savers")
    parser.add_argument("--sample", type=int, default=1, help="every so many states (default: all)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--record", nargs=3, metavar=("NAME", "ROOT", "LOG"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    if arguments.record is not None:
        name, root, log = arguments.record
        return record(name, Path(root), Path(log))
    memory = Path("/dev/shm")
    results = {}
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        library = compiled(Path(scratch))
        for number, name in enumerate(arguments.only or [HARNESS, *PEERS]):
            place = Path(scratch) / str(number)
            place.mkdir()
            (place / "toy.yaml").write_text(CONFIG)
            keys.create(place / "me")
            results[name] = measure(name, place, library, arguments.sample)
    report(results)
    verdicts = {
        name: {model: dict(each.verdicts) for model, each in counts.items()}
        for name, counts in results.items()
    }
    keep(arguments.json, {"verdicts": verdicts})
    if any(verdicts.get(HARNESS, {}).get(model, {}).get(bad, 0) for model in MODELS for bad in BAD):
        raise SystemExit(1)
    return None


if __name__ == "__main__":
    main()
