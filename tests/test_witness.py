"""Witnesses that cosign a log's head: the format of C2SP, `harness head --cosign`, and what policies ask."""

from __future__ import annotations

import base64
import hashlib
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import run_folder
from run_folder import SampleRun
from test_verify import harness

from harness.audit.verification import verify
from harness.errors import ConfigError, UsageError, VerificationFailed
from harness.provenance.policy import reader
from harness.provenance.signing import keys
from harness.provenance.transparency import log, witness

NOW = datetime(2026, 11, 23, 21, tzinfo=UTC)
IDENTITY = "format: harness-policy/1\nidentities: [{name: me, keys: [me.ed25519.pub, me.p256.pub]}]\n"
BOTH = f"{IDENTITY}witnesses: {{keys: [one.ed25519.pub, two.ed25519.pub], threshold: 2}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of ``me`` with checkpoints 10 and 20, its copy at 10, and two witnesses."""
    run = SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "me"))
    for name in ("one", "two"):
        run_folder.identity(tmp_path / name)
    run.advance(10)
    shutil.copytree(tmp_path / "run", tmp_path / "older")
    run.advance(20)
    return tmp_path


def cosign(note: bytes, folder: Path, name: str) -> bytes:
    """``note`` with the cosignature of the witness ``name``."""
    return witness.cosign(note, keys.load_signer(folder / f"{name}.key"), name, NOW, where="there")


def test_a_cosignature_has_the_bytes_of_c2sp(folder: Path) -> None:
    """Oracle: c2sp.org/tlog-cosignature by hand: key id, time, and what is signed; the head is the same."""
    note = (folder / "run" / "log" / "checkpoint").read_bytes()
    made = cosign(note, folder, "one")
    line = made.removeprefix(note).decode()
    assert line.startswith("— one ")
    blob, key = base64.b64decode(line.split(" ")[2]), keys.load_public(folder / "one.ed25519.pub")
    assert blob[:4] == hashlib.sha256(b"one\n\x04" + key.raw).digest()[:4]
    assert int.from_bytes(blob[4:12], "big") == int(NOW.timestamp())
    text = note.split(b"\n\n")[0] + b"\n"
    assert key.verifies(blob[12:], b"cosignature/v1\ntime %d\n" % NOW.timestamp() + text)
    maker = [keys.load_public(folder / "me.ed25519.pub")]
    assert log.open_note(made, maker, where="there") == log.open_note(note, maker, where="there")
    assert witness.cosigned(made, [key]) == {key.key_id: "2026-11-23T21:00:00Z"}


def test_only_good_cosignatures_of_distinct_witnesses_count(folder: Path) -> None:
    """Oracle: each spoilt note by hand; the moment is that of the last one needed."""
    note = (folder / "run" / "log" / "checkpoint").read_bytes()
    known = [keys.load_public(folder / f"{name}.ed25519.pub") for name in ("one", "two")]
    once = cosign(note, folder, "one")
    later = witness.cosign(
        once, keys.load_signer(folder / "two.key"), "two", NOW.replace(hour=23), where="there"
    )
    assert witness.seen(later, known, 2, where="there") == "2026-11-23T23:00:00Z"
    assert witness.seen(later, known, 1, where="there") == "2026-11-23T21:00:00Z"
    older = cosign((folder / "older" / "log" / "checkpoint").read_bytes(), folder, "two")
    line = once.removeprefix(note)
    for spoilt in (
        note,
        once + line,  # twice the same witness
        cosign(once, folder, "me"),  # nobody's witness
        once + older.splitlines(keepends=True)[-1],  # of another head
        once + line.replace(b"one", b"two"),
        once + line.replace(line[12:16], b"AAAA"),
        once + "— two AAAA\n".encode(),
    ):
        with pytest.raises(VerificationFailed, match="of the 2 witnesses"):
            witness.seen(spoilt, known, 2, where="there")
    with pytest.raises(UsageError):
        witness.cosign(note, keys.load_signer(folder / "one.key"), "a b", NOW, where="there")


def test_a_policy_takes_only_heads_that_its_witnesses_cosigned(folder: Path) -> None:
    """Oracle: the same run without a head, with a plain head, one witness, both; and an older state of it."""
    (folder / "team.yaml").write_text(BOTH)
    whom, out = reader.load(folder / "team.yaml"), folder / "run.head"
    assert verify.verify(folder / "run", whom, quiet=True).exit_code == 4
    words = ["head", "run", "--out", "run.head", "--key", "me.ed25519.pub"]
    for more, good in (
        ([], False), (["--cosign", "one.key"], False), (["--cosign", "two.key", "--name", "w.example"], True),
        ([], True),
    ):  # fmt: skip
        done = harness(folder, *words, *more)
        assert done.returncode == 0, done.stderr
        if not good:
            with pytest.raises(VerificationFailed, match="of the 2 witnesses"):
                verify.verify(folder / "run", whom, head=[out], quiet=True)
    report = verify.verify(folder / "run", whom, head=[out], quiet=True)
    assert report.exit_code == 0, report.findings
    assert any("a kept head shows that the first 2 records were there" in note for note in report.notes)
    assert harness(folder, "verify", "older", "--policy", "team.yaml", "--head", "run.head").returncode == 1
    # A witness does not cosign what its own file is not continued by, nor what nobody has checked.
    rolled_back = harness(folder, "head", "older", *words[2:], "--cosign", "one.key")
    assert (rolled_back.returncode, "rolled back" in rolled_back.stderr) == (1, True)
    assert harness(folder, "head", "run", "--out", "x.head", "--cosign", "one.key").returncode == 2


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("{keys: [one.ed25519.pub], threshold: 2}", "not 1 to 1"),
        ("{keys: [one.p256.pub]}", "with Ed25519 keys"),
        ("{keys: [me.ed25519.pub]}", "the key of an identity"),
        ("{keys: [one.ed25519.pub, one.ed25519.pub]}", "the same key twice"),
        ("{keys: []}", "an empty one"),
        ("{key: [one.ed25519.pub]}", "unknown key `key`"),
        (f"{{keys: [one.ed25519.pub]}}\nlog_head: {{origin: a, size: 1, root: '{'0' * 64}'}}", "is no file"),
    ],
)
def test_a_rule_about_witnesses_that_says_nothing_is_an_error(folder: Path, rule: str, reason: str) -> None:
    """Oracle: the reason, with a line of the file."""
    with pytest.raises(ConfigError, match=reason) as refused:
        reader.parse(f"{IDENTITY}witnesses: {rule}\n", where="trust.yaml", folder=folder)
    assert str(refused.value.where).startswith("trust.yaml:")
