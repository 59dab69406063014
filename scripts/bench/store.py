"""Uploads to and fetches from an S3 server on this machine: ours beside boto3, MB/s and client CPU s/GB.

python scripts/bench/store.py [--mib 128] [--rounds 5] [--json FILE]

Both clients take turns against the same server (moto, a process of its own), one object of that size from
memory up and down into memory. Ours is what a save and `harness fetch` call: an upload sends the sha256 of
each part, a fetch hashes what comes and compares; boto3 does what it does by default (crc32). The server
shares the cores with the client, so MB/s is a figure of both; CPU seconds are of the client alone.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from interleave import keep, ratios, rounds, table, verdict

from harness.stores.client import ObjectStore, pieces_of

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from object_store import Bucket, Server, bucket_of

LIMIT = 1.0
"""Of boto3's time and CPU time."""


def cpu() -> float:
    """CPU seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def contenders(bucket: Bucket, data: bytes) -> dict[str, Callable[[], None]]:
    """Name → one transfer."""
    store = ObjectStore(bucket.url)
    digest = hashlib.sha256(data).hexdigest()
    key = "runs/toy/boto3"

    def upload() -> None:
        store.put_large("ours", pieces_of(memoryview(data)), len(data), digest)

    def fetch() -> None:
        found = hashlib.sha256()
        for piece in store.pieces("ours", len(data)):
            found.update(piece)
        assert found.hexdigest() == digest

    def upload_boto3() -> None:
        bucket.client.upload_fileobj(io.BytesIO(data), bucket.name, key)

    def fetch_boto3() -> None:
        target = io.BytesIO()
        bucket.client.download_fileobj(bucket.name, key, target)
        assert target.tell() == len(data)

    return {"upload": upload, "upload boto3": upload_boto3, "fetch": fetch, "fetch boto3": fetch_boto3}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=128, help="MiB of the object (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    server = Server()
    try:
        os.environ |= server.environ
        calls = contenders(bucket_of(server, "bench"), os.urandom(arguments.mib << 20))
        for call in calls.values():
            call()
        used: dict[str, list[float]] = {name: [] for name in calls}

        def timed(name: str) -> Callable[[], float]:
            def run() -> float:
                began, before = time.perf_counter(), cpu()
                calls[name]()
                used[name].append(cpu() - before)
                return time.perf_counter() - began

            return run

        taken = rounds({name: timed(name) for name in calls}, arguments.rounds)
    finally:
        server.stop()
    size = (arguments.mib << 20) / 1e9
    rows = [["", "MB/s", "client CPU s/GB"]]
    for name in calls:
        speed = 1e3 * size / statistics.median(taken[name])
        rows.append([name, f"{speed:.0f}", f"{statistics.median(used[name]) / size:.2f}"])
    print(table(rows))
    found = {}
    for what in ("upload", "fetch"):
        for kind, values in (("time", taken), ("CPU", used)):
            ratio = statistics.median(ratios(values, what, f"{what} boto3"))
            found[f"{what}, {kind}"] = ratio
            print(verdict(f"{what}: {ratio:.2f} of boto3's {kind} (limit {LIMIT})", ratio, LIMIT))
    keep(arguments.json, {"rounds": arguments.rounds, "of boto3": found})


if __name__ == "__main__":
    main()
