"""The policy that a run is made under: its copy, whether a run can satisfy it, launch, resume, verdict."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import rotated
import run_folder
from attack import trusted
from authority import Authority
from conftest import Place
from honest import COPY, OTHER
from hypothesis import given
from hypothesis import strategies as st
from rotated import AT
from run_folder import SampleRun
from toy_task import config as toy

from harness import config, verify
from harness.audit import rerun
from harness.checkpoint.candidates import Found
from harness.cli import main
from harness.commands.report import write_report
from harness.errors import ConfigError, UsageError, VerificationFailed
from harness.format import layout, moments, strict_json
from harness.provenance.policy import canonical, fit, reader, rotation
from harness.provenance.policy.fit import Maker
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import keys
from harness.provenance.transparency import log
from harness.provenance.transparency.authorities import pem_of
from harness.settings import Start
from harness.training.beginning import own_policy, parent, resume
from harness.training.beginning.resume import HeldRun

ALICE = "{name: alice, keys: [alice.ed25519.pub, alice.p256.pub]%s}"
BOB = "{name: bob, keys: [bob.ed25519.pub]%s}"
WHOLE = """\
format: harness-policy/1
identities:
  - name: carol
    keys: [carol.ed25519.pub, carol.p256.pub]
    runs: [tiny, "gpt-*"]
    statements: [checkpoint, slsa, log, model-signature]
    valid: {from: 2026-01-01, until: 2027-01-01T12:00:00Z, proven: true}
  - {name: alice, keys: [alice.ed25519.pub]}
  - name: ci
    keyless: [{issuer: "https://b", identity: "x"}, {issuer: "https://a", identity: "é \\u2713"}]
    statements: [test-result, countersignature]
sigstore: root.json
required: [slsa, timestamp]
threshold: 2
revoked: [{id: "%(revoked)s", from: 2026-06-01, reason: stolen}, "%(zeros)s"]
rotations: [to-bob.rotation]
witnesses: {keys: [witness.ed25519.pub], threshold: 1}
timestamps: {certificates: [tsa.pem]}
max_age: 36h
"""


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of four people and whatever `WHOLE` names, all beside each other."""
    folder = tmp_path_factory.mktemp("people")
    signers = {
        name: run_folder.identity(folder / name) for name in ("alice", "bob", "carol", "dave", "witness")
    }
    (folder / "root.json").write_text('{"mediaType": "ü", "logs": []}\n')
    (folder / "tsa.pem").write_text(pem_of(Authority("tsa").trusted[0]))
    handed = rotation.build(signers["alice"], signers["bob"], AT, "new laptop")
    (folder / "to-bob.rotation").write_bytes(handed)
    return folder


def whole(people: Path) -> str:
    """A policy with every rule but a log head."""
    carol = keys.load_public(people / "carol.p256.pub").key_id
    return WHOLE % {"revoked": carol, "zeros": "0" * 64}


def parsed(people: Path, text: str) -> Policy:
    return reader.parse(text, where="team.yaml", folder=people)


def test_a_copy_is_a_policy_that_means_the_same_and_stands_alone(people: Path, tmp_path: Path) -> None:
    """Oracle: the policy that its text is read as where no other file lies, compared field by field; their
    order means nothing."""
    read = parsed(people, whole(people))
    copy = canonical.written(read)
    again = parsed(tmp_path, copy.decode())
    assert canonical.written(again) == copy

    def sorted_out(one: Policy) -> Policy:
        identities = (
            dataclasses.replace(
                each,
                keys=tuple(sorted(each.keys, key=lambda key: key.key_id)),
                runs=tuple(sorted(each.runs)),
                subjects=tuple(sorted(each.subjects, key=str)),
            )
            for each in one.identities
        )
        return dataclasses.replace(one, identities=tuple(sorted(identities, key=lambda each: each.name)))

    ids = [
        [(each.name, [key.key_id for key in each.keys]) for each in sorted_out(one).identities]
        for one in (read, again)
    ]
    assert ids[0] == ids[1]
    names = {field.name for field in dataclasses.fields(Policy)} - {"identities", "witnesses", "rotations"}
    assert {name: getattr(read, name) for name in names} == {name: getattr(again, name) for name in names}
    limits = ("runs", "valid_from", "valid_until", "proven", "statements", "spans", "subjects")
    for one, other in zip(sorted_out(read).identities, sorted_out(again).identities, strict=True):
        assert [getattr(one, name) for name in limits] == [getattr(other, name) for name in limits]
    assert [key.key_id for key in read.witnesses] == [key.key_id for key in again.witnesses]
    assert [each.payload for each in read.rotations] == [each.payload for each in again.rotations]


def test_comments_order_paths_reasons_and_heads_change_no_copy_and_every_rule_does(people: Path) -> None:
    """Oracle: the same meaning, spelt otherwise; then one rule changed at a time."""
    text = whole(people)
    copy = canonical.written(parsed(people, text))
    pem = json.dumps((people / "alice.ed25519.pub").read_text())
    head = f'log_head: [{{origin: harness/run/0, size: 1, root: "{"ab" * 32}"}}]\n'
    same = {
        "comment": "# ours\n" + text,
        "reason": text.replace("stolen", "sold"),
        "PEM text": text.replace("alice.ed25519.pub", pem),
        "the order of runs": text.replace('[tiny, "gpt-*"]', '["gpt-*", tiny]'),
        "the order of kinds": text.replace("[slsa, timestamp]", "[timestamp, checkpoint, slsa]"),
    }
    for name, other in same.items():
        assert other != text, name
        assert canonical.written(parsed(people, other)) == copy, name
    simple = f"format: harness-policy/1\nidentities: [{ALICE % ''}, {BOB % ''}]\n"
    turned = f"identities: [{BOB % ''}, {ALICE % ''}]\nformat: harness-policy/1\nthreshold: 1\n"
    assert len({canonical.written(parsed(people, each)) for each in (simple, turned, simple + head)}) == 1
    changes = {
        "identities": [("carol\n", "caro\n"), ("tiny", "tinier"), ("2026-01-01", "2026-01-02"),
                       ("proven: true", "proven: false"),
                       (", countersignature]", ", countersignature, svr]"), ("https://b", "https://c")],
        "sigstore": [("sigstore: root.json", "sigstore: '{}'")],
        "required": [("[slsa,", "[slsa, log,")],
        "threshold": [("threshold: 2", "threshold: 1")],
        "revoked": [("2026-06-01", "2026-06-02"), ("0" * 64, "1" * 64)],
        "witnesses": [("witness.ed25519.pub", "dave.ed25519.pub")],
        "max_age": [("36h", "37h")],
    }  # fmt: skip
    for rule, pairs in changes.items():
        for before, after in pairs:
            assert before in text
            other = canonical.written(parsed(people, text.replace(before, after, 1)))
            assert canonical.changed(copy, other) == [rule], (before, after)


@given(
    st.one_of(st.binary(max_size=20), st.sampled_from([b"[]", b'{"a":1}', b'{"a":1,"a":2}', b"\xff", b"nul"]))
)
def test_a_copy_that_is_none_differs_in_nothing_that_could_be_named(data: bytes) -> None:
    """Oracle: no exception, and only names of keys."""
    assert all(isinstance(name, str) for name in canonical.changed(data, COPY))
    assert canonical.changed(COPY, OTHER) == ["max_age"]
    assert canonical.changed(COPY, b'{"\\u001b[2J":1,"format":"x"}')[-1] == "rules of another version"


FITS: dict[str, tuple[str, str | None]] = {
    "everybody": ("", None),
    "its name": ('runs: ["sam*"]', None),
    "another name": ("runs: [another]", "alice may not sign for the run sample"),
    "its kinds": ("statements: [checkpoint, slsa, log, model-signature]", None),
    "no SLSA": ("statements: [checkpoint, log, model-signature]", "may not sign a statement of kind slsa"),
    "no log": ("statements: [checkpoint, slsa, model-signature]", "may not sign a statement of kind log"),
    "no model.sig": ("statements: [checkpoint, slsa, log]", "of kind model-signature"),
    "no checkpoint": ("statements: [log, slsa, model-signature, countersignature]", "of kind checkpoint"),
    "over": ("valid: {until: 2026-11-23T20:00:00Z}", "valid until 2026-11-23T20:00:00Z"),
    "not over": ("valid: {until: 2026-11-23T20:00:01Z}", None),
    "not yet": ("valid: {from: 2026-11-23T20:00:01Z}", "valid from 2026-11-23T20:00:01Z"),
}


@pytest.fixture(scope="module")
def sample(people: Path) -> Path:
    """A run of alice, which she has not handed to anybody."""
    return run_folder.build(people / "sample", keys.load_signer(people / "alice.key"), steps=(10,))


def objected(
    people: Path, text: str, who: str = "alice", stamps: bool = False, run_id: str | None = None
) -> str:
    maker = Maker(keys.public_keys(keys.load_signer(people / f"{who}.key")), "sample", run_id, stamps)
    return "; ".join(fit.objections(parsed(people, text), maker, AT))


@pytest.mark.parametrize("name", FITS)
def test_a_run_is_objected_to_where_its_checkpoints_would_not_verify(
    name: str, people: Path, sample: Path
) -> None:
    """Oracle: `harness.verify` of a run that was signed so at that moment, under the same policy."""
    rule, objection = FITS[name]
    text = f"format: harness-policy/1\nidentities: [{ALICE % (rule and f', {rule}')}]\n"
    said = objected(people, text)
    assert (objection or "") in said
    assert bool(said) == (objection is not None)
    assert len(set(said.split("; "))) == len(said.split("; "))
    assert verify(sample, parsed(people, text)).exit_code == (1 if objection else 0)


MORE: dict[str, tuple[str, str]] = {
    "somebody else": (f"identities: [{BOB % ''}]", "it does not know the ed25519 key"),
    "half of the key": (
        "identities: [{name: alice, keys: [alice.ed25519.pub]}, {name: x, keys: [bob.p256.pub]}]",
        "it does not know the p256 key",
    ),
    "half of the key, and model.sig is looked at": (
        "identities: [{name: alice, keys: [alice.ed25519.pub]}, {name: x, keys: [bob.p256.pub]}]\n"
        "required: [slsa]",
        "it does not know the p256 key",
    ),
    "an evaluation by somebody whose time will come": (
        f"identities: [{ALICE % ', statements: [checkpoint, slsa, log, model-signature]'}, "
        f"{BOB % ', valid: {from: 2027-01-01}'}]\nrequired: [test-result]", "",
    ),
    "a revoked key": (
        f"identities: [{ALICE % ''}, {BOB % ''}]\nrevoked: [ALICE]", "the ed25519 key ALI… is revoked",
    ),
    "a key that was revoked before": (
        f"identities: [{ALICE % ''}, {BOB % ''}]\nrevoked: [{{id: ALICE, from: 2026-11-23}}]", "is revoked",
    ),
    "one that is revoked later": (
        f"identities: [{ALICE % ''}, {BOB % ''}]\nrevoked: [{{id: ALICE, from: 2026-11-24}}]", "",
    ),
    "timestamps": (
        f"identities: [{ALICE % ''}]\nrequired: [timestamp]\ntimestamps: {{certificates: [tsa.pem]}}",
        "it requires timestamps, and signing.timestamp names no authority",
    ),
    "two people": (f"identities: [{ALICE % ''}, {BOB % ''}]\nthreshold: 2", ""),
    "two people, and one of another run": (
        f"identities: [{ALICE % ''}, {BOB % ', runs: [another]'}]\nthreshold: 2",
        "it wants 2 people to have signed, and 1 of its identities may sign for this run now",
    ),
    "two people, and one too late": (
        f"identities: [{ALICE % ''}, {BOB % ', valid: {until: 2026-01-01}'}]\nthreshold: 2", "and 1 of its",
    ),
    "two people, and one who may not countersign": (
        f"identities: [{ALICE % ''}, {BOB % ', statements: [checkpoint]'}]\nthreshold: 2", "and 1 of its",
    ),
    "an evaluation": (f"identities: [{ALICE % ''}]\nrequired: [test-result]", ""),
    "an evaluation by nobody": (
        f"identities: [{ALICE % ', statements: [checkpoint, slsa, log]'}]\nrequired: [test-result]",
        "it requires a statement of kind test-result, and nobody may sign one for this run",
    ),
    "a head of its own log": (f"identities: [{ALICE % ''}]\nlog_head: HEAD OWN}}", ""),
    "a head of another log": (
        f"identities: [{ALICE % ''}]\nlog_head: HEAD 0}}", "its log_head is of the log 'harness/run/0'",
    ),
    "heads of several logs": (f"identities: [{ALICE % ''}]\nlog_head: [HEAD 0}}, HEAD OWN}}]", ""),
    "heads of other logs, to which its own can be added": (
        f"identities: [{ALICE % ''}]\nlog_head: [HEAD 0}}, HEAD 1}}]", "",
    ),
    "witnesses and an age": (
        f"identities: [{ALICE % ''}]\nwitnesses: {{keys: [bob.ed25519.pub]}}\nmax_age: 1h", "",
    ),
    "a hand-over to it": (
        f"identities: [{BOB % ''}]\nrotations: [{{}}]".replace("{}", "to-alice.rotation"), "",
    ),
    "a hand-over of it": (
        "identities: [{name: alice, keys: [alice.ed25519.pub]}]\nrotations: [to-bob.rotation]",
        "was handed over at",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_a_run_is_objected_to_that_cannot_satisfy_a_rule_or_that_nobody_else_can(
    name: str, people: Path
) -> None:
    """Oracle: docs/verify.md, rule by rule; the pairs differ in the rule alone."""
    rules, objection = MORE[name]
    alice, own = keys.load_public(people / "alice.ed25519.pub").key_id, "5" * 32
    head = f'{{size: 1, root: "{"ab" * 32}", origin: harness/run/'
    rules = rules.replace("[ALICE]", f'["{alice}"]').replace("ALICE", f'"{alice}"')
    rules = rules.replace("HEAD OWN", head + own).replace("HEAD ", head)
    bob = keys.load_signer(people / "bob.key")
    handed = rotation.build(bob, keys.load_signer(people / "alice.key"), "2026-11-01T00:00:00Z", "sold")
    (people / "to-alice.rotation").write_bytes(handed)
    said = objected(people, f"format: harness-policy/1\n{rules}\n", run_id=own)
    assert objection.replace("ALI", alice[:16]) in said
    assert bool(said) == bool(objection), said


def test_who_asks_for_timestamps_may_be_required_to_have_some(people: Path) -> None:
    """Oracle: the row about timestamps above; model.sig is the other thing that a run makes itself."""
    rules = MORE["timestamps"][0]
    assert objected(people, f"format: harness-policy/1\n{rules}\n", stamps=True) == ""
    maker = Maker([keys.load_public(people / "alice.ed25519.pub")], "sample", None, True)
    read = parsed(people, f"format: harness-policy/1\nidentities: [{ALICE % ''}]\n")
    assert list(fit.objections(read, maker, AT)) == [
        "it requires model.sig, and the signing key has no P-256 half"
    ]


LATER = "valid: {until: 2026-11-25}"
ENDS: dict[str, tuple[str, str, str, str | None]] = {
    "never": ("", "", "", None),
    "its key": (LATER, "", "", "2026-11-25T00:00:00Z"),
    "for somebody else": ("", LATER, "", None),
    "for who must sign as well": ("", LATER, "threshold: 2", "2026-11-25T00:00:00Z"),
    "a revocation": ("", "", "revoked: [{id: ALICE, from: 2026-11-24T01:00:00Z}]", "2026-11-24T01:00:00Z"),
    "the first of two": (LATER, "", "revoked: [{id: ALICE, from: 2026-11-26}]", "2026-11-25T00:00:00Z"),
    "a hand-over that is to come": ("", "", "rotations: [later.rotation]", "2026-11-30T00:00:00Z"),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_end_is_the_moment_at_which_time_alone_brings_the_first_objection(
    name: str, people: Path
) -> None:
    """Oracle: the objections a second before and at that moment."""
    alice, bob, more, at = ENDS[name]
    pair = [keys.load_signer(people / f"{each}.key") for each in ("alice", "dave")]
    later = rotation.build(*pair, "2026-11-30T00:00:00Z", "new laptop")
    (people / "later.rotation").write_bytes(later)
    more = more.replace("ALICE", f'"{pair[0].ed25519_id}"')
    identities = f"{ALICE % (alice and f', {alice}')}, {BOB % (bob and f', {bob}')}"
    text = f"format: harness-policy/1\nidentities: [{identities}]\n{more}\n"
    rules, maker = parsed(people, text), Maker(keys.public_keys(pair[0]), "sample", None, False)
    assert not list(fit.objections(rules, maker, AT))
    found = fit.end(rules, maker, AT)
    assert (found and found[0]) == at
    if found is not None:
        before = datetime.fromisoformat(found[0]) - timedelta(seconds=1)
        assert not list(fit.objections(rules, maker, moments.text(before)))
        assert found[1] == list(fit.objections(rules, maker, found[0]))


def test_a_run_is_reminded_once_when_the_end_is_near_and_once_when_it_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the clock that is set; a run that begins near the end has read so on its first screen."""
    end = own_policy.End("2026-11-25T00:00:00Z", "alice …")
    begun = datetime(2026, 11, 23, tzinfo=UTC)
    clock = Mock(wraps=datetime)
    monkeypatch.setattr(own_policy, "datetime", clock)

    def told(first: int) -> list[str]:
        said: list[str] = []
        clock.now.return_value = begun + timedelta(hours=first)
        remind = own_policy.reminder(end, said.append)
        for hours in range(first, 52):
            clock.now.return_value = begun + timedelta(hours=hours)
            remind()
        return said

    near, over = told(0)
    assert "signing.policy ends 2026-11-25T00:00:00Z, 23 h 00 min from now; what is saved after" in near
    assert "signing.policy ended 2026-11-25T00:00:00Z; what is saved does not verify" in over
    assert told(30) == [over]


# The front door.


@pytest.fixture
def work(people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the keys of two people, a policy of both, and a config that names it."""
    for file in people.iterdir():
        if file.name.startswith(("alice.", "bob.")):
            shutil.copy(file, tmp_path)
    (tmp_path / "team.yaml").write_text(f"format: harness-policy/1\nidentities: [{ALICE % ''}, {BOB % ''}]\n")
    (tmp_path / "toy.yaml").write_text(
        "run: {dir: run}\ntask: {kind: digits}\ntrain: {steps: 2, global_batch: 4, micro_batch: 4}\n"
        "signing: {key: alice.key, policy: team.yaml}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


REFUSED: dict[str, tuple[Sequence[str], str]] = {
    "an unknown key": (["signing.key=bob.key"], "does not know the p256 key"),
    "no policy": (["signing.policy=toy.yaml"], "the policy has the unknown key `run`"),
    "no file": (["signing.policy=nowhere.yaml"], "nowhere.yaml"),
    "the run's own": (["signing.policy=run/policy.json"], "lies in the run folder"),
    "by a link": (["signing.policy=link.yaml"], "lies in the run folder"),
    "another run's copy": (["signing.policy=other/policy.json"], "is a run's own copy of a policy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_is_refused_as_a_launch_would_be(
    name: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2 and one line, as DESIGN has it for a config; doctor says it is bad."""
    for folder in (work / "run", work / "other"):
        (folder / layout.CHECKPOINTS).mkdir(parents=True)
        (folder / layout.POLICY).write_bytes(COPY)
    (work / "link.yaml").symlink_to("run/policy.json")
    words, says = REFUSED[name]
    assert main(["plan", "toy.yaml", *words]) == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert says in said.err
    main(["doctor", "toy.yaml", *words, "--json"])
    checks = {each["name"]: each for each in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["signing.policy"]["level"] == "bad"
    assert says in checks["signing.policy"]["text"]


def test_what_is_odd_in_it_is_told_before_the_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: what `harness policy check` finds in it, and the digest that it prints."""
    with open(work / "team.yaml", "a") as stream:
        stream.write("required: [checkpoint]\n")
    assert main(["policy", "check", "team.yaml", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    odd = found["odd"][0]["what"]
    assert main(["plan", "toy.yaml", "--json"]) == 0
    named = json.loads(capsys.readouterr().out)["policy"]
    assert named == {"name": "team.yaml", "sha256": found["sha256"]}
    assert main(["plan", "toy.yaml"]) == 0
    assert odd in capsys.readouterr().out
    main(["doctor", "toy.yaml"])
    assert odd in capsys.readouterr().out
    assert main(["plan", "toy.yaml", "signing.policy=null", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policy"] is None


def test_the_end_of_a_policy_is_told_before_the_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the moment in the policy; a speed at which the run takes longer, and shorter; doctor warns when
    it is near."""
    begun = datetime.now(UTC)
    rules = (work / "team.yaml").read_text()
    for hours, level in ((50, "ok"), (20, "warn")):
        end = moments.text(begun + timedelta(hours=hours, minutes=30))
        until = f"alice.p256.pub], valid: {{until: {end}}}"
        (work / "team.yaml").write_text(rules.replace("alice.p256.pub]", until))
        assert main(["plan", "toy.yaml", "--tokens-per-second", "1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["policy_ends"] == end
        for speed, early in (("1", False), ("0.00001", True)):
            assert main(["plan", "toy.yaml", "--tokens-per-second", speed]) == 0
            (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ends")]
            assert f"{end}, {hours} h" in line
            assert ("before the run: " in line) == early
        main(["doctor", "toy.yaml", "--json"])
        checks = {each["name"]: each for each in json.loads(capsys.readouterr().out)["checks"]}
        assert checks["policy ends"]["level"] == level


def test_a_sweep_begins_no_member_that_its_policy_would_reject(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2, one line, no folder; the members' names are what the policy is asked about."""
    text = (work / "team.yaml").read_text().replace("alice.p256.pub]", "alice.p256.pub], runs: [seed-0]")
    (work / "team.yaml").write_text(text)
    assert main(["sweep", "toy.yaml", "--seeds", "0..1"]) == 2
    assert "alice may not sign for the run seed-1" in capsys.readouterr().err
    assert not (work / "run-seeds").exists()


@pytest.mark.slow
def test_a_run_under_a_policy_is_resumed_under_it_alone(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the README: exact under the same one, spelt otherwise; refused under another, with both digests
    and the rule; accepted, and signed. policy.json is that of the newest checkpoint, even if edited."""
    monkeypatch.chdir(place.root)
    place.write("toy.yaml", toy(place.run, train="{steps: 6, global_batch: 12, micro_batch: 12}"))
    public = [str(path) for path in keys.create(Path("me")).public]
    for name, more in (("team", []), ("older", ["--max-age", "30d"])):
        assert main(["policy", "new", "--key", *public, *more, "--out", f"{name}.yaml"]) == 0
    place.write("again.yaml", "# ours\n" + Path("team.yaml").read_text())
    capsys.readouterr()

    def digest(name: str) -> str:
        assert main(["policy", "check", name, "--json"]) == 0
        return str(json.loads(capsys.readouterr().out)["sha256"])

    def train(*words: str) -> tuple[int, str]:
        done = place.harness("train", "toy.yaml", "signing.key=me.key", *words)
        return done.code, done.err if done.code else done.out

    def verified(policy: str) -> str:
        assert main(["verify", "run", "--policy", policy]) == 0
        return capsys.readouterr().out

    copy, team, older = place.run / layout.POLICY, digest("team.yaml"), digest("older.yaml")
    assert digest("again.yaml") == team
    code, said = train("signing.policy=team.yaml")
    assert (code, f"team.yaml  {team[:12]}  1 of me; required" in said) == (0, True), said
    assert canonical.digest(copy.read_bytes()) == team
    assert "made under the policy that is given: team.yaml" in verified("again.yaml")
    copy.write_bytes(OTHER)
    # What a colleague adds to the newest checkpoint is no damage to a job that does not know their key.
    colleague = str(keys.create(Path("colleague")).private)
    words = ["--kind", "countersignature", "--signing-key", colleague, "--key", "colleague.ed25519.pub"]
    newest = place.run / "checkpoints" / "step-00000006"
    assert main(["attest", str(newest), *words, *public]) == 0
    code, said = train("signing.policy=again.yaml", "checkpoint.every=5")
    assert said.startswith("resume        exact")
    assert "skipped" not in said
    (newest / layout.PROVENANCE / "countersignature-0.sigstore.json").unlink()
    assert canonical.digest(copy.read_bytes()) == team
    code, said = train("signing.policy=older.yaml")
    assert (code, len(said.splitlines())) == (2, 1)
    assert f"policy: {team[:12]}… → {older[:12]}…; of the policy: max_age: run; " in said
    assert "--accept policy --reason TEXT" in said
    accept = ["--accept", "policy,config", "--reason", "thirty days"]
    assert train("signing.policy=older.yaml", "train.steps=8", *accept)[0] == 0
    assert canonical.digest(copy.read_bytes()) == older
    said = verified("team.yaml")
    assert "changed train.steps, policy; accepted policy: thirty days, config: thirty days" in said
    assert f"than the one that is given: older.yaml, sha256 {older}; they differ in max_age" in said
    assert f"policy: {older[:12]}… → none: run; " in train("train.steps=8")[1]
    assert train("train.steps=10", *accept)[0] == 0
    assert not copy.exists()
    assert "made under" not in verified("team.yaml")


TEN_HOURS_A_CHECKPOINT = """
import pathlib
from datetime import datetime, timedelta
from harness.format import moments
from harness.training.beginning import own_policy
class Clock(datetime):
    @classmethod
    def now(cls, zone):
        made = len(list(pathlib.Path("run").glob("checkpoints/step*")))
        return datetime.now(zone) + timedelta(hours=10 * made)
own_policy.datetime = moments.datetime = Clock
"""


@pytest.mark.slow
def test_a_run_that_outlives_its_key_is_told_so_and_keeps_what_it_saves(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a clock that each checkpoint puts forward, and `harness verify` of checkpoints under the policy
    and under one that is extended."""
    monkeypatch.chdir(place.root)
    (place.root / "toy_task.py").write_text((place.root / "toy_task.py").read_text() + TEN_HOURS_A_CHECKPOINT)
    public = [str(path) for path in keys.create(Path("me")).public]
    end = moments.text(datetime.now(UTC) + timedelta(hours=35, minutes=29))
    rules = f"format: harness-policy/1\nidentities: [{{name: me, keys: {json.dumps(public)}%s}}]\n"
    place.write("team.yaml", rules % f", valid: {{until: {end}}}")
    place.write("extended.yaml", rules % "")
    train = "{steps: 5, global_batch: 2, micro_batch: 2}"
    place.write("toy.yaml", toy(place.run, train=train, checkpoint="{every: 1}", signing="{key: me.key}"))
    done = place.harness("train", "toy.yaml", "signing.policy=team.yaml")
    assert done.code == 0, done.err
    assert f"policy ends   {end}, 35 h 2" in done.out
    told = [line for line in done.out.splitlines() if line.startswith("signing.policy")]
    assert len(told) == 2
    assert told[0].startswith(f"signing.policy ends {end}, 15 h 2")
    assert told[1].startswith(f"signing.policy ended {end}; what is saved does not verify")
    events = (place.run / "events" / "rank-00000.jsonl").read_text().splitlines()
    assert sum('"policy"' in line and '"warning"' in line for line in events) == 2
    for step, name, code in ((4, "team", 0), (5, "team", 1), (5, "extended", 0)):
        folder = place.run / "checkpoints" / f"step-{step:08}"
        assert main(["verify", str(folder), "--policy", f"{name}.yaml"]) == code


# What others do with it.


@pytest.fixture
def made(tmp_path: Path) -> SampleRun:
    """A run that was made under a policy."""
    run = SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "me"), policy=COPY)
    run.advance(10, 20)
    return run


def test_a_verdict_says_under_which_policy_a_run_claims_to_be_made(made: SampleRun, tmp_path: Path) -> None:
    """Oracle: the note for keys, for another policy, for a checkpoint apart, and for an exchanged copy: rules
    are named only where the run has what was signed."""
    name = f"team.yaml, sha256 {canonical.digest(COPY)}"
    trust = trusted(made.signer)
    (own,) = trust.identities
    other = Policy((dataclasses.replace(own, name="me"),))
    last = made.saved[20].folder

    def told(path: Path, whom: Policy) -> list[str]:
        report = verify(path, whom)
        assert report.document()["checkpoints"][-1]["policy"] == {
            "name": "team.yaml",
            "sha256": canonical.digest(COPY),
        }
        return [each for each in report.notes if each.startswith("made under")]

    assert told(made.root, trust) == [
        f"made under the policy {name} (policy.json holds it, to be read, not to be trusted)"
    ]
    assert told(last, trust) == [f"made under the policy {name}"]
    another = f"made under another policy than the one that is given: {name}"
    assert told(made.root, other) == [f"{another}; they differ in identities"]
    assert told(last, other) == [another]
    made.folder.policy.write_bytes(OTHER)
    assert told(made.root, other) == [another]
    assert verify(made.root, other).exit_code == 1


@pytest.mark.parametrize("verb", ["verify", "gate", "lineage", "show", "export", "replay", "kernels"])
def test_no_verb_takes_a_runs_copy_for_a_policy(
    verb: str, made: SampleRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2 for the copy of the very policy that accepts the run, of this run and of another;
    outside of any run it is a policy like others."""
    own = Policy((dataclasses.replace(trusted(made.signer).identities[0], name="me"),))
    made.folder.policy.write_bytes(canonical.written(own))
    other = tmp_path / "other"
    (other / layout.CHECKPOINTS).mkdir(parents=True)
    for place in (other, tmp_path):
        shutil.copy(made.folder.policy, place)
    (tmp_path / "link.json").symlink_to(made.folder.policy)
    target = made.saved[20].folder if verb == "export" else made.root
    words = [verb, str(target), *([str(tmp_path / "out")] if verb == "export" else [])]
    for file in (made.folder.policy, other / layout.POLICY, tmp_path / "link.json"):
        assert main([*words, "--policy", str(file)]) == 2
        assert "is a run's own copy of a policy" in capsys.readouterr().err
        with pytest.raises(UsageError, match="is a run's own copy"):
            verify(target, file)
    if verb == "verify":
        with pytest.raises(UsageError, match="is a run's own copy"):
            parent.policy_of(Start(checkpoint=made.saved[20].folder, policy=other / layout.POLICY), None)
        assert main(["policy", "check", str(made.folder.policy)]) in (0, 1)
        shutil.copytree(made.root, tmp_path / "away", ignore=shutil.ignore_patterns("policy.json"))
        report = verify(tmp_path / "away", tmp_path / "policy.json")
        assert [each.check for each in report.findings] == ["policy.json"]


def test_a_child_takes_nobody_on_trust_from_its_parents_run(made: SampleRun) -> None:
    """Oracle: the rule of `harness verify`, exit code 2."""
    shutil.copy(made.root.parent / "me.ed25519.pub", made.root / "me.pub")
    start = Start(checkpoint=made.saved[20].folder, key=[made.root / "me.pub"])
    with pytest.raises(UsageError, match="would come from the folder that is checked"):
        parent.policy_of(start, None)


def test_a_report_tells_the_policies_of_its_runs(made: SampleRun, tmp_path: Path) -> None:
    """Oracle: the statements; a report without such a run says nothing of policies."""
    twin = SampleRun(tmp_path / "twin", made.signer, name="twin")
    twin.advance(10)
    write_report([made.root, twin.root], tmp_path / "both", None, None)
    text = (tmp_path / "both" / "report.md").read_text()
    assert f"- team.yaml, sha256 `{canonical.digest(COPY)}`: sample\n" in text
    write_report([twin.root], tmp_path / "one", None, None)
    assert "policy, as its runs say" not in (tmp_path / "one" / "report.md").read_text()


def test_show_diff_and_a_rerun_tell_of_it(
    made: SampleRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the statement; a twin without one differs in its identity only; a rerun has no such policy."""
    assert main(["show", str(made.root)]) == 0
    assert f"policy        team.yaml  sha256 {canonical.digest(COPY)}\n" in capsys.readouterr().out
    twin = SampleRun(tmp_path / "twin", made.signer)
    twin.advance(10, 20)
    assert main(["diff", str(made.root), str(twin.root), "--json"]) == 0
    (_, step) = json.loads(capsys.readouterr().out)["steps"]
    found = {fact["name"]: fact["topic"] for fact in step["facts"]}
    assert {name: topic for name, topic in found.items() if name.startswith("policy")} == {
        "policy": "identity", "policy.name": "identity", "policy.sha256": "identity",
    }  # fmt: skip
    for run, unset in ((made, True), (twin, False)):
        statement = verify(run.root, trusted(made.signer)).checkpoints[-1].statement
        script = rerun.rerun(statement, "folder").files[rerun.SCRIPT]
        assert ("signing.policy=null" in script) == unset
        assert "signing.key=null" in script


# A resume.


def held(run: SampleRun, people: Path, rules: str, **more: str) -> HeldRun:
    """The folder of ``run``, to be continued under a policy with ``rules`` that admits its signer."""
    names = ", ".join(f"me.{kind}.pub" for kind in ("ed25519", "p256"))
    file = people / "own.yaml"
    file.write_text(f"format: harness-policy/1\nidentities: [{{name: me, keys: [{names}]}}]\n{rules}\n")
    document = {
        "run": {"dir": str(run.root), "name": run.name}, "task": {"kind": "digits"},
        "train": {"steps": 2, "global_batch": 1, "micro_batch": 1}, "signing": {"policy": str(file), **more},
    }  # fmt: skip
    settings = config.load_as(config.Settings, _written(people, document))
    return HeldRun(run.folder, 0, people / "me.key", run.signer, "", own_policy.load(settings))


def _written(folder: Path, document: object) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(strict_json.dumps(document))
    return path


def test_a_resume_continues_the_heads_that_its_policy_keeps(made: SampleRun, tmp_path: Path) -> None:
    """Oracle: the log itself, one that was rolled back behind the head, and that of a run which begins."""
    (tmp_path / "kept.head").write_bytes((made.folder.log / log.HEAD).read_bytes())
    nothing = Found(None, None, ())
    rules = "log_head: [kept.head]"
    assert resume.open_run(held(made, tmp_path, rules), nothing, ()).logged_run == made.run_id
    shutil.rmtree(made.folder.log)
    assert resume.open_run(held(made, tmp_path, rules), nothing, ()).logged_run is None
    with pytest.raises(ConfigError, match="its log_head is of the log 'harness/run/"):
        resume.open_run(held(made, tmp_path, "log_head: kept.head"), nothing, ())
    again = SampleRun(tmp_path / "again", made.signer, policy=COPY)
    again.advance(10)
    with pytest.raises(VerificationFailed, match="it was rolled back"):
        resume.open_run(held(again, tmp_path, rules), nothing, ())


def test_a_key_that_took_over_in_the_runs_log_may_go_on(made: SampleRun, tmp_path: Path) -> None:
    """Oracle: `harness verify` under a policy that knows the first key alone."""
    rotated.hand_over(made, rotated.another(made.root))
    assert verify(made.root, trusted(run_folder.keys.load_signer(tmp_path / "me.key"))).exit_code == 0
    nothing = Found(None, None, ())
    assert resume.open_run(held(made, tmp_path, ""), nothing, ()).logged_run == made.run_id
    made.signer = run_folder.identity(tmp_path / "stranger")
    own = held(made, tmp_path, "")
    with pytest.raises(ConfigError, match="does not know the ed25519 key"):
        own_policy.require_satisfiable(own.own_policy, made.signer, made.run_id)


def test_a_policy_that_is_too_large_to_be_kept_is_refused(made: SampleRun, tmp_path: Path) -> None:
    """Oracle: the limit of a policy file, which the trusted root that it names may exceed."""
    (tmp_path / "root.json").write_text(json.dumps({"a": "x" * (300 << 10)}))
    file = tmp_path / "own.yaml"
    held(made, tmp_path, "")
    ci = '  - {name: ci, keyless: [{issuer: "https://a", identity: x}]}\nsigstore: root.json\n'
    text = file.read_text().replace("identities: [", "identities:\n  - ").replace("]}]", "]}")
    file.write_text(text.rstrip() + "\n" + ci)
    settings = config.load_as(config.Settings, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="bytes with all that it names, more than 262144"):
        own_policy.load(settings)
