"""A run of 10,000 checkpoints' statements: `harness verify` on it, and what one more record of its log costs.

python scripts/bench/chain.py [--checkpoints 10000] [--tensors 5] [--rounds 5] [--folder FOLDER] [--json FILE]

The run is written by tests/run_folder.py with real keys: a checkpoint each step, all but the newest pruned as
`checkpoint.keep: 1` leaves them, so what is verified is a checkpoint statement, an SLSA statement, a model
signature and a manifest of each, the lineage, the log and the metrics chain. A manifest lists ``--tensors``
of them: a model and its optimizer have more than the sample's five. Beside `harness verify` as a
command stands the floor of this machine: the same signatures over the same bytes, verified by `cryptography`
in as many processes, and nothing else. `--since` is measured on the same run, with a head of all but the
newest checkpoint, and on a second one of checkpoints with weights, of which the last was added after the head
was kept. FOLDER keeps both runs for the next time. Seconds of the processor are given as well: other jobs on
the machine change them less.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import interleave

from harness.format import layout
from harness.provenance.signing import envelope, keys
from harness.provenance.transparency import log

ROOT = Path(__file__).parent.parent.parent
VERIFY, FLOOR, ONE_NEW = "harness verify", "the signatures alone", "verify --since, one new"
WHOLE, SINCE = "verify, weights", "verify --since, weights"
SECONDS, GROWTH = 5.0, 1.5
SAMPLE_TENSORS = 5
"""Of a checkpoint of tests/run_folder.py."""
SAMPLE = 200
"""Appends whose median is compared: the first ones, and the last ones."""
WEIGHTS, MIB = 8, 64
"""Checkpoints with weights, and MiB of each."""


def build(folder: Path, count: int, tensors: int) -> list[float]:
    """A run of ``count`` checkpoints at ``folder``/run; returns the seconds of each append to its log."""
    run_folder = importlib.import_module("run_folder")
    more = [(f"layers.{number}.weight", [3]) for number in range(tensors - SAMPLE_TENSORS)]
    listed = {**run_folder.TENSORS, "model.safetensors": [*run_folder.TENSORS["model.safetensors"], *more]}
    run = run_folder.SampleRun(folder / "run", run_folder.identity(folder / "me"), tensors=listed)
    append, seconds = run_folder.log.append, []

    def timed(*words: Any) -> Any:
        started = time.perf_counter()
        head = append(*words)
        seconds.append(time.perf_counter() - started)
        return head

    run_folder.log.append = timed
    try:
        for step in range(1, count + 1):
            run.advance(step)
            if step > 1:
                run.prune(step - 1)
    finally:
        run_folder.log.append = append
    return seconds


def with_weights(folder: Path) -> None:
    """A run at ``folder``/run whose checkpoints have weights, and the head of its log before the last one."""
    run_folder = importlib.import_module("run_folder")
    weights = {"model.safetensors": [("weights", [0])]}
    body = os.urandom(1 << 20) * MIB
    run = run_folder.SampleRun(
        folder / "run", run_folder.identity(folder / "me"), tensors=weights, files={"weights.bin": body}
    )
    run.advance(*range(1, WEIGHTS))
    subprocess.run(command("head", folder, "--out", "kept.head"), cwd=folder, check=True, capture_output=True)
    run.advance(WEIGHTS)


def keep_head(folder: Path) -> None:
    """The head of the log of ``folder``/run before its last record, signed as it was then, in kept.head."""
    book = log.read_claimed(folder / "run" / layout.LOG)
    size = book.head.size - 1
    head = log.Head(size, book.root_of_prefix(size), book.head.origin)
    (folder / "kept.head").write_bytes(log.sign_note(head, keys.load_signer(folder / "me.key")))


def command(verb: str, folder: Path, *words: str) -> list[str]:
    """A harness command on ``folder``/run with its keys."""
    public = [str(folder / f"me.{each}.pub") for each in ("ed25519", "p256")]
    return [sys.executable, "-m", "harness", verb, str(folder / "run"), "--key", *public, *words]


def seconds(words: list[str], folder: Path) -> float:
    """Wall time of a command, which must succeed."""
    started = time.perf_counter()
    subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def processor(turn: Callable[[], float], used: list[float]) -> float:
    """What ``turn`` returns; the processor's seconds of the processes that it starts go to ``used``."""
    before = os.times()
    value = turn()
    after = os.times()
    used.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return value


Signed = tuple[bytes, bytes, bool]
"""Message, signature, and whether its key is P-256."""


def signatures(folder: Path) -> list[Signed]:
    """What is signed in every checkpoint."""
    found = []
    for checkpoint in sorted((folder / "run" / layout.CHECKPOINTS).iterdir()):
        for name in (layout.CHECKPOINT_BUNDLE, layout.SLSA_BUNDLE, layout.MODEL_SIGNATURE):
            inner = json.loads((checkpoint / name).read_bytes())["dsseEnvelope"]
            message = envelope.pae(envelope.PAYLOAD_TYPE, base64.b64decode(inner["payload"]))
            signature = base64.b64decode(inner["signatures"][0]["sig"])
            found.append((message, signature, name == layout.MODEL_SIGNATURE))
    return found


def floor(work: Sequence[Signed], folder: Path) -> float:
    """Wall time of verifying ``work`` in as many forked processes as there are cores."""
    ed25519, p256 = (keys.load_public(folder / f"me.{each}.pub") for each in ("ed25519", "p256"))
    cores = len(os.sched_getaffinity(0))

    def verify(part: Sequence[Signed]) -> None:
        good = all((p256 if model else ed25519).verifies(sig, message) for message, sig, model in part)
        sys.exit(0 if good else 1)

    fork = multiprocessing.get_context("fork")
    started = time.perf_counter()
    running = [fork.Process(target=verify, args=(work[number::cores],)) for number in range(cores)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    if any(each.exitcode for each in running):
        raise SystemExit("a signature is not good")
    return time.perf_counter() - started


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=10_000)
    parser.add_argument("--tensors", type=int, default=SAMPLE_TENSORS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        chain, weights, appends = folder / "chain", folder / "weights", folder / "appends.json"
        if not appends.exists():
            for each in (chain, weights):
                each.mkdir(parents=True)
            with_weights(weights)
            appends.write_text(json.dumps(build(chain, arguments.checkpoints, arguments.tensors)))
        appended = json.loads(appends.read_text())
        work = signatures(chain)
        keep_head(chain)
        commands = {
            VERIFY: lambda: seconds(command("verify", chain), chain),
            FLOOR: lambda: floor(work, chain),
            ONE_NEW: lambda: seconds(command("verify", chain, "--since", "kept.head"), chain),
            WHOLE: lambda: seconds(command("verify", weights), weights),
            SINCE: lambda: seconds(command("verify", weights, "--since", "kept.head"), weights),
        }
        used: dict[str, list[float]] = {each: [] for each in commands}
        turns = {each: partial(processor, turn, used[each]) for each, turn in commands.items()}
        values = interleave.rounds(turns, arguments.rounds)
    rows = [
        (each, interleave.spread(times, ".2f"), interleave.spread(used[each], ".2f"))
        for each, times in values.items()
    ]
    print(interleave.table([("command", "seconds", "of the processor"), *rows]))
    count = len(appended)
    whole = statistics.median(values[VERIFY])
    text = f"{count} checkpoints, {len(work)} signatures: {whole:.2f} s, {SECONDS} s wanted"
    print(interleave.verdict(text, whole, SECONDS))
    busy = [one / other for one, other in zip(used[VERIFY], used[FLOOR], strict=True)]
    print(f"the same in seconds of the processor: {interleave.spread(busy, '.2f')}")
    over = interleave.spread(interleave.ratios(values, VERIFY, FLOOR), ".2f")
    print(f"verify over its signatures alone: {over}")
    one_new = interleave.spread(interleave.ratios(values, ONE_NEW, VERIFY), ".2f")
    print(f"--since with one new checkpoint over the whole of {count}: {one_new}")
    busy = [one / other for one, other in zip(used[ONE_NEW], used[VERIFY], strict=True)]
    print(f"the same in seconds of the processor: {interleave.spread(busy, '.2f')}")
    since = interleave.spread(interleave.ratios(values, SINCE, WHOLE), ".2f")
    print(f"--since over the whole of {WEIGHTS} checkpoints of {MIB} MiB: {since}")
    first, last = statistics.median(appended[:SAMPLE]), statistics.median(appended[-SAMPLE:])
    text = (
        f"append to a log of {count} records: {1e3 * last:.2f} ms, {last / first:.2f} of one"
        f" to a log of up to {SAMPLE}, at most {GROWTH} wanted"
    )
    print(interleave.verdict(text, last / first, GROWTH))
    interleave.keep(arguments.json, {"seconds": values, "processor": used, "appends": appended})


if __name__ == "__main__":
    main()
