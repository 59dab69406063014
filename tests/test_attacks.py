"""Whatever is changed in a run folder, by whom ever, is found, named and answered with the right exit code.

The register of attacks is in tests/attacks_on_*.py: each says how the folder is changed and what the verifier
must say. Oracle: the run before the change verifies with exit code 0 and no finding.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import attacks_on_files
import attacks_on_history
import attacks_on_signatures
import pytest
import run_folder
from attack import ATTACKS, Scene, judge, trusted

MODULES = (attacks_on_files, attacks_on_signatures, attacks_on_history)


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


def test_the_untouched_run_verifies(scene: Scene) -> None:
    """Oracle: nothing was changed, so nothing may be found."""
    assert judge(scene) == (0, [])


def test_each_untouched_checkpoint_verifies_alone(scene: Scene) -> None:
    """Oracle: nothing was changed, so nothing may be found."""
    for step in (10, 20, 30):
        scene.target = scene.checkpoint(step)
        assert judge(scene) == (0, [])


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_is_found_and_named(name: str, scene: Scene) -> None:
    """Oracle: what the register says of the attack."""
    attack = ATTACKS[name]
    attack.mutate(scene)
    code, messages = judge(scene)
    assert code == attack.code, messages
    assert any(attack.says in message for message in messages), messages


def test_the_register_is_large_and_every_module_adds_to_it() -> None:
    """Oracle: sigstore-conformance, the nearest must-fail corpus, holds 49 cases."""
    assert len(ATTACKS) >= 80
    assert {attack.mutate.__module__ for attack in ATTACKS.values()} == {each.__name__ for each in MODULES}
