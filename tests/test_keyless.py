"""Signatures without a key: the policy says who may sign; another certificate, time or log is refused."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import run_folder
from attack import payload_of
from attacks_on_keyless import CI, ENTRY, INSTANCE, Bundle, changed
from authority import Authority
from run_folder import SampleRun

from harness.audit.verification import verify
from harness.cli import main
from harness.errors import ConfigError, EnvironmentFault, VerificationFailed
from harness.provenance import later, statements
from harness.provenance.policy import reader
from harness.provenance.policy.policy_schema import FORMAT
from harness.provenance.signing import keyless

pytest.importorskip("sigstore")
from sigstore_instance import IDENTITY, ISSUER, identity_token, text_of

TWICE = "{issuer: a, identity: b}"


@dataclass
class Scene:
    """A run of one checkpoint, and a policy beside it that accepts its maker and CI."""

    run: SampleRun
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.run.saved[10].folder

    def policy(self, *rules: str, ci: str = "") -> Path:
        """The policy's file; ``ci`` are more rules for that identity."""
        (self.folder / "root.json").write_text(json.dumps(INSTANCE.trusted_root()))
        keys = "keys: [me.ed25519.pub, me.p256.pub]"
        text = [
            f"format: {FORMAT}",
            "identities:",
            f"  - {{name: me, {keys}}}",
            f"  - {CI % ci}",
        ]
        file = self.folder / "policy.yaml"
        file.write_text("\n".join([*text, "sigstore: root.json", *rules]) + "\n")
        return file

    def statement(self, kind: str = later.SVR) -> bytes:
        """What is signed: the checkpoint's own statement, or that it was verified."""
        own = payload_of(self.checkpoint / "provenance" / "checkpoint.sigstore.json")
        if kind == later.COUNTERSIGNATURE:
            data = (self.checkpoint / "provenance" / "checkpoint.sigstore.json").read_bytes()
            return base64.b64decode(json.loads(data)["dsseEnvelope"]["payload"])
        predicate = {
            "verifier": {"id": "urn:example"},
            "timeCreated": "2026-01-01T00:00:00Z",
            "properties": ["GOOD"],
        }
        subject = own["subject"][0]
        words = (
            subject["digest"]["sha256"],
            subject["digest"]["dirHash"],
            subject["name"],
            later.TYPES[later.SVR],
        )
        return statements.statement_bytes(*words, predicate)

    def add(self, bundle: Bundle | bytes, kind: str = later.SVR) -> None:
        """Put a later statement where `harness attest` would."""
        data = bundle if isinstance(bundle, bytes) else json.dumps(bundle).encode()
        (self.checkpoint / later.path_of(f"{kind}-0")).write_bytes(data)

    def judged(self, policy: Path) -> tuple[int, str]:
        """Exit code of verify, and its findings, a line each; its notes where there is none."""
        report = verify.verify(self.run.root, reader.load(policy), quiet=True)
        return report.exit_code, "\n".join(map(str, report.findings)) or "\n".join(report.notes)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """A fresh one."""
    run = SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "me"))
    run.advance(10)
    return Scene(run, tmp_path)


def test_what_attest_signs_without_a_key_verifies_offline(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: services of this machine that follow the specifications, asked by sigstore's own client; then
    `harness verify` with nobody listening; the token is nowhere."""
    token = identity_token()
    monkeypatch.setenv(keyless.TOKEN, token)
    config = tmp_path / "instance.json"
    assert scene.judged(scene.policy("required: [checkpoint, slsa, svr]", "threshold: 2"))[0] == 4
    trust = ["--policy", str(scene.policy())]
    with INSTANCE.listening():
        config.write_text(json.dumps(INSTANCE.client_config()))
        for kind in (later.SVR, later.COUNTERSIGNATURE):
            words = ["--kind", kind, "--keyless", "--sigstore-config", str(config)]
            assert main(["attest", str(scene.checkpoint), *words, *trust, "--json"]) == 0
            said = capsys.readouterr()
            told = json.loads(said.out)
            assert (told["identity"], told["issuer"], told["log_record"]) == (IDENTITY, ISSUER, None)
            assert token not in said.out + said.err
    policy = scene.policy("required: [checkpoint, slsa, svr]", "threshold: 2")
    assert main(["verify", str(scene.run.root), "--policy", str(policy), "--json"]) == 0
    verdict = capsys.readouterr().out
    assert "svr-0: HARNESS_CHECKPOINT_VERIFIED (signed by ci)" in verdict
    left = b"".join(path.read_bytes() for path in scene.run.root.rglob("*") if path.is_file())
    assert token.encode() not in left
    assert main(["attest", str(scene.checkpoint), *words, *trust]) == 3
    said = capsys.readouterr()
    assert said.err.startswith("harness: sigstore did not sign: ")
    assert (len(said.err.splitlines()), token in said.err) == (1, False)


def test_a_bundle_by_hand_is_accepted_and_its_time_is_that_of_the_certificate(scene: Scene) -> None:
    """Oracle: a bundle that was written from the specifications; certificates of an hour ago, years later."""
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    within = int(hour_ago.timestamp()) + 60
    scene.add(INSTANCE.bundle(scene.statement(), start=hour_ago, at=within))
    code, text = scene.judged(scene.policy("required: [checkpoint, slsa, svr]"))
    assert (code, "GOOD (signed by ci)" in text) == (0, True), text
    before, after = (f"{hour_ago + timedelta(minutes=minutes):%Y-%m-%dT%H:%M:%SZ}" for minutes in (-1, 11))
    for rules, expected in (
        (f"from: {before}, until: {after}", 0),
        (f"from: {before}, until: {after}, proven: true", 0),
        (f"from: {after}", 1),
        (f"until: {before}", 1),
        (f"from: {hour_ago + timedelta(minutes=5):%Y-%m-%dT%H:%M:%SZ}", 1),
        (f"until: {hour_ago + timedelta(minutes=5):%Y-%m-%dT%H:%M:%SZ}", 1),
    ):
        code, text = scene.judged(scene.policy(ci=f", valid: {{{rules}}}"))
        assert (code, "does not count: " in text) == (expected, expected == 1), (rules, text)


def test_a_timestamping_authority_of_the_root_shows_the_time(scene: Scene) -> None:
    """Oracle: RFC 3161 timestamps of an authority made here, in place of Rekor's promise; good within the
    certificate's minutes and by an authority of the root only."""
    tsa, other = Authority("tsa"), Authority("other")
    payload, now = scene.statement(), datetime.now(UTC)
    good = changed(INSTANCE.bundle(payload), *ENTRY, "inclusionPromise", to=None)
    signature = base64.b64decode(good["dsseEnvelope"]["signatures"][0]["sig"])

    def judged(stamps: list[bytes]) -> tuple[int, str]:
        policy = scene.policy()
        root = INSTANCE.trusted_root()
        root["timestampAuthorities"] = [INSTANCE.authority("tsa", [tsa.certificate, tsa.root])]
        (scene.folder / "root.json").write_text(json.dumps(root))
        told = {"rfc3161Timestamps": [{"signedTimestamp": text_of(each)} for each in stamps]}
        scene.add(changed(good, "verificationMaterial", "timestampVerificationData", to=told))
        return scene.judged(policy)

    def stamp(by: Authority, minutes: int, message: bytes = signature) -> bytes:
        return by.stamp(message, f"{now + timedelta(minutes=minutes):%Y%m%d%H%M%SZ}")

    assert judged([stamp(tsa, 1)])[0] == 0
    for stamps, words in (
        ([], "must contain an inclusion promise or signed timestamp"),
        ([stamp(tsa, 30)], "not valid at validation time"),
        ([stamp(tsa, -30)], "not valid at validation time"),
        ([stamp(other, 1)], "not enough sources of verified time"),
        ([stamp(tsa, 1, b"another")], "not enough sources of verified time"),
    ):
        code, text = judged(stamps)
        assert (code, words in text) == (1, True), text


def test_each_byte_of_certificate_and_log_entry_is_bound(scene: Scene) -> None:
    """Oracle: no bit of the certificate, the signature, the log's entry or its promise may change."""
    payload = scene.statement()
    good = INSTANCE.bundle(payload)
    root = json.dumps(INSTANCE.trusted_root()).encode()
    subjects = [keyless.Subject(ISSUER, IDENTITY)]
    places = [
        ("verificationMaterial", "certificate", "rawBytes"),
        (*ENTRY, "canonicalizedBody"),
        (*ENTRY, "inclusionPromise", "signedEntryTimestamp"),
        (*ENTRY, "logId", "keyId"),
    ]
    for place in places:
        value: Any = good
        for step in place:
            value = value[step]
        data = base64.b64decode(value)
        for index in range(0, len(data), 7):
            broken = data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]
            text = json.dumps(changed(good, *place, to=text_of(broken))).encode()
            with pytest.raises(VerificationFailed):
                keyless.open_bundle(text, subjects, root, where="there")


def test_limits_of_the_identity_hold(scene: Scene) -> None:
    """Oracle: the policy's own rules: kinds, runs, revoked keys; without a keyless identity nothing is."""
    good = INSTANCE.bundle(scene.statement())
    scene.add(good)
    assert scene.judged(scene.policy(ci=", statements: [svr]"))[0] == 0
    for ci, words in (
        (", statements: [test-result]", "may not sign a statement of kind svr"),
        (", runs: [other]", "may not sign for the run sample"),
    ):
        code, text = scene.judged(scene.policy(ci=ci))
        assert (code, words in text) == (1, True), text
    root = json.dumps(INSTANCE.trusted_root()).encode()
    data = json.dumps(good).encode()
    signed = keyless.open_bundle(data, [keyless.Subject(ISSUER, IDENTITY)], root, where="x")
    assert signed is not None
    code, text = scene.judged(scene.policy(f'revoked: ["{signed.key.key_id}"]'))
    assert (code, "revoked key" in text) == (1, True), text
    keys = [str(scene.folder / f"me.{name}.pub") for name in ("ed25519", "p256")]
    assert main(["verify", str(scene.run.root), "--key", *keys]) == 1


def _an_hour_ago() -> str:
    return f"{datetime.now(UTC) - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"


def test_a_countersignature_counts_for_the_threshold_and_no_key_is_replaced(scene: Scene) -> None:
    """Oracle: a threshold of two people; the checkpoint's own statement still takes a key."""
    policy = scene.policy("threshold: 2")
    assert scene.judged(policy)[0] == 4
    payload = scene.statement(later.COUNTERSIGNATURE)
    scene.add(INSTANCE.bundle(payload), later.COUNTERSIGNATURE)
    assert scene.judged(policy)[0] == 0
    # Younger than the checkpoint, which says when it was made; sigstore says when CI has signed.
    assert scene.judged(scene.policy("threshold: 2", ci=f", valid: {{from: {_an_hour_ago()}}}"))[0] == 0
    policy = scene.policy("threshold: 2")
    scene.add(INSTANCE.bundle(scene.statement()), later.COUNTERSIGNATURE)
    assert scene.judged(policy)[0] == 1
    own = scene.checkpoint / "provenance" / "checkpoint.sigstore.json"
    own.write_text(json.dumps(INSTANCE.bundle(payload)))
    code, text = scene.judged(policy)
    assert (code, "accepted keys" in text) == (1, True), text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sigstore: root.json", "no identity is keyless"),
        (f"  - {CI % ''}", "names no trusted root"),
        (f"  - {CI % ''}\nsigstore: nowhere.json", "is missing"),
        (
            f"  - {CI % ''}\n  - {{name: x, keyless: [{TWICE}, {TWICE}]}}",
            "twice",
        ),
        (f"  - {CI % ''}\n  - {(CI % '').replace('ci', 'two', 1)}\nsigstore: root.json", "are the same"),
        ("  - {name: x}", "neither `keys` nor `keyless`"),
        ("  - {name: x, keyless: []}", "an empty one"),
        ("  - {name: x, keyless: [{issuer: a}]}", "no `identity`"),
        ('  - {name: x, keyless: [{issuer: a, identity: ""}]}', "is no text"),
        ("  - {name: x, keyless: [{issuer: a, identity: b, subject: c}]}", "unknown key `subject`"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(text: str, words: str, scene: Scene) -> None:
    """Oracle: `ConfigError` with the line."""
    scene.policy()
    keys = "  - {name: me, keys: [me.ed25519.pub]}"
    file = scene.folder / "odd.yaml"
    file.write_text(f"format: {FORMAT}\nidentities:\n{keys}\n{text}\n")
    with pytest.raises(ConfigError, match=words) as refused:
        reader.load(file)
    assert str(refused.value.where).startswith(f"{file}:")


def test_a_root_that_is_none_is_said_and_nothing_verifies(scene: Scene) -> None:
    """Oracle: exit code 1, never 0."""
    scene.add(INSTANCE.bundle(scene.statement()))
    policy = scene.policy()
    for root in ("{}", "no JSON", json.dumps({**INSTANCE.trusted_root(), "tlogs": []})):
        (scene.folder / "root.json").write_text(root)
        code, text = scene.judged(policy)
        assert (code, "does not read the trusted root" in text) == (1, True), text


def test_policy_check_knows_who_signs_without_a_key(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a required kind that CI may sign is good; one that takes a key, or past its time, is odd."""

    def told(required: str, ci: str, me: str = "") -> tuple[int, str]:
        policy = scene.policy(f"required: [checkpoint, {required}]", ci=ci)
        policy.write_text(policy.read_text().replace("me.p256.pub]}", f"me.p256.pub]{me}}}"))
        return main(["policy", "check", str(policy)]), capsys.readouterr().out

    only = ", statements: [checkpoint, model-signature]"
    assert told("model-signature, svr", "", only)[0] == 0
    code, text = told("model-signature, svr", ", valid: {until: 2020-01-01}", only)
    assert (code, "who may sign it may not now (ci): svr" in text) == (1, True)
    code, text = told("model-signature, export", "", only)
    assert (code, "export is required, and no identity may sign it" in text) == (1, True)


def test_what_signing_needs_is_said_in_one_line(
    scene: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: exit codes; no token is shown."""
    trust = ["--key", str(scene.folder / "me.ed25519.pub"), str(scene.folder / "me.p256.pub")]
    words = ["attest", str(scene.checkpoint), "--kind", "svr", *trust]
    monkeypatch.setattr("sigstore.oidc.detect_credential", lambda: None)
    monkeypatch.delenv(keyless.TOKEN, raising=False)
    config = scene.folder / "config.json"
    config.write_text(json.dumps({"mediaType": "x"}))
    cases: list[tuple[list[str], str | None, int, str]] = [
        (["--keyless"], None, 3, "there is no identity token"),
        (["--keyless"], "secret.secret.secret", 3, "cannot be used"),
        (["--keyless"], identity_token(exp=5), 3, "cannot be used"),
        (["--keyless", "--sigstore-config", str(config)], identity_token(), 2, "instance is not known"),
        (["--sigstore-config", str(config)], None, 2, "add --keyless"),
        (["--keyless", "--sigstore-config", "/nowhere"], identity_token(), 2, "is missing"),
    ]
    for more, token, expected, text in cases:
        if token is not None:
            monkeypatch.setenv(keyless.TOKEN, token)
        assert main([*words, *more]) == expected, more
        said = capsys.readouterr().err
        assert (len(said.splitlines()), text in said) == (1, True), said
        assert token is None or token not in said


def test_what_sigstore_verified_must_be_what_is_read(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a verifier that answers for another payload, another type, or asks for nobody's identity."""
    data = json.dumps(INSTANCE.bundle(scene.statement())).encode()
    payload = scene.statement()
    subject = keyless.Subject(ISSUER, IDENTITY)
    for asks, answer in (
        (True, ("application/vnd.in-toto+json", payload + b" ")),
        (True, ("application/json", payload)),
        (False, ("application/vnd.in-toto+json", payload)),
    ):

        class Stub:
            def verify_dsse(
                self, bundle: Any, policy: Any, asks: bool = asks, answer: tuple[str, bytes] = answer
            ) -> tuple[str, bytes]:
                if asks:
                    policy.verify(bundle.signing_certificate)
                return answer

        monkeypatch.setattr(keyless, "_verifier", lambda root: Stub())
        with pytest.raises(VerificationFailed, match="over its payload"):
            keyless.open_bundle(data, [subject], b"", where="x")


def test_without_the_package_nothing_is_verified(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `EnvironmentFault` with the extra to install."""
    scene.add(INSTANCE.bundle(scene.statement()))
    policy = reader.load(scene.policy())
    keyless._verifier.cache_clear()
    monkeypatch.setitem(sys.modules, "sigstore.models", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'harness\[sigstore\]'"):
        verify.verify(scene.run.root, policy, quiet=True)
    (scene.checkpoint / later.path_of("svr-0")).unlink()
    assert verify.verify(scene.run.root, policy, quiet=True).exit_code == 0
