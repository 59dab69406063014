"""Every verb that reads a run, over a folder in which one thing was changed, for some minutes.

python scripts/fuzz_verbs.py [--minutes 20] [--seed 0] [--only TEXT]

Each file and folder of the run, and of what its auditor keeps beside it, is replaced once by everything of
`STAND_INS` in tests/mistreated.py; then files drawn by chance are changed: in their bytes, in a value of
their JSON, or in a value of what they sign, signed again by the run's own key. After each change every verb
is called. What must never happen (tests/mistreated.py says it) ends the run with exit code 1. Prints what
`verify` of the whole run has accepted: what no signature covers.
"""

from __future__ import annotations

import argparse
import importlib
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz

ROOT = Path(__file__).parent.parent
_HOSTILE = ("policy.json", "team.yaml", "log/checkpoint", "timestamps", "run.head", "tsa.pem", "countersign")
"""Names of what is changed more often."""


def main() -> None:
    """Change, call, print."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="part of the paths that are changed")
    parser.add_argument("--keep-going", action="store_true", help="tell all that goes wrong, not the first")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    mistreated = importlib.import_module("mistreated")
    failures: Counter[str] = Counter()
    calls = 0
    with tempfile.TemporaryDirectory() as name:
        place = mistreated.Place.made(Path(name))
        fuzz.limit()
        end = time.process_time() + 60 * arguments.minutes
        for about, path, change in changes(mistreated, place, random.Random(arguments.seed), arguments.only):
            with place.changed(path, change):
                for words in place.commands():
                    calls += 1
                    signal.setitimer(signal.ITIMER_PROF, fuzz.SECONDS)
                    signal.alarm(fuzz.PATIENCE)
                    try:
                        place.call(words, about)
                    except BaseException as error:
                        if isinstance(error, KeyboardInterrupt):
                            raise
                        last = traceback.extract_tb(error.__traceback__)[-1]
                        key = f"{words[0]}: {type(error).__name__} {last.filename}:{last.lineno}"
                        failures[key] += 1
                        if failures[key] == 1:
                            content = path.read_bytes()[:3000] if path.is_file() else b""
                            print(
                                f"{about}\n  {words}\n  {key}: {str(error)[:3000]}\n  {content!r}", flush=True
                            )
                        if not arguments.keep_going:
                            raise SystemExit(1) from error
                    finally:
                        signal.setitimer(signal.ITIMER_PROF, 0)
                        signal.alarm(0)
            if time.process_time() > end:
                break
    print(*(f"accepted  {each}" for each in place.accepted), sep="\n")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{calls} commands, {sum(failures.values())} wrong, {memory:.0f} MiB at most")
    print(*(f"{count}  {each}" for each, count in failures.most_common()), sep="\n")
    raise SystemExit(bool(failures))


def changes(
    mistreated: Any, place: Any, chance: random.Random, only: str | None
) -> Iterator[tuple[str, Path, Any]]:
    """What is done to which path: first all that can stand in, then changes by chance, without an end."""
    keys = importlib.import_module("harness.provenance.signing.keys")
    signer = keys.load_signer(place.folder / "me.key")
    paths = [each for each in place.paths() if only is None or only in str(each.relative_to(place.folder))]
    for path in paths:
        for name, change in mistreated.STAND_INS.items():
            if mistreated.possible(place, path, name):
                yield f"{path.relative_to(place.folder)}: {name}", path, change
    plain = [each for each in paths if each.is_file()]
    hostile = [each for each in plain if any(text in str(each) for text in _HOSTILE)] or plain
    while True:
        path = chance.choice(hostile if chance.random() < 0.4 else plain)
        number = chance.randrange(1 << 32)
        change = mistreated.damaged(random.Random(number), chance.choice(plain).read_bytes(), signer)
        yield f"{path.relative_to(place.folder)}: damaged {number}", path, change


if __name__ == "__main__":
    main()
