"""Signing with keys in a real token: what it signs verifies everywhere, and its PIN is nowhere."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import run_folder
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st
from soft_token import MISSING, MODULE, PIN, REASON, SoftToken

from harness.cli import main
from harness.errors import EnvironmentFault, UsageError
from harness.provenance.signing import keys, pkcs11_token

needs_token = pytest.mark.skipif(MISSING, reason=REASON)
QUERY = "module-path=/m.so"


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SoftToken:
    """A token that is plugged in."""
    (tmp_path / "hsm").mkdir()
    made = SoftToken(tmp_path / "hsm")
    monkeypatch.setenv("SOFTHSM2_CONF", str(made.config))
    # The library reads where its tokens are when it is initialised; the token of the test before is gone.
    monkeypatch.setitem(pkcs11_token._initialised, str(MODULE), 0)
    return made


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    """Exit code and document of `harness WORDS --json`."""
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@needs_token
def test_a_run_that_a_token_signs_verifies_with_the_keys_of_openssl(
    token: SoftToken, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: `harness verify` with the public keys that openssl wrote, to which those of `keys show --out`
    are equal; an Ed25519 signature is the one that the imported private key makes, byte for byte; the PIN is
    in no byte of the run, nor on the screen."""
    signer = keys.load_signer(token.file)
    run = run_folder.build(tmp_path / "run", signer, steps=(10,))
    public = [token.root / f"me.{name}.pub" for name in ("ed25519", "p256")]
    checkpoint = run_folder.checkpoint(run, 10)
    words = ("--kind", "svr", "--signing-key", token.file, "--key", *public)
    assert told(capsys, "attest", checkpoint, *words)[0] == 0
    assert told(capsys, "verify", run, "--key", *public)[0] == 0
    assert told(capsys, "verify", run, "--key", public[1])[0] != 0
    assert (checkpoint / "model.sig").exists()
    code, shown = told(capsys, "keys", "show", token.file, "--out", tmp_path / "shown")
    assert (code, shown["private"]) == (0, True)
    assert [each["key_id"] for each in shown["keys"]] == [keys.load_public(each).key_id for each in public]
    assert [Path(each).read_bytes() for each in shown["written"]] == [each.read_bytes() for each in public]
    private = serialization.load_pem_private_key(token.private("ed25519").read_bytes(), password=None)
    message = os.urandom(100_000)
    assert keys.sign_with(signer.ed25519, message) == private.sign(message)  # type: ignore[union-attr,call-arg]
    assert main(["keys", "show", str(token.file)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("token ed25519 ")
    left = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert PIN not in said.out + said.err + repr(signer)
    assert PIN.encode() not in left


@needs_token
def test_a_token_that_is_pulled_out_fails_one_save_and_signs_again_when_it_is_back(
    token: SoftToken, tmp_path: Path
) -> None:
    """Oracle: the failure policy of any save (exit code 3 in the background thread, nothing half left), and
    `harness verify` of what was saved before and after."""
    from test_writer import exit_code, made, save_of

    signer = keys.load_signer(token.file)
    writing = made(tmp_path, signer)
    writing.save(save_of(1))
    writing.wait()
    token.pull()
    writing.save(save_of(2))
    with pytest.raises(EnvironmentFault, match="PKCS#11 token") as failed:
        writing.wait()
    assert "is it plugged in" in str(failed.value)
    assert str(token.file) in str(failed.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    token.put_back()
    writing.save(save_of(3))
    writing.wait()
    assert exit_code(tmp_path, signer) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000003"]


@needs_token
def test_threads_and_a_forked_process_sign_with_one_signer(token: SoftToken) -> None:
    """Oracle: every signature verifies, the parent's after the fork too; the child is given a lock that is
    taken, as by a thread of its parent."""
    signer = keys.load_signer(token.file)
    public = keys.public_keys(signer)
    good: list[bool] = []

    def sign(number: int) -> None:
        private = signer.p256 if number % 2 else signer.ed25519
        assert private is not None
        message = bytes([number]) * 1000
        good.append(public[number % 2].verifies(keys.sign_with(private, message), message))

    threads = [threading.Thread(target=sign, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    with pkcs11_token._locks[os.getpid()]:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                sign(0)
                sign(1)
                code = 0 if good[-2:] == [True, True] else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    sign(2)
    assert good == [True] * 9


def _rewritten(token: SoftToken, old: str, new: str) -> None:
    token.file.write_text(token.file.read_text().replace(old, new))


WRONG: dict[str, tuple[Callable[[SoftToken], object], str]] = {
    "pulled out": (SoftToken.pull, "is it plugged in"),
    "another token": (lambda token: _rewritten(token, "the%20lab", "my%20lab"), "no PKCS#11 token fits"),
    "another key": (
        lambda token: _rewritten(token, "%01", "%07"),
        "no private keys in the PKCS#11 token fit",
    ),
    "two keys": (lambda token: _rewritten(token, ";id=%01", ""), "2 private keys"),
    "no PIN named": (
        lambda token: token.file.write_text(token.uri("id=%01", f"module-path={MODULE}")),
        "add &pin-source=file:/PATH",
    ),
    "wrong PIN": (lambda token: token.pin.write_text("1234"), "PinIncorrect"),
    "two PINs": (lambda token: token.pin.write_text(f"{PIN}\n{PIN}\n"), "no single line"),
    "empty PIN": (lambda token: token.pin.write_text("\n"), "no single line"),
    "long PIN": (lambda token: token.pin.write_text("7" * 300), "no single line"),
    "PIN of bytes": (lambda token: token.pin.write_bytes(b"sesame-\xff"), "no UTF-8"),
    "PIN not there": (lambda token: token.pin.unlink(), "the PIN cannot be read: No such file"),
    "PIN for all": (lambda token: token.pin.chmod(0o640), "mode 0640"),
    "no module": (lambda token: _rewritten(token, str(MODULE), "/nowhere.so"), "module cannot be loaded"),
    "no PKCS#11 module": (
        lambda token: _rewritten(token, str(MODULE), sys.modules["_ssl"].__file__ or ""),
        "module cannot be loaded",
    ),
}


@needs_token
@pytest.mark.parametrize("name", WRONG)
def test_a_token_that_cannot_sign_is_one_line_with_a_remedy(
    name: str, token: SoftToken, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 3 of the command, without the PIN."""
    spoil, words = WRONG[name]
    spoil(token)
    with pytest.raises(EnvironmentFault, match=words):
        keys.load_signer(token.file)
    code = main(["keys", "show", str(token.file)])
    said = capsys.readouterr().err
    assert (code, len(said.splitlines())) == (3, 1)
    assert words in said
    assert "sesame" not in said


@needs_token
def test_a_key_for_model_sig_alone_is_no_identity(token: SoftToken) -> None:
    """Oracle: `UsageError`; with the Ed25519 key alone there is no model.sig."""
    token.file.write_text(token.uri("id=%02"))
    with pytest.raises(UsageError, match="names no single Ed25519 key"):
        keys.load_signer(token.file)
    token.file.write_text(token.uri("id=%01"))
    assert keys.load_signer(token.file).p256 is None


@needs_token
def test_doctor_says_which_token_would_sign_and_what_is_wrong_with_it(
    token: SoftToken, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the key id as openssl's file has it; a token that is not there is bad."""
    config = tmp_path / "c.yaml"
    config.write_text(
        f"run: {{dir: {tmp_path / 'run'}}}\ntask: {{kind: digits}}\nsigning: {{key: {token.file}}}\n"
        "train: {steps: 10, global_batch: 8, micro_batch: 4}\n"
    )
    identity = keys.load_public(token.root / "me.ed25519.pub").key_id[:16]
    for level, words in (("ok", identity), ("bad", "is it plugged in")):
        _, document = told(capsys, "doctor", config)
        (line,) = [each for each in document["checks"] if each["name"] == "signing key"]
        assert (line["level"], words in line["text"]) == (level, True), line
        token.pull() if level == "ok" else token.put_back()


@needs_token
def test_a_pin_in_the_run_folder_is_refused(token: SoftToken, tmp_path: Path) -> None:
    """Oracle: `UsageError`, before any token is asked; elsewhere the same file is taken."""
    run = tmp_path / "run"
    run.mkdir()
    assert keys.signing_key_path(token.file, run)[0] == token.file
    token.pin.rename(run / "pin")
    _rewritten(token, str(token.pin), str(run / "pin"))
    token.pull()
    with pytest.raises(UsageError, match="PIN lies in the run folder"):
        keys.signing_key_path(token.file, run)


def test_the_last_try_for_a_pin_is_never_used() -> None:
    """Oracle: the flags of PKCS #11, section 4.6 (CKF_USER_PIN_FINAL_TRY, _LOCKED), on a token that would be
    asked for nothing else."""
    pkcs11 = pytest.importorskip("pkcs11")
    (reference,) = pkcs11_token.references(f"pkcs11:object=a?{QUERY}&pin-source=/nowhere".encode(), "x")
    flags = pkcs11.TokenFlag
    for flag in (flags.USER_PIN_FINAL_TRY, flags.USER_PIN_LOCKED):
        asked: Any = SimpleNamespace(flags=flag | flags.LOGIN_REQUIRED)
        with pytest.raises(EnvironmentFault, match="one try left"):
            pkcs11_token._login(asked, reference)
    asked = SimpleNamespace(flags=flags.USER_PIN_COUNT_LOW)
    with pytest.raises(EnvironmentFault, match="the PIN cannot be read"):
        pkcs11_token._login(asked, reference)


def test_a_signature_that_does_not_verify_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `EnvironmentFault` for a token that signs with another key than it shows."""
    shown, used = (keys.Ed25519PrivateKey.generate() for _ in range(2))
    (reference,) = pkcs11_token.references(f"pkcs11:?{QUERY}".encode(), "x")
    key = pkcs11_token.TokenKey(reference, shown.public_key(), "me.pkcs11")
    monkeypatch.setattr(pkcs11_token.TokenKey, "sign", lambda self, message: used.sign(message))
    with pytest.raises(EnvironmentFault, match="the PKCS#11 token gave a signature that does not verify"):
        keys.sign_with(key, b"message")


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: exit code 3 and the extra to install."""
    monkeypatch.setitem(sys.modules, "pkcs11.exceptions", None)
    (tmp_path / "me.pkcs11").write_text(f"pkcs11:object=a?{QUERY}")
    with pytest.raises(EnvironmentFault, match=r"pip install 'harness\[pkcs11\]'"):
        keys.load_signer(tmp_path / "me.pkcs11")


def test_a_uri_is_understood_as_rfc_7512_says() -> None:
    """Oracle: section 2.3 of the RFC: percent-encoding, any order, an id of bytes."""
    text = f"pkcs11:id=%00%ffA;type=private;object=a%3Bb;serial=01;token=my%20token?pin-source=file:///p%20n&{QUERY}"
    (found,) = pkcs11_token.references(f"\n{text}\n".encode(), "x")
    assert (found.identifier, found.label, found.module) == (b"\x00\xffA", "a;b", "/m.so")
    assert found.token == {"token": "my token", "serial": "01"}
    assert found.pin_file == Path("/p n")
    assert "?" not in found.shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"pkcs11:object=a?{QUERY}&pin-value=4711", "has a PIN in a URI"),
        ("pkcs11:object=a;pin-value=4711", "has a PIN in a URI"),
        ("pkcs11:object=a", "without an absolute module-path"),
        ("pkcs11:object=a?module-path=m.so", "without an absolute module-path"),
        (f"pkcs11:object=a?{QUERY}&pin-source=|cat /pin", "no absolute path"),
        (f"pkcs11:object=a?{QUERY}&pin-source=pin", "no absolute path"),
        (f"pkcs11:object=a?{QUERY}&pin-source=file://host/pin", "no absolute path"),
        (f"pkcs11:object=a?{QUERY}&module-name=m", "with 'module-name'"),
        (f"pkcs11:slot-id=1?{QUERY}", "with 'slot-id'"),
        (f"pkcs11:object=a;object=b?{QUERY}", "'object' twice"),
        (f"pkcs11:object?{QUERY}", "with 'object'"),
        (f"pkcs11:object=%4?{QUERY}", "not percent-encoded"),
        (f"pkcs11:object=%ff?{QUERY}", "no UTF-8"),
        (f"pkcs11:type=cert?{QUERY}", "no private key"),
        (f"pkcs11:object=a?{QUERY}\nssh-ed25519 AAAA", "no PKCS#11 URI"),
    ],
)
def test_a_uri_that_is_not_understood_is_refused(text: str, words: str, tmp_path: Path) -> None:
    """Oracle: `UsageError` in one line without what a PIN could be."""
    (tmp_path / "me.pkcs11").write_text(text)
    with pytest.raises(UsageError) as failed:
        keys.load_signer(tmp_path / "me.pkcs11")
    assert words in str(failed.value)
    assert "4711" not in str(failed.value)


def test_a_uri_in_place_of_a_file_is_refused_without_showing_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: exit code 2 and the page to read."""
    assert main(["keys", "show", "pkcs11:object=a?pin-value=4711"]) == 2
    said = capsys.readouterr().err
    assert "docs/keys.md" in said
    assert "4711" not in said


@given(st.text("pkcs11:;=?&%/aidtokenpin-source\n", max_size=60))
def test_no_text_breaks_the_parser(text: str) -> None:
    """Oracle: `UsageError` or an answer."""
    with contextlib.suppress(UsageError):
        pkcs11_token.references(f"pkcs11:{text}?{QUERY}".encode(), "x")
