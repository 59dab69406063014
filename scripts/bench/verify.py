"""`harness verify` where torch is absent: start-up in seconds, and hashing over `openssl dgst -sha256`.

python scripts/bench/verify.py [--rounds 11] [--mib 512] [--json FILE]

Start-up is the whole command of .venv-audit (made by `scripts/setup.sh audit`) on a run of three small
checkpoints. Hashing is `harness.audit.folders.payload` on one file of eight tensors, against openssl on the
same file; every byte is hashed twice, for its file and for its tensor, on two cores, so what is compared is
the time of one core for one byte hashed once.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import interleave

from harness.audit.folders import payload
from harness.format import files
from harness.format.manifest import FileEntry, TensorEntry
from harness.format.safetensors_header import build
from harness.format.tensor_digests import tensor_digest
from harness.provenance.findings import Findings

ROOT = Path(__file__).parent.parent.parent
HARNESS = ROOT / ".venv-audit" / "bin" / "harness"
START, HASHING, OPENSSL = "harness verify, small run", "audit.payload, large file", "openssl dgst -sha256"
SECONDS, RATIO = 0.4, 1.2
TENSORS = 8


def seconds(command: list[str], folder: Path) -> float:
    """Wall time of ``command``."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def large(path: Path, mib: int) -> payload.Job:
    """A safetensors file of ``mib`` MiB at ``path``, and its entries."""
    block = os.urandom(1 << 20)
    data = block * (mib // TENSORS)
    header, spans = build([(f"w{number}", "U8", [len(data)]) for number in range(TENSORS)], {})
    digest = hashlib.sha256(header)
    with open(path, "wb") as stream:
        stream.write(header)
        for _ in spans:
            stream.write(data)
            digest.update(data)
    one = tensor_digest(data)
    entries = [
        TensorEntry(span.name, path.name, span.dtype, tuple(span.shape), span.start, span.end, one)
        for span in spans
    ]
    status = path.stat()
    entry = FileEntry(path.name, status.st_size, digest.hexdigest())
    return payload.Job(path, entry, files.stamp(status), tuple(entries))


def hashing(job: payload.Job) -> float:
    """Wall time of checking ``job``, which must be good."""
    findings = Findings()
    started = time.perf_counter()
    payload.check([job], findings)
    if findings.failed:
        raise SystemExit(str(findings.failed[0]))
    return time.perf_counter() - started


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not HARNESS.exists():
        raise SystemExit("no .venv-audit: run scripts/setup.sh audit")
    sys.path.insert(0, str(ROOT / "tests"))
    run_folder = importlib.import_module("run_folder")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_folder.build(folder / "small", run_folder.identity(folder / "me"))
        job = large(folder / "large.safetensors", arguments.mib)
        verify = [str(HARNESS), "verify", "small", "--key", "me.ed25519.pub", "me.p256.pub"]
        openssl = ["openssl", "dgst", "-sha256", "large.safetensors"]
        turns = {
            START: lambda: seconds(verify, folder),
            HASHING: lambda: hashing(job),
            OPENSSL: lambda: seconds(openssl, folder),
        }
        values = interleave.rounds(turns, arguments.rounds)
    rows = [(each, interleave.spread(times, ".2f")) for each, times in values.items()]
    print(interleave.table([("command", "seconds"), *rows]))
    start = statistics.median(values[START])
    print(interleave.verdict(f"start-up: {start:.2f} s, at most {SECONDS} wanted", start, SECONDS))
    used = min(2, len(os.sched_getaffinity(0)))
    ratios = [used * one / 2 / other for one, other in zip(values[HASHING], values[OPENSSL], strict=True)]
    text = f"one core, one byte, verify / openssl: {interleave.spread(ratios, '.2f')}, at most {RATIO} wanted"
    print(interleave.verdict(text, statistics.median(ratios), RATIO))
    interleave.keep(arguments.json, {"seconds": values, "ratios": ratios})


if __name__ == "__main__":
    main()
