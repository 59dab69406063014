"""model.sig as we make it, beside model_signing 1.1.1; and the shell of docs/statements.md."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import run_folder
from attack import payload_of
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import accepted

from harness.errors import VerificationFailed
from harness.format import strict_json
from harness.provenance.signing import envelope, keys, model_signature
from harness.provenance.signing.keys import Signer

OFFICIAL = Path(sys.executable).with_name("model_signing")
DOCUMENT = Path(__file__).parent.parent / "docs" / "statements.md"
needs_official = pytest.mark.skipif(not OFFICIAL.exists(), reason="model-signing is not installed")
needs_shell = pytest.mark.skipif(
    not all(map(shutil.which, ("jq", "openssl", "sha256sum"))), reason="jq, openssl or sha256sum is missing"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the identity ``me`` and the run ``run`` lie."""
    folder = tmp_path_factory.mktemp("signed")
    run_folder.build(folder / "run", run_folder.identity(folder / "me"), steps=(10, 20))
    return folder


@pytest.fixture(scope="module")
def signer(folder: Path) -> Signer:
    """Who signed."""
    return keys.load_signer(folder / "me.key")


@pytest.fixture
def checkpoint(folder: Path, tmp_path: Path) -> Path:
    """A copy of the second checkpoint."""
    return shutil.copytree(run_folder.checkpoint(folder / "run", 20), tmp_path / "step-00000020")


def shell(number: int, checkpoint: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block of commands of the document."""
    block = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[number]
    environ = {
        **os.environ,
        "PATH": f"{OFFICIAL.parent}:{os.environ['PATH']}",
        "CKPT": str(checkpoint),
        "PUB": str(folder / "me.ed25519.pub"),
        "P256": str(folder / "me.p256.pub"),
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=checkpoint.parent,
        env=environ,
        capture_output=True,
        text=True,
    )


@needs_official
@pytest.mark.slow
def test_the_official_verifier_accepts_a_checkpoint_and_refuses_a_changed_one(
    checkpoint: Path, folder: Path
) -> None:
    """Oracle: `model_signing verify key`, as the document shows it."""
    done = shell(1, checkpoint, folder)
    assert done.returncode == 0, done.stderr
    assert "Verification succeeded" in done.stdout + done.stderr
    (checkpoint / "config.json").write_bytes(b"[]\n")
    assert shell(1, checkpoint, folder).returncode != 0


@needs_official
@pytest.mark.slow
def test_we_refuse_a_file_that_the_official_verifier_ignores(checkpoint: Path, folder: Path) -> None:
    """Oracle: model_signing 1.1.1 passes a file in .git; the attack of the same kind is one of ours."""
    (checkpoint / ".git").mkdir()
    (checkpoint / ".git" / "config").write_text("evil")
    assert shell(1, checkpoint, folder).returncode == 0


@needs_official
@pytest.mark.slow
def test_we_read_what_the_official_signer_writes(tmp_path: Path, folder: Path, signer: Signer) -> None:
    """Oracle: `model_signing sign key` over a folder that holds provenance/ to be ignored."""
    model = tmp_path / "model"
    (model / "provenance").mkdir(parents=True)
    (model / "weights").write_bytes(b"weights")
    private = tmp_path / "p256.pem"
    private.write_bytes(
        (folder / "me.key").read_bytes().split(b"-----END PRIVATE KEY-----\n")[1]
        + b"-----END PRIVATE KEY-----\n"
    )
    words = [
        str(OFFICIAL),
        "sign",
        "key",
        "--private_key",
        str(private),
        "--signature",
        str(model / "model.sig"),
    ]
    words += ["--ignore-paths", str(model / "provenance"), "--no-ignore-git-paths", str(model)]
    subprocess.run(words, check=True, capture_output=True)
    data = (model / "model.sig").read_bytes()
    signed = model_signature.verify(data, keys.public_keys(signer), where="x")
    assert signed == {"weights": hashlib.sha256(b"weights").hexdigest()}


@needs_shell
def test_the_shell_of_the_document_verifies_a_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Oracle: jq, coreutils and openssl."""
    done = shell(0, checkpoint, folder)
    assert done.returncode == 0, done.stderr
    assert "Signature Verified Successfully" in done.stdout


@needs_shell
@pytest.mark.parametrize(
    "path", ["model.safetensors", "MANIFEST.json", "provenance/checkpoint.sigstore.json"]
)
def test_the_shell_of_the_document_notices_a_change(path: str, checkpoint: Path, folder: Path) -> None:
    """Oracle: jq, coreutils and openssl on a file whose last letter or bit is another."""
    data = bytearray((checkpoint / path).read_bytes())
    place = data.rindex(b"A") if path.endswith(".json") and b"A" in data else len(data) - 2
    data[place] ^= 1
    (checkpoint / path).write_bytes(bytes(data))
    assert shell(0, checkpoint, folder).returncode != 0


def sign(signer: Signer, statement: dict[str, Any]) -> bytes:
    """A bundle of the P-256 half."""
    assert signer.p256 is not None
    return envelope.sign(strict_json.dumps(statement), signer.p256, keys.public_keys(signer)[1])


def test_files_are_read_back_with_their_digests(signer: Signer) -> None:
    """Oracle: what was signed; the order does not matter."""
    assert signer.p256 is not None
    files = [("b/c", "1" * 64), ("a", "2" * 64), ("b-c", "3" * 64)]
    data = model_signature.sign(files, signer.p256, keys.public_keys(signer)[1], "model")
    assert model_signature.verify(data, keys.public_keys(signer), where="x") == dict(files)
    stranger = keys.public_keys(Signer(signer.ed25519, ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(VerificationFailed, match="signed by none of the 1 accepted keys"):
        model_signature.verify(data, stranger, where="x")


@pytest.mark.parametrize("name", ["model", "another"])
def test_exactly_the_listed_files_are_signed(signer: Signer, name: str) -> None:
    """Oracle: what was signed, whatever name the folder had; one file more, less or other is refused."""
    assert signer.p256 is not None
    files = {"a": "2" * 64, "b/c": "1" * 64}
    data = model_signature.sign(files.items(), signer.p256, keys.public_keys(signer)[1], "model")
    model_signature.check(data, keys.public_keys(signer), files, name, where="x")
    for other in ({"a": "2" * 64}, {**files, "b/c": "3" * 64}, {**files, "d": "1" * 64}):
        with pytest.raises(VerificationFailed, match="signs other files than the manifest lists"):
            model_signature.check(data, keys.public_keys(signer), other, name, where="x")


def _serialization(**changes: Any) -> Any:
    return lambda each: each["predicate"]["serialization"].update(changes)


CHANGES: dict[str, tuple[str, Any]] = {
    "shards": ("another way than method files", _serialization(method="shards")),
    "blake2b": ("another way than method files", _serialization(hash_type="blake2b")),
    "symlinks": ("another way than method files", _serialization(allow_symlinks=True)),
    "symlinks as a number": ("another way than method files", _serialization(allow_symlinks=0)),
    "everything ignored": ("another way than method files", _serialization(ignore_paths=["."])),
    "nothing ignored": ("another way than method files", _serialization(ignore_paths=[])),
    "no resource": ("signs no file", lambda each: each["predicate"].update(resources=[])),
    "a resource twice": (
        "repeated resource",
        lambda each: each["predicate"]["resources"].append(each["predicate"]["resources"][0]),
    ),
    "another algorithm": (
        "repeated resource",
        lambda each: each["predicate"]["resources"][0].update(algorithm="md5"),
    ),
    "another root": ("root", lambda each: each["subject"][0]["digest"].update(sha256="0" * 64)),
    "no subject": ("root", lambda each: each.update(subject=[])),
    "another predicate type": ("no model signature", lambda each: each.update(predicateType="x")),
    "another statement type": ("no in-toto statement", lambda each: each.update(_type="x")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_signer_cannot_sign_less_than_everything(name: str, checkpoint: Path, signer: Signer) -> None:
    """Oracle: the rules of the module; each form passes or crashes the official verifier 1.1.1 or is odd."""
    reason, change = CHANGES[name]
    statement = payload_of(checkpoint / "model.sig")
    change(statement)
    with pytest.raises(VerificationFailed, match=reason):
        model_signature.verify(sign(signer, statement), keys.public_keys(signer), where="x")


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_any_signed_statement_is_read_or_refused(folder: Path, signer: Signer, data: st.DataObject) -> None:
    """Oracle: no other exception than ours, whatever the right key has signed."""
    statement = payload_of(run_folder.checkpoint(folder / "run", 20) / "model.sig")
    place: Any = statement
    for _ in range(data.draw(st.integers(0, 3))):
        choices = [place[key] for key in place] if isinstance(place, dict) else list(place)
        inner = [each for each in choices if isinstance(each, dict | list) and each]
        place = data.draw(st.sampled_from(inner)) if inner else place
    key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(
        st.none() | st.integers(0, 9) | st.text(max_size=3) | st.just([]) | st.just([{}]) | st.just({})
    )
    for files in accepted(model_signature.verify, sign(signer, statement), keys.public_keys(signer)):
        assert files
