"""Attacks by a signer who lies in statements or model.sig, and against what a policy asks."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from typing import Any

from attack import MODEL, NOBODY, Scene, attack, edit_json, flip, payload_of, signed, trusted
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from harness.format import layout, strict_json
from harness.provenance.policy import rules as policies
from harness.provenance.policy.rules import Identity
from harness.provenance.signing import envelope, keys, model_signature

SLSA, MODEL_SIG = layout.SLSA_BUNDLE, layout.MODEL_SIGNATURE


@attack("has steps that do not follow its parent's")
def a_statement_has_steps_that_leave_a_gap(scene: Scene) -> None:
    scene.restate(20, lambda each: each["predicate"]["steps"].update({"from": 11}))


@attack("has a sequence number that does not fit its parent")
def a_second_genesis_is_claimed(scene: Scene) -> None:
    scene.restate(20, lambda each: each["predicate"].update(sequence=0))


@attack("training_loss is not a known field")
def a_statement_has_an_unknown_field(scene: Scene) -> None:
    scene.restate(20, lambda each: each["predicate"].update(training_loss="0.1"))


@attack("run.seed is no integer")
def a_statement_holds_a_float(scene: Scene) -> None:
    scene.restate(20, lambda each: each["predicate"]["run"].update(seed=3.0))


@attack("is no in-toto statement")
def a_statement_has_a_second_predicate(scene: Scene) -> None:
    scene.restate(20, lambda each: each.update(predicate2={}))


@attack("it is no object")
def a_statement_has_two_subjects(scene: Scene) -> None:
    scene.restate(20, lambda each: each["subject"].append(each["subject"][0]))


@attack("has another dirHash than the statement")
def a_statement_has_another_dir_hash(scene: Scene) -> None:
    scene.restate(20, lambda each: each["subject"][0]["digest"].update(dirHash="h1:AAAA"))


@attack("has a config text with another digest than its own")
def a_config_text_is_another_than_its_digest(scene: Scene) -> None:
    scene.restate(20, lambda each: each["predicate"]["config"].update(text="run: {}\n"))


@attack("has a state digest that is not that of the manifest's tensors")
def a_state_digest_is_another(scene: Scene) -> None:
    scene.restate(20, lambda each: each["predicate"]["state"].update(sha256="0" * 64))


@attack("holds other rows than the statement says")
def a_statement_counts_fewer_rows_than_the_ledger_has(scene: Scene) -> None:
    scene.restate(20, lambda each: each["predicate"]["determinism"]["ledger"].update(rows=999))


@attack("holds other coverage.observed than the statement says")
def a_statement_says_that_all_was_observed(scene: Scene) -> None:
    def claim(each: dict[str, Any]) -> None:
        coverage = each["predicate"]["determinism"]["ledger"]["coverage"]
        coverage["observed"] = not coverage["observed"]

    scene.restate(20, claim)


@attack("the statement says strict")
def a_statement_claims_the_strict_mode(scene: Scene) -> None:
    scene.restate(20, lambda each: each["predicate"]["determinism"].update(mode="strict"))


@attack("has the data cursor at step 19, not 20")
def a_cursor_is_behind_its_step(scene: Scene) -> None:
    scene.restate(20, lambda each: each["predicate"]["cursor"].update(step=19))


@attack("is named step-00000099, its step is 20")
def a_statement_is_about_another_name(scene: Scene) -> None:
    scene.restate(20, lambda each: each["subject"][0].update(name="step-00000099"))


@attack("shown as a good checkpoint")
def a_state_that_is_not_finite_is_shown_as_good(scene: Scene) -> None:
    scene.rebuild(tweak=lambda step, facts: facts.update(outcome="nonfinite" if step == 30 else "ok"))


@attack("shown as a good checkpoint")
def a_state_that_is_not_finite_is_copied_under_another_name(scene: Scene) -> None:
    scene.rebuild(tweak=lambda step, facts: facts.update(outcome="nonfinite" if step == 30 else "ok"))
    scene.target = scene.checkpoint(30).rename(scene.root.parent / "final")


@attack("a good checkpoint is shown as non-finite")
def a_good_checkpoint_is_shown_as_not_finite(scene: Scene) -> None:
    scene.checkpoint(30).rename(scene.checkpoint(30).with_name("nonfinite-step-00000030"))


# The SLSA statement.


@attack("externalParameters.seed")
def the_slsa_statement_lies_about_the_seed(scene: Scene) -> None:
    def lie(each: dict[str, Any]) -> None:
        each["predicate"]["buildDefinition"]["externalParameters"]["seed"] = 4

    scene.restate(20, lie, name=SLSA)


@attack("resolvedDependencies")
def the_slsa_statement_leaves_out_the_parent(scene: Scene) -> None:
    scene.restate(
        20, lambda each: each["predicate"]["buildDefinition"]["resolvedDependencies"].pop(), name=SLSA
    )


@attack(NOBODY)
def the_slsa_statement_is_signed_by_a_stranger(scene: Scene) -> None:
    scene.restate(20, lambda statement: None, by=scene.stranger, name=SLSA)


@attack("requires a statement of kind slsa", 4)
def the_slsa_statement_is_removed(scene: Scene) -> None:
    (scene.checkpoint(20) / SLSA).unlink()


# model.sig.


def _model_sig(scene: Scene, change: Any) -> None:
    path = scene.checkpoint(20) / MODEL_SIG
    statement = payload_of(path)
    change(statement)
    _sign_model(scene, statement)


def _sign_model(scene: Scene, statement: dict[str, Any]) -> None:
    assert scene.signer.p256 is not None
    public = keys.public_keys(scene.signer)[1]
    data = envelope.sign(strict_json.dumps(statement), scene.signer.p256, public)
    (scene.checkpoint(20) / MODEL_SIG).write_bytes(data)


def _covered(scene: Scene) -> list[tuple[str, str]]:
    resources = payload_of(scene.checkpoint(20) / MODEL_SIG)["predicate"]["resources"]
    return [(each["name"], each["digest"]) for each in resources]


@attack("requires a statement of kind model-signature", 4)
def model_sig_is_removed(scene: Scene) -> None:
    (scene.checkpoint(20) / MODEL_SIG).unlink()


@attack(NOBODY)
def model_sig_is_signed_by_a_stranger(scene: Scene) -> None:
    assert scene.stranger.p256 is not None
    public = keys.public_keys(scene.stranger)[1]
    data = model_signature.sign(_covered(scene), scene.stranger.p256, public, "step-00000020")
    (scene.checkpoint(20) / MODEL_SIG).write_bytes(data)


@attack(NOBODY)
def model_sig_is_signed_with_the_ed25519_key(scene: Scene) -> None:
    payload = strict_json.dumps(payload_of(scene.checkpoint(20) / MODEL_SIG))
    (scene.checkpoint(20) / MODEL_SIG).write_bytes(signed(payload, scene.signer))


@attack("ignores paths")
def model_sig_ignores_the_weights(scene: Scene) -> None:
    _model_sig(
        scene, lambda each: each["predicate"]["serialization"]["ignore_paths"].append("model.safetensors")
    )


@attack("ignores paths")
def model_sig_leaves_out_and_ignores_weights_that_are_changed(scene: Scene) -> None:
    assert scene.signer.p256 is not None
    public = keys.public_keys(scene.signer)[1]
    covered = [each for each in _covered(scene) if each[0] != MODEL]
    data = model_signature.sign(covered, scene.signer.p256, public, "step-00000020")
    (scene.checkpoint(20) / MODEL_SIG).write_bytes(data)
    _model_sig(scene, lambda each: each["predicate"]["serialization"]["ignore_paths"].append(MODEL))
    flip(scene.model(20), -1)


@attack("does not have exactly one signature")
def model_sig_has_a_second_signature_that_is_none(scene: Scene) -> None:
    def add(bundle: dict[str, Any]) -> None:
        bundle["dsseEnvelope"]["signatures"].append({"sig": "AAAA", "keyid": ""})

    edit_json(scene.checkpoint(20) / MODEL_SIG, add)


@attack("has the key `mediaType` twice")
def model_sig_has_a_key_twice(scene: Scene) -> None:
    path = scene.checkpoint(20) / MODEL_SIG
    path.write_bytes(b'{"mediaType":"application/json",' + path.read_bytes()[1:])


@attack("signs no file")
def model_sig_signs_nothing(scene: Scene) -> None:
    _model_sig(scene, lambda each: each["predicate"].update(resources=[]))


@attack("signs other files than the manifest lists")
def model_sig_leaves_out_a_file(scene: Scene) -> None:
    assert scene.signer.p256 is not None
    public = keys.public_keys(scene.signer)[1]
    data = model_signature.sign(_covered(scene)[1:], scene.signer.p256, public, "step-00000020")
    (scene.checkpoint(20) / MODEL_SIG).write_bytes(data)


@attack("model.sig")
def model_sig_has_another_root(scene: Scene) -> None:
    _model_sig(scene, lambda each: each["subject"][0]["digest"].update(sha256="0" * 64))


@attack("signs other files than the manifest lists")
def model_sig_comes_from_another_checkpoint(scene: Scene) -> None:
    shutil.copy(scene.checkpoint(10) / MODEL_SIG, scene.checkpoint(20) / MODEL_SIG)


# Statements that were added later.


def _later(scene: Scene, kind: str, data: bytes) -> None:
    (scene.checkpoint(20) / "provenance" / f"{kind}-0.sigstore.json").write_bytes(data)


@attack(NOBODY)
def a_later_statement_is_signed_by_a_stranger(scene: Scene) -> None:
    statement = payload_of(scene.bundle(20)) | {"predicateType": "https://example.org/evaluation/v1"}
    _later(scene, "evaluation", signed(strict_json.dumps(statement), scene.stranger))


@attack("is about another checkpoint")
def a_later_statement_is_about_another_checkpoint(scene: Scene) -> None:
    statement = payload_of(scene.bundle(10)) | {"predicateType": "https://example.org/evaluation/v1"}
    _later(scene, "evaluation", signed(strict_json.dumps(statement), scene.signer))


@attack("is no statement of kind evaluation")
def a_copy_of_the_statement_stands_in_for_an_evaluation(scene: Scene) -> None:
    scene.trust(required=scene.policy.required | {"evaluation"})
    for step in (10, 20, 30):
        folder = scene.checkpoint(step) / "provenance"
        shutil.copy(scene.bundle(step), folder / "evaluation-0.sigstore.json")


@attack("signs another statement than the checkpoint's")
def a_countersignature_is_of_another_checkpoint(scene: Scene) -> None:
    _later(scene, "countersignature", scene.bundle(10).read_bytes())


@attack("is signed by 1 of the 2 identities", 4)
def one_identity_signs_twice_where_two_are_wanted(scene: Scene) -> None:
    scene.policy = trusted(scene.signer)
    other = Identity("another", tuple(keys.public_keys(scene.stranger)))
    scene.trust(identities=(*scene.policy.identities, other), threshold=2)
    for step in (10, 20, 30):
        path = scene.checkpoint(step) / "provenance" / "countersignature-0.sigstore.json"
        shutil.copy(scene.bundle(step), path)


# What the auditor's policy says.


@attack("is signed by none of the 0 accepted keys")
def the_key_is_revoked(scene: Scene) -> None:
    scene.trust(revoked=frozenset({keys.public_keys(scene.signer)[0].key_id}))


@attack("is revoked")
def the_checkpoint_is_revoked(scene: Scene) -> None:
    manifest = (scene.checkpoint(20) / layout.MANIFEST).read_bytes()
    scene.trust(revoked=frozenset({hashlib.sha256(manifest).hexdigest()}))


@attack("valid until 2026-01-01T00:00:00Z")
def the_signer_signed_after_the_time_allowed(scene: Scene) -> None:
    _identity(scene, valid_until="2026-01-01T00:00:00Z")


@attack("valid from 2027-01-01T00:00:00Z")
def the_signer_signed_before_the_time_allowed(scene: Scene) -> None:
    _identity(scene, valid_from="2027-01-01T00:00:00Z")


@attack("does not count: alice signed at 2026-11-23T20:00:00Z, valid until 2026-01-01T00:00:00Z")
def the_signer_whose_time_is_over_is_outvoted_by_a_countersignature_and_still_signs_the_rest(
    scene: Scene,
) -> None:
    """That the maker's own signature is not counted is a note then; of the rest it must be a finding."""
    maker = Identity("alice", tuple(keys.public_keys(scene.signer)), valid_until="2026-01-01T00:00:00Z")
    scene.trust(identities=(maker, Identity("bob", tuple(keys.public_keys(scene.stranger)))))
    for step in (10, 20, 30):
        again = signed(strict_json.dumps(payload_of(scene.bundle(step))), scene.stranger)
        (scene.checkpoint(step) / "provenance" / "countersignature-0.sigstore.json").write_bytes(again)


@attack("may not sign for the run sample")
def the_signer_signed_for_somebody_elses_run(scene: Scene) -> None:
    _identity(scene, runs=("other-*",))


@attack("requires a statement of kind evaluation", 4)
def a_required_evaluation_is_not_there(scene: Scene) -> None:
    scene.trust(required=frozenset({policies.CHECKPOINT, "evaluation"}))


def _identity(scene: Scene, **limits: Any) -> None:
    scene.trust(identities=(Identity("alice", tuple(keys.public_keys(scene.signer)), **limits),))


@attack(NOBODY)
def a_signature_is_malleated(scene: Scene) -> None:
    """ECDSA has a twin of each signature; a DER prefix must not make one of another length good either."""
    path = scene.checkpoint(20) / MODEL_SIG
    bundle = json.loads(path.read_bytes())
    signature = base64.b64decode(bundle["dsseEnvelope"]["signatures"][0]["sig"])
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signature + b"\0").decode()
    path.write_bytes(strict_json.dumps(bundle))


@attack(NOBODY)
def a_signature_uses_another_hash(scene: Scene) -> None:
    path = scene.checkpoint(20) / MODEL_SIG
    payload = strict_json.dumps(payload_of(path))
    assert scene.signer.p256 is not None
    message = envelope.pae(envelope.PAYLOAD_TYPE, payload)
    signature = scene.signer.p256.sign(message, ec.ECDSA(hashes.SHA384()))
    encoded = [{"sig": base64.b64encode(signature).decode(), "keyid": ""}]
    edit_json(path, lambda bundle: bundle["dsseEnvelope"].update(signatures=encoded))


@attack("has changed where no signature reaches: layout, base64 or key hint")
def the_key_hint_of_the_slsa_statement_is_another(scene: Scene) -> None:
    path = scene.checkpoint(20) / layout.SLSA_BUNDLE
    document = json.loads(path.read_bytes())
    document["verificationMaterial"]["publicKey"]["hint"] = "0" * 64
    path.write_bytes(strict_json.dumps(document))


@attack("has changed where no signature reaches: layout, base64 or key hint")
def a_blank_is_put_into_the_model_signature(scene: Scene) -> None:
    path = scene.checkpoint(20) / layout.MODEL_SIGNATURE
    path.write_bytes(path.read_bytes().replace(b'":{', b'": {', 1))
