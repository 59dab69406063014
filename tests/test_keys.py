"""`harness.provenance.signing.keys`, beside the openssl and ssh-keygen command lines."""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Never

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.cli import main
from harness.errors import EnvironmentFault, HarnessError, UsageError
from harness.provenance.signing import keys

KEYS = keys.public_keys(keys.Signer(Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())))
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
needs_ssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")


def tool(*words: object, data: bytes | None = None) -> bytes:
    """What a command prints; it must succeed."""
    done = subprocess.run([str(word) for word in words], input=data, capture_output=True, check=True)
    return done.stdout


@pytest.fixture
def made(tmp_path: Path) -> keys.KeyFiles:
    """A new identity."""
    return keys.create(tmp_path / "me")


def test_an_identity_is_three_files_and_only_its_owner_reads_the_private_one(
    made: keys.KeyFiles, tmp_path: Path
) -> None:
    """Oracle: the contract of `keys new`: names and mode 0600."""
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["me.ed25519.pub", "me.key", "me.p256.pub"]
    assert stat.S_IMODE(made.private.stat().st_mode) == 0o600


def test_nothing_is_overwritten(made: keys.KeyFiles) -> None:
    """Oracle: the bytes before; one file that exists is enough."""
    before = made.private.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        keys.create(made.private.with_suffix(""))
    made.private.rename(made.private.with_name("kept"))
    with pytest.raises(UsageError, match=r"me\.ed25519\.pub"):
        keys.create(made.private.with_suffix(""))
    assert made.private.with_name("kept").read_bytes() == before
    assert not made.private.exists()


@pytest.mark.parametrize("missing", [["ed25519", "p256"], ["p256"]])
def test_a_key_whose_making_was_killed_gets_its_public_files_as_the_refusal_says(
    missing: list[str], made: keys.KeyFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the files of the undisturbed making; what is there and something else stays as it is."""
    public = [made.private.with_name(f"me.{each}.pub") for each in ("ed25519", "p256")]
    before = [path.read_bytes() for path in public]
    for each in missing:
        made.private.with_name(f"me.{each}.pub").unlink()
    name = str(made.private.with_suffix(""))
    assert main(["keys", "new", "--out", name]) == 2
    remedy = capsys.readouterr().err.strip().rpartition("harness ")[2]
    assert main(shlex.split(remedy)) == 0
    assert [path.read_bytes() for path in public] == before
    public[1].write_bytes(before[0])
    assert main(shlex.split(remedy)) == 2
    assert public[1].read_bytes() == before[0]


@pytest.mark.parametrize("out", ["", ".", "..", "/"])
def test_a_name_that_is_none_is_refused(
    out: str, made: keys.KeyFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2 in one line."""
    for words in (["new"], ["show", str(made.private)]):
        assert main(["keys", *words, "--out", out]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "names no file" in line


def test_of_several_public_keys_in_a_file_none_is_trusted_and_all_are_shown(
    made: keys.KeyFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the ids of each alone; the first one alone would be trusted otherwise, without a word."""
    one, other = made.public
    ids = [keys.load_public(each).key_id for each in (one, other)]
    lines = [
        keys.load_public(each).key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        for each in (one, other)
    ]
    for content in (one.read_bytes() + other.read_bytes(), b"\n".join(lines) + b" a comment\n"):
        both = tmp_path / "both.pub"
        both.write_bytes(content)
        with pytest.raises(UsageError, match="holds 2 public keys"):
            keys.load_public(both)
        assert main(["keys", "show", str(both)]) == 0
        assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ids
    both.write_bytes(lines[0] + b"\nssh-ed25519 nothing\n")
    assert main(["keys", "show", str(both)]) == 2


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_key_that_could_not_be_written_leaves_no_name_of_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Oracle: the folder; a sync that fails stands for a kill before the contents are on disk."""
    synced, seen = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal seen
        seen += stat.S_ISREG(os.fstat(descriptor).st_mode)
        if seen == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="error"):
        keys.create(tmp_path / "me")
    whole = {"me.key", "me.ed25519.pub", "me.p256.pub"}
    found = {path.name for path in tmp_path.iterdir()} & whole
    assert len(found) == number - 1
    assert all(keys.describe(tmp_path / name).keys for name in found)


def test_the_public_files_are_the_halves_of_the_private_one(made: keys.KeyFiles) -> None:
    """Oracle: the halves computed from the private keys."""
    halves = keys.public_keys(keys.load_signer(made.private))
    assert [keys.load_public(path) for path in made.public] == halves
    assert [half.algorithm for half in halves] == ["ed25519", "p256"]
    assert list(keys.describe(made.private).keys) == halves
    assert keys.describe(made.private).kind == "private"
    assert keys.describe(made.public[0]).kind == "public"


@needs_openssl
def test_openssl_reads_the_keys_and_computes_the_same_ids(made: keys.KeyFiles) -> None:
    """Oracle: `openssl pkey` writes the DER whose sha256 is the key id."""
    for path in made.public:
        der = tool("openssl", "pkey", "-pubin", "-in", path, "-outform", "DER")
        key = keys.load_public(path)
        assert key.key_id == hashlib.sha256(der).hexdigest()
        assert key.hint == hashlib.sha256(path.read_bytes()).hexdigest()
    text = tool("openssl", "pkey", "-in", made.private, "-pubout")
    assert text == made.public[0].read_bytes()


@needs_openssl
def test_openssl_verifies_what_we_sign(made: keys.KeyFiles, tmp_path: Path) -> None:
    """Oracle: `openssl pkeyutl -verify -rawin`."""
    signer = keys.load_signer(made.private)
    message, signature = tmp_path / "message", tmp_path / "signature"
    message.write_bytes(b"a message")
    signature.write_bytes(signer.ed25519.sign(b"a message"))
    words = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", made.public[0], "-rawin"]
    assert b"Verified Successfully" in tool(*words, "-in", message, "-sigfile", signature)


@needs_openssl
def test_keys_and_signatures_of_openssl_are_read(tmp_path: Path) -> None:
    """Oracle: keys made by `openssl genpkey`, a signature made by `openssl dgst`."""
    private, public, message = tmp_path / "k.pem", tmp_path / "k.pub", tmp_path / "message"
    message.write_bytes(b"a message")
    tool("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", private)
    public.write_bytes(tool("openssl", "pkey", "-in", private, "-pubout"))
    signature = tool("openssl", "dgst", "-sha256", "-sign", private, message)
    key = keys.load_public(public)
    assert key.algorithm == "p256"
    assert key.verifies(signature, b"a message")
    assert not key.verifies(signature, b"another message")


@needs_ssh
def test_an_openssh_key_signs_statements_and_makes_no_model_signature(tmp_path: Path) -> None:
    """Oracle: `ssh-keygen` made both files, and its public line is the half of its private key."""
    tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "id")
    signer = keys.load_signer(tmp_path / "id")
    assert signer.p256 is None
    assert keys.public_keys(signer) == [keys.load_public(tmp_path / "id.pub")]
    line = tool("ssh-keygen", "-y", "-f", tmp_path / "id")
    assert keys.parse_public(line, where="x") == keys.public_keys(signer)[0]


@needs_ssh
def test_an_encrypted_openssh_key_is_refused_with_a_remedy(tmp_path: Path) -> None:
    """Oracle: `ssh-keygen` with a passphrase; nobody can type it in an unattended run."""
    tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", tmp_path / "id")
    with pytest.raises(UsageError, match="an encrypted key cannot sign unattended"):
        keys.load_signer(tmp_path / "id")


@needs_openssl
@pytest.mark.parametrize(
    "options",
    [
        ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
        ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
        ["-algorithm", "X25519"],
        ["-algorithm", "ED448"],
    ],
    ids=["rsa", "p384", "x25519", "ed448"],
)
def test_other_kinds_of_keys_are_refused(options: list[str], tmp_path: Path) -> None:
    """Oracle: keys made by `openssl genpkey`; the algorithm decides, never a signature's claim."""
    private = tmp_path / "k.pem"
    tool("openssl", "genpkey", *options, "-out", private)
    private.chmod(0o600)
    with pytest.raises(UsageError, match="other than Ed25519 or P-256"):
        keys.load_signer(private)
    with pytest.raises(UsageError, match="neither an Ed25519 nor a P-256 key"):
        keys.parse_public(tool("openssl", "pkey", "-in", private, "-pubout"), where="x")


def test_a_private_key_is_never_taken_for_a_public_one(made: keys.KeyFiles) -> None:
    """Oracle: whoever passes a private key to an auditor is told."""
    with pytest.raises(UsageError, match="is a private key"):
        keys.load_public(made.private)


def test_a_key_that_others_may_read_is_refused(made: keys.KeyFiles) -> None:
    """Oracle: any bit for group or world."""
    for mode in (0o640, 0o604, 0o660):
        made.private.chmod(mode)
        with pytest.raises(EnvironmentFault, match=f"mode {mode:04o}"):
            keys.load_signer(made.private)


def test_another_file_is_no_private_key_whoever_may_read_it(made: keys.KeyFiles) -> None:
    """Oracle: chmod would not make a key of it, so nobody is told to."""
    with pytest.raises(UsageError, match="holds no private key"):
        keys.load_signer(made.public[0])


def test_a_p256_key_alone_is_no_identity(made: keys.KeyFiles) -> None:
    """Oracle: statements need Ed25519."""
    blocks = made.private.read_bytes().split(b"-----END PRIVATE KEY-----\n")
    made.private.write_bytes(blocks[1] + b"-----END PRIVATE KEY-----\n")
    with pytest.raises(UsageError, match="holds no single Ed25519 private key"):
        keys.load_signer(made.private)


@given(st.binary(max_size=200) | st.text("ssh-ed25519 AAAAC3Nza=\n-BEGINPUBLICKEY").map(str.encode))
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_a_key_or_refused(data: bytes) -> None:
    """Oracle: no other exception than ours."""
    try:
        key = keys.parse_public(data, where="x")
    except HarnessError:
        return
    assert keys.parse_public(key.pem, where="x") == key


@given(st.binary(max_size=100))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_a_bad_signature(data: bytes) -> None:
    """Oracle: nobody guesses a signature; and a broken one is no exception."""
    assert not any(key.verifies(data, b"a message") for key in KEYS)


def test_the_signing_key_comes_from_config_then_environment_then_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the documented order; the user's own key is made once and its reason says so."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(keys.ENVIRONMENT, raising=False)
    path, reason = keys.signing_key_path(None, tmp_path / "run")
    assert path == tmp_path / "config" / "harness" / "default.key"
    assert "made just now" in reason
    assert keys.signing_key_path(None, tmp_path / "run") == (path, "your default key")
    monkeypatch.setenv(keys.ENVIRONMENT, str(tmp_path / "other.key"))
    assert keys.signing_key_path(None, None) == (tmp_path / "other.key", "$HARNESS_SIGNING_KEY")
    assert keys.signing_key_path(tmp_path / "c.key", None) == (tmp_path / "c.key", "signing.key")


def test_a_key_of_ones_own_that_cannot_be_made_is_a_fault_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: exit code 3; the home of a container often belongs to nobody, or is not known."""
    monkeypatch.delenv(keys.ENVIRONMENT, raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    with pytest.raises(EnvironmentFault, match=r"cannot be made: .*default\.key; .*signing\.key"):
        keys.signing_key_path(None, None)
    monkeypatch.setattr(Path, "expanduser", raising(RuntimeError("Could not determine home directory.")))
    with pytest.raises(UsageError, match="set HOME"):
        keys.signing_key_path(None, None)


def raising(error: Exception) -> Callable[..., Never]:
    def always(*_: object) -> Never:
        raise error

    return always


def test_a_key_in_the_run_folder_is_refused_through_links_too(tmp_path: Path) -> None:
    """Oracle: whoever gets the folder must not get the key."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "link").symlink_to(run)
    for path in (run / "me.key", tmp_path / "link" / "me.key", run / ".." / "run" / "me.key"):
        with pytest.raises(UsageError, match="lies in the run folder"):
            keys.signing_key_path(path, run)
