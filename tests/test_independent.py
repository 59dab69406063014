"""Verifiers that share no code with harness, on the log of a run: scripts/independent_log.py.

What needs a program that is not here is skipped, and says so.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import run_folder
from attack import Scene, trusted

from harness.provenance.transparency import log

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "independent_log.py"
RECORDS = 300
"""A full tile, a partial one, and one above them."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A run of three checkpoints, whose log has gone on to `RECORDS` records."""
    folder = tmp_path_factory.mktemp("long")
    signer = run_folder.identity(folder / "me")
    scene = Scene(run_folder.build(folder / "run", signer), signer, signer, trusted(signer), folder / "run")
    own = list(log.read_claimed(scene.root / "log").records)
    scene.relog([*own, *(b"record %d" % number for number in range(len(own), RECORDS))])
    return scene


def asked(scene: Scene, folder: Path, *programs: str, head: Path | None = None) -> tuple[int, dict[str, Any]]:
    """Exit code and answer of each verifier, where only ``programs`` are installed."""
    for name in programs:
        (folder / name).symlink_to(shutil.which(name) or pytest.fail(name))
    words = [sys.executable, SCRIPT, scene.root, "--key", scene.root.parent / "me.ed25519.pub"]
    words += [] if head is None else ["--head", head]
    environment = {"PATH": str(folder), "HOME": str(folder), "PYTHONPATH": str(SCRIPT.parent.parent)}
    environment["GOCACHE"] = str(Path.home() / ".cache" / "go-build")
    told = folder / "told.json"
    done = subprocess.run(
        [*words, "--json", told], env=environment, capture_output=True, text=True, check=False
    )
    assert told.exists(), done.stderr
    return done.returncode, {each["verifier"]: each for each in json.loads(told.read_text())}


needs_go = pytest.mark.skipif(not shutil.which("go"), reason="needs Go: apt-get install golang-go")


@needs_go
def test_go_and_sigstore_read_our_log_and_reject_each_twin(scene: Scene, tmp_path: Path) -> None:
    """Oracle: golang.org/x/mod/sumdb and sigstore-python's Rekor code; what is not installed is said (4)."""
    code, told = asked(scene, tmp_path, "go")
    assert code == 4
    assert told["sigstore-js"]["absent"] == "install node and npm"
    twins = {"Go sumdb": 10, "sigstore-python": 6}
    for name, count in twins.items():
        assert (told[name]["records"], told[name]["earlier"], told[name]["original"]) == (RECORDS, 2, None)
        reasons = told[name]["twins"]
        assert (len(reasons), None in reasons.values()) == (count, False), reasons
    reasons = told["Go sumdb"]["twins"]
    assert reasons["an upper tile changed"] == "tiles: downloaded inconsistent tile"
    assert reasons["an earlier head of another history"].endswith("invalid transparency proof")
    assert "invalid signature" in reasons["a bit of the head's signature"]


@needs_go
def test_a_log_that_does_not_continue_a_kept_head_is_said_by_go(scene: Scene, tmp_path: Path) -> None:
    """Oracle: exit code 1 and Go's own words for a head of as many records that this tree never had; sigstore
    knows no consistency."""
    kept = tmp_path / "kept.head"
    kept.write_text(f"x\n{RECORDS - 1}\n{base64.b64encode(bytes(32)).decode()}\n")
    code, told = asked(scene, tmp_path, "go", head=kept)
    assert (code, told["sigstore-python"]["original"]) == (1, None)
    assert (
        told["Go sumdb"]["original"] == f"earlier head of {RECORDS - 1} records: invalid transparency proof"
    )


def test_without_go_nothing_is_known(scene: Scene, tmp_path: Path) -> None:
    """Oracle: exit code 4, and how to get it."""
    code, told = asked(scene, tmp_path)
    assert (code, told["Go sumdb"]["absent"]) == (4, "apt-get install golang-go")


def test_a_verifier_that_accepts_a_twin_is_wrong(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: verifiers that say yes to all, and no to all."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import independent_log

    shown = independent_log.Shown(scene.root / "log", (scene.root.parent / "me.ed25519.pub",), ())
    for answer, text in ((None, "accepts a twin: a record removed"), ("no", "rejected: no")):
        row = independent_log.judged(
            "x", shown, lambda answer=answer: lambda _: answer, independent_log.OF_ALL
        )
        assert independent_log.wrong(row)
        assert text in independent_log.told(row)
