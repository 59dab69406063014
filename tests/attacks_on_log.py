"""Attacks on the log, metrics.jsonl and run.yaml."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import run_folder
from attack import Scene, attack
from honest import never_saved
from run_folder import SampleRun

from harness.format import layout, strict_json
from harness.provenance.transparency import log
from harness.provenance.transparency.heads import Kept


def _log(scene: Scene) -> Path:
    return scene.root / "log"


def _rewrite(scene: Scene, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Write the log anew with the right key."""
    book = log.read(_log(scene), scene.policy.statement_keys)
    scene.relog(change(list(book.records)))


@attack("is missing", 4)
def the_log_is_removed(scene: Scene) -> None:
    shutil.rmtree(_log(scene))


@attack("is a symbolic link")
def the_log_is_a_link_to_itself(scene: Scene) -> None:
    shutil.rmtree(_log(scene))
    _log(scene).symlink_to(_log(scene).name)


@attack("holds folders that are nested deeper than 64")
def folders_in_the_log_are_nested_without_an_end(scene: Scene) -> None:
    (_log(scene) / "/".join("a" * 70)).mkdir(parents=True)


@attack("is missing", 4)
def the_head_of_the_log_is_removed(scene: Scene) -> None:
    (_log(scene) / "checkpoint").unlink()


def _unlogged(scene: Scene, *steps: int) -> None:
    """A run that became non-finite after ``steps``; of the rest nothing is shown."""
    shutil.rmtree(scene.root)
    run = SampleRun(scene.root, scene.signer)
    run.advance(*steps)
    run.tweak = lambda step, facts: facts.update(outcome="nonfinite")
    run.advance(40)
    for step in steps:
        shutil.rmtree(scene.checkpoint(step))
    scene.checkpoint(40).rename(scene.checkpoint(40).with_name("nonfinite-step-00000040"))
    shutil.rmtree(_log(scene))


@attack("log/checkpoint", 1)
def only_the_state_before_a_nan_is_shown_of_a_run_that_had_checkpoints(scene: Scene) -> None:
    _unlogged(scene, 10, 20)


@attack("log/checkpoint", 4)
def a_run_without_checkpoints_is_shown_to_somebody_who_asks_for_the_log(scene: Scene) -> None:
    _unlogged(scene)
    scene.trust(required=frozenset({*scene.policy.required, "log"}))


@attack("log/checkpoint", 4)
def a_run_without_checkpoints_is_shown_to_somebody_who_has_kept_its_head(scene: Scene) -> None:
    _keep_head(scene)
    _unlogged(scene)


@attack("has loss 0.25 at step")
def a_line_of_the_metrics_of_a_run_without_checkpoints_is_changed(scene: Scene) -> None:
    _unlogged(scene)
    _lines(scene, lambda lines: [*lines[:-1], _edited(lines[-1], loss=0.25) + b"\n"])


@attack("is a config that no checkpoint has signed")
def the_config_of_a_run_without_checkpoints_is_changed(scene: Scene) -> None:
    _unlogged(scene)
    (scene.root / layout.RUN_CONFIG).write_text("run: {seed: 4}\n")


@attack("is a policy that no checkpoint names")
def a_policy_is_put_into_a_run_without_checkpoints(scene: Scene) -> None:
    _unlogged(scene)
    (scene.root / layout.POLICY).write_text("{}")


@attack("is a config that no checkpoint has signed")
def the_config_of_an_earlier_launch_is_shown_of_a_run_without_checkpoints(scene: Scene) -> None:
    _unlogged(scene)
    before = (scene.root / layout.RUN_CONFIG).read_bytes()
    (scene.root / layout.METRICS).unlink()
    never_saved(scene, 50, created="2026-11-24T20:00:00Z", config="run: {seed: 4}\n")
    (scene.root / layout.RUN_CONFIG).write_bytes(before)


@attack("ago; max_age is")
def a_run_without_checkpoints_is_older_than_the_policy_wants(scene: Scene) -> None:
    _unlogged(scene)
    scene.trust(max_age=timedelta(seconds=0))


def _append(scene: Scene, line: str) -> None:
    path = scene.root / layout.LOG / log.HEAD
    path.write_bytes(path.read_bytes() + line.encode())


@attack("has a signature line that is none")
def a_line_that_is_no_signature_follows_the_head(scene: Scene) -> None:
    """Nobody has signed it, and whoever prints the head prints it."""
    _append(scene, "verified  everything\n")


@attack("has a signature line that is none")
def a_witness_has_a_name_that_a_terminal_obeys(scene: Scene) -> None:
    _append(scene, "— \x1b[2Jverified AAAA\n")


@attack("has broken base64")
def a_signature_that_is_no_base64_follows_the_heads(scene: Scene) -> None:
    _append(scene, "— witness !!!!\n")


@attack("the log's head is signed by none of the accepted keys")
def the_head_of_the_log_is_signed_by_a_stranger(scene: Scene) -> None:
    head = log.read(_log(scene), scene.policy.statement_keys).head
    (_log(scene) / "checkpoint").write_bytes(log.sign_note(head, scene.stranger))


@attack("the log's head is signed by none of the accepted keys")
def the_size_in_the_head_is_changed(scene: Scene) -> None:
    path = _log(scene) / "checkpoint"
    path.write_bytes(path.read_bytes().replace(b"\n3\n", b"\n2\n"))


@attack("has a broken size or root")
def the_size_in_the_head_is_huge(scene: Scene) -> None:
    path = _log(scene) / "checkpoint"
    path.write_bytes(path.read_bytes().replace(b"\n3\n", b"\n" + b"9" * 100_000 + b"\n"))


@attack("the records do not have the root that the head signs")
def a_record_of_the_log_is_edited(scene: Scene) -> None:
    path = _log(scene) / "tile" / "entries" / "000.p" / "3"
    path.write_bytes(path.read_bytes().replace(b'"step":20', b'"step":21'))


@attack("has fewer than 3 records")
def the_records_of_the_log_are_truncated(scene: Scene) -> None:
    path = _log(scene) / "tile" / "entries" / "000.p" / "3"
    (length,) = struct.unpack(">H", path.read_bytes()[:2])
    path.write_bytes(path.read_bytes()[: 2 + length])


@attack("has bytes before or after its records")
def the_last_record_of_the_log_is_cut_short(scene: Scene) -> None:
    path = _log(scene) / "tile" / "entries" / "000.p" / "3"
    path.write_bytes(path.read_bytes()[:-1])


@attack("is missing", 4)
def the_records_of_the_log_are_removed(scene: Scene) -> None:
    (_log(scene) / "tile" / "entries" / "000.p" / "3").unlink()


@attack("the tile does not hold the hashes of the records")
def a_tile_of_the_log_is_edited(scene: Scene) -> None:
    path = _log(scene) / "tile" / "0" / "000.p" / "3"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@attack("has other lines up to step 10 than this checkpoint has signed")
def a_learning_rate_in_the_metrics_is_another(scene: Scene) -> None:
    """It is in no chain, and in the digest of the launch's lines."""
    path = scene.root / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"lr":0.001', b'"lr":0.002', 1))


@attack("is no file of a log of 3 records")
def a_file_lies_beside_the_head_of_the_log(scene: Scene) -> None:
    (_log(scene) / "tile" / "evil.py").write_text("import os\n")


@attack("is no file of a log of 3 records")
def a_link_to_a_folder_lies_in_the_log(scene: Scene) -> None:
    (_log(scene) / "tile" / "1").symlink_to(scene.root / "checkpoints")


@attack("is an older tile, and the newer one does not begin with it")
def an_older_tile_of_the_log_has_other_hashes(scene: Scene) -> None:
    path = _log(scene) / "tile" / "0" / "000.p" / "3"
    path.with_name("2").write_bytes(path.read_bytes()[32:])


@attack("is an older tile, and the newer one does not begin with it")
def an_older_tile_of_the_log_has_other_records(scene: Scene) -> None:
    path = _log(scene) / "tile" / "entries" / "000.p" / "3"
    path.with_name("1").write_bytes(path.read_bytes()[:20])


@attack("was signed when the log had")
def the_records_of_the_log_are_reordered_by_the_signer(scene: Scene) -> None:
    _rewrite(scene, lambda records: [records[1], records[0], records[2]])


@attack("has two records of the same checkpoint")
def a_record_of_the_log_is_repeated_by_the_signer(scene: Scene) -> None:
    _rewrite(scene, lambda records: [*records, records[-1]])


@attack("says something else about it")
def a_record_of_the_log_is_edited_by_the_signer(scene: Scene) -> None:
    _rewrite(scene, lambda records: [*records[:2], records[2].replace(b'"step":30', b'"step":31')])


@attack("has a record that is neither of a checkpoint nor of a statement")
def a_record_of_the_log_has_an_unknown_field(scene: Scene) -> None:
    _rewrite(scene, lambda records: [*records[:2], b'{"evil":1,' + records[2][1:]])


@attack("has the key `run` twice")
def a_record_of_the_log_has_a_key_twice(scene: Scene) -> None:
    _rewrite(scene, lambda records: [*records[:2], b'{"run":"",' + records[2][1:]])


@attack("saw another log of 2 records when it was signed")
def the_history_before_a_checkpoint_is_rewritten_by_the_signer(scene: Scene) -> None:
    def other(step: int, facts: run_folder.Predicate) -> None:
        if step == 30:
            facts["log"]["root"] = "0" * 64

    scene.rebuild(tweak=other)


@attack("belongs to another run than the log of")
def the_log_of_another_run_is_put_in(scene: Scene) -> None:
    other = run_folder.build(scene.root.parent / "other", scene.signer, name="other")
    shutil.rmtree(_log(scene))
    shutil.copytree(other / "log", _log(scene))


def _before_step_30(scene: Scene) -> None:
    """The folder as it was when it held two checkpoints: an old copy, or a rollback."""
    shutil.rmtree(scene.checkpoint(30))
    _rewrite(scene, lambda records: records[:2])
    path = scene.root / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:20]))


def _keep_head(scene: Scene) -> None:
    """The auditor's policy gets the head that the log has now."""
    head = log.read(_log(scene), scene.policy.statement_keys).head
    scene.trust(log_heads=(Kept(head, "the head in the policy"),))


@attack("has 2 records, the head in the policy has 3: it was rolled back")
def the_run_is_rolled_back_behind_the_head_that_was_seen(scene: Scene) -> None:
    _keep_head(scene)
    _before_step_30(scene)


@attack("does not continue the head in the policy (3 records): its history was rewritten")
def the_run_is_replaced_by_another_history(scene: Scene) -> None:
    _keep_head(scene)
    scene.rebuild(values="other")


@attack("and a checkpoint folder alone has none", 4)
def a_checkpoint_is_taken_out_of_a_run_whose_head_was_kept(scene: Scene) -> None:
    _keep_head(scene)
    scene.target = scene.checkpoint(10)


@attack("is that of 'harness/run/")
def another_run_of_the_same_maker_is_shown_instead_of_the_one_whose_head_was_kept(scene: Scene) -> None:
    _keep_head(scene)
    scene.rebuild(name="another")


@attack("and the policy has heads of other logs only")
def a_run_is_shown_whose_head_is_not_among_those_of_the_policy(scene: Scene) -> None:
    heads = [log.Head(3, bytes(32), f"harness/run/{number}") for number in range(2)]
    scene.trust(log_heads=tuple(Kept(head, "the head in the policy", binding=False) for head in heads))


@attack("is not in the log yet", 4)
def the_newest_checkpoint_is_not_logged_yet(scene: Scene) -> None:
    """A crash between rename and log entry looks like this: no lie, and no complete evidence."""
    _rewrite(scene, lambda records: records[:2])


@attack("is not in the log")
def an_older_checkpoint_is_not_in_the_log(scene: Scene) -> None:
    _rewrite(scene, lambda records: [records[0], records[2]])


@attack("nonfinite-step-00000040")
def the_log_is_rolled_back_behind_a_state_that_is_not_finite(scene: Scene) -> None:
    shutil.rmtree(scene.root)
    run = SampleRun(scene.root, scene.signer)
    run.advance(10, 20, 30)
    book = shutil.copytree(_log(scene), scene.root.parent / "book")
    run.tweak = lambda step, facts: facts.update(outcome="nonfinite")
    run.advance(40)
    scene.checkpoint(40).rename(scene.checkpoint(40).with_name("nonfinite-step-00000040"))
    shutil.rmtree(_log(scene))
    shutil.copytree(book, _log(scene))
    _before_step_30(scene)


# metrics.jsonl.


def _lines(scene: Scene, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = scene.root / "metrics.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def _bare(line: bytes) -> bytes:
    return strict_json.dumps({key: value for key, value in json.loads(line).items() if key != "evaluation"})


def _edited(line: bytes, **changes: object) -> bytes:
    return strict_json.dumps(json.loads(line) | changes)


@attack("step 15 was changed")
def a_loss_in_the_metrics_is_edited(scene: Scene) -> None:
    _lines(scene, lambda lines: [*lines[:14], _edited(lines[14], loss=0.5), *lines[15:]])


@attack("no float32")
def a_loss_in_the_metrics_is_edited_below_the_precision_of_the_chain(scene: Scene) -> None:
    def change(lines: list[bytes]) -> list[bytes]:
        loss = json.loads(lines[14])["loss"]
        return [*lines[:14], _edited(lines[14], loss=loss * (1 + 1e-9)), *lines[15:]]

    _lines(scene, change)


@attack("step 15 was changed")
def a_batch_digest_in_the_metrics_is_edited(scene: Scene) -> None:
    _lines(scene, lambda lines: [*lines[:14], _edited(lines[14], batch="0" * 32), *lines[15:]])


@attack("has another evaluation up to step 20 than this checkpoint has signed")
def an_evaluation_in_the_metrics_is_edited(scene: Scene) -> None:
    better = {"accuracy": 0.99}
    _lines(scene, lambda lines: [*lines[:19], _edited(lines[19], evaluation=better), *lines[20:]])


@attack("has another evaluation up to step 10 than this checkpoint has signed")
def an_evaluation_in_the_metrics_is_removed(scene: Scene) -> None:
    _lines(scene, lambda lines: [*lines[:9], _bare(lines[9]), *lines[10:]])


@attack("has another evaluation up to step 20 than this checkpoint has signed")
def a_better_evaluation_is_added_to_the_metrics(scene: Scene) -> None:
    better = {"accuracy": 0.99}
    _lines(
        scene,
        lambda lines: [*lines[:18], _edited(lines[18], evaluation=better), _bare(lines[19]), *lines[20:]],
    )


@attack("step 16 follows step 14")
def a_line_of_the_metrics_is_removed(scene: Scene) -> None:
    _lines(scene, lambda lines: [*lines[:14], *lines[15:]])


def _with_a_gap(scene: Scene, lines: Callable[[list[bytes]], list[bytes]]) -> None:
    """Lines 16 to 20 were lost, a resume at step 20 has accepted that, and then ``lines`` is done."""
    shutil.rmtree(scene.root)
    run = SampleRun(scene.root, scene.signer)
    run.advance(10, 20)
    difference = {"what": "metrics.jsonl", "before": "20 lines", "after": "15 lines"}
    run.resume("accepted", accepted=["metrics"], differences=[difference])
    _lines(scene, lambda each: each[:15])
    run.advance(30)
    _lines(scene, lines)


@attack("step 22 follows step 15")
def a_gap_in_the_metrics_is_wider_than_was_accepted(scene: Scene) -> None:
    _with_a_gap(scene, lambda lines: [*lines[:15], *lines[16:]])


@attack("step 26 follows step 24")
def a_gap_in_the_metrics_is_elsewhere_than_was_accepted(scene: Scene) -> None:
    _with_a_gap(scene, lambda lines: [*lines[:19], *lines[20:]])


@attack("is not what this checkpoint has signed")
def lines_before_an_accepted_gap_are_another_runs(scene: Scene) -> None:
    other = run_folder.build(scene.root.parent / "other", scene.stranger, seed=4)
    lines = (other / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    _with_a_gap(scene, lambda own: [*lines[:15], *own[15:]])


@attack("step 15 follows step 15")
def a_line_of_the_metrics_is_repeated(scene: Scene) -> None:
    _lines(scene, lambda lines: [*lines[:15], *lines[14:]])


@attack("step 16 follows step 14")
def two_lines_of_the_metrics_are_swapped(scene: Scene) -> None:
    _lines(scene, lambda lines: [*lines[:14], lines[15], lines[14], *lines[16:]])


@attack("ends at step 25, before this checkpoint's")
def the_metrics_are_truncated(scene: Scene) -> None:
    _lines(scene, lambda lines: lines[:25])


@attack("is missing", 4)
def the_metrics_are_removed(scene: Scene) -> None:
    (scene.root / "metrics.jsonl").unlink()


@attack("holds NaN")
def a_loss_in_the_metrics_is_nan(scene: Scene) -> None:
    _lines(scene, lambda lines: [*lines[:14], lines[14].replace(b'"loss":', b'"loss":NaN,"x":'), *lines[15:]])


@attack("has a line of more than 1048576 bytes")
def a_line_of_the_metrics_has_no_end(scene: Scene) -> None:
    _lines(scene, lambda lines: [*lines, b" " * (2 << 20)])


@attack("is not what this checkpoint has signed")
def the_metrics_are_computed_anew_with_a_good_chain(scene: Scene) -> None:
    other = run_folder.build(scene.root.parent / "other", scene.stranger, seed=4)
    shutil.copy(other / "metrics.jsonl", scene.root / "metrics.jsonl")


@attack("has a broken chain, batch, rng, loss, grad_norm, gradients or state")
def a_chain_in_the_metrics_is_removed_with_its_digests(scene: Scene) -> None:
    _lines(scene, lambda lines: [*lines[:14], _edited(lines[14], batch=None, rng=None), *lines[15:]])


# The config.


@attack("is a config that no checkpoint has signed")
def the_config_is_edited(scene: Scene) -> None:
    path = scene.root / "run.yaml"
    path.write_text(path.read_text().replace("seed: 3", "seed: 4"))


@attack("is missing", 4)
def the_config_is_removed(scene: Scene) -> None:
    (scene.root / "run.yaml").unlink()


@attack("is a symbolic link")
def the_config_becomes_a_symbolic_link(scene: Scene) -> None:
    outside = (scene.root / "run.yaml").rename(scene.root.parent / "outside.yaml")
    (scene.root / "run.yaml").symlink_to(outside)


@attack("is a symbolic link")
def the_metrics_become_a_symbolic_link(scene: Scene) -> None:
    outside = (scene.root / "metrics.jsonl").rename(scene.root.parent / "outside.jsonl")
    (scene.root / "metrics.jsonl").symlink_to(outside)


@attack("has 2 hard links")
def the_metrics_have_a_second_name_outside(scene: Scene) -> None:
    os.link(scene.root / "metrics.jsonl", scene.root.parent / "outside.jsonl")


@attack("is a symbolic link")
def the_folder_of_the_log_becomes_a_symbolic_link(scene: Scene) -> None:
    outside = (scene.root / "log").rename(scene.root.parent / "outside")
    (scene.root / "log").symlink_to(outside)


@attack("is a symbolic link")
def the_folder_of_all_checkpoints_becomes_a_symbolic_link(scene: Scene) -> None:
    outside = (scene.root / "checkpoints").rename(scene.root.parent / "outside")
    (scene.root / "checkpoints").symlink_to(outside)


@attack("the run holds no checkpoint", 4)
def every_checkpoint_and_the_log_are_removed(scene: Scene) -> None:
    shutil.rmtree(scene.root / "checkpoints")
    (scene.root / "checkpoints").mkdir()
    shutil.rmtree(_log(scene))


@attack("is not a regular file")
def the_config_becomes_a_folder(scene: Scene) -> None:
    (scene.root / "run.yaml").unlink()
    (scene.root / "run.yaml").mkdir()


@attack("is not a regular file")
def the_head_of_the_log_becomes_a_folder(scene: Scene) -> None:
    (_log(scene) / "checkpoint").unlink()
    (_log(scene) / "checkpoint").mkdir()


@attack("is not a regular file")
def the_metrics_become_a_pipe(scene: Scene) -> None:
    (scene.root / "metrics.jsonl").unlink()
    os.mkfifo(scene.root / "metrics.jsonl")
