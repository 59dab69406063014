"""Signing through a real ssh-agent: private keys are on no disk, and what it signs verifies everywhere."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import run_folder
from conftest import TIMEOUT

from harness.errors import EnvironmentFault, UsageError
from harness.provenance.signing import envelope, keys, ssh_agent

pytestmark = pytest.mark.skipif(shutil.which("ssh-agent") is None, reason="ssh-agent is not installed")


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with ``id.pub``, two lines whose private keys only the agent has."""
    address = tmp_path / "a"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", address], stdout=subprocess.DEVNULL)
    monkeypatch.setenv(ssh_agent.SOCKET, str(address))
    while not listens(address):
        assert process.poll() is None
        time.sleep(0.01)
    lines = b""
    for name, kind in (("one", ["ed25519"]), ("two", ["ecdsa", "-b", "256"])):
        tool("ssh-keygen", "-q", "-N", "", "-C", "a b", "-f", tmp_path / name, "-t", *kind)
        tool("ssh-add", "-q", tmp_path / name)
        (tmp_path / name).unlink()
        lines += (tmp_path / f"{name}.pub").read_bytes()
    (tmp_path / "id.pub").write_bytes(lines)
    yield tmp_path
    process.terminate()
    process.wait()


def listens(address: Path) -> bool:
    """Whether somebody answers at the socket; that it is there says less."""
    with socket.socket(socket.AF_UNIX) as link:
        return link.connect_ex(str(address)) == 0


def tool(*words: object) -> None:
    """A command that must succeed."""
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


def lock() -> None:
    """SSH_AGENTC_LOCK (22), as `ssh-add -x` sends after asking for a password."""
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(os.environ[ssh_agent.SOCKET])
        link.sendall(struct.pack(">IBI", 9, 22, 4) + b"word")
        assert link.recv(5) == struct.pack(">IB", 1, 6)


def harness(*words: object) -> subprocess.CompletedProcess[str]:
    """`harness WORDS`."""
    command = [sys.executable, "-m", "harness", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)


def test_a_run_that_the_agent_signs_verifies_here_and_with_openssl(agent: Path) -> None:
    """Oracle: `harness verify` with the .pub files that ssh-keygen wrote, and openssl with the same keys."""
    run = run_folder.build(agent / "run", keys.load_signer(agent / "id.pub"), steps=(10,))
    checkpoint = run_folder.checkpoint(run, 10)
    trust = ["--key", agent / "one.pub", agent / "two.pub"]
    done = harness("attest", checkpoint, "--kind", "svr", "--signing-key", agent / "id.pub", *trust)
    assert done.returncode == 0, done.stderr
    assert harness("verify", run, *trust).returncode == 0
    assert harness("verify", run, "--key", agent / "two.pub").returncode != 0
    for public, file in (("one", "provenance/checkpoint.sigstore.json"), ("two", "model.sig")):
        key = keys.load_public(agent / f"{public}.pub")
        opened = envelope.open_bundle((checkpoint / file).read_bytes(), [key], where=file)
        _, signature, _ = envelope._parts((checkpoint / file).read_bytes(), file)
        (agent / "message").write_bytes(envelope.pae(envelope.PAYLOAD_TYPE, opened.payload))
        (agent / "signature").write_bytes(signature)
        (agent / "pem").write_bytes(key.pem)
        how = ["-rawin"] if public == "one" else ["-rawin", "-digest", "sha256"]
        words = ["-verify", "-pubin", "-inkey", agent / "pem", "-in", agent / "message", "-sigfile"]
        tool("openssl", "pkeyutl", *words, agent / "signature", *how)


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "removed": (lambda agent: tool("ssh-add", "-q", "-d", agent / "one.pub"), "holds 1 keys, not this one"),
    "emptied": (lambda agent: tool("ssh-add", "-q", "-D"), "shows no key"),
    "locked": (lambda agent: lock(), "shows no key"),
    "gone": (lambda agent: Path(os.environ[ssh_agent.SOCKET]).unlink(), "no answer from ssh-agent"),
    "not there": (lambda agent: os.environ.pop(ssh_agent.SOCKET) and None, "SSH_AUTH_SOCK is not set"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_agent_that_cannot_sign_is_one_line_with_a_remedy(name: str, agent: Path) -> None:
    """Oracle: exit code 3 of the command, and the same from a signer that was loaded before."""
    spoil, words = WRONG[name]
    signer = keys.load_signer(agent / "id.pub")
    checkpoint = run_folder.checkpoint(run_folder.build(agent / "run", signer, steps=(10,)), 10)
    trust = ["--key", agent / "one.pub", agent / "two.pub"]
    address = os.environ[ssh_agent.SOCKET]
    try:
        spoil(agent)
        done = harness("attest", checkpoint, "--kind", "svr", "--signing-key", agent / "id.pub", *trust)
        assert (done.returncode, len(done.stderr.splitlines())) == (3, 1), done.stderr
        with pytest.raises(EnvironmentFault, match=words):
            keys.load_signer(agent / "id.pub")
        with pytest.raises(EnvironmentFault, match=r"ssh-agent") as failed:
            keys.sign_with(signer.ed25519, b"message")
        assert len(str(failed.value).splitlines()) == 1
    finally:
        os.environ[ssh_agent.SOCKET] = address


@pytest.mark.parametrize(
    "text", ["ssh-rsa AAAA", "ssh-ed25519", "ssh-ed25519 !", "ssh-ed25519 AAAA", "sk- y"]
)
def test_a_line_of_another_kind_is_refused_before_the_agent_is_asked(text: str, agent: Path) -> None:
    """Oracle: `UsageError`."""
    (agent / "id.pub").write_text(text)
    with pytest.raises(UsageError):
        keys.load_signer(agent / "id.pub")


ANSWERS = [b"", b"\5", b"\x0e", b"\x0e\0\0\0\1", b"\x0e\0\0\0\4\0\0\0\0", b"\x0e\xff\xff\xff\xff"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_no_agent_should_give_is_one_line(
    answer: bytes, agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `EnvironmentFault`."""
    signer = keys.load_signer(agent / "id.pub")
    monkeypatch.setattr(ssh_agent, "_ask", lambda *rest: answer)
    with pytest.raises(EnvironmentFault, match="ssh-agent"):
        keys.sign_with(signer.ed25519, b"message")
