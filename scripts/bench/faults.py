"""A fault at every system call of the write path: what the run says, what is left, and where the rerun ends.

python scripts/bench/faults.py [--only NAME …] [--sample N [--skip M]] [--json FILE]

For each call that changes the run folder (open for writing, write, pwrite, fallocate, fsync, rename, unlink,
…), from the first of a launch to the last, a run is made in which this one call fails: with EIO, ENOSPC or
EINTR; as a write that takes half; as the moment from which the disk is *full* (every call that takes space
gives ENOSPC) or *dead* (every call gives EIO). Each once with ``checkpoint.on_failure: stop``, once with
``continue``. The run saves at every step and keeps one checkpoint, so that rotation is in it.

- *absorbed*: the run ends with 0 and has nothing to say: a call that was cut short was completed
- *went on*: it says that a save has failed and ends with 0
- *stopped*: it ends with 3 and one line that says what, where, and what to do next

Bad are:

- *lost*: the checkpoint that the product opens is older than one that the run had said was saved
- *torn*: a folder with the name of a whole checkpoint that does not verify, tensors included
- *unsaid*: another exit code, a traceback, no such line, or no end at all
- *stuck*: the same command, with a disk that works again, does not go on to the end
- *other*: it ends with other bits than a run without a fault, or does not verify with its log

Peers (savers.py) save a second state with the fault in it. *told*: the save raises, and the old or the new
state loads; *absorbed*: it returns, and the new one loads; *lost*: it returns, and the old one loads;
*stuck*: what their rule takes does not load; *other*: a state loads that was never saved.
``--sample``: only every so many faults, ``--skip``: after so many; so the whole can be taken in slices.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import forked
import torch
from crash_states import CONFIG, HARNESS, STEPS
from exactness import ROOT, differing_files
from file_operations import DEAD, FULL, ONCE, SHORT, Library, compiled
from interleave import keep, table
from kills import announced, read_whole
from savers import PEERS, Contents, Saved, truth
from torch.distributed.checkpoint.api import CheckpointException

from harness import cli
from harness.audit.verification.whole_run import verify_run
from harness.checkpoint.candidates import Candidates
from harness.checkpoint.restore import DamagedCheckpoint
from harness.errors import HarnessError
from harness.format.layout import RunFolder, parse_checkpoint_name
from harness.provenance.policy.rules import Policy, from_keys
from harness.provenance.signing import keys
from harness.workers import Workers

HOWS: Mapping[str, tuple[int, int]] = {
    "EIO": (errno.EIO, ONCE),
    "ENOSPC": (errno.ENOSPC, ONCE),
    "EINTR": (errno.EINTR, ONCE),
    "short": (SHORT, ONCE),
    "full": (errno.ENOSPC, FULL),
    "dead": (errno.EIO, DEAD),
}
OUTCOMES = ("absorbed", "went on", "stopped", "told", "lost", "torn", "unsaid", "stuck", "other")
BAD = OUTCOMES[4:]
ENDS_WITHIN = 120
"""Seconds after which a run counts as one that does not end."""


@dataclass(frozen=True)
class Fault:
    """One call that fails."""

    number: int
    how: str
    on_failure: str


@dataclass
class Counted:
    """Outcomes by call and way of failing, and an example of each bad one."""

    outcomes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(call, how, outcome) → number."""
    examples: list[str] = field(default_factory=list)

    def add(self, call: str, how: str, outcome: str, why: str) -> None:
        """Count one fault in ``call`` (its name and path)."""
        self.outcomes[call.split(" ")[0], how, outcome] += 1
        if outcome in BAD:
            self.examples.append(f"{how} in {call}: {outcome}: {why}")


def train(place: Path, folder: Path, on_failure: str) -> int:
    """`harness train` with its run in ``folder``; its exit code."""
    torch.set_num_threads(1)
    words = [f"{place}/toy.yaml", f"run.dir={folder}", f"signing.key={place}/me.key"]
    return cli.main(["train", *words, f"checkpoint.on_failure={on_failure}"])


def apart(function: Callable[[], int], said: Path) -> int:
    """What ``function`` returns, called in a fork whose output goes to ``said``; negative when it died."""
    pid = os.fork()
    if not pid:
        code = 255
        try:
            signal.alarm(ENDS_WITHIN)
            descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = function()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def strike(place: Path, fault: Fault, said: Path) -> tuple[str, str, str]:
    """A run with ``fault`` in it, and the same command once more: the call, the outcome, and why."""
    folder = place / "states" / f"run-{os.getpid()}"
    named = folder.with_suffix(".call")

    def faulty() -> int:
        library = Library()
        library.watch(folder)
        library.fail(fault.number, *HOWS[fault.how])
        try:
            return train(place, folder, fault.on_failure)
        finally:
            named.write_text(library.failed())

    try:
        code = apart(faulty, said)
        text = said.read_text()
        call = named.read_text() if named.exists() else "?"
        outcome, why = _looked(place, folder, code, text)
        if outcome not in BAD:
            again = apart(lambda: train(place, folder, fault.on_failure), said)
            if again:
                return call, "stuck", f"{why}; then exit {again}: {_last(said.read_text())}"
            last = f"checkpoints/step-{STEPS:08d}"
            odd = differing_files(folder / last, place / "reference" / last)
            verified = verify_run(folder, _policy(place)).exit_code
            if odd or verified:
                return call, "other", f"{why}; differs: {odd[:3]}; harness verify says {verified}"
        return call, outcome, why
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        named.unlink(missing_ok=True)


def _looked(place: Path, folder: Path, code: int, text: str) -> tuple[str, str]:
    """The outcome as far as the run with the fault shows it, and why."""
    lines = [line for line in text.splitlines() if line.startswith("harness: ")]
    failed = "a save has failed: " in text
    why = f"exit {code}: {_last(text)}"
    wrong = _left(place, folder)
    if wrong is not None:
        return wrong[0], f"{wrong[1]}; {why}"
    if "Traceback" in text and "not written to events/" not in text:
        return "unsaid", why
    if code == 0:
        return "went on" if failed else "absorbed", why
    # Where, and what to do next, as `HarnessError` puts them together.
    said = lines and ": " in lines[-1].removeprefix("harness: ") and "; " in lines[-1]
    return ("stopped" if code == 3 and said else "unsaid"), why


def _left(place: Path, folder: Path) -> tuple[str, str] | None:
    """What is wrong with the checkpoints in ``folder``, by the way in which the product looks for them."""
    run = RunFolder(folder)
    if not run.checkpoints.is_dir():
        return ("lost", "no checkpoints/") if announced(run) else None
    candidates = Candidates(Workers.alone(), run, _policy(place), lambda _: False)
    try:
        found = candidates.next()
        if found.loaded is not None:
            read_whole(found.loaded)
    except DamagedCheckpoint as error:
        return "torn", str(error)
    except HarnessError as error:
        return "stuck", str(error)
    if found.skipped:
        return "torn", f"{found.skipped[0].name}: {found.skipped[0].reason}"
    opened = 0 if found.loaded is None else parse_checkpoint_name(found.loaded.folder.name) or 0
    said = announced(run)
    return ("lost", f"opens step {opened}, step {said} was saved") if opened < said else None


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else ""


def _policy(place: Path) -> Policy:
    return from_keys(keys.public_keys(keys.load_signer(place / "me.key")))


def measure_harness(place: Path, sample: int, skip: int) -> Counted:
    """Every fault of `harness train`."""
    (place / "states").mkdir()
    (place / "toy.yaml").write_text(CONFIG)
    keys.create(place / "me")
    os.environ["HOME"] = str(place)
    forked.prepare(lambda: train(place, place / "reference", "stop"), place)
    faults = [
        Fault(number, how, on_failure)
        for how in HOWS
        for number in range(1, _calls(place, how) + 1)
        for on_failure in ("stop", "continue")
    ][skip::sample]
    counted = Counted()
    for done, (fault, result) in enumerate(forked.each(faults, partial(_judged, place), place), start=1):
        died = isinstance(result, dict)
        call, outcome, why = ("?", "unsaid", str(result)) if died else result
        counted.add(call, fault.how, outcome, f"{fault}: {why}")
        if done % 50 == 0:
            print(f"{HARNESS}: {done} of {len(faults)} faults", file=sys.stderr, flush=True)
    return counted


def _judged(place: Path, fault: Fault, said: Path) -> tuple[str, str, str]:
    return strike(place, fault, said.with_suffix(f".{os.getpid()}"))


def _calls(place: Path, how: str) -> int:
    """The number of calls of a run that could fail in the way ``how``."""
    folder, counted = place / "counting", place / "counted"

    def count() -> int:
        library = Library()
        library.watch(folder)
        library.fail(0, *HOWS[how])
        code = train(place, folder, "stop")
        counted.write_text(str(library.count()))
        return code

    if code := apart(count, place / "said"):
        raise SystemExit(f"exit {code}: {(place / 'said').read_text()}")
    shutil.rmtree(folder)
    return int(counted.read_text())


def measure_peer(name: str, place: Path, sample: int, skip: int) -> Counted:
    """Every fault in the second save of the peer ``name``."""
    library, counted = Library(), Counted()
    truths = {step: truth(step) for step in (1, 2)}
    for how, (number, lasts) in HOWS.items():
        _saved_twice(name, place / how, library, partial(library.fail, 0, number, lasts))
        for at in range(1 + skip, library.count() + 1, sample):
            folder = place / f"{how}-{at}"
            raised = _saved_twice(name, folder, library, partial(library.fail, at, number, lasts))
            call = library.failed()
            library.fail(0, 0)
            if call:
                counted.add(call, how, *_opened(PEERS[name], folder, truths, raised))
            shutil.rmtree(folder, ignore_errors=True)
    return counted


def _saved_twice(name: str, folder: Path, library: Library, strike_now: Callable[[], None]) -> str:
    """Save two states into ``folder``, the second one watched; what that raised, if it did."""
    made = Saved()
    saver = PEERS[name](folder, made)
    made.advance(1)
    saver.save()
    made.advance(2)
    library.watch(folder)
    strike_now()
    try:
        saver.save()
    except (Exception, CheckpointException) as error:  # DCP's own is no Exception
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def _opened(saver: type[Any], folder: Path, truths: Mapping[int, Contents], raised: str) -> tuple[str, str]:
    """What the saver's rule opens after a save that has ``raised``, or has returned."""
    made = Saved()
    made.advance(99)
    try:
        found = saver(folder, made).newest()
    except (Exception, CheckpointException) as error:
        return "stuck", f"{type(error).__name__}: {str(error)[:200]}; the save: {raised or 'returned'}"
    if found and made.contents() != truths.get(made.step):
        return "other", f"step {made.step}; the save: {raised or 'returned'}"
    if not found or (not raised and made.step != 2):
        return "lost", f"step {made.step if found else None}; the save: {raised or 'returned'}"
    return ("told" if raised else "absorbed"), raised


def report(results: Mapping[str, Counted]) -> None:
    """A row for each saver and way of failing; for the harness also one for each call."""
    rows = [["", "fault", "calls", *OUTCOMES]]
    for name, counted in results.items():
        for how in HOWS:
            rows.append([name, how, *_row(counted, lambda key, how=how: key[1] == how)])
    print(table(rows))
    if HARNESS in results:
        counted = results[HARNESS]
        rows = [["call", "", "faults", *OUTCOMES]]
        for call in sorted({key[0] for key in counted.outcomes}):
            rows.append([call, "", *_row(counted, lambda key, call=call: key[0] == call)])
        print(table(rows))
    for name, counted in results.items():
        # Of a peer a few are enough.
        for line in counted.examples[: None if name == HARNESS else 3]:
            print(f"{name}: {line}")


def _row(counted: Counted, wanted: Callable[[tuple[str, str, str]], bool]) -> list[str]:
    found = {key: count for key, count in counted.outcomes.items() if wanted(key)}
    each = [sum(count for key, count in found.items() if key[2] == outcome) for outcome in OUTCOMES]
    return [str(sum(found.values())), *map(str, each)]


def main() -> None:
    """Count, strike, look, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=[HARNESS, *PEERS], help="these savers")
    parser.add_argument("--sample", type=int, default=1, help="every so many calls (default: all)")
    parser.add_argument("--skip", type=int, default=0, help="so many first")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scratch is None:
        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
            environ = {**os.environ, "LD_PRELOAD": str(compiled(Path(scratch))), "OMP_NUM_THREADS": "1"}
            words = [sys.executable, __file__, *sys.argv[1:], "--scratch", scratch]
            raise SystemExit(subprocess.run(words, env=environ, check=False).returncode)
    sys.path.insert(0, str(ROOT / "tests"))
    results = {}
    for number, name in enumerate(arguments.only or [HARNESS, *PEERS]):
        place = arguments.scratch / str(number)
        place.mkdir()
        harness = name == HARNESS
        part = arguments.sample, arguments.skip
        results[name] = measure_harness(place, *part) if harness else measure_peer(name, place, *part)
    report(results)
    outcomes = {
        name: {"\t".join(key): count for key, count in counted.outcomes.items()}
        for name, counted in results.items()
    }
    keep(arguments.json, {"outcomes": outcomes, "examples": {n: c.examples for n, c in results.items()}})
    if HARNESS in results and results[HARNESS].examples:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
