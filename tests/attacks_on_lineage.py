"""Attacks on the lineage between checkpoints."""

from __future__ import annotations

import shutil

import run_folder
from attack import Scene, attack
from run_folder import SampleRun


@attack("the folder was signed as step-00000030")
def a_checkpoint_is_renamed_to_another_step(scene: Scene) -> None:
    scene.checkpoint(30).rename(scene.checkpoint(40))


@attack("record 1 names step-00000020")
def a_checkpoint_is_removed_without_pruning(scene: Scene) -> None:
    shutil.rmtree(scene.checkpoint(20))


@attack("record 2 names step-00000030")
def the_newest_checkpoint_is_removed(scene: Scene) -> None:
    shutil.rmtree(scene.checkpoint(30))


@attack("its parent")
def the_first_checkpoint_is_removed(scene: Scene) -> None:
    shutil.rmtree(scene.checkpoint(10))


@attack("which is not here")
def a_good_checkpoint_is_hidden_as_damaged(scene: Scene) -> None:
    scene.checkpoint(30).rename(scene.checkpoint(30).with_name("damaged-step-00000030-1"))


@attack("which is not here")
def a_good_checkpoint_is_hidden_as_a_save_that_was_cut_off(scene: Scene) -> None:
    scene.checkpoint(30).rename(scene.checkpoint(30).with_name(".tmp-step-00000030"))


@attack("belongs to the run")
def a_checkpoint_of_another_run_is_planted(scene: Scene) -> None:
    other = run_folder.build(scene.root.parent / "other", scene.signer, name="other", steps=(10, 20, 30, 40))
    shutil.copytree(run_folder.checkpoint(other, 40), scene.checkpoint(40))


@attack("is not in the log")
def a_checkpoint_of_a_twin_run_is_planted(scene: Scene) -> None:
    """Same run id and key, other tensors: a second history of the same run."""
    twin = run_folder.build(scene.root.parent / "twin", scene.signer, values="twin")
    shutil.rmtree(scene.checkpoint(30))
    shutil.copytree(run_folder.checkpoint(twin, 30), scene.checkpoint(30))


@attack("is not here")
def a_parent_does_not_exist(scene: Scene) -> None:
    parent = {"checkpoint": "0" * 64, "step": 0}
    scene.rebuild(tweak=lambda step, facts: facts.update(parent=parent, sequence=1) if step == 10 else None)


@attack("has the sequence number 2 of step-00000030")
def a_parent_has_two_children(scene: Scene) -> None:
    shutil.rmtree(scene.root)
    run = SampleRun(scene.root, scene.signer)
    run.advance(10, 20, 30)
    run.resume(at=20)
    run.advance(40)


@attack("its parent is")
def a_sequence_number_is_left_out(scene: Scene) -> None:
    def skip(step: int, facts: run_folder.Predicate) -> None:
        facts["sequence"] += step == 30

    scene.rebuild(tweak=skip)


OTHER = {"checkpoint": "1" * 64, "step": 5, "run": "2" * 32, "name": "other", "bundle_sha256": "3" * 64}
"""A checkpoint of another run."""


@attack("names another start of the run than step-00000020 before it")
def a_later_checkpoint_denies_what_the_run_began_with(scene: Scene) -> None:
    scene.rebuild(tweak=lambda step, facts: facts.update(start=None if step == 30 else OTHER))


@attack("names another start of the run than step-00000010 before it")
def a_later_checkpoint_claims_another_start(scene: Scene) -> None:
    scene.rebuild(tweak=lambda step, facts: facts.update(start=OTHER if step > 10 else None))


@attack("says that its run began with a checkpoint of itself")
def a_run_begins_with_itself(scene: Scene) -> None:
    itself = {**OTHER, "run": SampleRun(scene.root.parent / "same", scene.signer).run_id}
    scene.restate(10, lambda each: each["predicate"].update(start=itself))


@attack("says something else than the checkpoint statement")
def the_slsa_statement_hides_the_start(scene: Scene) -> None:
    scene.restate(10, lambda each: each["predicate"].update(start=OTHER))


@attack("its parent is")
def a_parent_is_the_grandparent(scene: Scene) -> None:
    shutil.rmtree(scene.root)
    run = SampleRun(scene.root, scene.signer)
    run.advance(10, 20)
    first = run.saved[10]

    def lie(step: int, facts: run_folder.Predicate) -> None:
        facts["parent"], facts["steps"] = first.reference, {"from": 10, "to": step}

    run.tweak = lie
    run.advance(30)


def _relaunched(scene: Scene, **claims: object) -> None:
    """A run that was resumed at step 20, whose launch says something else."""

    def lie(step: int, facts: run_folder.Predicate) -> None:
        if step == 30:
            facts["segment"] = facts["segment"] | claims

    scene.rebuild(resumes={20: "same-data"}, tweak=lie)


@attack("its launch does not continue that of step-00000020")
def a_resume_names_another_checkpoint_than_its_parent(scene: Scene) -> None:
    _relaunched(scene, resumed_from={"checkpoint": "0" * 64, "step": 20})


@attack("its launch does not continue that of step-00000020")
def a_launch_is_left_out(scene: Scene) -> None:
    _relaunched(scene, number=2)


@attack("has a launch whose reason, class and differences disagree")
def a_resume_calls_itself_the_first_launch(scene: Scene) -> None:
    _relaunched(scene, reason="first launch")


@attack("has a launch whose reason, class and differences disagree")
def a_resume_calls_itself_exact_and_lists_differences(scene: Scene) -> None:
    difference = {"what": "world_size", "before": "1", "after": "2"}
    _relaunched(scene, **{"class": "exact", "differences": [difference]})


@attack("the manifest that the statement is about")
def a_pruned_folder_has_another_manifest(scene: Scene) -> None:
    folder = run_folder.prune(scene.checkpoint(10))
    shutil.copy(scene.checkpoint(20) / "MANIFEST.json", folder / "MANIFEST.json")


@attack("is not in the manifest")
def a_pruned_folder_holds_another_payload(scene: Scene) -> None:
    folder = run_folder.prune(scene.checkpoint(10))
    (folder / "evil.safetensors").write_bytes(b"")


@attack("has the sequence number 1 of step-00000020")
def a_checkpoint_is_there_complete_and_pruned(scene: Scene) -> None:
    copy = shutil.copytree(scene.checkpoint(20), scene.root / "kept")
    run_folder.prune(scene.checkpoint(20))
    copy.rename(scene.checkpoint(20))


@attack("the payload was removed", 4)
def a_pruned_checkpoint_is_verified_alone(scene: Scene) -> None:
    scene.target = run_folder.prune(scene.checkpoint(10))


@attack("the newest checkpoint has no payload", 4)
def the_payload_of_every_checkpoint_is_removed(scene: Scene) -> None:
    for step in (10, 20, 30):
        run_folder.prune(scene.checkpoint(step))


@attack("was set aside as damaged")
def a_damaged_checkpoint_is_verified_alone(scene: Scene) -> None:
    name = "damaged-step-00000030-1"
    scene.target = scene.checkpoint(30).rename(scene.checkpoint(30).with_name(name))
