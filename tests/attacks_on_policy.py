"""Attacks by somebody whom the auditor's policy knows, and who signs what is not theirs to sign."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

from attack import NOBODY, Scene, attack, payload_of, signed
from later_facts import replay, svr, test_result

from harness.audit import attest
from harness.audit.exports import export
from harness.audit.folders import opening
from harness.format import layout, strict_json
from harness.format.manifest import Manifest, checkpoint_id
from harness.provenance import later
from harness.provenance.policy.rules import Identity
from harness.provenance.signing import model_signature
from harness.provenance.signing.keys import public_keys
from harness.provenance.transparency import log
from harness.provenance.transparency.heads import Kept


def _known(scene: Scene, **limits: Any) -> None:
    """The stranger becomes an identity of the policy, within ``limits``."""
    limited = Identity("mallory", tuple(public_keys(scene.stranger)), **limits)
    scene.trust(identities=(*scene.policy.identities, limited))


def _sign_head(scene: Scene) -> None:
    scene.relog(log.read_claimed(scene.root / layout.LOG).records, by=scene.stranger)


def _sign_slsa(scene: Scene) -> None:
    path = scene.checkpoint(20) / layout.SLSA_BUNDLE
    path.write_bytes(signed(strict_json.dumps(payload_of(path)), scene.stranger))


@attack("the log's head is signed by none of the accepted keys")
def somebody_of_another_run_signs_the_head(scene: Scene) -> None:
    _known(scene, runs=("another",))
    _sign_head(scene)


@attack("the log's head is signed by none of the accepted keys")
def somebody_whose_time_is_over_signs_the_head(scene: Scene) -> None:
    _known(scene, valid_until="2001-01-01T00:00:00Z")
    _sign_head(scene)


@attack("does not count: mallory may not sign for the run sample")
def somebody_of_another_run_signs_the_slsa_statement(scene: Scene) -> None:
    _known(scene, runs=("another",))
    _sign_slsa(scene)


@attack("valid until 2001-01-01T00:00:00Z")
def somebody_whose_time_is_over_signs_the_slsa_statement(scene: Scene) -> None:
    _known(scene, valid_until="2001-01-01T00:00:00Z")
    _sign_slsa(scene)


@attack(NOBODY)
def somebody_of_another_run_adds_a_verdict(scene: Scene) -> None:
    _known(scene, runs=("another",))
    statement = opening.open_checkpoint(scene.checkpoint(20), scene.policy).statement
    data = signed(later.build(later.REPLAY, replay(), statement), scene.stranger)
    (scene.checkpoint(20) / later.path_of("replay-0")).write_bytes(data)


@attack("may not sign a statement of kind checkpoint")
def somebody_who_may_only_countersign_signs_a_checkpoint(scene: Scene) -> None:
    _known(scene, statements=frozenset({"countersignature"}))
    scene.restate(20, lambda statement: None, by=scene.stranger)


@attack("may not sign a statement of kind slsa")
def somebody_who_may_not_sign_slsa_statements_does(scene: Scene) -> None:
    _known(scene, statements=frozenset({"checkpoint", "log"}))
    _sign_slsa(scene)


@attack("the log's head is signed by none of the accepted keys")
def somebody_who_may_sign_checkpoints_signs_the_head(scene: Scene) -> None:
    _known(scene, statements=frozenset({"checkpoint", "slsa"}))
    _sign_head(scene)


@attack("is signed by none of the 0 accepted keys")
def a_key_that_is_revoked_from_a_moment_on_has_signed_and_no_head_shows_when(scene: Scene) -> None:
    """The signer states a time before the revocation, as a thief would."""
    _revoke(scene, "2026-12-01T00:00:00Z")


@attack("is signed by none of the 0 accepted keys")
def a_checkpoint_is_added_after_the_key_was_revoked_and_stated_as_older(scene: Scene) -> None:
    """The kept head is older than the revocation, and does not hold the last checkpoint."""
    _revoke(scene, "2026-12-01T00:00:00Z")
    _seen(scene, 2, "2026-11-24T00:00:00Z")


@attack("neither a kept head nor a timestamp shows that maker signed before 2026-12-01T00:00:00Z")
def a_signature_whose_time_must_be_proven_is_not(scene: Scene) -> None:
    (own,) = scene.policy.identities
    limited = dataclasses.replace(own, name="maker", valid_until="2026-12-01T00:00:00Z", proven=True)
    scene.trust(identities=(limited,))
    _seen(scene, 2, "2026-11-24T00:00:00Z")


@attack("the newest evidence is of 2026-11-23T20:00:00Z")
def an_old_state_is_shown_to_somebody_who_wants_a_young_one(scene: Scene) -> None:
    scene.trust(max_age=timedelta(0))


@attack("which is still to come")
def a_time_to_come_is_stated_to_stay_young(scene: Scene) -> None:
    scene.trust(max_age=timedelta(days=30))
    scene.rebuild(tweak=lambda step, facts: facts.update(created="2999-01-01T00:00:00Z"))


@attack("the policy wants a head that witnesses have cosigned, and none is kept", 4)
def a_run_is_shown_to_somebody_who_wants_witnesses_without_any(scene: Scene) -> None:
    scene.trust(witnesses=(public_keys(scene.stranger)[0],))


def _revoke(scene: Scene, moment: str) -> None:
    """The maker's keys count only where they are shown to have signed before ``moment``."""
    moments = {key.key_id: moment for key in public_keys(scene.signer)}
    scene.trust(revoked=frozenset(moments), revoked_from=moments)


def _seen(scene: Scene, size: int, moment: str) -> None:
    """The auditor has seen the log when it had ``size`` records."""
    book = log.read_claimed(scene.root / layout.LOG)
    head = log.Head(size, book.root_of_prefix(size), book.head.origin)
    scene.trust(log_heads=(Kept(head, "the head in the policy", moment),))


@attack("is signed by none of the 0 accepted keys")
def the_key_of_model_sig_is_revoked_and_model_sig_is_required(scene: Scene) -> None:
    """A thief has that key alone; that nobody could have signed it is no reason not to look at it."""
    _revoke_model_key(scene)


@attack("is signed by none of the 0 accepted keys")
def the_key_of_model_sig_is_revoked_and_that_of_an_export_is_required(scene: Scene) -> None:
    scene.target = scene.root.parent / "export"
    export.export(scene.checkpoint(30), scene.target, scene.policy, scene.signer, quiet=True)
    _revoke_model_key(scene)


def _revoke_model_key(scene: Scene) -> None:
    (key,) = (key for key in public_keys(scene.signer) if key.algorithm == "p256")
    scene.trust(revoked=frozenset({key.key_id}), revoked_from={key.key_id: "2026-01-01T00:00:00Z"})


def _adds(scene: Scene, facts: dict[str, Any], kind: str = later.SVR) -> None:
    """The stranger adds a statement to a checkpoint, in no log."""
    statement = opening.open_checkpoint(scene.checkpoint(20), scene.policy).statement
    data = signed(later.build(kind, facts, statement), scene.stranger)
    (scene.checkpoint(20) / later.path_of(f"{kind}-0")).write_bytes(data)


@attack("does not count: mallory signed at 2026-11-24T20:00:00Z, valid until 2026-11-24T00:00:00Z")
def an_auditor_whose_time_is_over_has_verified_a_checkpoint(scene: Scene) -> None:
    _known(scene, valid_until="2026-11-24T00:00:00Z")
    _adds(scene, svr())


@attack("does not count: mallory signed at 2026-11-24T20:00:00Z, valid until 2026-11-24T00:00:00Z")
def a_replayer_whose_time_is_over_has_executed_steps_again(scene: Scene) -> None:
    _known(scene, valid_until="2026-11-24T00:00:00Z")
    _adds(scene, replay(), later.REPLAY)


@attack("does not count: mallory signed at 2026-11-24T20:00:00Z, valid from 2026-12-01T00:00:00Z")
def an_evaluator_whose_time_has_not_come_has_evaluated_a_checkpoint(scene: Scene) -> None:
    _known(scene, valid_from="2026-12-01T00:00:00Z")
    _adds(scene, test_result(), later.TEST_RESULT)


@attack("does not count: mallory signed at 2026-11-24T20:00:00Z with a key that was handed over at")
def an_auditor_signs_with_a_key_that_was_handed_over(scene: Scene) -> None:
    key = public_keys(scene.stranger)[0].key_id
    _known(scene, spans={key: (None, "2026-11-24T00:00:00Z")})
    _adds(scene, svr())


@attack("requires a statement of kind test-result, and there is only test-result-0: FAILED", 4)
def a_required_evaluation_has_failed(scene: Scene) -> None:
    _known(scene)
    for step in (10, 30):
        _passed(scene, step)
    _adds(scene, test_result() | {"result": "FAILED"}, later.TEST_RESULT)
    scene.trust(required=scene.policy.required | {later.TEST_RESULT})


def _passed(scene: Scene, step: int) -> None:
    opened = opening.open_checkpoint(scene.checkpoint(step), scene.policy)
    attest.add(opened, later.TEST_RESULT, test_result(), scene.signer)


@attack("requires a statement of kind replay, and there is only replay-0: outside, steps 10 to 20", 4)
def a_required_replay_has_found_other_bits(scene: Scene) -> None:
    _known(scene)
    scene.target = scene.checkpoint(20)
    _adds(scene, replay() | {"verdict": "outside"}, later.REPLAY)
    scene.trust(required=scene.policy.required | {later.REPLAY})


def _exported(scene: Scene) -> None:
    scene.target = scene.root.parent / "export"
    export.export(scene.checkpoint(30), scene.target, scene.policy, scene.signer, quiet=True)


def _signed_by_mallory(scene: Scene, **limits: Any) -> None:
    """model.sig of an export is signed again, by an identity within ``limits``."""
    _exported(scene)
    _known(scene, **limits)
    manifest = (scene.target / layout.MANIFEST).read_bytes()
    listed = [
        *Manifest.parse(manifest, where="x").digests.items(),
        (layout.MANIFEST, checkpoint_id(manifest)),
    ]
    key = public_keys(scene.stranger)[1]
    assert scene.stranger.p256 is not None
    data = model_signature.sign(listed, scene.stranger.p256, key, scene.target.name)
    (scene.target / layout.MODEL_SIGNATURE).write_bytes(data)


@attack(NOBODY)
def an_evaluator_signs_the_files_of_an_export(scene: Scene) -> None:
    _signed_by_mallory(scene, statements=frozenset({"test-result"}))


@attack(NOBODY)
def somebody_of_another_run_signs_the_files_of_an_export(scene: Scene) -> None:
    _signed_by_mallory(scene, runs=("other",))


@attack(NOBODY)
def somebody_whose_time_is_over_signs_the_files_of_an_export(scene: Scene) -> None:
    _signed_by_mallory(scene, valid_until="2026-01-01T00:00:00Z")


@attack("the policy requires a statement of kind test-result, and an exported folder alone has none", 4)
def an_export_is_shown_to_somebody_who_wants_an_evaluation(scene: Scene) -> None:
    _exported(scene)
    scene.trust(required=scene.policy.required | {later.TEST_RESULT})


@attack("the policy requires a statement of kind countersignature, and an exported folder alone has none", 4)
def an_export_is_shown_to_somebody_who_wants_a_countersignature(scene: Scene) -> None:
    _exported(scene)
    scene.trust(required=scene.policy.required | {later.COUNTERSIGNATURE})
