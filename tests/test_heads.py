"""Heads that were kept outside: proofs beside Go's rules, and `harness head` and `verify --head` as typed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import run_folder
from attack import trusted
from conftest import TIMEOUT
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folder import SampleRun
from test_verify import harness

from harness.audit.run import kept_head
from harness.audit.verification import verify
from harness.errors import UsageError, VerificationFailed
from harness.provenance.policy.rules import Policy
from harness.provenance.signing.keys import PublicKey
from harness.provenance.transparency import heads, log, merkle

Proof = list[bytes]


def leaves(count: int) -> list[bytes]:
    """Distinct leaf hashes."""
    return [merkle.leaf_hash(str(number).encode()) for number in range(count)]


def go_split(count: int) -> int:
    """The largest power of two below ``count``: ``maxpow2`` of golang.org/x/mod/sumdb/tlog."""
    split = 1
    while split * 2 < count:
        split *= 2
    return split


def go_record(proof: Proof, low: int, high: int, index: int, leaf: bytes) -> bytes:
    """Go's ``runRecordProof``: from the root down, where RFC 9162 goes from the leaf up."""
    if low + 1 == high:
        if proof:
            raise ValueError("too long")
        return leaf
    if not proof:
        raise ValueError("too short")
    middle = low + go_split(high - low)
    if index < middle:
        return merkle.node_hash(go_record(proof[:-1], low, middle, index, leaf), proof[-1])
    return merkle.node_hash(proof[-1], go_record(proof[:-1], middle, high, index, leaf))


def go_tree(proof: Proof, low: int, high: int, size: int, old: bytes) -> tuple[bytes, bytes]:
    """Go's ``runTreeProof``: the old root and the new one."""
    if size == high:
        if low == 0:
            if proof:
                raise ValueError("too long")
            return old, old
        if len(proof) != 1:
            raise ValueError("another length")
        return proof[0], proof[0]
    if not proof:
        raise ValueError("too short")
    middle = low + go_split(high - low)
    if size <= middle:
        before, after = go_tree(proof[:-1], low, middle, size, old)
        return before, merkle.node_hash(after, proof[-1])
    before, after = go_tree(proof[:-1], middle, high, size, old)
    return merkle.node_hash(proof[-1], before), merkle.node_hash(proof[-1], after)


def go_included(leaf: bytes, index: int, size: int, proof: Proof, root: bytes) -> bool:
    """Go's ``CheckRecord``."""
    try:
        return go_record(proof, 0, size, index, leaf) == root
    except ValueError:
        return False


def go_consistent(first: int, second: int, proof: Proof, old: bytes, new: bytes) -> bool:
    """Go's ``CheckTree``."""
    try:
        return go_tree(proof, 0, second, first, old) == (old, new)
    except ValueError:
        return False


def spoilt(draw: st.DataObject, proof: Proof) -> Proof:
    """The proof as it is, or with a hash too many, too few, changed or moved."""
    changed = list(proof)
    place = draw.draw(st.integers(0, len(changed)))
    kind = draw.draw(st.sampled_from(["none", "none", "add", "drop", "flip", "reverse"]))
    if kind == "add":
        changed.insert(place, merkle.leaf_hash(b"other"))
    elif kind == "reverse":
        changed.reverse()
    elif changed and kind == "drop":
        changed.pop(min(place, len(changed) - 1))
    elif changed and kind == "flip":
        changed[min(place, len(changed) - 1)] = merkle.leaf_hash(b"other")
    return changed


@given(st.data(), st.integers(1, 70))
@settings(deadline=None, max_examples=200)
def test_an_inclusion_proof_convinces_go(draw: st.DataObject, size: int) -> None:
    """Oracle: ``CheckRecord`` of golang.org/x/mod/sumdb/tlog, for the leaf and for another."""
    hashes = leaves(size)
    index, root = draw.draw(st.integers(0, size - 1)), merkle.root_hash(hashes)
    good = merkle.inclusion_proof(hashes, index)
    assert go_included(hashes[index], index, size, good, root)
    assert not go_included(merkle.leaf_hash(b"other"), index, size, good, root)


@given(st.data(), st.integers(1, 70))
@settings(deadline=None, max_examples=200)
def test_a_consistency_proof_convinces_where_go_is_convinced(draw: st.DataObject, second: int) -> None:
    """Oracle: ``CheckTree`` of golang.org/x/mod/sumdb/tlog, good and spoilt proofs."""
    first, hashes = draw.draw(st.integers(1, second)), leaves(second)
    old, new = merkle.root_hash(hashes[:first]), merkle.root_hash(hashes)
    good = merkle.consistency_proof(hashes, first)
    assert heads.consistent(first, second, good, old, new)
    assert not heads.consistent(first, second, good, merkle.leaf_hash(b"other"), new)
    proof, claimed = spoilt(draw, good), draw.draw(st.integers(1, second))
    expected = go_consistent(claimed, second, proof, old, new)
    assert heads.consistent(claimed, second, proof, old, new) == expected


def test_sizes_that_no_log_has_convince_nobody() -> None:
    """Oracle: RFC 9162 section 2.1: an empty tree is a prefix of every tree, and nothing precedes it."""
    empty, one = merkle.root_hash([]), merkle.leaf_hash(b"0")
    assert heads.consistent(0, 1, [], empty, one)
    assert heads.consistent(0, 0, [], empty, empty)
    for first, second, old, new in (
        (0, 1, one, one),
        (0, 0, empty, one),
        (2, 1, one, one),
        (-1, 1, one, one),
    ):
        assert not heads.consistent(first, second, [], old, new)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys of ``me``, a run of checkpoints 10 and 20, and ``two.head``, its head."""
    folder = tmp_path_factory.mktemp("kept")
    run = SampleRun(folder / "run", run_folder.identity(folder / "me"))
    run.advance(10, 20)
    done = harness(folder, "head", "run", "--out", "two.head", "--key", "me.ed25519.pub")
    assert done.returncode == 0, done.stderr
    assert "signature  verified" in done.stdout
    shutil.copytree(folder / "run", folder / "two")
    run.advance(30)
    return folder


KEYS = ["--key", "me.ed25519.pub", "me.p256.pub"]


def test_a_run_that_grew_continues_the_head_that_was_kept(kept: Path) -> None:
    """Oracle: the same run one checkpoint later; the head is the note that lay in the log."""
    assert (kept / "two.head").read_bytes() == (kept / "two" / "log" / "checkpoint").read_bytes()
    done = harness(kept, "verify", "run", "--head", "two.head", *KEYS)
    assert (done.returncode, done.stderr) == (0, "")
    assert "log head" in done.stdout


def test_a_rolled_back_and_a_rewritten_run_fail_under_a_kept_head(kept: Path, tmp_path: Path) -> None:
    """Oracle: the older copy of the run, and another history that the same key has signed."""
    harness(kept, "head", "run", "--out", str(tmp_path / "three.head"))
    done = harness(kept, "verify", "two", "--head", str(tmp_path / "three.head"), *KEYS)
    assert done.returncode == 1
    assert "has 2 records, the head in three.head has 3: it was rolled back" in done.stdout
    signer = run_folder.keys.load_signer(kept / "me.key")
    other = run_folder.build(tmp_path / "other", signer, values="other")
    done = harness(kept, "verify", str(other), "--head", "two.head", *KEYS)
    assert done.returncode == 1
    assert "does not continue the head in two.head (2 records): its history was rewritten" in done.stdout


def test_a_checkpoint_alone_cannot_be_told_good_under_a_kept_head(kept: Path) -> None:
    """Oracle: exit code 4: a lone folder may be the one that was rolled away."""
    done = harness(kept, "verify", "run/checkpoints/step-00000010", "--head", "two.head", *KEYS)
    assert done.returncode == 4
    assert "a checkpoint folder alone has none" in done.stdout


def test_a_kept_head_is_replaced_only_by_one_that_continues_it(kept: Path, tmp_path: Path) -> None:
    """Oracle: the file's bytes; what does not fit is refused and the evidence stays."""
    out = tmp_path / "my.head"
    shutil.copy(kept / "two.head", out)
    done = harness(kept, "head", "run", "--out", str(out))
    assert "2 records, which the log continues" in done.stdout
    newest = out.read_bytes()
    assert newest == (kept / "run" / "log" / "checkpoint").read_bytes()
    done = harness(kept, "head", "two", "--out", str(out))
    assert done.returncode == 1
    assert "it was rolled back" in done.stderr
    assert out.read_bytes() == newest


def test_the_head_is_printed_as_it_is_for_a_git_tag(kept: Path, tmp_path: Path) -> None:
    """Oracle: git gives back the bytes by the documented commands, and they verify."""
    note = harness(kept, "head", "run").stdout
    assert note.encode() == (kept / "run" / "log" / "checkpoint").read_bytes()
    assert json.loads(harness(kept, "head", "run", "--json").stdout)["note"] == note
    settings = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    commands = (
        f"git init -q . && git {' '.join(settings)} commit -q --allow-empty -m start && "
        f"git {' '.join(settings)} tag -a tiny-head --cleanup=verbatim -F {kept}/run/log/checkpoint && "
        "git cat-file tag tiny-head | sed '1,/^$/d' > tiny.head"
    )
    subprocess.run(commands, shell=True, cwd=tmp_path, check=True, timeout=TIMEOUT)
    assert (tmp_path / "tiny.head").read_text() == note
    assert harness(kept, "verify", "run", "--head", str(tmp_path / "tiny.head"), *KEYS).returncode == 0


def test_a_head_that_is_no_head_of_the_maker_is_refused(kept: Path, tmp_path: Path) -> None:
    """Oracle: no file, no note, a stranger's signature: an error of its own code, before anything is read."""
    whom = trusted(run_folder.keys.load_signer(kept / "me.key"))
    stranger = run_folder.identity(tmp_path / "stranger")
    (tmp_path / "stranger.head").write_bytes(log.sign_note(log.Head(1, bytes(32), "x"), stranger))
    (tmp_path / "broken.head").write_bytes(b"x\n")
    for name, kind in (
        ("none.head", UsageError), ("broken.head", UsageError),
        ("stranger.head", VerificationFailed),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            verify.verify(kept / "run", whom, head=[tmp_path / name])
        wanted = "the key or the policy" if "stranger" in name else "harness head RUN --out FILE has written"
        assert wanted in (caught.value.remedy or "")


def test_a_file_that_holds_no_head_is_not_replaced_by_one(kept: Path, tmp_path: Path) -> None:
    """Oracle: the file's bytes, and exit code 2: a wrong path is no wrong run."""
    (tmp_path / "thesis.md").write_text("# Thesis\n")
    done = harness(kept, "head", "run", "--out", str(tmp_path / "thesis.md"))
    assert (done.returncode, "name another --out" in done.stderr) == (2, True)
    assert (tmp_path / "thesis.md").read_text() == "# Thesis\n"


def test_since_a_kept_head_only_what_was_added_is_hashed(kept: Path, tmp_path: Path) -> None:
    """Oracle: the bytes of the payload: those of step 30 are hashed, of 10 and 20 not, and that is said."""
    document = json.loads(harness(kept, "verify", "run", "--since", "two.head", *KEYS, "--json").stdout)
    payload = (kept / "run" / "checkpoints" / "step-00000030").glob("*.*")
    new = sum(path.stat().st_size for path in payload if path.name not in ("MANIFEST.json", "model.sig"))
    assert (document["verdict"], document["bytes_hashed"]) == ("verified", new)
    assert document["since"]["not_hashed"] == ["step-00000010", "step-00000020"]
    assert any("the payload of 2 checkpoints was not hashed again" in note for note in document["notes"])


def test_what_was_added_and_what_is_small_is_still_checked_since_a_head(kept: Path, tmp_path: Path) -> None:
    """Oracle: a flipped payload byte is found in step 30 only; a foreign file, a changed manifest or
    statement in step 10, too; a log that does not continue the head makes everything be hashed."""
    signer = run_folder.keys.load_signer(kept / "me.key")

    def judged(step: int, name: str, *, since: Path = kept / "two.head") -> tuple[int, int]:
        root = shutil.copytree(kept / "run", tmp_path / f"run-{step}-{Path(name).name}-{since.stem}")
        path = run_folder.checkpoint(root, step) / name
        data = bytearray(path.read_bytes()) if path.exists() else bytearray(b"new")
        data[-10 if len(data) > 10 else 0] ^= 1
        path.write_bytes(bytes(data))
        report = verify.verify(root, trusted(signer), since=since, quiet=True)
        return report.exit_code, len((report.since or {})["not_hashed"])

    assert judged(30, "model.safetensors") == (1, 2)
    assert judged(10, "model.safetensors") == (0, 2)
    assert judged(10, "evil.py") == (1, 2)
    assert judged(10, "MANIFEST.json")[0] == 1
    assert judged(10, "provenance/checkpoint.sigstore.json")[0] == 1
    other = log.sign_note(log.Head(2, bytes(32), log.read_claimed(kept / "run" / "log").head.origin), signer)
    (tmp_path / "other.head").write_bytes(other)
    assert judged(10, "model.safetensors", since=tmp_path / "other.head") == (1, 0)


def pruned(root: Path) -> Path:
    """The first checkpoint, as ``checkpoint.keep`` leaves it."""
    folder = run_folder.checkpoint(root, 10)
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("MANIFEST.json", "model.sig"):
            path.unlink()
    return folder.rename(folder.with_name(f"pruned-{folder.name}"))


def test_since_a_head_no_signature_is_computed_again_over_the_same_bytes(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: counted verifications of a run whose first checkpoint is pruned, without the head and with it;
    a key that is not accepted any more, or a statement with another digest, is found all the same."""
    signer = run_folder.keys.load_signer(kept / "me.key")
    root, whom = shutil.copytree(kept / "run", tmp_path / "run"), trusted(signer)
    first = pruned(root)
    asked: list[str] = []
    verifies = PublicKey.verifies
    monkeypatch.setattr(
        PublicKey,
        "verifies",
        lambda key, *words: (asked.append(key.algorithm), verifies(key, *words))[1],
    )

    def judged(policy: Policy = whom, since: Path | None = kept / "two.head") -> tuple[int, int, int]:
        asked.clear()
        report = verify.verify(root, policy, since=since, quiet=True)
        return report.exit_code, asked.count("ed25519"), asked.count("p256")

    heads_read = 1
    assert judged(since=None) == (0, 6 + heads_read, 3)
    assert judged() == (0, 3 + 2 * heads_read, 2)
    (first / "model.sig").write_bytes(b"x")
    assert judged()[0] == 0
    assert judged(since=None)[0] == 1
    (me,) = whom.identities
    expired = replace(whom, identities=(replace(me, valid_until="2020-01-01T00:00:00Z"),))
    assert judged(expired)[0] == 1
    bundle = first / "provenance" / "checkpoint.sigstore.json"
    hint = run_folder.keys.public_keys(signer)[0].hint.encode()
    good = bundle.read_bytes()
    bundle.write_bytes(good.replace(hint, b"0" * 64))
    assert judged()[0] == 1
    bundle.write_bytes(good)
    assert judged()[0] == 0
    (first / "MANIFEST.json").write_bytes((first / "MANIFEST.json").read_bytes() + b" ")
    assert judged()[0] == 1


def test_what_is_left_of_a_pruned_checkpoint_is_held_to_its_place_since_a_head(
    kept: Path, tmp_path: Path
) -> None:
    """Oracle: the exit codes without a head, which makes the same files be parsed."""
    signer = run_folder.keys.load_signer(kept / "me.key")

    def judged(change: Callable[[Path], object]) -> set[int]:
        root = shutil.copytree(kept / "run", tmp_path / "run")
        change(pruned(root))
        heads = (None, kept / "two.head")
        codes = {verify.verify(root, trusted(signer), since=head, quiet=True).exit_code for head in heads}
        shutil.rmtree(root)
        return codes

    assert judged(lambda first: None) == {0}
    assert judged(lambda first: (first / "evil.py").write_bytes(b"")) == {1}
    assert judged(lambda first: (first / "model.safetensors").write_bytes(b"x")) == {1}
    assert judged(lambda first: first.rename(first.with_name("pruned-step-00000011"))) == {1}
    assert judged(lambda first: first.rename(first.with_name("nonfinite-step-00000010"))) == {1}


def test_since_wants_a_run(kept: Path) -> None:
    """Oracle: a usage error, since a checkpoint has no log."""
    done = harness(kept, "verify", "run/checkpoints/step-00000010", "--since", "two.head", *KEYS)
    assert done.returncode == 2
    with pytest.raises(UsageError, match="is no run folder"):
        kept_head.take(kept / "run" / "checkpoints" / "step-00000010", None)


def test_a_policy_names_the_file_of_a_head(kept: Path, tmp_path: Path) -> None:
    """Oracle: the same folders under a policy that lies beside the head."""
    for name in ("me.ed25519.pub", "me.p256.pub", "two.head"):
        shutil.copy(kept / name, tmp_path)
    harness(kept, "head", "run", "--out", str(tmp_path / "three.head"))
    identity = "identities: [{name: me, keys: [me.ed25519.pub, me.p256.pub]}]"
    for heads_of, expected in (("two.head", {"run": 0, "two": 0}), ("three.head", {"run": 0, "two": 1})):
        policy = tmp_path / "trust.yaml"
        policy.write_text(f"format: harness-policy/1\n{identity}\nlog_head: {heads_of}\n")
        for run, code in expected.items():
            assert harness(kept, "verify", run, "--policy", str(policy)).returncode == code
