"""The corpus of tampered runs: `harness verify`, and what `model_signing`'s own verifier says to each.

python scripts/bench/must_fail.py [--model-signing PYTHON] [--json FILE]

Every case of tests/attacks_on_*.py breaks one rule in a copy of a good run and must be found, under the exit
code and with the words that the register gives; every story of tests/honest.py must verify with no finding.
PYTHON is that of an environment with `pip install model-signing==1.1.1 pyOpenSSL`: its `verify key` then
judges model.sig of every complete checkpoint in the same folders. It checks one checkpoint's files, so that
it accepts lies in statements, lineage and log is no fault of it; those cases are listed apart.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import interleave

from harness.format import layout
from harness.provenance.signing import keys

ROOT = Path(__file__).parent.parent.parent
MUST_FAIL, MUST_PASS = 150, 20
FILE_MODULES = ("attacks_on_files", "attacks_on_formats")
"""Cases that change a checkpoint's own files, which is what model_signing covers."""

# Runs in the environment of model_signing; reads [[name, key, [folder…]]…], writes {name: rejections}.
PEER = """
import json, sys
from pathlib import Path
from click.testing import CliRunner
from model_signing._cli import main
verdicts = {}
for name, key, folders in json.load(sys.stdin):
    verdicts[name] = 0
    for folder in folders:
        words = ["verify", "key", "--public_key", key, "--signature", folder + "/model.sig", folder]
        verdicts[name] += CliRunner().invoke(main, words).exit_code != 0
json.dump(verdicts, sys.stdout)
"""


@dataclass(frozen=True)
class Case:
    """One folder, what was wanted of `harness verify` and what it said."""

    name: str
    module: str
    wanted: int
    """Exit code."""
    got: int | str
    """Exit code, or the exception that must never happen."""
    named: bool
    """Whether a finding says what the register wants, or there is none where there must be none."""
    key: str
    checkpoints: tuple[str, ...]
    """Folders with a model.sig."""

    @property
    def right(self) -> bool:
        """Whether the verdict is the wanted one."""
        return self.got == self.wanted and self.named


def build(folder: Path) -> list[Case]:
    """Every case, each in a folder of its own below ``folder``, judged."""
    attack, honest = importlib.import_module("attack"), importlib.import_module("honest")
    importlib.import_module("test_attacks")
    run_folder = importlib.import_module("run_folder")
    signer, stranger = run_folder.identity(folder / "signer"), run_folder.identity(folder / "stranger")
    good = run_folder.build(folder / "good", signer)
    cases = []
    stories = [(name, each.mutate, each.code, each.says) for name, each in attack.ATTACKS.items()]
    stories += [(name, story, 0, "") for name, story in honest.HONEST.items()]
    for number, (name, change, code, says) in enumerate(stories):
        place = folder / f"{number:03d}"
        place.mkdir()
        root = shutil.copytree(good, place / "run")
        scene = attack.Scene(root, signer, stranger, attack.trusted(signer), root)
        cases.append(_case(attack, scene, name, change, code, says))
    return cases


def _case(attack: Any, scene: Any, name: str, change: Callable[[Any], None], code: int, says: str) -> Case:
    change(scene)
    got: int | str
    try:
        got, messages = attack.judge(scene)
    except Exception as error:  # an attack that makes the verifier crash has succeeded, whatever it raises
        got, messages = f"{type(error).__name__}: {error}", []
    named = any(says in message for message in messages) if code else not messages
    public = scene.root.parent / "p256.pub"
    public.write_bytes(keys.public_keys(scene.signer)[1].pem)
    return Case(name, change.__module__, code, got, named, str(public), tuple(_checkpoints(scene)))


def _checkpoints(scene: Any) -> list[str]:
    """The folders that model_signing can be asked about: the target, or the complete ones of the run."""
    if scene.target != scene.root and not scene.target.is_symlink():
        found = [scene.target]
    else:
        found = sorted(each for each in (scene.root / layout.CHECKPOINTS).glob("step-*") if each.is_dir())
    signed = any((each / layout.MODEL_SIGNATURE).exists() for each in found)
    return list(map(str, found)) if signed else []


def ask_peer(python: Path, cases: Sequence[Case]) -> Mapping[str, int]:
    """Name → number of checkpoints that model_signing rejects, of the cases that have a model.sig."""
    asked = [[each.name, each.key, each.checkpoints] for each in cases if each.checkpoints]
    command = [str(python), "-c", PEER]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"model_signing could not be asked: {done.stderr[-500:]}")
    verdicts: dict[str, int] = json.loads(done.stdout)
    return verdicts


def tell_peer(cases: Sequence[Case], rejected: Mapping[str, int]) -> None:
    """The cases that model_signing accepts, by name; first those about what it covers."""
    bad = [each for each in cases if each.wanted and each.name in rejected]
    accepted = [each for each in bad if not rejected[each.name]]
    print(f"\nmodel_signing 1.1.1 was asked about {len(bad)} of them and accepts {len(accepted)}:")
    for module in dict.fromkeys(each.module for each in accepted):
        names = [each.name for each in accepted if each.module == module]
        covered = "a checkpoint's own files" if module in FILE_MODULES else module.removeprefix("attacks_on_")
        text = f"{covered} ({len(names)}): {', '.join(names)}"
        print(textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="    "))
    good = [each for each in cases if not each.wanted and each.name in rejected]
    refused = [each.name for each in good if rejected[each.name]]
    print(f"of {len(good)} honest ones it rejects {len(refused)}: {', '.join(refused) or 'none'}")


def main() -> None:
    """Build, judge, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--model-signing", type=Path, metavar="PYTHON")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    with tempfile.TemporaryDirectory() as name:
        cases = build(Path(name))
        rejected = ask_peer(arguments.model_signing, cases) if arguments.model_signing else {}
    for each in [each for each in cases if not each.right]:
        print(f"wrong: {each.name}: wanted {each.wanted}, got {each.got}, named {each.named}")
    for kind, wanted in (("must fail", MUST_FAIL), ("must pass", MUST_PASS)):
        of_kind = [each for each in cases if bool(each.wanted) == (kind == "must fail")]
        wrong = sum(not each.right for each in of_kind)
        print(interleave.verdict(f"{kind}: {len(of_kind)} cases, {wrong} wrong, 0 wanted", wrong, 0))
        count = len(of_kind)
        text = f"{kind}: {count} cases, at least {wanted} wanted"
        print(interleave.verdict(text, count, wanted, at_least=True))
    if rejected:
        tell_peer(cases, rejected)
    rows = [
        {"name": each.name, "wanted": each.wanted, "got": each.got, "right": each.right} for each in cases
    ]
    interleave.keep(arguments.json, {"cases": rows, "model_signing_rejects": dict(rejected)})
    raise SystemExit(any(not each.right for each in cases))


if __name__ == "__main__":
    main()
