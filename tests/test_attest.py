"""Statements that are added later: `harness attest` as people type it, and what is written.

Oracles: the schemas under docs/schema by jsonschema, `harness verify`, and the run before the statement.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import jsonschema
import later_facts
import pytest
import run_folder
from attack import payload_of, trusted
from run_folder import SampleRun

from harness import environment
from harness.audit import attest
from harness.audit.folders import opening
from harness.audit.verification import verify
from harness.cli import main
from harness.commands import evaluation
from harness.errors import HarnessError, UsageError, VerificationFailed
from harness.format import moments, strict_json
from harness.provenance import later
from harness.provenance.policy import canonical, policy_schema, reader
from harness.provenance.signing import keys
from harness.provenance.signing.keys import Signer
from harness.provenance.transparency import log

SCHEMAS = Path(__file__).parent.parent / "docs" / "schema"
FACTS = {"replay": later_facts.replay, "test-result": later_facts.test_result, "svr": later_facts.svr}


@pytest.fixture
def run(tmp_path: Path) -> SampleRun:
    """A run of checkpoints 10 and 20, whose maker is me."""
    made = SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "me"))
    made.advance(10, 20)
    return made


@pytest.fixture
def other(run: SampleRun, tmp_path: Path) -> Signer:
    """Somebody else."""
    return run_folder.identity(tmp_path / "other")


def typed(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of `harness attest` on checkpoint 20, the maker trusted."""
    trust = ["--key", str(folder / "me.ed25519.pub"), str(folder / "me.p256.pub")]
    checkpoint = str(folder / "run" / "checkpoints" / "step-00000020")
    code = main(["attest", checkpoint, *words, *trust, "--json"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, document


def judged(run: SampleRun, *signers: Signer) -> tuple[int, str]:
    """Exit code, and findings and notes as text."""
    report = verify.verify(run.root, trusted(run.signer, *signers), quiet=True)
    return report.exit_code, "\n".join([*map(str, report.findings), *report.notes])


@pytest.mark.parametrize("kind", FACTS)
def test_a_statement_fits_its_published_schema_and_our_checker(kind: str, run: SampleRun) -> None:
    """Oracle: jsonschema with the file under docs/schema."""
    opened = opening.open_checkpoint(run.saved[20].folder, trusted(run.signer))
    added = attest.add(opened, kind, FACTS[kind](), run.signer)
    (published,) = SCHEMAS.glob(f"{kind}-v*.schema.json")
    statement = payload_of(added.path)
    jsonschema.Draft202012Validator(json.loads(published.read_text())).validate(statement["predicate"])
    assert statement["predicateType"] == later.TYPES[kind]
    assert (added.path.name, added.record) == (f"{kind}-0.sigstore.json", 2)
    code, text = judged(run)
    assert code == 0
    assert f"step-00000020 {kind}-0: " in text
    assert "not in the log" not in text


def test_every_kind_is_typed_and_the_run_still_verifies(
    run: SampleRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit codes, the files, the log's size; the next checkpoint follows as if nothing had been."""
    signing = ["--signing-key", str(tmp_path / "me.key")]
    for number, (kind, made) in enumerate(FACTS.items()):
        file = tmp_path / "facts.json"
        file.write_bytes(strict_json.dumps(made()))
        words = [] if kind == "svr" else ["--predicate", str(file)]
        code, document = typed(tmp_path, capsys, "--kind", kind, *words, *signing)
        assert (code, document["log_record"]) == (0, 2 + number)
        assert Path(document["path"]).exists()
    other = ["--kind", "audit", "--predicate-type", "https://example.org/audit/v1", *words]
    file.write_text('{"by": "somebody"}')
    assert typed(tmp_path, capsys, *other, "--predicate", str(file), *signing)[0] == 0
    assert typed(tmp_path, capsys, "--kind", "svr", *signing)[1]["name"] == "svr-1"
    run.advance(30)
    code, text = judged(run)
    assert (code, log.read(run.folder.log, trusted(run.signer).statement_keys).head.size) == (0, 8), text


def test_a_statement_by_somebody_else_is_entered_by_the_owner_of_the_log(
    run: SampleRun, other: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the note of verify, gone after `--enter`; a removal is found from then on."""
    words = ["--kind", "countersignature", "--signing-key", str(tmp_path / "other.key")]
    code, document = typed(tmp_path, capsys, *words)
    assert (code, document["log_record"]) == (0, None)
    assert "trusts this signer, too, or finds it wrong" in document["log"]
    code, text = judged(run)
    assert (code, "give its signer's key, too" in text) == (1, True)
    code, text = judged(run, other)
    assert (code, "countersignature-0: not in the log" in text) == (0, True)
    Path(document["path"]).rename(tmp_path / "kept")
    assert judged(run, other)[0] == 0
    (tmp_path / "kept").rename(document["path"])
    both = opening.open_checkpoint(run.saved[20].folder, trusted(run.signer, other))
    assert attest.enter(both, run.signer) == ["countersignature-0"]
    assert attest.enter(both, run.signer) == []
    code, text = judged(run, other)
    assert (code, "not in the log" in text) == (0, False)
    Path(document["path"]).unlink()
    code, text = judged(run, other)
    assert (code, "countersignature-0 is record 2 of the log, and is not here" in text) == (1, True)


REFUSED = {
    "a countersignature by the same key": (["--kind", "countersignature"], None, "has signed the checkpoint"),
    "a predicate that does not fit": (["--kind", "replay"], {"verdict": "equal"}, "is missing"),
    "a float": (["--kind", "audit", "--predicate-type", "urn:audit/v1"], {"score": 0.5}, None),
    "no predicate": (["--kind", "replay"], None, "needs --predicate FILE"),
    "an unknown kind": (["--kind", "audit"], {}, "name its type"),
    "a kind that is a path": (["--kind", "../audit"], {}, "no kind of statement"),
    "the checkpoint's own kind": (["--kind", "checkpoint"], {}, "no kind of statement"),
    "another type of a known kind": (["--kind", "replay", "--predicate-type", "x:replay/v2"], {}, "has the"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_verifier_would_accept_is_not_signed(name: str, run: SampleRun, tmp_path: Path) -> None:
    """Oracle: the folder before; a float with a type of its own is accepted, nobody's schema forbids it."""
    words, facts, says = REFUSED[name]
    if facts is not None:
        (tmp_path / "facts.json").write_text(json.dumps(facts))
        words = [*words, "--predicate", str(tmp_path / "facts.json")]
    before = sorted(run.root.rglob("*"))
    trust = ["--key", str(tmp_path / "me.ed25519.pub"), str(tmp_path / "me.p256.pub")]
    where = str(run.saved[20].folder)
    code = main(["attest", where, *words, "--signing-key", str(tmp_path / "me.key"), *trust, "--json"])
    assert (code == 0) == (says is None)
    assert (sorted(run.root.rglob("*")) == before) == (says is not None)


@pytest.mark.parametrize("contents", [None, b"result: PASSED", b"\xff"])
def test_a_predicate_that_cannot_be_read_is_a_wrong_call(
    contents: bytes | None, run: SampleRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2; 1 and 4 speak of what somebody has signed."""
    if contents is not None:
        (tmp_path / "facts").write_bytes(contents)
    code, document = typed(tmp_path, capsys, "--kind", "test-result", "--predicate", str(tmp_path / "facts"))
    assert (code, document["error"]["where"]) == (2, str(tmp_path / "facts"))


def test_nothing_is_signed_about_a_checkpoint_that_does_not_verify(
    run: SampleRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one flipped byte of payload, and no key that is trusted."""
    words = ["--kind", "svr", "--signing-key", str(tmp_path / "me.key")]
    checkpoint = run.saved[20].folder
    assert main(["attest", str(checkpoint), *words]) == 2
    assert "nobody has verified" in capsys.readouterr().err
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    code, document = typed(tmp_path, capsys, *words)
    assert (code, "head.bias" in document["error"]["what"]) == (1, True)
    assert not (checkpoint / later.path_of("svr-0")).exists()


def test_a_checkpoint_outside_a_run_gets_its_statement_too(run: SampleRun, tmp_path: Path) -> None:
    """Oracle: verify on the copy; nothing but the statement appears in the folder or beside it."""
    copy = shutil.copytree(run.saved[20].folder, tmp_path / "alone" / "step-00000020")
    opened = opening.open_checkpoint(copy, trusted(run.signer))
    added = attest.add(opened, later.SVR, later_facts.svr(), run.signer)
    assert (added.record, added.reason) == (None, "the checkpoint lies in no run")
    assert verify.verify(copy, trusted(run.signer), quiet=True).exit_code == 0
    assert [path.name for path in copy.parent.iterdir()] == ["step-00000020"]
    with pytest.raises(UsageError, match="there is no log"):
        attest.enter(opened, run.signer)


def test_a_statement_that_was_changed_since_it_was_verified_is_not_countersigned(
    run: SampleRun, other: Signer
) -> None:
    """Oracle: the digest of the bundle that was verified."""
    opened = opening.open_checkpoint(run.saved[20].folder, trusted(run.signer))
    path = run.saved[20].folder / "provenance" / "checkpoint.sigstore.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(VerificationFailed, match="changed since it was verified"):
        attest.countersign(opened, other)


def test_statements_that_are_added_at_once_get_numbers_and_records_of_their_own(run: SampleRun) -> None:
    """Oracle: counting; no file is overwritten and no record is lost."""
    opened = opening.open_checkpoint(run.saved[20].folder, trusted(run.signer))
    failures: list[HarnessError | OSError] = []

    def work() -> None:
        try:
            attest.add(opened, later.SVR, later_facts.svr(), run.signer)
        except (HarnessError, OSError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    names = {path.name for path in (run.saved[20].folder / "provenance").glob("svr-*")}
    assert names == {f"svr-{number}.sigstore.json" for number in range(8)}
    assert judged(run)[0] == 0
    assert log.read(run.folder.log, keys.public_keys(run.signer)).head.size == 10


def test_a_crash_before_the_rename_leaves_the_checkpoint_as_it_was(
    run: SampleRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: verify; what is left over lies beside the folder, under a name that the next launch removes."""
    opened = opening.open_checkpoint(run.saved[20].folder, trusted(run.signer))
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(SystemExit("killed")))
    with pytest.raises(SystemExit, match="killed"):
        attest.add(opened, later.SVR, later_facts.svr(), run.signer)
    code, text = judged(run)
    assert (code, ".tmp-step-00000020-svr-0" in text) == (0, True)


NAMING = b"format: harness-policy/1\nidentities: [{name: a, keys: [../other.ed25519.pub]}]\n"
"""No copy of a policy names files, and this one would accept the other's key."""
ME = "{name: me, keys: [me.ed25519.pub, me.p256.pub]%s}"
RULES = {
    # name → rules of the other identity, more rules, what is said where it is refused
    "everybody": ("", "", None),
    "whoever may sign that kind": (", statements: [svr]", "", None),
    "whoever may sign for the run": (", runs: [sample]", "", None),
    "a time that has begun": (", valid: {from: 2026-01-01, until: 9999-01-01}", "", None),
    "somebody unknown": (None, "", "it does not know the ed25519 key"),
    "another kind": (", statements: [replay]", "", "other may not sign a statement of kind svr"),
    "another run": (", runs: [another]", "", "other may not sign for the run sample"),
    "a time that is over": (", valid: {until: 2026-01-01}", "", "valid until 2026-01-01T00:00:00Z"),
    "a time that is to come": (", valid: {from: 9998-01-01}", "", "valid from 9998-01-01T00:00:00Z"),
    "a revoked key": ("", 'revoked: ["%s"]', "is revoked"),
}


def _rules(folder: Path, name: str, other: Signer) -> Path:
    """The policy file of `RULES`."""
    limits, more, _ = RULES[name]
    both = [ME % "", *([] if limits is None else [f"{{name: other, keys: [other.ed25519.pub]{limits}}}"])]
    text = [f"format: {policy_schema.FORMAT}", f"identities: [{', '.join(both)}]"]
    path = folder / "team.yaml"
    path.write_text("\n".join([*text, more % other.ed25519_id if more else ""]) + "\n")
    return path


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_a_policy_is_asked_before_a_statement_is_signed_that_it_would_not_accept(
    name: str, named: bool, run: SampleRun, other: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: `harness verify` with the policy: what was signed verifies, and what was refused, signed
    nevertheless, does not. The policy is given, or it is the one that the run says it was made under."""
    says, file = RULES[name][2], _rules(tmp_path, name, other)
    whom = ["--policy", str(file)]
    if named:
        shutil.rmtree(run.root)
        run = SampleRun(run.root, run.signer, policy=canonical.written(reader.load(file)))
        run.advance(10, 20)
        whom = ["--key", *(str(tmp_path / f"me.{kind}.pub") for kind in ("ed25519", "p256"))]
    checkpoint, before = run.saved[20].folder, sorted(run.root.rglob("*"))
    words = ["attest", str(checkpoint), "--kind", "svr", "--signing-key", str(tmp_path / "other.key"), *whom]
    code, said = main(words), capsys.readouterr()
    if says is None:
        assert code == 0, said
        assert ("team.yaml, under which the run was made," if named else "the given policy") in said.out
        assert main(["verify", str(run.root), "--policy", str(file)]) == 0
        return
    assert (code, sorted(run.root.rglob("*"))) == (2, before), said
    assert len(said.err.splitlines()) == 1
    assert says in said.err
    opened = opening.open_checkpoint(checkpoint, trusted(run.signer))
    attest.add(opened, later.SVR, {**later_facts.svr(), "timeCreated": moments.now()}, other)
    assert main(["verify", str(run.root), "--policy", str(file)]) == 1


def test_a_countersignature_is_asked_about_by_the_time_of_the_checkpoint(
    run: SampleRun, other: Signer, tmp_path: Path
) -> None:
    """Oracle: verify; the checkpoint was made on 2026-11-23, after which the other's key came, and before."""
    checkpoint = str(run.saved[20].folder)
    for valid, codes in ((", valid: {from: 2026-11-24}", (2, 0)), (", valid: {until: 2026-11-24}", (0, 0))):
        file = tmp_path / "team.yaml"
        limited = f"{{name: other, keys: [other.ed25519.pub]{valid}}}"
        file.write_text(f"format: {policy_schema.FORMAT}\nidentities: [{ME % ''}, {limited}]\n")
        words = ["attest", checkpoint, "--kind", "countersignature", "--policy", str(file)]
        assert main([*words, "--signing-key", str(tmp_path / "other.key")]) == codes[0]
        assert main(["verify", str(run.root), "--policy", str(file)]) == codes[1]


@pytest.mark.parametrize("spoilt", [None, b"", b"{}", b"\xff\xfe", b"format: harness-policy/9", NAMING])
def test_a_named_policy_that_is_not_at_hand_is_said_and_asked_nothing(
    spoilt: bytes | None, run: SampleRun, other: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the line; a checkpoint that lies alone, and copies that this version cannot read."""
    shutil.rmtree(run.root)
    run = SampleRun(run.root, run.signer, policy=spoilt or b"x")
    run.advance(20)
    where = run.saved[20].folder
    if spoilt is None:
        where = shutil.copytree(where, tmp_path / "alone" / where.name)
    whom = ["--key", *(str(tmp_path / f"me.{kind}.pub") for kind in ("ed25519", "p256"))]
    words = ["attest", str(where), "--kind", "svr", "--signing-key", str(tmp_path / "other.key")]
    assert main([*words, *whom]) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "policy  " in each]
    assert "none was asked: team.yaml, under which the run was made, cannot be read here: " in line


def test_an_evaluation_asks_the_policy_before_its_work(
    run: SampleRun,
    other: Signer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: exit code 2 and the line of the policy; what would evaluate is never called, and is called
    where the policy accepts the signer."""
    called: list[str] = []

    def work(*words: object) -> None:
        called.append("work")
        raise UsageError("the work")

    monkeypatch.setattr(evaluation, "_asked", work)
    monkeypatch.setattr(environment, "require_training", lambda: None)
    words = ["evaluate", str(run.saved[20].folder), "--signing-key", str(tmp_path / "other.key"), "--policy"]
    assert main([*words, str(_rules(tmp_path, "another kind", other))]) == 2
    assert "other may not sign a statement of kind test-result" in capsys.readouterr().err
    assert called == []
    assert main([*words, str(_rules(tmp_path, "everybody", other))]) == 2
    assert called == ["work"]
