"""`harness.provenance.policy.rules`: a rule that is misspelt is an error, never no rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import run_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import ConfigError, HarnessError, UsageError
from harness.provenance.policy import reader
from harness.provenance.policy import rules as policy
from harness.provenance.policy.rules import Identity, Policy
from harness.provenance.signing import keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the keys of alice and bob lie."""
    folder = tmp_path_factory.mktemp("policy")
    for name in ("alice", "bob"):
        run_folder.identity(folder / name)
    return folder


def text(*rules: str, alice: str = "") -> str:
    """A policy file with alice and bob in it."""
    return "\n".join(
        [
            "format: harness-policy/1",
            "identities:",
            f"  - {{name: alice, keys: [alice.ed25519.pub, alice.p256.pub]{alice}}}",
            "  - {name: bob, keys: [bob.ed25519.pub]}",
            *rules,
            "",
        ]
    )


def parse(folder: Path, written: str) -> Policy:
    """The policy of ``written``, as if it lay beside the keys."""
    return reader.parse(written, where="trust.yaml", folder=folder)


def test_a_whole_policy_is_read(folder: Path) -> None:
    """Oracle: each rule, by hand."""
    rules = [
        "required: [slsa, log]",
        "threshold: 2",
        f'revoked: ["{"0" * 64}"]',
        f'log_head: {{origin: harness/run/0, size: 12, root: "{"ab" * 32}"}}',
    ]
    alice = ', runs: ["gpt-*"], valid: {from: 2026-01-01, until: 2027-01-01T12:00:00Z}'
    read = parse(folder, text(*rules, alice=alice))
    assert [identity.name for identity in read.identities] == ["alice", "bob"]
    assert read.identities[0].runs == ("gpt-*",)
    assert read.identities[0].valid_from == "2026-01-01T00:00:00Z"
    assert read.identities[0].valid_until == "2027-01-01T12:00:00Z"
    assert read.required == {"checkpoint", "slsa", "log"}
    assert read.threshold == 2
    assert read.revoked == {"0" * 64}
    (kept,) = read.log_heads
    assert (kept.head.origin, kept.head.size, kept.head.root.hex()) == ("harness/run/0", 12, "ab" * 32)
    assert [key.algorithm for key in read.statement_keys] == ["ed25519", "ed25519"]
    assert [key.algorithm for key in read.model_keys] == ["p256"]


def test_what_is_not_said_is_strict(folder: Path) -> None:
    """Oracle: the documented defaults; model.sig is required as soon as somebody could have signed it."""
    read = parse(folder, text())
    assert read.required == {"checkpoint", "slsa", "model-signature"}
    assert (read.threshold, read.revoked, read.log_heads) == (1, frozenset(), ())
    assert read.identities[0].runs == ("*",)


def test_a_key_may_be_written_into_the_file(folder: Path) -> None:
    """Oracle: the same key from its own file."""
    pem = (folder / "alice.ed25519.pub").read_text()
    indented = "".join(f"          {line}\n" for line in pem.splitlines())
    written = f"format: harness-policy/1\nidentities:\n  - name: alice\n    keys:\n      - |\n{indented}"
    assert parse(folder, written).statement_keys == (keys.load_public(folder / "alice.ed25519.pub"),)


@pytest.mark.parametrize(
    ("rules", "alice", "reason"),
    [
        (["treshold: 2"], "", "unknown key `treshold`"),
        (["threshold: 1", "threshold: 2"], "", "threshold"),
        (["threshold: 0"], "", "not 1 to 2"),
        (["threshold: 3"], "", "not 1 to 2"),
        (["threshold: true"], "", "not 1 to 2"),
        (["threshold: 1.0"], "", "not 1 to 2"),
        (['revoked: ["abc"]'], "", "not 64 hex digits"),
        ([f'revoked: ["{"A" * 64}"]'], "", "not 64 hex digits"),
        (["revoked: 5"], "", "revoked"),
        (["revoked:"], "", "revoked"),
        (["required: []"], "", "an empty one"),
        (["required: slsa"], "", "no list"),
        (['required: ["Slsa"]'], "", "no kind of statement"),
        (["log_head: {origin: a, size: 1}"], "", "has no `root`"),
        ([f'log_head: {{size: 1, root: "{"0" * 64}"}}'], "", "has no `origin`"),
        ([f'log_head: {{origin: a, size: -1, root: "{"0" * 64}"}}'], "", "has the size -1"),
        ([f'log_head: {{origin: 5, size: 1, root: "{"0" * 64}"}}'], "", "an origin that is no text"),
        (["log_head: []"], "", "an empty one"),
        (["log_head: 5"], "", "no mapping"),
        (["log_head: nowhere.head"], "", "is missing"),
        (["log_head: [alice.ed25519.pub]"], "", "is no log head"),
        ([], ", run: [x]", "unknown key `run`"),
        ([], ", runs: []", "no list, or an empty one"),
        ([], ", runs: gpt", "no list, or an empty one"),
        ([], ", valid: {from: soon}", "is neither"),
        ([], ", valid: {from: 2027-01-01, until: 2026-01-01}", "is never valid"),
        ([], ", valid: {till: 2026-01-01}", "unknown key `till`"),
        ([], ", valid: {from: 2026-13-45}", "is neither"),
    ],
)
def test_a_misspelt_rule_is_an_error_with_its_line(
    rules: list[str], alice: str, reason: str, folder: Path
) -> None:
    """Oracle: the reason names what is wrong, and the place is a line of the file."""
    with pytest.raises(ConfigError, match=reason) as refused:
        parse(folder, text(*rules, alice=alice))
    assert str(refused.value.where).startswith("trust.yaml:")


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "no mapping"),
        ("[]", "no mapping"),
        ("format: harness-policy/1", "has no `identities`"),
        ("format: harness-policy/2\nidentities: [1]", "not harness-policy/1"),
        ("format: harness-policy/1\nidentities: []", "an empty one"),
        ("format: harness-policy/1\nidentities: [alice]", "no mapping"),
        ("format: harness-policy/1\nidentities: [{name: a, keys: [5]}]", "a key is no text"),
        ("format: harness-policy/1\nidentities: [{name: a, keys: [alice.p256.pub]}]", "has an Ed25519"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_policy_is_refused(written: str, reason: str, folder: Path) -> None:
    """Oracle: the reason."""
    with pytest.raises(ConfigError, match=reason):
        parse(folder, written)


def test_a_key_counts_for_one_identity_only(folder: Path) -> None:
    """Oracle: a threshold counts people; two names with one key, or one name twice, would cheat it."""
    same = "  - {name: eve, keys: [alice.ed25519.pub]}"
    with pytest.raises(ConfigError, match="alice and eve have the same key"):
        parse(folder, text().replace("  - {name: bob, keys: [bob.ed25519.pub]}", same))
    with pytest.raises(ConfigError, match="is what --key is called"):
        parse(folder, text().replace("name: bob", "name: the given keys"))
    with pytest.raises(ConfigError, match="two identities are called alice"):
        parse(folder, text().replace("name: bob", "name: alice"))


def test_a_private_key_in_a_policy_is_refused(folder: Path) -> None:
    """Oracle: private keys do not belong to auditors."""
    with pytest.raises(UsageError, match="is a private key"):
        parse(folder, text().replace("bob.ed25519.pub", "bob.key"))


@pytest.mark.parametrize(
    "name", ["none.pub", "", ".", "~nobody-of-that-name/x.pub", "a\\0b", "ssh-ed25519 AAAA"]
)
def test_a_key_that_cannot_be_read_is_an_error(name: str, folder: Path) -> None:
    """Oracle: no other exception than ours."""
    with pytest.raises(HarnessError):
        parse(folder, f'format: harness-policy/1\nidentities: [{{name: a, keys: ["{name}"]}}]\n')


def test_a_policy_whose_keys_are_all_revoked_is_refused(folder: Path) -> None:
    """Oracle: it could accept nothing."""
    ids = [keys.load_public(folder / f"{name}.ed25519.pub").key_id for name in ("alice", "bob")]
    listed = ", ".join(f'"{each}"' for each in ids)
    with pytest.raises(ConfigError, match="Ed25519 key that is not revoked"):
        parse(folder, text(f"revoked: [{listed}]"))


@given(st.text(max_size=60) | st.text("format: hs-ply/1\n{}[]dk&*!\"'", max_size=60).map("format: {}".format))
@settings(deadline=None, max_examples=300)
def test_any_text_is_a_policy_or_refused(written: str) -> None:
    """Oracle: no other exception than ours."""
    with pytest.raises(HarnessError):
        reader.parse(written, where="x", folder=Path("/nonexistent"))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """Oracle: one line with the file's name."""
    (tmp_path / "p").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        reader.load(tmp_path / "p")
    with pytest.raises(UsageError, match="cannot be read"):
        reader.load(tmp_path / "none")


def test_keys_alone_are_a_policy_of_one_identity(folder: Path) -> None:
    """Oracle: the contract of `--key`: model.sig is required with a P-256 key, an Ed25519 key always."""
    ed25519, p256 = (keys.load_public(folder / f"alice.{kind}.pub") for kind in ("ed25519", "p256"))
    assert policy.from_keys([ed25519]).required == {"checkpoint", "slsa"}
    assert policy.from_keys([ed25519, p256]).required == {"checkpoint", "slsa", "model-signature"}
    assert len(policy.from_keys([ed25519, ed25519]).statement_keys) == 1
    with pytest.raises(UsageError, match="no Ed25519 key was given"):
        policy.from_keys([p256])


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        (Identity("a", ()), None),
        (Identity("a", (), runs=("gpt-*",)), None),
        (Identity("a", (), runs=("0123*",)), None),
        (Identity("a", (), runs=("GPT-*",)), "may not sign for the run gpt-2"),
        (Identity("a", (), valid_from="2026-06-01T00:00:00Z"), None),
        (Identity("a", (), valid_from="2026-06-01T00:00:01Z"), "valid from"),
        (Identity("a", (), valid_until="2026-06-01T00:00:01Z"), None),
        (Identity("a", (), valid_until="2026-06-01T00:00:00Z"), "valid until"),
    ],
)
def test_an_identity_signs_for_its_runs_in_its_time(identity: Identity, reason: str | None) -> None:
    """Oracle: names or ids match with case; the first moment counts, the last does not."""
    objection = identity.objection("0123abcd", "gpt-2", "2026-06-01T00:00:00Z", "checkpoint")
    assert objection is None if reason is None else objection is not None and reason in objection
