"""Every byte of every metadata file of a run, and random bytes of its payload, flipped one at a time.

python scripts/bench/flips.py [--payload 2000] [--seed 0] [--json FILE]

A run of two checkpoints, made by tests/run_folder.py with real keys, one of them with a later statement that
the log knows. One random bit of each byte of statements, signatures, manifests, the headers of safetensors
files, trainer.json, ledger.json, every other small file, metrics.jsonl, run.yaml and the log is flipped, the
run verified with the public keys, and the byte put back; then the same for random bytes of tensors."""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import interleave

from harness.audit import attest
from harness.audit.folders import opening
from harness.audit.verification import verify
from harness.format import safetensors_header
from harness.provenance import later
from harness.provenance.policy import rules
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import keys

ROOT = Path(__file__).parent.parent.parent
TENSORS = {
    "model.safetensors": [("embed.weight", [64, 32]), ("head.bias", [64])],
    "optimizer-00001-of-00001.safetensors": [("optimizer.embed.weight.exp_avg", [64, 32])],
    "rng-rank-00000.safetensors": [("torch.cpu", [16])],
}


def build(folder: Path) -> tuple[Path, Policy]:
    """The run, and whom its auditor trusts."""
    run_folder, facts = importlib.import_module("run_folder"), importlib.import_module("later_facts")
    signer = run_folder.identity(folder / "me")
    run = run_folder.SampleRun(folder / "run", signer, tensors=TENSORS)
    run.advance(2, 4)
    trusted = rules.from_keys(keys.public_keys(signer))
    opened = opening.open_checkpoint(run.saved[2].folder, trusted)
    attest.add(opened, later.SVR, facts.svr(), signer)
    return run.root, trusted


def places(root: Path) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Each byte of metadata, and each byte of payload."""
    metadata, payload = [], []
    for path in sorted(each for each in root.rglob("*") if each.is_file()):
        tensors = path.suffix == ".safetensors"
        start = safetensors_header.read_header(path).data_start if tensors else path.stat().st_size
        metadata += [(path, offset) for offset in range(start)]
        payload += [(path, offset) for offset in range(start, path.stat().st_size)]
    return metadata, payload


def missed(
    root: Path, trusted: Policy, flips: list[tuple[Path, int]], chance: random.Random
) -> Iterator[tuple[Path, int, int]]:
    """The flips that `harness verify` does not find."""
    for number, (path, offset) in enumerate(flips):
        good = path.read_bytes()
        bit = 1 << chance.randrange(8)
        changed = bytearray(good)
        changed[offset] ^= bit
        path.write_bytes(changed)
        found = verify.verify(root, trusted, quiet=True).exit_code
        path.write_bytes(good)
        if not found:
            yield path, offset, bit
        if number % 500 == 0:
            print(f"{number} of {len(flips)}", end="\r", file=sys.stderr, flush=True)


def main() -> None:
    """Flip, verify, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--payload", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        root, trusted = build(Path(name))
        if verify.verify(root, trusted, quiet=True).exit_code:
            raise SystemExit("the run does not verify as it is")
        metadata, payload = places(root)
        chosen = {"metadata": metadata, "payload": chance.sample(payload, arguments.payload)}
        lost = {kind: list(missed(root, trusted, flips, chance)) for kind, flips in chosen.items()}
    for kind, flips in chosen.items():
        for path, offset, bit in lost[kind]:
            print(f"missed: {path.relative_to(root)} byte {offset} bit {bit}")
        files = len({path for path, _ in flips})
        text = f"{kind}: {len(flips)} bytes of {files} files, {len(lost[kind])} flips missed, 0 wanted"
        print(interleave.verdict(text, len(lost[kind]), 0))
    sizes = Counter(path.name for path, _ in metadata)
    interleave.keep(
        arguments.json,
        {
            "bytes": sizes,
            "payload": arguments.payload,
            "missed": {kind: len(each) for kind, each in lost.items()},
        },
    )
    raise SystemExit(any(lost.values()))


if __name__ == "__main__":
    main()
