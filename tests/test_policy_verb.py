"""`harness policy new` and `check` as typed, the published schema, and what kept heads prove of time."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import run_folder
import yaml
from attack import trusted
from test_verify import harness

from harness import cli
from harness.audit.verification import verify
from harness.provenance.policy import oddities, reader
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import keys
from harness.provenance.signing.keyless import Subject
from harness.provenance.signing.keys import public_keys
from harness.provenance.transparency import log
from harness.provenance.transparency.heads import Kept

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "schema" / "policy-v1.schema.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of alice and bob, and a run of alice."""
    folder = tmp_path_factory.mktemp("policy-verb")
    run_folder.build(folder / "run", run_folder.identity(folder / "alice"))
    run_folder.identity(folder / "bob")
    return folder


ALICE = ["--key", "alice.ed25519.pub", "alice.p256.pub"]


def test_a_policy_that_was_made_is_good_and_accepts_its_makers_run(folder: Path, tmp_path: Path) -> None:
    """Oracle: the check of the same tool, the published schema, and a verification under it."""
    out = tmp_path / "team.yaml"
    given = [*ALICE, "bob.ed25519.pub", "--run", "sample", "--until", "2999-01-01", "--out", str(out)]
    done = harness(folder, "policy", "new", *given)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a P-256 key is there, so model.sig must be" in done.stdout
    assert harness(folder, "policy", "check", str(out)).returncode == 0
    jsonschema.validate(yaml.safe_load(out.read_text()) | {"identities": _dates_as_text(out)}, SCHEMA)
    read = reader.load(out)
    assert [identity.name for identity in read.identities] == ["alice", "bob"]
    assert [key.key_id for key in read.identities[0].keys] == [
        keys.load_public(folder / f"alice.{kind}.pub").key_id for kind in ("ed25519", "p256")
    ]
    assert read.identities[1].runs == ("sample",)
    assert harness(folder, "verify", "run", "--policy", str(out)).returncode == 0
    assert harness(folder, "policy", "new", *given).returncode == 2
    assert harness(folder, "policy", "new", *ALICE).stdout.startswith("# Made by")


def _dates_as_text(file: Path) -> list[dict[str, Any]]:
    """PyYAML makes dates of what YAML 1.2 and our reader take as text."""
    listed = yaml.safe_load(file.read_text())["identities"]
    return [each | {"valid": {"until": str(each["valid"]["until"])}} for each in listed]


def test_who_signs_without_a_key_is_written_with_the_root_of_their_instance(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the policy as `verify` reads it, and the check of the same tool; each lack is exit code 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    root = {"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}
    (tmp_path / "root.json").write_text(json.dumps(root))
    (tmp_path / "other.json").write_text("{}")
    subjects = [Subject("https://issuer.example", f"{name}@lab.example") for name in ("a", "b")]
    ci = [word for each in subjects for word in ("--keyless", "ci", each.issuer, each.identity)]
    given = ["policy", "new", "--key", str(folder / "alice.ed25519.pub"), *ci]
    out = ["--out", "there/team.yaml"]
    assert cli.main([*given, "--trusted-root", "root.json", *out]) == 0
    assert cli.main(["policy", "check", "there/team.yaml"]) == 0
    read = reader.load(tmp_path / "there" / "team.yaml")
    assert [(each.name, each.subjects) for each in read.identities] == [("alice", ()), ("ci", (*subjects,))]
    assert read.sigstore == (tmp_path / "root.json").read_bytes()
    for words, says in (
        (given, "no trusted root is named"),
        ([*given, "--trusted-root", "none.json"], "the trusted root is missing"),
        ([*given, "--trusted-root", "other.json"], "is no trusted root"),
        ([*given[:4], "--trusted-root", "root.json"], "no identity is keyless"),
    ):
        capsys.readouterr()
        assert cli.main(words) == 2
        assert says in capsys.readouterr().err


def test_a_policy_that_was_made_with_a_head_refuses_another_history(folder: Path, tmp_path: Path) -> None:
    """Oracle: the run whose head it was, and another one of the same key; a stranger's head makes none."""
    head, out = tmp_path / "run.head", tmp_path / "team.yaml"
    harness(folder, "head", "run", "--out", str(head))
    made = harness(folder, "policy", "new", *ALICE, "--head", str(head), "--out", str(out))
    assert made.returncode == 0, made.stderr
    assert harness(folder, "verify", "run", "--policy", str(out)).returncode == 0
    signer = keys.load_signer(folder / "alice.key")
    other = run_folder.build(tmp_path / "other", signer, values="other")
    assert "its history was rewritten" in harness(folder, "verify", str(other), "--policy", str(out)).stdout
    refused = harness(folder, "policy", "new", "--key", "bob.ed25519.pub", "--head", str(head))
    assert (refused.returncode, refused.stdout) == (1, "")


def test_what_makes_no_policy_is_not_written(folder: Path, tmp_path: Path) -> None:
    """Oracle: an error of one line, and no file."""
    out = ["--out", str(tmp_path / "team.yaml")]
    for given in (
        ["--threshold", "2"],
        ["--until", "soon"],
        ["--max-age", "1 month"],
        ["--until", "x}, a: {"],
    ):
        done = harness(folder, "policy", "new", *ALICE, *given, *out)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert harness(folder, "policy", "new", *out).returncode == 2
    assert not (tmp_path / "team.yaml").exists()


HEAD = (
    "format: harness-policy/1\nidentities:\n  - name: alice\n    keys: [alice.ed25519.pub, alice.p256.pub]\n"
)
BOB = "  - name: bob\n    keys: [bob.ed25519.pub]\n"
NOW = datetime(2026, 6, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("written", "line", "says"),
    [
        (f"{HEAD}    valid: {{until: 2026-06-01}}\n{BOB}", 5, "the time of alice is over"),
        (f"{HEAD}    valid: {{from: 2026-06-02}}\n{BOB}", 5, "begins at 2026-06-02"),
        (
            f"{HEAD}{BOB}    valid: {{until: 2026-01-01}}\nthreshold: 2\n",
            8,
            "1 of the identities may sign now",
        ),
        (f"{HEAD}    runs: [tiny]\n{BOB}    runs: [other]\nthreshold: 2\n", 9, "may sign for the run tiny"),
        (f"{HEAD}required: [slas]\n", 5, "did you mean slsa?"),
        (f"{HEAD}required: [test-results, model-signature]\n", 5, "did you mean test-result?"),
        (f"{HEAD}    statements: [checkpoint, model-signatur]\n", 5, "did you mean model-signature?"),
        (f"{HEAD}    statements: [checkpoint, log]\n", 1, "slsa is required, and no identity may sign it"),
        (f"{HEAD}required: [slsa]\n", 5, "model-signature is not required"),
        (
            f"{HEAD}    valid: {{until: 2026-06-01}}\n{BOB}required: [slsa, model-signature]\n",
            8,
            "required, and who may sign it may not now (alice): model-signature",
        ),
        (
            f"{HEAD}    statements: [slsa]\n    valid: {{from: 2026-06-02}}\n"
            f"{BOB}    statements: [checkpoint]\n",
            1,
            "required, and who may sign it may not now (alice): slsa",
        ),
    ],
)
def test_what_is_odd_in_a_policy_is_told_with_its_line(
    written: str, line: int, says: str, folder: Path, tmp_path: Path
) -> None:
    """Oracle: the line that the test has written, and a reason or remedy."""
    file = folder / "odd.yaml"
    file.write_text(written)
    _, odd = oddities.check(file, NOW)
    told = {(int(each.where.rpartition(":")[2]), f"{each.what}; {each.remedy}") for each in odd}
    assert any(place == line and says in text for place, text in told), told


def test_a_policy_without_oddities_has_none(folder: Path) -> None:
    """Oracle: two people, both in time, and kinds of other tools, which nobody can know."""
    file = folder / "good.yaml"
    file.write_text(f"{HEAD}{BOB}threshold: 2\nrequired: [slsa, model-signature, energy-use]\n")
    assert oddities.check(file, NOW)[1] == []


def test_the_verb_says_what_is_odd_and_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    """Oracle: exit code 1 with every oddity; 2 with line and nearest name for a key that nobody knows."""
    file = folder / "verb.yaml"
    file.write_text(f"{HEAD}    valid: {{until: 2001-01-01}}\n")
    done = harness(folder, "policy", "check", "verb.yaml")
    assert (done.returncode, done.stdout.count("\nodd ")) == (1, 3)
    document = json.loads(harness(folder, "policy", "check", "verb.yaml", "--json").stdout)
    assert document["odd"][0]["where"] == "verb.yaml:5"
    for number, (rest, says) in enumerate(
        {
            "treshold: 1\n": "verb.yaml:5; did you mean `threshold`?",
            "    vaild: {until: 2001-01-01}\n": "verb.yaml:5; did you mean `valid`?",
            f"{BOB}    valid:\n      form: 2001-01-01\n": "verb.yaml:8; did you mean `from`?",
            "  - name: eve\n    keys:\n      - bob.ed25519.pub\n      - bob.ed25519.pub\n": "verb.yaml:8",
        }.items()
    ):
        file.write_text(HEAD + rest)
        done = harness(folder, "policy", "check", "verb.yaml")
        assert done.returncode == 2, number
        assert says in done.stderr


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"log_head": [{"file": "a", "seen": "2026-01-01"}, "b"]}, True),
        ({"revoked": ["0" * 64, {"id": "1" * 64, "from": "2026-01-01T00:00:00Z", "reason": "lost"}]}, True),
        ({"max_age": "30d"}, True),
        ({"treshold": 1}, False),
        ({"threshold": 0}, False),
        ({"max_age": "1 month"}, False),
        ({"revoked": [{"from": "2026-01-01"}]}, False),
        ({"log_head": {"size": 1}}, False),
        ({"required": []}, False),
        ({"format": "harness-policy/2"}, False),
        ({"identities": [{"name": "a", "keys": ["k"], "run": ["x"]}]}, False),
        ({"identities": [{"name": "a", "keys": ["k"], "valid": {"till": "2026-01-01"}}]}, False),
    ],
)
def test_the_published_schema_draws_the_same_line(change: dict[str, Any], good: bool) -> None:
    """Oracle: jsonschema, which editors use; the cases are those of our own reader's tests."""
    document = {"format": "harness-policy/1", "identities": [{"name": "a", "keys": ["a.pub"]}]} | change
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(document) == good


def _judged(root: Path, trust: Policy) -> tuple[int, list[str]]:
    report = verify.verify(root, trust, quiet=True)
    return report.exit_code, [str(each) for each in report.findings]


def test_a_key_that_was_revoked_later_counts_for_what_a_kept_head_shows(folder: Path) -> None:
    """Oracle: the three combinations of a head's time and the revocation's; only an older head helps."""
    signer = keys.load_signer(folder / "alice.key")
    book = log.read(folder / "run" / "log", public_keys(signer))
    moments = {key.key_id: "2026-12-01T00:00:00Z" for key in public_keys(signer)}
    trust = dataclasses.replace(trusted(signer), revoked=frozenset(moments), revoked_from=moments)
    for seen, code in (("2026-11-30T23:59:59Z", 0), ("2026-12-01T00:00:00Z", 1), (None, 1)):
        kept = Kept(book.head, "the head in the policy", seen)
        found = _judged(folder / "run", dataclasses.replace(trust, log_heads=(kept,)))
        assert found[0] == code, found
    wrong = Kept(log.Head(3, bytes(32), book.head.origin), "the head in the policy", "2026-11-24T00:00:00Z")
    assert _judged(folder / "run", dataclasses.replace(trust, log_heads=(wrong,)))[0] == 1


def test_a_time_that_must_be_proven_is_proven_by_a_kept_head(folder: Path) -> None:
    """Oracle: a head that was seen before the end of the window, and one that was seen after."""
    signer = keys.load_signer(folder / "alice.key")
    book = log.read(folder / "run" / "log", public_keys(signer))
    trust = trusted(signer)
    limited = dataclasses.replace(trust.identities[0], valid_until="2026-12-01T00:00:00Z", proven=True)
    for seen, code in (("2026-11-24T00:00:00Z", 0), ("2026-12-02T00:00:00Z", 1)):
        kept = (Kept(book.head, "the head in the policy", seen),)
        changed = dataclasses.replace(trust, identities=(limited,), log_heads=kept)
        assert _judged(folder / "run", changed)[0] == code


def test_a_young_state_and_a_young_head_are_fresh(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the sample run's time is 2026-11-23T20:00:00Z; the verifier's clock is set by the test."""
    from harness.provenance import freshness

    signer = keys.load_signer(folder / "alice.key")
    trust = dataclasses.replace(trusted(signer), max_age=timedelta(days=2))
    book = log.read(folder / "run" / "log", public_keys(signer))
    seen = Kept(book.head, "the head in the policy", "2026-12-01T00:00:00Z")
    older = log.Head(2, book.root_of_prefix(2), book.head.origin)
    heads = {"none": (), "whole": (seen,), "prefix": (dataclasses.replace(seen, head=older),)}
    for now, head, code in (
        ("2026-11-25T19:59:59+00:00", "none", 0), ("2026-11-25T20:00:01+00:00", "none", 1),
        ("2026-12-02T00:00:00+00:00", "whole", 0), ("2026-12-02T00:00:00+00:00", "prefix", 1),
        ("2026-11-23T19:51:00+00:00", "none", 0), ("2026-11-23T19:49:00+00:00", "none", 1),
    ):  # fmt: skip
        monkeypatch.setattr(freshness, "now", lambda now=now: datetime.fromisoformat(now))
        found = _judged(folder / "run", dataclasses.replace(trust, log_heads=heads[head]))
        assert found[0] == code, (now, head, found)
        alone = dataclasses.replace(trust)
        step = folder / "run" / "checkpoints" / "step-00000030"
        assert _judged(step, alone)[0] == (code if head == "none" else 1)
