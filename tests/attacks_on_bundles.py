"""Attacks on the bundle around a statement."""

from __future__ import annotations

import base64
import json
import shutil
from typing import Any

import run_folder
from attack import NOBODY, Scene, attack, edit_json, payload_of

from harness.format import layout, strict_json
from harness.provenance.signing import envelope, keys


@attack(NOBODY)
def a_statement_is_signed_again_by_a_stranger(scene: Scene) -> None:
    scene.restate(20, lambda statement: None, by=scene.stranger)


@attack(NOBODY)
def a_statement_is_edited_under_its_old_signature(scene: Scene) -> None:
    statement = payload_of(scene.bundle(20))
    statement["predicate"]["run"]["seed"] = 4
    payload = base64.b64encode(strict_json.dumps(statement)).decode()
    edit_json(scene.bundle(20), lambda bundle: bundle["dsseEnvelope"].update(payload=payload))


@attack(NOBODY)
def a_run_is_made_by_a_stranger(scene: Scene) -> None:
    shutil.rmtree(scene.root)
    run_folder.build(scene.root, scene.stranger)


@attack(NOBODY)
def a_stranger_puts_the_key_into_the_folder(scene: Scene) -> None:
    stranger = keys.public_keys(scene.stranger)[0]
    scene.restate(20, lambda statement: None, by=scene.stranger)
    material = {"publicKey": {"hint": stranger.hint, "rawBytes": base64.b64encode(stranger.pem).decode()}}
    edit_json(scene.bundle(20), lambda bundle: bundle.update(verificationMaterial=material))
    (scene.checkpoint(20) / "provenance" / "key.pub").write_bytes(stranger.pem)


@attack(NOBODY)
def a_stranger_claims_the_hint_of_the_right_key(scene: Scene) -> None:
    hint = keys.public_keys(scene.signer)[0].hint
    scene.restate(20, lambda statement: None, by=scene.stranger)
    edit_json(scene.bundle(20), lambda each: each["verificationMaterial"]["publicKey"].update(hint=hint))


@attack(NOBODY)
def a_statement_has_an_ecdsa_signature_of_the_identity(scene: Scene) -> None:
    """The P-256 half of the right identity is for model.sig only."""
    payload = base64.b64decode(json.loads(scene.bundle(20).read_bytes())["dsseEnvelope"]["payload"])
    assert scene.signer.p256 is not None
    public = keys.public_keys(scene.signer)[1]
    scene.bundle(20).write_bytes(envelope.sign(payload, scene.signer.p256, public))


@attack(NOBODY)
def a_payload_is_signed_without_its_type(scene: Scene) -> None:
    """Signing the payload itself instead of DSSE's encoding must not count."""
    payload = base64.b64decode(json.loads(scene.bundle(20).read_bytes())["dsseEnvelope"]["payload"])
    signature = {"sig": base64.b64encode(scene.signer.ed25519.sign(payload)).decode(), "keyid": ""}
    edit_json(scene.bundle(20), lambda each: each["dsseEnvelope"].update(signatures=[signature]))


@attack("is not the manifest that the statement is about")
def statements_are_swapped_between_checkpoints(scene: Scene) -> None:
    one, other = scene.bundle(10).read_bytes(), scene.bundle(20).read_bytes()
    scene.bundle(10).write_bytes(other)
    scene.bundle(20).write_bytes(one)


@attack("is a 'https://slsa.dev/provenance/v1', not urn:harness:predicate:checkpoint/v1")
def the_slsa_statement_stands_in_for_ours(scene: Scene) -> None:
    shutil.copy(scene.checkpoint(20) / layout.SLSA_BUNDLE, scene.bundle(20))


def _envelope(scene: Scene, **changes: Any) -> None:
    edit_json(scene.bundle(20), lambda bundle: bundle["dsseEnvelope"].update(changes))


@attack("has the payload type 'application/json'")
def the_payload_type_is_another(scene: Scene) -> None:
    _envelope(scene, payloadType="application/json")


@attack("does not have exactly one signature")
def a_bundle_has_two_signatures(scene: Scene) -> None:
    signatures = json.loads(scene.bundle(20).read_bytes())["dsseEnvelope"]["signatures"]
    _envelope(scene, signatures=signatures * 2)


@attack("does not have exactly one signature")
def a_bundle_has_no_signature(scene: Scene) -> None:
    _envelope(scene, signatures=[])


@attack(NOBODY)
def a_bundle_has_an_empty_signature(scene: Scene) -> None:
    _envelope(scene, signatures=[{"sig": "", "keyid": ""}])


@attack("has broken base64")
def a_signature_is_no_base64(scene: Scene) -> None:
    _envelope(scene, signatures=[{"sig": "!!!!", "keyid": ""}])


@attack("has the media type")
def the_media_type_is_another(scene: Scene) -> None:
    edit_json(scene.bundle(20), lambda bundle: bundle.update(mediaType="application/json"))


@attack("is a bundle with other fields than")
def a_bundle_has_an_unknown_field(scene: Scene) -> None:
    edit_json(scene.bundle(20), lambda bundle: bundle.update(trusted=True))


@attack("has the key `dsseEnvelope` twice")
def a_bundle_has_a_key_twice(scene: Scene) -> None:
    data = scene.bundle(20).read_bytes()
    scene.bundle(20).write_bytes(b'{"dsseEnvelope":null,' + data[1:])


@attack("is larger than")
def a_bundle_is_oversized(scene: Scene) -> None:
    with open(scene.bundle(20), "ab") as stream:
        stream.truncate((16 << 20) + 1)


@attack("is nested deeper than 64")
def a_bundle_is_nested_deeply(scene: Scene) -> None:
    scene.bundle(20).write_bytes(b'{"a":' * 100_000)


@attack("is not JSON")
def a_bundle_is_empty(scene: Scene) -> None:
    scene.bundle(20).write_bytes(b"")


@attack("provenance/checkpoint.sigstore.json", 4)
def a_statement_is_removed(scene: Scene) -> None:
    scene.bundle(30).unlink()
    scene.target = scene.checkpoint(30)
