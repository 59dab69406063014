"""`harness verify` of one large checkpoint beside `model_signing verify key` of the same files.

python scripts/bench/verify_large.py [--gib 3.7] [--rounds 3] [--json FILE]

A checkpoint as `harness train` writes it, read from a warm page cache. Both are whole commands, start-up
included. model_signing hashes every file with sha256; `harness verify` hashes every byte with sha256 for its
file and with BLAKE3 for its tensor, and checks statements, lineage and file set besides.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import interleave
import torch.distributed as dist
from checkpoint import Harness, training_state, warmed_cache

OURS, THEIRS = "harness verify", "model_signing verify key"
LIMIT = 0.5


def seconds(command: list[str | Path]) -> float:
    """Wall time of ``command``, which must accept."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} refuses: {done.stdout[-500:]}{done.stderr[-500:]}")
    return time.perf_counter() - started


def main() -> None:
    """Save, verify in turns, print."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--gib", type=float, default=3.7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    official = Path(sys.executable).with_name("model_signing")
    if not official.exists():
        raise SystemExit("no model_signing: pip install model-signing==1.1.1 pyOpenSSL")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saver = Harness(folder, "run", training_state(arguments.gib))
        saver.begin().wait()
        (saved,) = (saver.folder / "checkpoints").glob("step-*")
        size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        del saver
        warmed_cache(saved)
        keys = [folder / "bench.ed25519.pub", folder / "bench.p256.pub"]
        ours = [sys.executable, "-m", "harness", "verify", saved, "--key", *keys]
        theirs = [official, "verify", "key", "--public_key", keys[1], "--signature"]
        turns = {
            OURS: lambda: seconds(ours),
            THEIRS: lambda: seconds([*theirs, saved / "model.sig", saved]),
        }
        values = interleave.rounds(turns, arguments.rounds)
        files = len(list(saved.glob("*.safetensors")))
    dist.destroy_process_group()
    print(f"{size / 1e9:.2f} GB in {files} safetensors files")
    for each, times in values.items():
        speed = size / 1e9 / statistics.median(times)
        print(f"{each:<26} {interleave.spread(times, '.2f')} s, {speed:.2f} GB/s")
    ratio = statistics.median(interleave.ratios(values, OURS, THEIRS))
    print(interleave.verdict(f"{ratio:.2f} of its time (limit {LIMIT})", ratio, LIMIT))
    interleave.keep(arguments.json, {"seconds": values, "ratio": ratio, "bytes": size})


if __name__ == "__main__":
    main()
