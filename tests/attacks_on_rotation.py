"""Attacks with and on hand-overs of the signing key."""

from __future__ import annotations

import shutil

import rotated
from attack import Scene, attack, trusted
from rotated import another, hand_over, record_of, records
from run_folder import SampleRun

from harness.format import layout
from harness.provenance.policy import rotation, rules
from harness.provenance.signing import keys
from harness.provenance.signing.keys import Signer
from harness.provenance.transparency import log
from harness.provenance.transparency.heads import Kept
from harness.provenance.transparency.log import Head


def _handed_over(
    scene: Scene, *, before: tuple[int, ...] = (10,), after: tuple[int, ...] = (20,)
) -> SampleRun:
    """A run whose maker handed over to a second key; the auditor trusts the first."""
    shutil.rmtree(scene.root)
    run = SampleRun(scene.root, scene.signer)
    run.advance(*before)
    hand_over(run, another(scene.root))
    run.advance(*after)
    return run


@attack("hands over between keys of which the policy accepts none")
def a_stranger_hands_over_to_a_stranger(scene: Scene) -> None:
    run = _handed_over(scene, after=())
    data = rotation.build(scene.stranger, another(scene.root, "third"), rotated.AT, "mine now")
    scene.relog([*records(scene.root), record_of(run, data)], by=run.signer)


@attack("is not signed by the key")
def a_stranger_takes_over_with_a_signature_of_their_own(scene: Scene) -> None:
    """Both bundles around one statement, the old key's signature replaced."""
    run = _handed_over(scene, after=())
    forged = rotation.build(scene.signer, scene.stranger, rotated.AT, "mine now").splitlines(keepends=True)
    data = forged[1] + forged[1]
    scene.trust(identities=trusted(scene.signer, scene.stranger).identities)
    scene.relog([*records(scene.root)[:-1], record_of(run, data)], by=scene.stranger)


@attack("is not signed by the key")
def a_key_is_handed_over_to_somebody_who_did_not_take_it(scene: Scene) -> None:
    """The new key has not signed: else a key could be hung on anybody."""
    run = _handed_over(scene, after=())
    data = rotation.build(scene.signer, scene.stranger, rotated.AT, "yours").splitlines(keepends=True)
    scene.relog([*records(scene.root)[:-1], record_of(run, data[0] + data[0])], by=scene.signer)


@attack("is no hand-over of two signed bundles")
def a_hand_over_lacks_the_signature_of_the_new_key(scene: Scene) -> None:
    run = _handed_over(scene, after=())
    data = rotation.build(scene.signer, scene.stranger, rotated.AT, "yours").splitlines(keepends=True)
    scene.relog([*records(scene.root)[:-1], record_of(run, data[0])], by=scene.signer)


@attack("hands the key")
def a_key_is_handed_over_twice(scene: Scene) -> None:
    run = _handed_over(scene, after=())
    data = rotation.build(scene.signer, scene.stranger, rotated.AT, "to me, too")
    scene.relog([*records(scene.root), record_of(run, data)], by=scene.stranger)


@attack("which took over from another one")
def two_keys_are_handed_over_to_one(scene: Scene) -> None:
    run = _handed_over(scene, after=())
    data = rotation.build(scene.stranger, run.signer, rotated.AT, "we are one")
    scene.relog([*records(scene.root), record_of(run, data)], by=run.signer)


@attack("hands a key over to one that it has taken over from")
def a_key_is_handed_back(scene: Scene) -> None:
    run = _handed_over(scene, after=())
    later = rotation.build(run.signer, scene.signer, "2026-11-24T00:00:00Z", "and back")
    scene.relog([*records(scene.root), record_of(run, later)], by=scene.signer)


@attack("a key that took over at")
def a_key_hands_over_before_it_took_over(scene: Scene) -> None:
    run = _handed_over(scene, after=())
    third = another(scene.root, "third")
    earlier = rotation.build(run.signer, third, "2026-11-22T00:00:00Z", "in the past")
    scene.relog([*records(scene.root), record_of(run, earlier)], by=third)


@attack("is signed by the key that record 1 of the log handed over")
def the_old_key_makes_a_checkpoint_after_it_was_handed_over(scene: Scene) -> None:
    """By whoever has found the old key; both keys are known to the auditor."""
    run = _handed_over(scene, after=())
    second, run.signer = run.signer, scene.signer
    scene.relog(records(scene.root), by=scene.signer)
    run.advance(20)
    scene.relog(records(scene.root), by=second)


@attack("is signed by the key that record 1 of the log hands over to")
def the_new_key_makes_a_checkpoint_before_it_took_over(scene: Scene) -> None:
    second = another(scene.root)
    shutil.rmtree(scene.root)
    run = SampleRun(scene.root, second)
    run.advance(10)
    data = rotation.build(scene.signer, second, rotated.AT, "backdated")
    scene.relog([*records(scene.root), record_of(run, data)], by=second)


@attack("the log's head is signed by none of the accepted keys")
def the_old_key_signs_the_head_after_it_was_handed_over(scene: Scene) -> None:
    _handed_over(scene)
    scene.relog(records(scene.root), by=scene.signer)


@attack("is signed by none of the 1 accepted keys")
def the_record_of_a_hand_over_is_taken_out_of_the_log(scene: Scene) -> None:
    run = _handed_over(scene)
    scene.relog([each for each in records(scene.root) if b"key-rotation" not in each], by=run.signer)


@attack("is a hand-over for another run")
def a_hand_over_is_copied_from_another_run(scene: Scene) -> None:
    run = _handed_over(scene, after=())
    data = rotation.build(run.signer, another(scene.root, "third"), "2026-11-24T00:00:00Z", "go")
    foreign = record_of(run, data).replace(run.run_id.encode(), b"0" * 32)
    third = keys.load_signer(scene.root.parent / "third.key")
    scene.relog([*records(scene.root), foreign], by=third)


@attack("hands over between keys of which the policy accepts none")
def a_revoked_key_hands_over(scene: Scene) -> None:
    """Revoked for good, whatever time the hand-over states."""
    _handed_over(scene)
    _revoke(scene, scene.signer)


@attack("hands over between keys of which the policy accepts none")
def a_key_hands_over_and_no_head_shows_that_it_was_before_its_revocation(scene: Scene) -> None:
    """A thief can state any time."""
    _handed_over(scene)
    _revoke(scene, scene.signer, "2026-12-01T00:00:00Z")


@attack("is signed by none of the 1 accepted keys")
def what_a_revoked_successor_signs_is_shown(scene: Scene) -> None:
    run = _handed_over(scene)
    scene.trust(revoked=frozenset(key.key_id for key in keys.public_keys(run.signer)))


@attack("has 1 records, the head in the policy has 2: it was rolled back")
def a_thief_of_the_old_key_goes_on_from_before_the_hand_over(scene: Scene) -> None:
    run = _handed_over(scene)
    root = log.read_claimed(scene.root / layout.LOG).root_of_prefix(2)
    head = Head(2, root, f"harness/run/{run.run_id}")
    shutil.rmtree(scene.root)
    SampleRun(scene.root, scene.signer).advance(10)
    scene.trust(log_heads=(Kept(head, "the head in the policy"),))


@attack("with a key that was handed over at")
def a_checkpoint_of_the_old_key_is_younger_than_the_hand_over_in_the_policy(scene: Scene) -> None:
    data = rotation.build(scene.signer, another(scene.root), "2026-11-01T00:00:00Z", "sold")
    _known(scene, data)
    scene.target = scene.checkpoint(20)


@attack("with a key that takes over at")
def a_checkpoint_of_the_new_key_is_older_than_the_hand_over_in_the_policy(scene: Scene) -> None:
    second = another(scene.root)
    _known(scene, rotation.build(scene.signer, second, "2026-12-01T00:00:00Z", "sold"))
    shutil.rmtree(scene.root)
    SampleRun(scene.root, second).advance(20)
    scene.target = scene.checkpoint(20)


@attack("hands the key")
def the_log_hands_over_to_another_key_than_the_policy(scene: Scene) -> None:
    """A thief of the old key makes one more hand-over; the auditor knows the right one."""
    _handed_over(scene)
    _known(scene, rotation.build(scene.signer, another(scene.root, "right"), rotated.AT, "sold"))


def _known(scene: Scene, data: bytes) -> None:
    """The auditor's policy names the hand-over ``data``."""
    whom = rules.from_keys(keys.public_keys(scene.signer))
    scene.policy = rotation.extended(whom, [rotation.Claim(data, "there")], timed=True)[0]


def _revoke(scene: Scene, signer: Signer, moment: str | None = None) -> None:
    """The auditor trusts a bystander besides, so that the policy is one that can accept something."""
    revoked = frozenset(key.key_id for key in keys.public_keys(signer))
    scene.trust(revoked=revoked, revoked_from={} if moment is None else dict.fromkeys(revoked, moment))
