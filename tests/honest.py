"""Honest stories: how trainers, auditors and stores leave a folder that must verify, without any finding.

A story changes a `Scene` as an attack does (`tests/attack.py`), and everything in it is as it should be::

    @honest
    def a_run_is_resumed(scene: Scene) -> None:
        ...
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import later_facts
import rotated
import run_folder
from attack import MODEL, Scene, payload_of, signed, trusted
from attacks_on_keyless import INSTANCE, add, countersign, statement, trust
from attacks_on_timestamps import AFTER, REVOKED, required, revoked, stamped, tsa
from authority import stamp_log
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from run_folder import SampleRun

from harness.audit import attest
from harness.audit.exports import export
from harness.audit.folders import opening
from harness.format import layout, strict_json
from harness.provenance import later
from harness.provenance.policy import canonical, reader, rotation
from harness.provenance.policy import rules as policy
from harness.provenance.policy.policy_schema import FORMAT
from harness.provenance.policy.rules import Identity, Policy
from harness.provenance.signing import keys
from harness.provenance.signing.keys import Signer
from harness.provenance.transparency import log
from harness.provenance.transparency.heads import Kept

Story = Callable[[Scene], None]
HONEST: dict[str, Story] = {}


def honest(story: Story) -> Story:
    """Register a story; its name is what it tells."""
    name = story.__name__.replace("_", " ")
    assert name not in HONEST, name
    HONEST[name] = story
    return story


def fresh(scene: Scene, signer: Signer | None = None, **options: object) -> SampleRun:
    """An empty run in place of the scene's; ``options`` are the fields of `SampleRun`."""
    shutil.rmtree(scene.root)
    run = SampleRun(scene.root, signer or scene.signer, **options)  # type: ignore[arg-type]
    scene.policy = trusted(run.signer)
    return run


def _made_under(*rules: str) -> bytes:
    """The copy of a policy of one identity, whose key is nobody's here."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    text = "\n".join([f"format: {FORMAT}", f"identities: [{{name: team, keys: [{line}]}}]", *rules])
    return canonical.written(reader.parse(text, where="team.yaml", folder=Path(".")))


COPY, OTHER = _made_under(), _made_under("max_age: 30d")
"""Copies of two policies under which a run may have been made; no auditor has them."""


def under(scene: Scene, copy: bytes, **options: object) -> SampleRun:
    """An empty run in place of the scene's, made under the policy of ``copy``; ``options`` as for `fresh`."""
    return fresh(scene, policy=copy, **options)


# What a trainer leaves.


@honest
def nothing_was_changed(scene: Scene) -> None:
    pass


@honest
def a_run_of_one_checkpoint(scene: Scene) -> None:
    fresh(scene).advance(1)


@honest
def a_run_with_more_records_than_one_tile_of_the_log_holds(scene: Scene) -> None:
    run = fresh(scene, tensors={MODEL: [("bias", [3])]})
    run.advance(*range(1, 260))
    for step in range(1, 259):
        run.prune(step)


@honest
def older_checkpoints_are_pruned(scene: Scene) -> None:
    run = fresh(scene)
    run.advance(10, 20, 30)
    run.prune(10)
    run.prune(20)


@honest
def a_run_is_resumed_by_other_machines_and_once_more(scene: Scene) -> None:
    run = fresh(scene)
    run.advance(10, 20)
    run.resume("same-data", differences=[{"what": "world_size", "before": "1", "after": "2"}])
    run.advance(30)
    run.resume()
    run.advance(40, 50)


@honest
def a_run_is_launched_again_before_its_first_checkpoint(scene: Scene) -> None:
    run = fresh(scene)
    run.train(3)
    run.resume()
    run.advance(5, 10)


@honest
def the_only_checkpoint_is_damaged_and_the_run_begins_again(scene: Scene) -> None:
    """With nothing at random it makes the same checkpoint, bit for bit, under the same id."""
    run = fresh(scene)
    run.advance(10)
    opened = opening.open_checkpoint(scene.checkpoint(10), scene.policy)
    attest.add(opened, later.SVR, later_facts.svr(), scene.signer)
    run.log_head = log.read(run.folder.log, scene.policy.statement_keys).head
    skipped = [run.set_aside(10)]
    run.parent = None
    run.resume(skipped=skipped)
    run.advance(10, 20)


@honest
def a_resume_sets_a_damaged_checkpoint_aside_and_signs_it(scene: Scene) -> None:
    run = fresh(scene)
    run.advance(10, 20, 30)
    skipped = [run.set_aside(30)]
    run.resume(at=20, skipped=skipped)
    run.advance(30, 40)


@honest
def a_resume_with_another_config_is_accepted_and_signed(scene: Scene) -> None:
    run = fresh(scene)
    run.advance(10, 20)
    difference = {"what": "config train.steps", "before": "30", "after": "60"}
    run.resume("accepted", accepted=["config"], differences=[difference])
    run.config = run.config.replace("steps: 30", "steps: 60")
    run.folder.run_config.write_text(run.config)
    run.advance(30)


@honest
def a_run_is_made_under_a_policy_that_the_auditor_does_not_have(scene: Scene) -> None:
    under(scene, COPY).advance(10, 20)


@honest
def a_run_is_made_under_the_policy_that_it_is_verified_with(scene: Scene) -> None:
    own = Identity("team", tuple(keys.public_keys(scene.signer)))
    run = under(scene, canonical.written(Policy((own,))))
    run.advance(10, 20)
    scene.policy = Policy((own,))


@honest
def a_run_is_made_under_a_policy_and_resumed_and_pruned(scene: Scene) -> None:
    run = under(scene, COPY)
    run.advance(10, 20)
    run.resume()
    run.advance(30)
    run.prune(10)


@honest
def a_resume_under_another_policy_is_accepted_and_signed(scene: Scene) -> None:
    _changes_policy(scene, COPY, OTHER).advance(30)


@honest
def a_resume_without_the_policy_is_accepted_and_signed(scene: Scene) -> None:
    run = _changes_policy(scene, COPY, None)
    run.folder.policy.unlink()
    run.advance(30)


@honest
def a_resume_under_a_first_policy_is_accepted_and_signed(scene: Scene) -> None:
    _changes_policy(scene, None, COPY).advance(30)


@honest
def a_launch_under_another_policy_was_killed_before_it_wrote_the_copy(scene: Scene) -> None:
    run = _changes_policy(scene, COPY, OTHER)
    run.advance(30)
    run.folder.policy.write_bytes(COPY)


@honest
def a_checkpoint_of_a_run_with_a_policy_is_verified_alone(scene: Scene) -> None:
    run = under(scene, COPY)
    run.advance(10)
    scene.target = run.saved[10].folder


@honest
def an_older_version_that_knew_no_policies_has_begun_the_run(scene: Scene) -> None:
    run = fresh(scene)
    run.tweak = lambda step, facts: facts.pop("policy")
    run.advance(10, 20)
    run.tweak = None
    run.resume()
    run.advance(30)


def _changes_policy(scene: Scene, before: bytes | None, after: bytes | None) -> SampleRun:
    """A run of two checkpoints under ``before``, resumed under ``after``, which was accepted."""
    run = fresh(scene, policy=before)
    run.advance(10, 20)
    difference = {"what": "policy", "before": "a…", "after": "b…"}
    run.resume("accepted", accepted=["policy: a new member"], differences=[difference])
    run.policy = after
    return run


@honest
def lines_of_the_metrics_were_lost_and_a_resume_accepts_that(scene: Scene) -> None:
    run = fresh(scene)
    run.advance(10, 20)
    difference = {"what": "metrics.jsonl", "before": "20 lines", "after": "15 lines"}
    run.resume("accepted", accepted=["metrics"], differences=[difference])
    lines = run.folder.metrics.read_bytes().splitlines(keepends=True)
    run.folder.metrics.write_bytes(b"".join(lines[:15]))
    run.advance(30)


@honest
def a_run_ends_without_finite_numbers(scene: Scene) -> None:
    run = fresh(scene)
    run.advance(10, 20)
    become_nonfinite(run, 30)


def become_nonfinite(run: SampleRun, step: int, **said: object) -> None:
    """Keep the state of ``step`` as a trainer does after which numbers are not finite; ``said``: in its
    statement."""
    book = shutil.copytree(run.folder.log, run.root / "book")
    run.tweak = lambda _, facts: facts.update(outcome="nonfinite", **said)
    run.advance(step)
    folder = run.folder.checkpoint(step)
    folder.rename(folder.with_name(f"nonfinite-{folder.name}"))
    shutil.rmtree(run.folder.log)
    book.rename(run.folder.log)


@honest
def a_run_ends_without_finite_numbers_before_its_first_checkpoint(scene: Scene) -> None:
    fresh(scene)
    never_saved(scene, 10)


@honest
def a_run_that_ended_so_is_begun_again_with_another_config_and_ends_so(scene: Scene) -> None:
    fresh(scene)
    never_saved(scene, 10)
    (scene.root / layout.METRICS).unlink()
    never_saved(scene, 20, created="2026-11-24T20:00:00Z", config="run: {seed: 4}\n")


def never_saved(scene: Scene, step: int, created: str = "2026-11-23T20:00:00Z", **options: object) -> None:
    """A launch in the scene's folder whose numbers are not finite after ``step``, before any checkpoint;
    ``options`` as for `fresh`."""
    run = SampleRun(scene.root, scene.signer, **options)  # type: ignore[arg-type]
    run.tweak = lambda _, facts: facts.update(outcome="nonfinite", created=created)
    run.advance(step)
    folder = run.folder.checkpoint(step)
    folder.rename(folder.with_name(f"nonfinite-{folder.name}"))
    shutil.rmtree(run.folder.log)


@honest
def a_save_and_a_line_of_the_metrics_are_cut_off(scene: Scene) -> None:
    (scene.root / "checkpoints" / ".tmp-step-00000040").mkdir()
    with open(scene.root / "metrics.jsonl", "ab") as stream:
        stream.write(b'{"step":31,"lo')


@honest
def steps_were_trained_since_the_newest_checkpoint(scene: Scene) -> None:
    run = fresh(scene)
    run.advance(10, 20)
    run.train(27)


@honest
def there_are_files_that_no_signature_covers_and_that_are_named(scene: Scene) -> None:
    (scene.root / "events").mkdir()
    (scene.root / "events" / "rank-00000.jsonl").write_text('{"event":"save"}\n')
    (scene.root / "tracking.json").write_text("{}")


@honest
def the_model_lies_in_several_files(scene: Scene) -> None:
    shards = {f"model-0000{number}-of-00003.safetensors": [(f"w{number}", [2, 2])] for number in (1, 2, 3)}
    names = {f"w{number}": f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    index = strict_json.dumps({"metadata": {"total_size": 48}, "weight_map": names})
    run = fresh(scene, tensors=shards, files={"model.safetensors.index.json": index})
    run.advance(10, 20)


@honest
def a_payload_has_folders_and_names_beyond_ascii(scene: Scene) -> None:
    files = {"modèle.json": b"{}\n", "tokenizer/vocabulary.txt": b"a\n", "empty.txt": b""}
    fresh(scene, files=files).advance(10)


@honest
def a_model_has_a_scalar_and_a_tensor_without_elements(scene: Scene) -> None:
    fresh(scene, tensors={MODEL: [("nothing", [0, 4]), ("one", [])]}).advance(10)


# How somebody looks at it.


@honest
def a_checkpoint_is_verified_alone(scene: Scene) -> None:
    scene.target = scene.checkpoint(20)


@honest
def a_checkpoint_was_copied_under_another_name(scene: Scene) -> None:
    scene.target = shutil.copytree(scene.checkpoint(20), scene.root.parent / "downloaded")


@honest
def the_run_is_reached_by_a_link(scene: Scene) -> None:
    scene.target = scene.root.parent / "link"
    scene.target.symlink_to(scene.root)


@honest
def the_auditor_has_the_ed25519_key_only(scene: Scene) -> None:
    scene.policy = policy.from_keys(keys.public_keys(scene.signer)[:1])


@honest
def the_run_has_grown_since_the_head_was_seen(scene: Scene) -> None:
    run = fresh(scene)
    run.advance(10)
    assert run.log_head is not None
    seen = Kept(run.log_head, "the head in the policy")
    run.advance(20, 30)
    scene.trust(log_heads=(seen,))


@honest
def every_rule_of_a_policy_is_used_and_kept(scene: Scene) -> None:
    for step in (10, 20, 30):
        bundle = scene.bundle(step)
        again = signed(strict_json.dumps(payload_of(bundle)), scene.stranger)
        bundle.with_name("countersignature-0.sigstore.json").write_bytes(again)
    head = log.read(scene.root / layout.LOG, scene.policy.statement_keys).head
    year = {"valid_from": "2026-01-01T00:00:00Z", "valid_until": "2027-01-01T00:00:00Z"}
    alice = Identity("alice", tuple(keys.public_keys(scene.signer)), ("sam*",), **year)
    bob = Identity("bob", tuple(keys.public_keys(scene.stranger)))
    required = {policy.CHECKPOINT, policy.SLSA, policy.MODEL_SIGNATURE, policy.LOG, "countersignature"}
    scene.policy = Policy(
        (alice, bob), frozenset(required), 2, frozenset({"0" * 64}), (Kept(head, "a head"),)
    )


@honest
def an_append_to_the_log_was_cut_off(scene: Scene) -> None:
    """It leaves tiles beyond the head and a temporary name; a version before this one kept older tiles."""
    folder = scene.root / layout.LOG
    before = shutil.copytree(folder, scene.root.parent / "before")
    log.append(folder, b"lost", scene.signer, log.read_claimed(folder).head.origin)
    shutil.copytree(before, folder, dirs_exist_ok=True)
    (folder / ".tmp-checkpoint").write_bytes(b"harness/ru")
    hashes = (folder / "tile" / "0" / "000.p" / "3").read_bytes()
    (folder / "tile" / "0" / "000.p" / "1").write_bytes(hashes[:32])


# Keys.


def _open_ssh(folder: Path) -> Signer:
    """The signer in an unencrypted OpenSSH key file, as ssh-keygen writes it."""
    path = folder / "id_ed25519"
    form = serialization.PrivateFormat.OpenSSH
    pem = serialization.Encoding.PEM
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(pem, form, serialization.NoEncryption()))
    path.chmod(0o600)
    return keys.load_signer(path)


@honest
def an_open_ssh_key_has_signed_which_makes_no_model_sig(scene: Scene) -> None:
    fresh(scene, _open_ssh(scene.root.parent)).advance(10, 20)


@honest
def two_identities_have_signed_where_two_are_wanted(scene: Scene) -> None:
    for step in (10, 20, 30):
        bundle = scene.bundle(step)
        again = signed(strict_json.dumps(payload_of(bundle)), scene.stranger)
        bundle.with_name("countersignature-0.sigstore.json").write_bytes(again)
    other = Identity("another", tuple(keys.public_keys(scene.stranger)))
    scene.trust(identities=(*scene.policy.identities, other), threshold=2)


@honest
def ci_countersigns_and_audits_without_a_key(scene: Scene) -> None:
    trust(scene, "threshold: 2")
    countersign(scene, 10, 20, 30)
    add(scene, INSTANCE.bundle(statement(scene)))


@honest
def ci_has_audited_when_it_still_might_and_later_lost_its_place(scene: Scene) -> None:
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    minutes = (f"{hour_ago + timedelta(minutes=each):%Y-%m-%dT%H:%M:%SZ}" for each in (-5, 15))
    trust(scene, ci=", valid: {{from: {}, until: {}, proven: true}}".format(*minutes))
    add(scene, INSTANCE.bundle(statement(scene), start=hour_ago, at=int(hour_ago.timestamp()) + 60))


# Statements that were added later.


def _by_another(scene: Scene, **limits: Any) -> None:
    """Somebody else, within ``limits``, may sign in the auditor's policy, too."""
    other = Identity("another", tuple(keys.public_keys(scene.stranger)), **limits)
    scene.trust(identities=(*scene.policy.identities, other))


@honest
def an_auditor_has_verified_before_their_time_was_over(scene: Scene) -> None:
    _by_another(scene, valid_from="2026-11-24T00:00:00Z", valid_until="2026-11-25T00:00:00Z")
    opened = opening.open_checkpoint(scene.checkpoint(20), scene.policy)
    data = signed(later.build(later.SVR, later_facts.svr(), opened.statement), scene.stranger)
    (scene.checkpoint(20) / later.path_of("svr-0")).write_bytes(data)


@honest
def a_key_that_has_just_taken_over_signs_an_older_evaluation(scene: Scene) -> None:
    key = keys.public_keys(scene.stranger)[0].key_id
    _by_another(scene, spans={key: ("2026-11-25T00:00:00Z", None)})
    opened = opening.open_checkpoint(scene.checkpoint(20), scene.policy)
    data = signed(later.build(later.TEST_RESULT, later_facts.test_result(), opened.statement), scene.stranger)
    (scene.checkpoint(20) / later.path_of("test-result-0")).write_bytes(data)


@honest
def an_evaluation_has_failed_and_the_next_one_has_passed_where_one_is_required(scene: Scene) -> None:
    scene.target = scene.checkpoint(20)
    opened = opening.open_checkpoint(scene.checkpoint(20), scene.policy)
    for result in ("FAILED", "WARNED"):
        attest.add(opened, later.TEST_RESULT, later_facts.test_result() | {"result": result}, scene.signer)
    scene.trust(required=scene.policy.required | {later.TEST_RESULT})


@honest
def an_exporter_who_may_sign_nothing_else_has_signed_the_files_of_an_export(scene: Scene) -> None:
    _by_another(scene, statements=frozenset({policy.EXPORT}), valid_from="2026-11-24T00:00:00Z")
    scene.target = scene.root.parent / "export"
    export.export(scene.checkpoint(30), scene.target, scene.policy, scene.stranger, quiet=True)


@honest
def a_countersignature_that_is_required_has_come_along_with_an_export(scene: Scene) -> None:
    _by_another(scene)
    bundle = scene.bundle(30)
    again = signed(strict_json.dumps(payload_of(bundle)), scene.stranger)
    bundle.with_name("countersignature-0.sigstore.json").write_bytes(again)
    scene.target = scene.root.parent / "export"
    export.export(scene.checkpoint(30), scene.target, scene.policy, scene.signer, quiet=True)
    scene.trust(required=scene.policy.required | {later.COUNTERSIGNATURE})


@honest
def an_evaluation_a_replay_and_an_audit_are_added_and_logged(scene: Scene) -> None:
    facts = {
        later.TEST_RESULT: later_facts.test_result(),
        later.REPLAY: later_facts.replay(),
        later.SVR: later_facts.svr(),
    }
    for kind, predicate in facts.items():
        opened = opening.open_checkpoint(scene.checkpoint(20), scene.policy)
        attest.add(opened, kind, predicate, scene.signer)


@honest
def an_auditor_adds_a_verdict_that_the_log_does_not_know(scene: Scene) -> None:
    scene.policy = trusted(scene.signer, scene.stranger)
    statement = opening.open_checkpoint(scene.checkpoint(20), scene.policy).statement
    data = signed(later.build(later.SVR, later_facts.svr(), statement), scene.stranger)
    (scene.checkpoint(20) / later.path_of("svr-0")).write_bytes(data)


@honest
def another_tool_adds_a_statement_of_its_own_kind(scene: Scene) -> None:
    statement = payload_of(scene.bundle(20)) | {"predicateType": "https://example.org/evaluation/v1"}
    path = scene.checkpoint(20) / later.path_of("evaluation-0")
    path.write_bytes(signed(strict_json.dumps(statement), scene.signer))


@honest
def a_checkpoint_with_a_logged_statement_is_pruned(scene: Scene) -> None:
    opened = opening.open_checkpoint(scene.checkpoint(10), scene.policy)
    attest.add(opened, later.SVR, later_facts.svr(), scene.signer)
    run_folder.prune(scene.checkpoint(10))


# Timestamps.


@honest
def every_head_is_timestamped_as_the_policy_requires(scene: Scene) -> None:
    for size in (1, 2, 3):
        stamped(scene, size)
    required(scene)


@honest
def a_later_timestamp_covers_what_an_authority_that_was_down_has_not(scene: Scene) -> None:
    stamped(scene, 3, AFTER)
    required(scene)


@honest
def a_statement_is_added_after_the_last_timestamp_that_is_required(scene: Scene) -> None:
    opened = opening.open_checkpoint(scene.checkpoint(20), scene.policy)
    stamped(scene)
    attest.add(opened, later.SVR, later_facts.svr(), scene.signer)
    required(scene)


@honest
def a_key_is_revoked_and_a_timestamp_is_older(scene: Scene) -> None:
    stamped(scene)
    revoked(scene)


@honest
def a_key_is_revoked_and_a_checkpoint_is_verified_in_its_run(scene: Scene) -> None:
    stamped(scene)
    revoked(scene)
    scene.target = scene.checkpoint(20)


@honest
def a_key_is_handed_over_and_its_revocation_is_younger_than_a_timestamp(scene: Scene) -> None:
    _handed_over_twice(scene)
    stamped(scene, 2)
    revoked(scene)


def _parent_and_child(scene: Scene) -> SampleRun:
    """The scene's run, begun with the end of another, which is given beside it and returned."""
    parent = SampleRun(scene.root.parent / "parent", scene.signer, name="parent", seed=4)
    parent.advance(10, 20)
    run = fresh(scene)
    run.start = parent.saved[20].as_start(parent)
    run.advance(10, 20)
    scene.beside = (parent.root,)
    return parent


@honest
def a_key_is_revoked_and_parent_and_child_have_older_timestamps(scene: Scene) -> None:
    parent = _parent_and_child(scene)
    stamped(scene, 2)
    stamp_log(parent.folder.log, tsa(), 2)
    revoked(scene)


@honest
def a_signature_whose_time_must_be_proven_has_an_older_timestamp(scene: Scene) -> None:
    (own,) = scene.policy.identities
    scene.trust(identities=(replace(own, valid_until=REVOKED, proven=True),))
    stamped(scene)


@honest
def the_policy_names_no_authority_and_timestamps_are_there(scene: Scene) -> None:
    stamped(scene, 3).write_bytes(b"whatever")
    scene.trust(authorities=())


# More than one run.


@honest
def a_child_run_is_verified_with_its_parent(scene: Scene) -> None:
    _parent_and_child(scene)


@honest
def a_child_run_is_verified_without_its_parent(scene: Scene) -> None:
    parent = SampleRun(scene.root.parent / "parent", scene.signer, name="parent", seed=4)
    parent.advance(10)
    run = fresh(scene)
    run.start = parent.saved[10].as_start(parent)
    run.advance(10)


@honest
def a_checkpoint_is_exported(scene: Scene) -> None:
    scene.target = scene.root.parent / "export"
    export.export(scene.checkpoint(30), scene.target, scene.policy, scene.signer, quiet=True)


# Keys that are handed over.


@honest
def a_key_is_handed_over_and_the_auditor_trusts_the_old_one(scene: Scene) -> None:
    _handed_over_twice(scene)


@honest
def a_key_is_handed_over_and_the_auditor_trusts_the_newest_one(scene: Scene) -> None:
    scene.policy = trusted(_handed_over_twice(scene).signer)


@honest
def a_key_is_handed_over_and_its_revocation_is_younger_than_a_kept_head(scene: Scene) -> None:
    """The head shows that the hand-over, and the checkpoint before it, are older than the revocation."""
    run = _handed_over_twice(scene)
    head = log.Head(2, log.read_claimed(run.folder.log).root_of_prefix(2), f"harness/run/{run.run_id}")
    moments = {key.key_id: "2026-12-01T00:00:00Z" for key in keys.public_keys(scene.signer)}
    seen = Kept(head, "the head in the policy", seen="2026-11-24T00:00:00Z")
    scene.trust(revoked=frozenset(moments), revoked_from=moments, log_heads=(seen,))


@honest
def a_policy_names_the_hand_over_that_the_log_has_too(scene: Scene) -> None:
    run = fresh(scene)
    run.advance(10)
    data = rotated.hand_over(run, rotated.another(scene.root), "2026-11-23T20:00:01Z")
    run.tweak = lambda step, facts: facts.update(created="2026-11-23T20:00:02Z")
    run.advance(20)
    claims = [rotation.Claim(data, "there")]
    scene.policy = rotation.extended(scene.policy, claims, timed=True)[0]


@honest
def a_run_ends_with_a_hand_over(scene: Scene) -> None:
    run = fresh(scene)
    run.advance(10)
    rotated.hand_over(run, rotated.another(scene.root))


@honest
def a_checkpoint_of_a_run_whose_key_was_handed_over_is_verified_in_its_place(scene: Scene) -> None:
    scene.target = _handed_over_twice(scene).saved[30].folder


def _handed_over_twice(scene: Scene) -> SampleRun:
    run = fresh(scene)
    run.advance(10)
    rotated.hand_over(run, rotated.another(scene.root))
    run.advance(20)
    rotated.hand_over(run, rotated.another(scene.root, "third"), "2026-11-24T20:00:00Z")
    run.advance(30)
    return run
