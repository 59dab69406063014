"""Attacks on the policy that a run says it was made under: its copy, its digest in statements, its change."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from attack import Scene, attack
from honest import COPY, OTHER, become_nonfinite, under

from harness.format import layout
from harness.provenance.policy import canonical


def _copy(scene: Scene) -> Path:
    """policy.json of a run that was made under a policy."""
    under(scene, COPY).advance(10, 20, 30)
    return scene.root / layout.POLICY


def _named(copy: bytes) -> dict[str, str]:
    return {"name": "team.yaml", "sha256": hashlib.sha256(copy).hexdigest()}


@attack("is a policy that no checkpoint names")
def the_copy_of_the_policy_is_edited(scene: Scene) -> None:
    path = _copy(scene)
    path.write_bytes(path.read_bytes().replace(b'"threshold":1', b'"threshold":2'))


@attack("is a policy that no checkpoint names")
def the_copy_of_the_policy_means_the_same_in_other_bytes(scene: Scene) -> None:
    path = _copy(scene)
    path.write_bytes(path.read_bytes().replace(b",", b", "))


@attack("is a policy that no checkpoint names")
def the_copy_of_the_policy_is_that_of_the_auditor(scene: Scene) -> None:
    _copy(scene).write_bytes(canonical.written(scene.policy))


@attack("is missing", 4)
def the_copy_of_the_policy_is_removed(scene: Scene) -> None:
    _copy(scene).unlink()


@attack("is a symbolic link")
def the_copy_of_the_policy_becomes_a_symbolic_link(scene: Scene) -> None:
    path = _copy(scene)
    path.symlink_to(path.rename(scene.root.parent / "outside.json"))


@attack("is not a regular file")
def the_copy_of_the_policy_becomes_a_folder(scene: Scene) -> None:
    path = _copy(scene)
    path.unlink()
    path.mkdir()


@attack("is larger than 262144 bytes")
def the_copy_of_the_policy_is_huge(scene: Scene) -> None:
    _copy(scene).write_bytes(b" " * (512 << 10))


@attack("is a policy that no checkpoint names")
def a_policy_is_put_into_a_run_without_one(scene: Scene) -> None:
    (scene.root / layout.POLICY).write_bytes(COPY)


@attack("names another policy than step-00000020 before it, and no resume accepted that")
def a_checkpoint_names_another_policy_than_the_one_before(scene: Scene) -> None:
    run = under(scene, COPY)
    run.advance(10, 20)
    run.policy = OTHER
    run.advance(30)


@attack("is a policy that no checkpoint names")
def every_checkpoint_names_another_policy_than_the_copy_holds(scene: Scene) -> None:
    tweak = lambda step, facts: facts.update(policy=_named(OTHER))  # noqa: E731
    under(scene, COPY, tweak=tweak).advance(10, 20, 30)


@attack("names another policy than step-00000020 before it, and no resume accepted that")
def a_resume_goes_on_under_another_policy_that_nobody_accepted(scene: Scene) -> None:
    run = under(scene, COPY)
    run.advance(10, 20)
    run.resume("accepted", accepted=["config: more steps", "policies: no such thing"])
    run.policy = OTHER
    run.advance(30)


@attack("names another policy than step-00000020 before it, and no resume accepted that")
def a_resume_drops_the_policy_that_nobody_accepted_to_drop(scene: Scene) -> None:
    run = under(scene, COPY)
    run.advance(10, 20)
    run.resume()
    run.policy = None
    run.folder.policy.unlink()
    run.advance(30)


@attack("names another policy than step-00000020 before it, and no resume accepted that")
def a_launch_that_accepted_another_policy_changes_it_once_more(scene: Scene) -> None:
    run = under(scene, COPY)
    run.advance(10)
    run.resume("accepted", accepted=["policy: a new member"])
    run.policy = OTHER
    run.advance(20)
    run.policy = COPY
    run.advance(30)


@attack("names another policy than its parent, and no resume accepted that")
def the_last_state_before_a_nan_names_another_policy(scene: Scene) -> None:
    run = under(scene, COPY)
    run.advance(10, 20)
    become_nonfinite(run, 30, policy=_named(OTHER))


def _says(scene: Scene, policy: dict[str, Any]) -> None:
    scene.restate(20, lambda statement: statement["predicate"].update(policy=policy))


@attack("policy.sha256 is 'ab'")
def a_statement_names_a_policy_by_half_a_digest(scene: Scene) -> None:
    _says(scene, {"name": "team.yaml", "sha256": "ab"})


@attack("policy.text is not a known field")
def a_statement_says_more_of_a_policy_than_there_is_to_say(scene: Scene) -> None:
    _says(scene, {**_named(COPY), "text": "trust me"})
