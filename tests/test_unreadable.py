"""What a user may not read is told as that, never as missing, wrong or equal."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import run_folder

from harness.cli import main

_VERSION_3 = 0x20080522
_DAC = 0b110
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (capabilities(7))."""


@contextmanager
def permissions() -> Iterator[None]:
    """Within, permissions apply to this thread, and to those that it starts, also where it is root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = struct.pack("Ii", _VERSION_3, 0), ctypes.create_string_buffer(24)
    assert libc.capget(header, sets) == 0
    before = sets.raw
    effective, *others = struct.unpack("6I", before)
    assert libc.capset(header, struct.pack("6I", effective & ~_DAC, *others)) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and what else the commands name."""
    root = tmp_path_factory.mktemp("place")
    run = run_folder.build(root / "run", run_folder.identity(root / "me"), steps=(10, 20))
    (run / "events").mkdir()
    (run / "events" / "rank-00000.jsonl").touch()
    (root / "own.yaml").write_text("run: {dir: run}\n")
    return root


STEP = "run/checkpoints/step-00000020"
DIFF = f"diff run/checkpoints/step-00000010 {STEP}"
CASES = [
    ("own.yaml", "config own.yaml"),
    (STEP, DIFF),
    (f"{STEP}/provenance", DIFF),
    (f"{STEP}/ledger.json", DIFF),
    ("run/events", "report run --out out"),
    ("run/events", "watch run --once"),
    ("run/log/other", "verify run KEY"),
    ("run/log/tile", "verify run KEY"),
    ("run/checkpoints", "lineage run"),
    (f"{STEP}/model.safetensors", "verify run KEY"),
    (f"{STEP}/provenance", "gate run KEY"),
    ("run/events/models", "gate run KEY"),
    (f"{STEP}/MANIFEST.json", f"export {STEP} out/exported KEY"),
]


@pytest.mark.parametrize(("closed", "words"), CASES)
def test_what_may_not_be_read_is_exit_code_3_and_one_line(
    closed: str, words: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: DESIGN's exit code of the environment, and the path in the line."""
    monkeypatch.chdir(place)
    path, new = place / closed, not (place / closed).exists()
    if new:
        path.mkdir()
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with permissions():
            code = main(words.replace("KEY", "--key me.ed25519.pub me.p256.pub").split())
    finally:
        path.chmod(mode)
        if new:
            path.rmdir()
    said = capsys.readouterr()
    assert (code, said.out, len(said.err.splitlines())) == (3, "", 1), said
    assert closed in said.err
    assert "Permission denied" in said.err
