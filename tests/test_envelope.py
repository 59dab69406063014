"""`harness.provenance.signing.envelope`, beside securesystemslib's DSSE and the openssl command line."""

from __future__ import annotations

import base64
import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import accepted
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from harness.errors import VerificationFailed
from harness.format import strict_json
from harness.provenance.signing import envelope, keys
from harness.provenance.signing.keys import PublicKey, Signer

SIGNER = Signer(Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1()))
ED25519, P256 = keys.public_keys(SIGNER)
STRANGER = keys.public_keys(Signer(Ed25519PrivateKey.generate(), None))[0]


def signed(payload: bytes, key: PublicKey) -> bytes:
    """A bundle by one of the halves of the identity."""
    private = SIGNER.ed25519 if key is ED25519 else SIGNER.p256
    assert private is not None
    return envelope.sign(payload, private, key)


def test_the_encoding_that_is_signed_is_that_of_the_specification() -> None:
    """Oracle: the example of github.com/secure-systems-lab/dsse, protocol.md."""
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert envelope.pae("http://example.com/HelloWorld", b"hello world") == expected


@pytest.mark.parametrize("key", [ED25519, P256], ids=["ed25519", "p256"])
@given(payload=st.binary(max_size=100))
@settings(deadline=None, max_examples=30)
def test_a_payload_is_opened_with_the_key_that_signed_it(key: PublicKey, payload: bytes) -> None:
    """Oracle: the payload itself."""
    data = signed(payload, key)
    opened = envelope.open_bundle(data, [STRANGER, ED25519, P256], where="x")
    assert (opened.payload, opened.key) == (payload, key)
    with pytest.raises(VerificationFailed, match="signed by none of the 1 accepted keys"):
        envelope.open_bundle(data, [STRANGER], where="x")


@pytest.mark.parametrize("key", [ED25519, P256], ids=["ed25519", "p256"])
def test_securesystemslib_verifies_our_bundle(key: PublicKey) -> None:
    """Oracle: securesystemslib's DSSE; it looks keys up by keyid, which a bundle leaves empty."""
    document = json.loads(signed(b'{"a":1}', key))["dsseEnvelope"]
    document["signatures"][0]["keyid"] = "id"
    schemes = {"ed25519": ("ed25519", "ed25519"), "p256": ("ecdsa", "ecdsa-sha2-nistp256")}
    public = ED25519.raw.hex() if key is ED25519 else key.pem.decode()
    theirs = SSlibKey("id", *schemes[key.algorithm], {"public": public})
    assert Envelope.from_dict(copy.deepcopy(document)).verify([theirs], 1)
    document["payload"] = base64.b64encode(b'{"a":2}').decode()
    with pytest.raises(VerificationError):
        Envelope.from_dict(copy.deepcopy(document)).verify([theirs], 1)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("key", [ED25519, P256], ids=["ed25519", "p256"])
def test_openssl_verifies_our_bundle(key: PublicKey, tmp_path: Path) -> None:
    """Oracle: the openssl command line, given PAE, signature and PEM."""
    inner = json.loads(signed(b'{"a":1}', key))["dsseEnvelope"]
    (tmp_path / "pae").write_bytes(envelope.pae(inner["payloadType"], base64.b64decode(inner["payload"])))
    (tmp_path / "sig").write_bytes(base64.b64decode(inner["signatures"][0]["sig"]))
    (tmp_path / "pub").write_bytes(key.pem)
    words = {
        "ed25519": "pkeyutl -verify -pubin -inkey pub -rawin -in pae -sigfile sig",
        "p256": "dgst -sha256 -verify pub -signature sig pae",
    }
    command = ["openssl", *words[key.algorithm].split()]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    (tmp_path / "pae").write_bytes(b"DSSEv1 0  0 ")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0


def test_a_bundle_has_the_fields_of_the_sigstore_format() -> None:
    """Oracle: sigstore bundle v0.3 as model_signing 1.1.1 writes it, with the sha256 of the PEM as hint."""
    document = json.loads(signed(b"{}", P256))
    assert document["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    assert document["verificationMaterial"] == {"publicKey": {"hint": P256.hint}, "tlogEntries": []}
    assert document["dsseEnvelope"]["payloadType"] == "application/vnd.in-toto+json"
    assert [sorted(each) for each in document["dsseEnvelope"]["signatures"]] == [["keyid", "sig"]]


def test_both_alphabets_of_base64_are_read() -> None:
    """Oracle: DSSE 1.0.2: verifiers accept standard and URL-safe base64."""
    document = json.loads(signed(b"\xfb\xff\xfe" * 7, ED25519))
    inner = document["dsseEnvelope"]
    inner["payload"] = inner["payload"].replace("+", "-").replace("/", "_")
    inner["signatures"][0]["sig"] = inner["signatures"][0]["sig"].replace("+", "-").replace("/", "_")
    opened = envelope.open_bundle(strict_json.dumps(document), [ED25519], where="x")
    assert opened.payload == b"\xfb\xff\xfe" * 7


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "has the media type": lambda each: each.update(mediaType="text/plain"),
    "is a bundle with other fields": lambda each: each.pop("verificationMaterial"),
    "is an envelope with other fields": lambda each: each["dsseEnvelope"].update(extra=1),
    "has the payload type": lambda each: each["dsseEnvelope"].update(payloadType="text/plain"),
    "does not have exactly one signature": lambda each: each["dsseEnvelope"].update(signatures={}),
    "has a signature with other fields": lambda each: each["dsseEnvelope"].update(signatures=[{"keyid": ""}]),
    "has base64 that is no string": lambda each: each["dsseEnvelope"].update(payload=1),
    "has broken base64": lambda each: each["dsseEnvelope"].update(payload="e30"),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_bundle_of_another_form_is_refused(reason: str) -> None:
    """Oracle: the rules of the module; the reason names the rule."""
    document = json.loads(signed(b"{}", ED25519))
    CHANGES[reason](document)
    with pytest.raises(VerificationFailed, match=reason):
        envelope.open_bundle(strict_json.dumps(document), [ED25519], where="x")


@pytest.mark.parametrize("opening", [envelope.open_bundle, envelope.open_own])
@pytest.mark.parametrize("text", ["!!!!", "AAA", "AA=A", "A A=", "=AAA", "AA==AA=="])
def test_what_is_no_base64_is_told_as_such(opening: Callable[..., object], text: str) -> None:
    """Oracle: RFC 4648 section 4; Python's decoder passes over what is no letter of it."""
    good = signed(b"{}", ED25519)
    payload, signature = (part for part in good.split(b'"') if part.endswith(b"="))
    for part in (payload, signature):
        with pytest.raises(VerificationFailed, match="has broken base64"):
            opening(good.replace(part, text.encode()), [ED25519], where="x")


@pytest.mark.parametrize("payload", [b"1", b"{}"])
@pytest.mark.parametrize("part", ["payload", "sig"])
def test_of_two_spellings_of_base64_only_one_is_ours(payload: bytes, part: str) -> None:
    """Oracle: RFC 4648 section 3.5: the bits that padding leaves over mean nothing, and decoders differ."""
    good = signed(payload, ED25519)
    text = good.split(f'"{part}":"'.encode())[1].split(b'"')[0]
    letters = text.rstrip(b"=")
    other = letters[:-1] + bytes([letters[-1] + 1]) + text[len(letters) :]
    assert base64.b64decode(other) == base64.b64decode(text)
    changed = good.replace(text, other)
    assert envelope.open_bundle(changed, [ED25519], where="x").payload == payload
    with pytest.raises(VerificationFailed, match="has changed where no signature reaches"):
        envelope.open_own(changed, [ED25519], where="x")


GOOD = signed(b'{"a":1}', ED25519)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
@settings(deadline=None, max_examples=600)
def test_a_changed_byte_never_changes_what_was_signed(place: int, value: int) -> None:
    """Oracle: whatever still opens has the same payload and key; else our exception, no other."""
    data = bytearray(GOOD)
    data[place] = value
    for opened in accepted(envelope.open_bundle, bytes(data), [ED25519]):
        assert (opened.payload, opened.key) == (b'{"a":1}', ED25519)


@given(st.binary(max_size=100))
@settings(deadline=None)
def test_any_bytes_are_refused(data: bytes) -> None:
    """Oracle: nobody guesses a bundle; no other exception than ours."""
    with pytest.raises(VerificationFailed):
        envelope.open_bundle(data, [ED25519], where="x")
