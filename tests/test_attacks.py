"""Whatever is changed in a run folder, by whom ever, is found, named and answered with the right exit code.

The register of attacks is in tests/attacks_on_*.py: each says how the folder is changed and what the verifier
must say. Oracle: the run before the change verifies with exit code 0 and no finding.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import attacks_on_bundles
import attacks_on_files
import attacks_on_formats
import attacks_on_keyless
import attacks_on_later
import attacks_on_lineage
import attacks_on_log
import attacks_on_own_policy
import attacks_on_policy
import attacks_on_rotation
import attacks_on_statements
import attacks_on_timestamps
import pytest
import run_folder
from attack import ATTACKS, Scene, flip, judge, trusted
from honest import HONEST
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.cli import main
from harness.format import json_lines
from harness.provenance.signing import keys

MODULES = (
    attacks_on_files,
    attacks_on_formats,
    attacks_on_bundles,
    attacks_on_statements,
    attacks_on_lineage,
    attacks_on_log,
    attacks_on_later,
    attacks_on_policy,
    attacks_on_own_policy,
    attacks_on_rotation,
    attacks_on_timestamps,
    attacks_on_keyless,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A run of checkpoints 10, 20 and 30 that verifies; the attacks work on copies."""
    folder = tmp_path_factory.mktemp("good")
    signer, stranger = run_folder.identity(folder / "signer"), run_folder.identity(folder / "stranger")
    root = run_folder.build(folder / "run", signer)
    return Scene(root, signer, stranger, trusted(signer), root)


@pytest.fixture
def scene(good: Scene, tmp_path: Path) -> Scene:
    """A copy of the good run."""
    root = shutil.copytree(good.root, tmp_path / "run")
    return Scene(root, good.signer, good.stranger, good.policy, root)


@pytest.mark.parametrize("story", HONEST)
def test_an_honest_story_verifies(story: str, scene: Scene) -> None:
    """Oracle: each is how a trainer or an auditor leaves a folder, so nothing may be found."""
    HONEST[story](scene)
    assert judge(scene) == (0, [])


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_is_found_and_named(name: str, scene: Scene) -> None:
    """Oracle: what the register says of the attack."""
    attack = ATTACKS[name]
    attack.mutate(scene)
    code, messages = judge(scene)
    assert code == attack.code, messages
    assert any(attack.says in message for message in messages), messages


def test_the_registers_are_large_and_every_module_adds_to_them() -> None:
    """Oracle: sigstore-conformance, the nearest must-fail corpus, holds 49 cases."""
    assert len(ATTACKS) >= 150
    assert len(HONEST) >= 20
    assert {attack.mutate.__module__ for attack in ATTACKS.values()} == {each.__name__ for each in MODULES}


def test_every_file_is_needed(scene: Scene) -> None:
    """Oracle: a run without any one of its files is not verified; a finding names the file or its kind."""
    for path in [each for each in scene.root.rglob("*") if each.is_file()]:
        kept = path.rename(scene.root.parent / "kept")
        code, messages = judge(scene)
        assert code in (1, 4), path
        required = "the policy requires a statement of kind"
        assert any(path.name in message or required in message for message in messages), (path, messages)
        kept.rename(path)


def test_what_is_not_checked_is_told_and_its_names_cannot_speak_to_a_terminal(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: names with the commands that clear a screen and write a verdict of their own; every character
    that arrives at the terminal is one that it shows."""
    evil = "\x1b[2J\rx\nverified"
    for path in (f"checkpoints/damaged-{evil}", f"checkpoints/.tmp-{evil}", f"weights{evil}", "later"):
        (scene.root / path).mkdir()
    shutil.copytree(scene.checkpoint(10), tmp_path / f"step{evil}")
    for verb in ("verify", "lineage", "show", "diff", "gate", "export"):
        for path in (scene.root, tmp_path / f"step{evil}", tmp_path / f"none{evil}"):
            more = {"diff": [str(scene.root)], "export": [str(tmp_path / "exported")]}.get(verb, [])
            for key in ([], ["--key", f"{tmp_path.parent}/none{evil}.pub"], _public(scene, tmp_path)):
                main([verb, str(path), *more, *key])
                said = capsys.readouterr()
                lines = (said.out + said.err).split("\n")
                assert not [line for line in lines if line and not line.isprintable()], (verb, path)
                assert "verified" not in lines
    main(["verify", str(scene.root), *_public(scene, tmp_path)])
    assert "covered by no signature: later, weights\\x1b[2J" in capsys.readouterr().out


def test_the_name_of_a_run_cannot_speak_to_a_terminal_either(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the same of a name that is signed, in the verdict on run, checkpoint and export."""
    whom, private = _public(scene, tmp_path), keys.create(tmp_path / "exporter").private
    root = scene.rebuild(tweak=lambda _, facts: facts["run"].update(name="\x1b[2Jx\nverified"))
    last, made = str(run_folder.checkpoint(root, 30)), str(tmp_path / "made")
    assert main(["export", last, made, "--signing-key", str(private), *whom]) == 0
    for path in (str(root), last, made):
        main(["verify", path, *whom])
    lines = capsys.readouterr().out.split("\n")
    assert not [line for line in lines if line and not line.isprintable()]
    assert sum("\\x1b[2Jx\\nverified" in line for line in lines) >= 3


def test_a_name_that_is_no_unicode_ends_no_verb(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit codes as for any other name, and JSON that a parser reads, with the name in it."""
    root = scene.root.rename(Path(os.fsdecode(os.fsencode(scene.root.parent) + b"/run-\xff")))
    (root / "checkpoints" / os.fsdecode(b"damaged-\xff")).mkdir()
    newest, whom = str(run_folder.checkpoint(root, 30)), _public(scene, tmp_path)
    for words, code in (
        (["verify", str(root)], 0), (["gate", str(root)], 0), (["show", newest], 0),
        (["lineage", str(root)], 0), (["lineage", str(root), "--format", "json"], 0),
        (["verify", f"{root}x"], 2),
    ):  # fmt: skip
        assert main([*words, *whom]) == code
        capsys.readouterr()
        assert main([*words, *whom, "--json"]) == code
        assert r"\udcff" in str(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("name", ["metrics.jsonl", "events/rank-00000.jsonl", "checkpoints/step-00000030"])
def test_no_verb_that_shows_a_run_waits_or_breaks_down_at_what_stands_in_for_a_file(
    scene: Scene, name: str, tmp_path: Path
) -> None:
    """Oracle: an exit code of ours, within the limit of a test, for a pipe, a folder, an endless device and a
    link to itself."""
    path, away = scene.root / name, tmp_path / "away"
    (scene.root / "events").mkdir()
    links = (lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name))
    for stand_in in (os.mkfifo, os.mkdir, *links):
        if path.exists():
            path.rename(away)
        stand_in(path)
        for words in (["watch", "--once"], ["report", "--out", str(tmp_path / "report")], ["lineage"]):
            assert main([words[0], str(scene.root), *words[1:]]) in (0, 1, 4)
        path.rmdir() if path.is_dir() else path.unlink()
        if away.exists():
            away.rename(path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events/rank-00000.jsonl"])
def test_a_line_without_an_end_is_read_up_to_a_limit(
    scene: Scene, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a file of holes, a byte longer than a line may be, which could as well be larger than memory:
    one line of ours, exit code 1."""
    path = scene.root / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    os.truncate(path, json_lines.LIMIT + 1)
    for words in (["watch", "--once"], ["report", "--out", str(tmp_path / "report")]):
        assert main([words[0], str(scene.root), *words[1:]]) == 1
        said = capsys.readouterr().err
        assert f"has a line of more than {json_lines.LIMIT} bytes: {path}" in said
        assert len(said.splitlines()) == 1


def _public(scene: Scene, folder: Path) -> list[str]:
    """The option that gives the signer's public keys."""
    files = [folder / f"{key.algorithm}.pub" for key in keys.public_keys(scene.signer)]
    for file, key in zip(files, keys.public_keys(scene.signer), strict=True):
        file.write_bytes(key.pem)
    return ["--key", *map(str, files)]


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_flipped_bit_anywhere_is_found(scene: Scene, data: st.DataObject) -> None:
    """Oracle: the run before the flip, which verifies; scripts/bench/flips.py goes through every byte."""
    files = sorted(each for each in scene.root.rglob("*") if each.is_file())
    path = data.draw(st.sampled_from(files))
    before = path.read_bytes()
    flip(path, data.draw(st.integers(0, len(before) - 1)), 1 << data.draw(st.integers(0, 7)))
    code, _ = judge(scene)
    assert code, path
    path.write_bytes(before)
