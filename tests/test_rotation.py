"""Handing over to another signing key, as typed: `keys rotate`, the run that goes on, whom auditors trust."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import rotated
import run_folder
import toy_task
from attack import trusted
from authority import Authority, stamp_log
from conftest import Place
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import accepted
from run_folder import SampleRun
from test_verify import harness

from harness.audit.lineage import picture
from harness.audit.verification import verify
from harness.errors import ConfigError
from harness.provenance.policy import reader, rotation
from harness.provenance.policy.rotation import Claim
from harness.provenance.policy.rules import Rotation
from harness.provenance.signing import envelope, keys
from harness.provenance.transparency import log, timestamp
from harness.provenance.transparency.timestamp import Stamp

TRAIN = "{steps: 6, global_batch: 4, micro_batch: 2}"
OLD, NEW = (["--key", f"{name}.ed25519.pub", f"{name}.p256.pub"] for name in ("old", "new"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two identities and a run of the old one, with a checkpoint at step 10."""
    run = SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "old"))
    run_folder.identity(tmp_path / "new")
    run.advance(10)
    return tmp_path


def rotate(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`keys rotate` from the old to the new key, for the run."""
    words = ["keys", "rotate", "--from", "old.key", "--to", "new.key", "--run", "run"]
    return harness(folder, *words, "--reason", "the laptop is sold", *more)


def test_a_run_goes_on_under_the_new_key_and_either_key_verifies_all_of_it(folder: Path) -> None:
    """Oracle: exit codes with the old, the new and a stranger's key, before and after; the log's head."""
    done = rotate(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "record 1 of its log" in done.stdout
    assert "is in its log already" in rotate(folder).stdout
    said = harness(folder, "verify", "run", *NEW)
    assert said.returncode == 0
    assert "handed over to" in said.stdout
    assert "the laptop is sold" in said.stdout
    assert harness(folder, "head", "run", "--out", "run.head", *OLD).returncode == 0
    old, new = (keys.load_signer(folder / f"{name}.key") for name in ("old", "new"))
    inside, heads = folder / "run" / "checkpoints" / "step-00000010", [folder / "run.head"]
    for whom, code in ((old, 0), (new, 0), (run_folder.identity(folder / "other"), 1)):
        assert verify.verify(folder / "run", trusted(whom), quiet=True).exit_code == code
        assert verify.verify(inside, trusted(whom), quiet=True).exit_code == code
        assert picture.read(folder / "run", trusted(whom)).exit_code == code
    assert verify.verify(folder / "run", trusted(old), head=heads, quiet=True).exit_code == 0
    # A checkpoint of the old key, apart from its run: the log that hands over is not there.
    shutil.copytree(inside, folder / "step-00000010")
    assert verify.verify(folder / "step-00000010", trusted(new), quiet=True).exit_code == 1


@pytest.mark.slow
def test_a_training_run_is_resumed_with_the_new_key(place: Place) -> None:
    """Oracle: a launch with another signing.key continues the checkpoint of the old one; the run verifies
    with the first key, and each checkpoint is signed by the key of its launch."""
    place.write(
        "toy.yaml", toy_task.config(place.run, checkpoint="{every: 3}", train=TRAIN.replace("6", "3"))
    )
    (old, new) = (keys.create(place.root / name) for name in ("old", "new"))
    train = ("train", "toy.yaml", f"signing.key={new.private}", "--accept", "config", "--reason", "longer")
    assert place.harness("train", "toy.yaml", f"signing.key={old.private}").code == 0
    place.write("toy.yaml", toy_task.config(place.run, checkpoint="{every: 3}", train=TRAIN))
    rotate = ("keys", "rotate", "--from", str(old.private), "--to", str(new.private), "--run")
    assert place.harness(*rotate, str(place.run)).code == 0
    done = place.harness(*train)
    assert done.code == 0, done.err
    whom = ("--key", *map(str, old.public))
    verdict = json.loads(place.harness("verify", str(place.run), *whom, "--json").out)
    assert verdict["verdict"] == "verified", verdict["findings"]
    signers = [each["key_id"] for each in verdict["checkpoints"]]
    assert signers == [keys.load_public(each.public[0]).key_id for each in (old, new)]


def test_a_hand_over_needs_both_keys_and_a_log_of_the_old_one(folder: Path) -> None:
    """Oracle: each refusal by its code, and the log's bytes, which stay."""
    head = (folder / "run" / "log" / "checkpoint").read_bytes()
    run_folder.identity(folder / "other")
    words = ["keys", "rotate", "--run", "run"]
    foreign = harness(folder, *words, "--from", "other.key", "--to", "new.key", "--out", "a.rotation")
    assert (foreign.returncode, "none of the accepted keys" in foreign.stderr) == (1, True)
    itself = harness(folder, *words, "--from", "old.key", "--to", "old.key")
    assert (itself.returncode, "take over from itself" in itself.stderr) == (2, True)
    between = harness(folder, *words, "--from", "old.key", "--to", "new.key", "--out", "a.rotation")
    assert (between.returncode, "between other keys" in between.stderr) == (2, True)
    with log.files.locked(folder / "run"):
        busy = rotate(folder)
    assert (busy.returncode, "another job" in busy.stderr) == (3, True)
    assert (folder / "run" / "log" / "checkpoint").read_bytes() == head


def test_a_policy_names_a_hand_over_for_checkpoints_apart_from_their_run(folder: Path) -> None:
    """Oracle: a checkpoint of the new key alone, under a policy with the old key and the file, or without."""
    rotate(folder)
    text = "format: harness-policy/1\nidentities: [{name: me, keys: [old.ed25519.pub, old.p256.pub]}]\n"
    (folder / "without.yaml").write_text(text)
    (folder / "with.yaml").write_text(f"{text}rotations: [new.rotation]\n")
    moment = json.loads(rotate(folder, "--json").stdout)["at"]
    new = keys.load_signer(folder / "new.key")
    run = SampleRun(folder / "next", new, tweak=lambda step, facts: facts.update(created=moment))
    run.advance(10)
    shutil.copytree(run.saved[10].folder, folder / "step-00000010")
    for path, policy, code in (
        ("step-00000010", "with", 0), ("step-00000010", "without", 1), ("run", "with", 0),
    ):  # fmt: skip
        whom = reader.load(folder / f"{policy}.yaml")
        assert verify.verify(folder / path, whom, quiet=True).exit_code == code
    assert harness(folder, "policy", "check", "with.yaml").returncode == 0
    revoked = keys.load_public(folder / "old.ed25519.pub").key_id
    for rule, reason in (
        (f'rotations: [new.rotation]\nrevoked: ["{revoked}"]', "of which the policy accepts none"),
        ("rotations: [new.rotation, new.rotation]", ""),
        ("rotations: [nowhere.rotation]", "is missing"),
        ("rotations: [old.ed25519.pub]", "is no hand-over"),
        ("rotations: [5]", "is no text"),
        ("rotations: []", "an empty one"),
    ):
        if not reason:
            reader.parse(f"{text}{rule}\n", where="trust.yaml", folder=folder)
            continue
        with pytest.raises(ConfigError, match=reason) as error:
            reader.parse(f"{text}{rule}\n", where="trust.yaml", folder=folder)
        assert str(error.value.where).startswith("trust.yaml:")


@pytest.mark.parametrize("path", ["run", "run/checkpoints/step-00000010"])
def test_a_log_with_hand_overs_and_timestamps_is_read_once(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: calls of what opens a timestamp, of which there is one, and the verdict."""
    run = SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "old"))
    run.advance(10)
    old, tsa, calls = run.signer, Authority("tsa"), 0
    rotated.hand_over(run, rotated.another(run.root))
    run.advance(20)
    stamp_log(run.folder.log, tsa, 3)

    def counted(data: bytes, message: bytes, certificates: Sequence[bytes], *, where: str) -> Stamp:
        nonlocal calls
        calls += 1
        return opened(data, message, certificates, where=where)

    opened = timestamp.opened
    monkeypatch.setattr(timestamp, "opened", counted)
    policy = dataclasses.replace(trusted(old), authorities=tsa.trusted)
    assert verify.verify(tmp_path / path, policy, quiet=True).exit_code == 0
    assert calls == 1


def test_both_bundles_are_what_other_tools_read(folder: Path) -> None:
    """Oracle: each line of the file is a sigstore bundle, by its own key alone; one statement."""
    rotate(folder)
    lines = (folder / "new.rotation").read_bytes().splitlines(keepends=True)
    payloads = {
        envelope.open_bundle(line, [keys.load_public(folder / f"{name}.ed25519.pub")], where=name).payload
        for line, name in zip(lines, ("old", "new"), strict=True)
    }
    assert len(payloads) == 1


SIGNERS = tuple(
    keys.Signer(keys.Ed25519PrivateKey.generate(), None)
    for _ in range(2)
)  # fmt: skip
GOOD = rotation.build(*SIGNERS, rotated.AT, "because")


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_no_changed_byte_of_a_hand_over_is_accepted(draw: st.DataObject) -> None:
    """Oracle: the bytes of the statement: a file is refused, or says the very same."""
    place = draw.draw(st.integers(0, len(GOOD) - 1))
    changed = bytearray(GOOD)
    changed[place] ^= draw.draw(st.integers(1, 255))
    trusted = keys.public_keys(SIGNERS[draw.draw(st.integers(0, 1))])

    def parse(data: bytes, *, where: str) -> Rotation | None:
        return rotation.opened(Claim(data, where), trusted)

    for found in accepted(parse, bytes(changed)):
        assert found is None or found.payload == rotated.read(GOOD, by=SIGNERS[0]).payload
