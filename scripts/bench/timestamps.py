"""What timestamps cost whoever verifies a run that has one for each head of its log.

python scripts/bench/timestamps.py [--checkpoints 1000] [--rounds 5] [--json FILE]

A run of so many checkpoints without payload, written by tests/run_folder.py with real keys, each of whose
heads has a timestamp of an ECDSA authority with one certificate between it and its root. `harness verify` on
it, under a policy that names the root and under one that does not, as commands in turn; beside it, in one
process, the same timestamps by harness, by rfc3161-client and as bare signatures by `cryptography`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import interleave
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from harness.format import layout
from harness.provenance.transparency import log, timestamp

ROOT = Path(__file__).parent.parent.parent
WITH, WITHOUT = "verify, authority named", "verify, none named"
OURS, OTHER, FLOOR = "harness", "rfc3161-client", "the signatures alone"
Stamps = Sequence[tuple[bytes, bytes]]
"""Timestamp, and the text of its head."""


def build(folder: Path, count: int) -> tuple[Stamps, tuple[bytes, ...], Callable[[], None]]:
    """The run at ``folder``/run with its policies; returns the timestamps, the policy's certificates, and a
    function that verifies as many signatures."""
    run_folder, authority = importlib.import_module("run_folder"), importlib.import_module("authority")
    run = run_folder.SampleRun(folder / "run", run_folder.identity(folder / "me"))
    for step in range(1, count + 1):
        run.advance(step)
        if step > 1:
            run.prune(step - 1)
    tsa = authority.Authority("tsa", between=1)
    (folder / "root.pem").write_bytes(tsa.root.public_bytes(Encoding.PEM))
    rules = "format: harness-policy/1\nidentities: [{name: me, keys: [me.ed25519.pub, me.p256.pub]}]\n"
    (folder / "without.yaml").write_text(rules)
    (folder / "with.yaml").write_text(f"{rules}timestamps: {{certificates: [root.pem]}}\n")
    book = log.read_claimed(folder / "run" / layout.LOG)
    texts = [log.text_of(log.Head(n, book.root_of_prefix(n), book.head.origin)) for n in range(1, count + 1)]
    stamps = [(tsa.stamp(text), text) for text in texts]
    (folder / "run" / layout.LOG / timestamp.FOLDER).mkdir()
    for size, (data, _) in enumerate(stamps, start=1):
        (folder / "run" / layout.LOG / timestamp.path_of(size)).write_bytes(data)
    signature = tsa.key.sign(texts[0], ec.ECDSA(hashes.SHA256()))
    public = tsa.key.public_key()

    def signatures() -> None:
        for _ in range(count):
            public.verify(signature, texts[0], ec.ECDSA(hashes.SHA256()))

    return stamps, tsa.trusted, signatures


def by_harness(stamps: Stamps, trusted: tuple[bytes, ...]) -> None:
    """All timestamps, as `harness verify` opens them."""
    for data, text in stamps:
        timestamp.opened(data, text, trusted, where="there")


def by_another(stamps: Stamps, trusted: tuple[bytes, ...]) -> None:
    """The same by rfc3161-client (pip install rfc3161-client)."""
    from cryptography.x509 import load_der_x509_certificate
    from rfc3161_client import VerifierBuilder, decode_timestamp_response

    verifier = VerifierBuilder(roots=[load_der_x509_certificate(each) for each in trusted]).build()
    for data, text in stamps:
        if not verifier.verify(decode_timestamp_response(data), hashlib.sha256(text).digest()):
            raise SystemExit("rfc3161-client rejects a timestamp")


def processor(function: Callable[[], None], count: int) -> Callable[[], float]:
    """Milliseconds of the processor that ``function`` takes for each of ``count``."""

    def turn() -> float:
        started = time.process_time()
        function()
        return 1e3 * (time.process_time() - started) / count

    return turn


def verified(folder: Path, policy: str) -> float:
    """Wall time of `harness verify`, which must succeed."""
    words = [sys.executable, "-m", "harness", "verify", "run", "--policy", policy]
    started = time.perf_counter()
    subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    count = arguments.checkpoints
    with tempfile.TemporaryDirectory() as name:
        stamps, trusted, signatures = build(Path(name), count)
        each = interleave.rounds(
            {
                OURS: processor(lambda: by_harness(stamps, trusted), count),
                OTHER: processor(lambda: by_another(stamps, trusted), count),
                FLOOR: processor(signatures, count),
            },
            arguments.rounds,
        )
        whole = interleave.rounds(
            {
                WITH: lambda: verified(Path(name), "with.yaml"),
                WITHOUT: lambda: verified(Path(name), "without.yaml"),
            },
            arguments.rounds,
        )
    rows = [(name, interleave.spread(times, ".3f")) for name, times in each.items()]
    print(interleave.table([("a timestamp by", "ms of the processor"), *rows]))
    rows = [(name, interleave.spread(times, ".2f")) for name, times in whole.items()]
    print(interleave.table([(f"{count} checkpoints", "seconds"), *rows]))
    ratio = statistics.median(interleave.ratios(each, OURS, OTHER))
    print(interleave.verdict(f"a timestamp over rfc3161-client: {ratio:.2f}, 1 wanted", ratio, 1))
    interleave.keep(arguments.json, {"each": each, "whole": whole})


if __name__ == "__main__":
    main()
