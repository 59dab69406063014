"""Attacks on statements that somebody signs without a key: bundles of a sigstore instance of this machine.

Each bundle has one thing wrong; the same one without it is in tests/honest.py's register.
"""

from __future__ import annotations

import base64
import copy
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from attack import NOBODY, Scene, attack, payload_of, signed
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from sigstore_instance import IDENTITY, ISSUER, Instance, text_of

from harness.format import layout
from harness.provenance import later, statements
from harness.provenance.policy import policy_schema, reader
from harness.provenance.signing import keys

Bundle = dict[str, Any]
INSTANCE = Instance()
CI = f'{{name: ci, keyless: [{{issuer: "{ISSUER}", identity: "{IDENTITY}"}}]%s}}'
NOBODY_YET = f'{{name: other, keyless: [{{issuer: "{ISSUER}", identity: nobody}}]}}'
STEP = 30


def changed(bundle: Bundle, *path: str | int, to: Any) -> Bundle:
    """``bundle`` with another value at ``path``."""
    copied = copy.deepcopy(bundle)
    place: Any = copied
    for name in path[:-1]:
        place = place[name]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return copied


def flipped(bundle: Bundle, *path: str | int) -> Bundle:
    """``bundle`` with one bit of the base64 at ``path`` changed."""
    place: Any = bundle
    for name in path:
        place = place[name]
    data = bytearray(base64.b64decode(place))
    data[len(data) // 2] ^= 1
    return changed(bundle, *path, to=text_of(bytes(data)))


ENTRY = ("verificationMaterial", "tlogEntries", 0)
SIGNATURE = ("dsseEnvelope", "signatures", 0, "sig")
Broken = Callable[[bytes, Bundle], Bundle | bytes]


def _an_hour_off(minutes: int) -> Broken:
    return lambda payload, good: INSTANCE.bundle(payload, at=int(time.time()) + 60 * minutes)


def _mixed(payload: bytes, good: Bundle) -> Bundle:
    """The log's entry of another statement by the same identity."""
    other = INSTANCE.bundle(payload + b" ")
    return changed(good, *ENTRY, to=other["verificationMaterial"]["tlogEntries"][0])


def _of_another_log(payload: bytes, good: Bundle) -> Bundle:
    """The whole of another instance, but for the certificate's authority."""
    other = Instance()
    other.fulcio, other.root, other._name = INSTANCE.fulcio, INSTANCE.root, INSTANCE._name
    return other.bundle(payload, ct=INSTANCE.ct)


BROKEN: dict[str, tuple[str, Broken]] = {
    "another identity": (
        "SANs do not match",
        lambda payload, good: INSTANCE.bundle(payload, identity=f"{IDENTITY}2"),
    ),
    "identity of a person": (
        "SANs do not match",
        lambda payload, good: INSTANCE.bundle(payload, identity="me@example.org"),
    ),
    "another issuer": (
        "OIDCIssuer does not match",
        lambda payload, good: INSTANCE.bundle(payload, issuer=f"{ISSUER}/"),
    ),
    "another instance": ("certificate chain: ", lambda payload, good: Instance().bundle(payload)),
    "another log": ("checkpoint: invalid signature", _of_another_log),
    "certificate transparency of nobody": (
        "does not contain a signed certificate timestamp",
        lambda payload, good: INSTANCE.bundle(payload, logged=False),
    ),
    "certificate transparency of another": (
        "SCT verify failed",
        lambda payload, good: INSTANCE.bundle(payload, ct=ec.generate_private_key(ec.SECP256R1())),
    ),
    "a certificate for servers": (
        "does not contain `code signing`",
        lambda payload, good: INSTANCE.bundle(payload, use=ExtendedKeyUsageOID.SERVER_AUTH),
    ),
    "logged an hour too late": ("not valid at validation time", _an_hour_off(60)),
    "logged an hour too early": ("not valid at validation time", _an_hour_off(-60)),
    "another payload": (
        "DSSE: invalid signature",
        lambda payload, good: flipped(good, "dsseEnvelope", "payload"),
    ),
    "another signature": ("DSSE: invalid signature", lambda payload, good: flipped(good, *SIGNATURE)),
    "another certificate": (
        "certificate chain: ",
        lambda payload, good: flipped(good, "verificationMaterial", "certificate", "rawBytes"),
    ),
    "certificate of another signature": (
        "DSSE: invalid signature",
        lambda payload, good: changed(
            good,
            *("verificationMaterial", "certificate"),
            to=INSTANCE.bundle(payload)["verificationMaterial"]["certificate"],
        ),
    ),
    "no promise of the log": (
        "must contain an inclusion promise or signed timestamp",
        lambda payload, good: changed(good, *ENTRY, "inclusionPromise", to=None),
    ),
    "another promise": (
        "SET: invalid inclusion promise",
        lambda payload, good: flipped(good, *ENTRY, "inclusionPromise", "signedEntryTimestamp"),
    ),
    "another time": (
        "SET: invalid inclusion promise",
        lambda payload, good: changed(good, *ENTRY, "integratedTime", to=str(int(time.time()) + 1)),
    ),
    "no time": (
        "not enough sources of verified time",
        lambda payload, good: changed(good, *ENTRY, "integratedTime", to="0"),
    ),
    "no proof": (
        "failed to load bundle",
        lambda payload, good: changed(good, *ENTRY, "inclusionProof", to=None),
    ),
    "another root": (
        "invalid root hash",
        lambda payload, good: flipped(good, *ENTRY, "inclusionProof", "rootHash"),
    ),
    "another head": (
        "Signature not found for log ID",
        lambda payload, good: changed(
            good,
            *(*ENTRY, "inclusionProof", "checkpoint"),
            to=_of_another_log(payload, good)["verificationMaterial"]["tlogEntries"][0]["inclusionProof"][
                "checkpoint"
            ],
        ),
    ),
    "another entry": ("invalid root hash", lambda payload, good: flipped(good, *ENTRY, "canonicalizedBody")),
    "entry of another statement": ("payload hash does not match", _mixed),
    "no entry": ("expected exactly one log entry", lambda payload, good: changed(good, *ENTRY[:2], to=[])),
    "entry of an artefact": (
        "Unsupported DSSE log entry type",
        lambda payload, good: changed(
            good, *ENTRY, "kindVersion", to={"kind": "hashedrekord", "version": "0.0.1"}
        ),
    ),
    "two signatures": (
        "exactly one signature",
        lambda payload, good: changed(good, *SIGNATURE[:2], to=good["dsseEnvelope"]["signatures"] * 2),
    ),
    "a chain": (
        "other verification material",
        lambda payload, good: changed(
            good,
            *("verificationMaterial", "x509CertificateChain"),
            to={"certificates": [good["verificationMaterial"]["certificate"]]},
        ),
    ),
    "a key, too": (
        "other verification material",
        lambda payload, good: changed(good, *("verificationMaterial", "publicKey"), to={"hint": ""}),
    ),
    "an older bundle": (
        "media type",
        lambda payload, good: changed(
            good, "mediaType", to="application/vnd.dev.sigstore.bundle+json;version=0.3"
        ),
    ),
    "a repeated key": (
        "`mediaType` twice",
        lambda payload, good: json.dumps(good).encode()[:-1] + b',"mediaType":""}',
    ),
    "a certificate of no bytes": (
        "asn1",
        lambda payload, good: changed(good, *("verificationMaterial", "certificate"), to={"rawBytes": ""}),
    ),
    "a certificate that is a text": (
        "failed to load bundle",
        lambda payload, good: changed(good, *("verificationMaterial", "certificate"), to="x"),
    ),
    "another checkpoint": (
        "is about another checkpoint",
        lambda payload, good: INSTANCE.bundle(
            payload.replace(json.loads(payload)["subject"][0]["digest"]["sha256"].encode(), b"0" * 64)
        ),
    ),
    "another payload type": (
        "has the payload type",
        lambda payload, good: changed(good, *("dsseEnvelope", "payloadType"), to="application/json"),
    ),
}


def trust(
    scene: Scene, *rules: str, ci: str = "", instance: Instance = INSTANCE, me: str = "", other: str = ""
) -> None:
    """The auditor accepts the run's maker and CI, or an ``other``; ``ci`` and ``me`` are more rules."""
    pytest.importorskip("sigstore", reason="needs pip install 'harness[sigstore]'")
    folder = scene.root.parent
    for key in keys.public_keys(scene.signer):
        (folder / f"me.{key.algorithm}.pub").write_bytes(key.pem)
    (folder / "root.json").write_text(json.dumps(instance.trusted_root()))
    maker = f"{{name: me, keys: [me.ed25519.pub, me.p256.pub]{me}}}"
    lines = [f"format: {policy_schema.FORMAT}", "identities:", f"  - {maker}", f"  - {other or CI % ci}"]
    (folder / "policy.yaml").write_text("\n".join([*lines, "sigstore: root.json", *rules]) + "\n")
    scene.policy = reader.load(folder / "policy.yaml")


def statement(scene: Scene) -> bytes:
    """That the newest checkpoint was verified."""
    subject = payload_of(scene.bundle(STEP))["subject"][0]
    words = (subject["digest"]["sha256"], subject["digest"]["dirHash"], subject["name"])
    predicate = {"verifier": {"id": "urn:x"}, "timeCreated": "2026-01-01T00:00:00Z", "properties": ["GOOD"]}
    return statements.statement_bytes(*words, later.TYPES[later.SVR], predicate)


def own(scene: Scene, step: int = STEP) -> bytes:
    """What a countersignature signs: the checkpoint's own statement."""
    envelope = json.loads(scene.bundle(step).read_bytes())["dsseEnvelope"]
    return base64.b64decode(envelope["payload"])


def add(scene: Scene, bundle: Bundle | bytes, name: str = "svr-0") -> None:
    """Put a statement where `harness attest` would."""
    data = bundle if isinstance(bundle, bytes) else json.dumps(bundle).encode()
    (scene.checkpoint(STEP) / later.path_of(name)).write_bytes(data)


def _broken(change: Broken) -> Callable[[Scene], None]:
    def mutate(scene: Scene) -> None:
        trust(scene)
        payload = statement(scene)
        add(scene, change(payload, INSTANCE.bundle(payload)))

    return mutate


for _name, (_says, _change) in BROKEN.items():
    _mutate = _broken(_change)
    _mutate.__name__ = f"a keyless statement with {_name}"
    attack(_says)(_mutate)


@attack("ci may not sign a statement of kind svr")
def a_keyless_statement_of_a_kind_that_its_identity_may_not_sign(scene: Scene) -> None:
    trust(scene, ci=", statements: [test-result]")
    add(scene, INSTANCE.bundle(statement(scene)))


@attack("ci may not sign for the run sample")
def a_keyless_statement_of_a_run_that_its_identity_may_not_sign_for(scene: Scene) -> None:
    trust(scene, ci=", runs: [other]")
    add(scene, INSTANCE.bundle(statement(scene)))


@attack("does not count: ci signed at")
def a_keyless_statement_of_an_identity_whose_time_is_over(scene: Scene) -> None:
    trust(scene, ci=f", valid: {{until: {datetime.now(UTC) - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}}}")
    add(scene, INSTANCE.bundle(statement(scene)))


@attack("is signed with a revoked key")
def a_keyless_statement_whose_key_is_revoked(scene: Scene) -> None:
    bundle = INSTANCE.bundle(statement(scene))
    der = base64.b64decode(bundle["verificationMaterial"]["certificate"]["rawBytes"])
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    pem = x509.load_der_x509_certificate(der).public_key().public_bytes(*form)
    trust(scene, f'revoked: ["{keys.parse_public(pem, where="certificate").key_id}"]')
    add(scene, bundle)


@attack(NOBODY)
def a_keyless_statement_before_somebody_who_trusts_keys_only(scene: Scene) -> None:
    add(scene, INSTANCE.bundle(statement(scene)))


@attack("certificate chain: ")
def a_keyless_statement_before_somebody_who_trusts_another_instance(scene: Scene) -> None:
    trust(scene, instance=Instance())
    add(scene, INSTANCE.bundle(statement(scene)))


@attack(NOBODY)
def a_statement_under_a_certified_key_without_its_certificate(scene: Scene) -> None:
    trust(scene)
    bundle = INSTANCE.bundle(statement(scene))
    add(scene, changed(bundle, "verificationMaterial", to={"publicKey": {"hint": ""}, "tlogEntries": []}))


@attack("has no good keyless signature")
def a_certificate_beside_a_signature_of_the_makers_key(scene: Scene) -> None:
    trust(scene)
    payload = statement(scene)
    bundle = json.loads(signed(payload, scene.signer))
    material = INSTANCE.bundle(payload)["verificationMaterial"]
    add(scene, changed(bundle, "verificationMaterial", to=material))


@attack(NOBODY)
def the_checkpoint_itself_is_signed_without_a_key(scene: Scene) -> None:
    trust(scene)
    scene.bundle(STEP).write_text(json.dumps(INSTANCE.bundle(own(scene))))


@attack(NOBODY)
def the_slsa_statement_is_signed_without_a_key(scene: Scene) -> None:
    trust(scene)
    path = scene.checkpoint(STEP) / layout.SLSA_BUNDLE
    payload = base64.b64decode(json.loads(path.read_bytes())["dsseEnvelope"]["payload"])
    path.write_text(json.dumps(INSTANCE.bundle(payload)))


def countersign(scene: Scene, *steps: int, number: int = 0) -> None:
    """CI countersigns checkpoints."""
    for step in steps:
        path = scene.checkpoint(step) / later.path_of(f"countersignature-{number}")
        path.write_text(json.dumps(INSTANCE.bundle(own(scene, step))))


@attack("is signed by 2 of the 3 identities that the policy wants", 4)
def one_identity_countersigns_twice_without_a_key(scene: Scene) -> None:
    trust(scene, "threshold: 3", other=f"{CI % ''}\n  - {NOBODY_YET}")
    for number in range(2):
        countersign(scene, 10, 20, 30, number=number)


@attack("is signed by 1 of the 2 identities that the policy wants", 4)
def the_maker_countersigns_without_the_key(scene: Scene) -> None:
    mine = f', keyless: [{{issuer: "{ISSUER}", identity: "{IDENTITY}"}}]'
    trust(scene, "threshold: 2", me=mine, other=NOBODY_YET)
    countersign(scene, 10, 20, 30)


@attack("signs another statement than the checkpoint's")
def a_keyless_countersignature_is_that_of_another_checkpoint(scene: Scene) -> None:
    trust(scene, "threshold: 2")
    countersign(scene, 10, 20)
    add(scene, INSTANCE.bundle(own(scene, 20)), "countersignature-0")


@attack("is no statement of kind test-result")
def a_keyless_statement_is_renamed(scene: Scene) -> None:
    trust(scene, "required: [checkpoint, slsa, test-result]")
    add(scene, INSTANCE.bundle(statement(scene)), "test-result-0")


@attack("the policy requires a statement of kind svr", 4)
def a_required_keyless_statement_is_removed(scene: Scene) -> None:
    trust(scene, "required: [checkpoint, slsa, svr]")
