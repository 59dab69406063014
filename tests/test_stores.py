"""A run's copy in an object store: cut off, damaged, contested, unreachable; against a real S3 server."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import obstore
import pytest
from authority import Authority, stamp_log
from object_store import Bucket, Server
from test_writer import CONFIG, RUN_ID, TENSORS, images_of, save_of

from harness.audit.folders import story
from harness.audit.run import handover
from harness.audit.verification.whole_run import verify_run
from harness.checkpoint.keeping import Keep
from harness.checkpoint.mirror import Mirror
from harness.checkpoint.publisher import Publisher, dropped
from harness.checkpoint.writer import CheckpointWriter
from harness.cli import main
from harness.errors import (
    EnvironmentFault,
    HarnessError,
    Interrupted,
    UsageError,
    VerificationFailed,
)
from harness.format import files, layout
from harness.format.layout import RunFolder
from harness.provenance import log_record
from harness.provenance.policy import rotation
from harness.provenance.policy.rules import TIMESTAMP, from_keys
from harness.provenance.signing import keys
from harness.provenance.transparency import log
from harness.stores import client
from harness.stores.client import ObjectExistsError, ObjectStore
from harness.stores.contents import parse_selection
from harness.stores.fetch import fetch, fetch_newest
from harness.workers import Workers

STEPS = 6
"""Lines of metrics.jsonl."""
PATIENCE = 120
"""Seconds that a store has where it answers: no machine is too slow for it."""


@pytest.fixture
def signer(tmp_path: Path) -> keys.Signer:
    """A fresh identity."""
    keys.create(tmp_path / "me")
    return keys.load_signer(tmp_path / "me.key")


@dataclass
class Machine:
    """A run folder with a store, and its writer."""

    run: RunFolder
    store: ObjectStore
    publisher: Publisher
    writer: CheckpointWriter

    def save(self, *steps: int) -> None:
        """Save at each of ``steps``, and wait until everything is where it belongs."""
        for step in steps:
            self.writer.save(save_of(step))
            self.writer.wait()

    def failure(self, step: int) -> HarnessError | None:
        """What a save at ``step`` fails of."""
        try:
            self.save(step)
        except HarnessError as error:
            return error
        return None


def launched(
    root: Path,
    url: str,
    who: keys.Signer,
    *,
    only: bool = False,
    keep: Keep | None = None,
    patience: int = PATIENCE,
) -> Machine:
    """The first launch of a run in ``root``, whose store has ``patience`` seconds for an answer."""
    run = RunFolder(root)
    root.mkdir(exist_ok=True)
    run.run_config.write_text(CONFIG)
    run.metrics.write_bytes(b"".join(b'{"step":%d}\n' % step for step in range(1, STEPS + 1)))
    store = ObjectStore(url, patience=patience)
    publisher = Publisher(run, RUN_ID, who, parent=None, head=None, keep=keep or Keep())
    again(publisher, store, 0, only=only)
    return Machine(run, store, publisher, CheckpointWriter(run, Workers.alone(), publisher, store=store))


def again(publisher: Publisher, store: ObjectStore, start: int, *, only: bool = False) -> Mirror:
    """The mirror of a launch that continues from step ``start``."""
    keep = publisher.keep
    mirror = Mirror(store, publisher.run, only, lambda folders: dropped(keep, folders), lambda _: None)
    mirror.begin(start)
    mirror.sync()
    publisher.mirror = mirror
    return mirror


def verdict(folder: Path, who: keys.Signer) -> int:
    """The exit code of `harness verify`."""
    return verify_run(folder, from_keys(keys.public_keys(who))).exit_code


def taken(bucket: Bucket, folder: Path, which: str = "all") -> list[str]:
    """What a reader gets: the names of whole checkpoints."""
    fetch(ObjectStore(bucket.url, patience=PATIENCE), RunFolder(folder), parse_selection(which), quiet=True)
    return [path.name for path in RunFolder(folder).complete()]


@pytest.mark.parametrize("only", [False, True])
def test_the_store_holds_what_the_folder_would(
    bucket: Bucket,
    tmp_path: Path,
    signer: keys.Signer,
    only: bool,
) -> None:
    """Oracle: boto3 for the bytes, `harness verify` for the rest."""
    here = launched(tmp_path / "run", bucket.url, signer, only=only)
    here.save(1, 2)
    assert taken(bucket, tmp_path / "fetched") == ["step-00000001", "step-00000002"]
    assert verdict(tmp_path / "fetched", signer) == 0
    assert (tmp_path / "fetched" / "metrics.jsonl").read_bytes() == b'{"step":1}\n{"step":2}\n'
    for path in (tmp_path / "fetched" / "checkpoints").rglob("*.*"):
        name = path.relative_to(tmp_path / "fetched").as_posix()
        assert bucket.read(name) == path.read_bytes()
    local = [path.name for path in here.run.complete()]
    assert local == ([] if only else ["step-00000001", "step-00000002"])
    assert len(here.run.pruned()) == (2 if only else 0)


def test_timestamps_go_to_the_store_and_come_back(
    bucket: Bucket, tmp_path: Path, signer: keys.Signer
) -> None:
    """Oracle: the policy that requires them, on what was fetched; one that came after the last save too, and
    none of a longer log than was fetched."""
    tsa = Authority("tsa")
    here = launched(tmp_path / "run", bucket.url, signer)
    here.save(1)
    stamp_log(here.run.log, tsa, 1)
    here.save(2)
    assert bucket.read("log/timestamps/1.tsr") == (here.run.log / "timestamps" / "1.tsr").read_bytes()
    last = stamp_log(here.run.log, tsa, 2)
    assert here.publisher.mirror is not None
    here.publisher.mirror.add_timestamps()
    here.store.put("log/timestamps/3.tsr", b"of a record that is not here")
    taken(bucket, tmp_path / "fetched")
    names = sorted(path.name for path in (tmp_path / "fetched" / "log" / "timestamps").iterdir())
    assert names == ["1.tsr", "2.tsr"]
    whom = from_keys(keys.public_keys(signer))
    whom = replace(whom, authorities=tsa.trusted, required=whom.required | {TIMESTAMP})
    report = verify_run(tmp_path / "fetched", whom)
    assert report.exit_code == 0, report.findings
    assert [each.size for each in report.stamped] == [1, 2]
    last.unlink()
    taken(bucket, here.run.root)
    assert last.exists()


class CutOff(BaseException):
    """The process dies here."""


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[list[str]]:
    """The process dies before the ``at``-th change of the store, counted from 1. Yields the changes."""
    done: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(obstore, name)

        def change(store: Any, path: Any, *words: Any, **options: Any) -> Any:
            done.append(f"{name} {path}")
            if len(done) >= at:
                raise CutOff
            return original(store, path, *words, **options)

        return change

    with monkeypatch.context() as patched:
        for name in ("put", "delete", "copy"):
            patched.setattr(obstore, name, counted(name))
        yield done


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("only", "every"), [(True, 2), (False, 5)])
def test_a_save_that_is_cut_off_anywhere_shows_the_old_or_the_new(
    bucket: Bucket,
    tmp_path: Path,
    signer: keys.Signer,
    monkeypatch: pytest.MonkeyPatch,
    only: bool,
    every: int,
) -> None:
    """Oracle: `harness verify` of what a reader gets, before and after the next launch has completed it."""
    at, changes, seen = 1, 99, set()
    while at <= changes:
        url = f"s3://{bucket.name}/{at}"
        here = launched(tmp_path / f"run-{at}", url, signer, only=only, keep=Keep(newest=1))
        here.save(1)
        with dying(monkeypatch, at) as done:
            here.writer.save(save_of(2))
            here.writer.join()
        changes = len(done) if len(done) < at else changes
        reader = RunFolder(tmp_path / f"reader-{at}")
        fetch(here.store, reader, parse_selection("all"), quiet=True)
        names = [path.name for path in reader.complete()]
        seen.add((tuple(names), verdict(reader.root, signer)))
        parent = here.publisher.parent
        assert parent is not None
        again(here.publisher, here.store, parent.step, only=only)
        here.save(*range(parent.step + 1, 4))
        after = RunFolder(tmp_path / f"after-{at}")
        fetch(here.store, after, parse_selection("all"), quiet=True)
        assert [path.name for path in after.complete()] == ["step-00000003"], done
        assert verdict(after.root, signer) == 0, done
        at += every
    old, both, new = ("step-00000001",), ("step-00000001", "step-00000002"), ("step-00000002",)
    assert seen <= {(old, 0), (both, 4), (both, 0), (new, 0)}
    assert len(seen) > 2


def test_an_upload_that_was_cut_off_sends_again_only_what_is_missing(
    bucket: Bucket,
    tmp_path: Path,
    signer: keys.Signer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the names of what is put, and the modification times that the server tells."""
    here = launched(tmp_path / "run", bucket.url, signer)
    create = ObjectStore.create

    def only_claims(self: ObjectStore, path: str, data: bytes) -> str:
        return create(self, path, data) if path.startswith("claims/") else unreachable()

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "create", only_claims)
        assert isinstance(here.failure(1), EnvironmentFault)
    assert bucket.checkpoints() == []
    payload = [name for name in bucket.names() if name.startswith("checkpoints/")]
    assert len(payload) == 2
    before = {name: bucket.modified(name) for name in payload}
    again(here.publisher, here.store, 1)
    assert bucket.checkpoints() == ["step-00000001"]
    assert {name: bucket.modified(name) for name in payload} == before


def unreachable() -> str:
    """What a store that is gone does."""
    raise EnvironmentFault("the store does not answer as it should")


@pytest.mark.parametrize("only", [False, True])
def test_of_two_writers_one_is_told(
    bucket: Bucket,
    tmp_path: Path,
    signer: keys.Signer,
    only: bool,
) -> None:
    """Oracle: the reader gets the run of the writer that was first, whole."""
    one = launched(tmp_path / "one", bucket.url, signer, only=only)
    other = launched(tmp_path / "other", bucket.url, signer, only=only)
    one.save(1)
    failure = other.failure(1)
    assert isinstance(failure, ObjectExistsError)
    assert failure.exit_code == UsageError.exit_code
    assert "another job" in str(failure)
    one.save(2)
    assert taken(bucket, tmp_path / "read") == ["step-00000001", "step-00000002"]
    assert verdict(tmp_path / "read", signer) == 0
    with pytest.raises(ObjectExistsError):
        again(other.publisher, other.store, 0)


def test_two_writers_at_the_same_instant_leave_one_whole_checkpoint(
    bucket: Bucket,
    tmp_path: Path,
    signer: keys.Signer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: `harness verify`. Neither has seen the other when it begins to send the same bits."""
    one = launched(tmp_path / "one", bucket.url, signer)
    other = launched(tmp_path / "other", bucket.url, signer)
    with monkeypatch.context() as blind:
        blind.setattr(Mirror, "alone", lambda self: None)
        one.save(1)
        assert isinstance(other.failure(1), ObjectExistsError)
    assert taken(bucket, tmp_path / "read") == ["step-00000001"]
    assert verdict(tmp_path / "read", signer) == 0


def test_two_writers_of_other_bits_at_the_same_instant_do_not_mix_them(
    bucket: Bucket,
    tmp_path: Path,
    signer: keys.Signer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: `harness verify` of the first one's checkpoint; the second one comes when its payload was sent
    and its manifest was not. A launch takes over the claim of one that was cut off there."""
    one = launched(tmp_path / "one", bucket.url, signer)
    other = launched(tmp_path / "other", bucket.url, signer)
    others = replace(save_of(1), images=images_of({name: value + 1 for name, value in TENSORS.items()}))
    put_large, told = ObjectStore.put_large, []

    def meanwhile(self: ObjectStore, *words: Any) -> None:
        put_large(self, *words)
        if self is one.store and not told:
            told.append("now")
            other.writer.save(others)
            with pytest.raises(ObjectExistsError, match="claims/step-00000001"):
                other.writer.wait()

    monkeypatch.setattr(ObjectStore, "put_large", meanwhile)
    one.save(1)
    assert told
    assert taken(bucket, tmp_path / "read") == ["step-00000001"]
    assert verdict(tmp_path / "read", signer) == 0
    assert not [name for name in bucket.names() if name.startswith("claims/")]
    tag = ObjectStore.tag

    def cut_off(self: ObjectStore, path: str) -> str | None:
        if path.startswith("claims/"):
            raise EnvironmentFault("the network is gone")
        return tag(self, path)

    with monkeypatch.context() as cut:
        cut.setattr(ObjectStore, "tag", cut_off)
        assert isinstance(one.failure(2), EnvironmentFault)
    assert "claims/step-00000002" in bucket.names()
    again(one.publisher, one.store, 1)
    assert taken(bucket, tmp_path / "read") == ["step-00000001", "step-00000002"]


def test_an_answer_that_was_lost_is_not_taken_for_a_second_writer(
    bucket: Bucket,
    tmp_path: Path,
    signer: keys.Signer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the checkpoint is whole. A retry finds what the first attempt has written."""
    here = launched(tmp_path / "run", bucket.url, signer)
    put = ObjectStore._put

    def twice(self: ObjectStore, path: str, data: bytes, mode: Any = None) -> str:
        put(self, path, data, mode)
        return put(self, path, data, mode)

    monkeypatch.setattr(ObjectStore, "_put", twice)
    here.save(1, 2)
    assert taken(bucket, tmp_path / "read") == ["step-00000001", "step-00000002"]


def test_a_store_that_stops_answering_fails_the_save_and_the_next_one_makes_up_for_it(
    bucket: Bucket,
    tmp_path: Path,
    signer: keys.Signer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: exit code 3's error within seconds; the folder has the checkpoint; later the store has both."""
    here = launched(tmp_path / "run", bucket.url, signer, patience=5)
    bucket.server.pause()
    try:
        slow = here.failure(1)
    finally:
        bucket.server.go_on()
    assert isinstance(slow, EnvironmentFault)
    assert "the store does not answer as it should" in str(slow)
    assert [path.name for path in here.run.complete()] == ["step-00000001"]
    here.save(2)
    assert taken(bucket, tmp_path / "read") == ["step-00000001", "step-00000002"]
    assert verdict(tmp_path / "read", signer) == 0


def test_a_server_that_is_gone_is_named_and_the_bucket_that_is_not_there_too(
    tmp_path: Path, server: Server, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: exit code 3's error, with what to do, within seconds."""
    with pytest.raises(EnvironmentFault, match="NoSuchBucket"):
        ObjectStore("s3://no-such-bucket/run", patience=PATIENCE).objects()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match="s3://there/run; check the network"):
        ObjectStore("s3://there/run", patience=1).objects()
    with pytest.raises(UsageError, match="write s3://BUCKET/PREFIX"):
        ObjectStore("https://there/run")


def test_an_upload_is_given_up_at_the_deadline(
    bucket: Bucket,
    tmp_path: Path,
    signer: keys.Signer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: exit code 75's error; the folder has the checkpoint and the store has nothing of that name."""
    here = launched(tmp_path / "run", bucket.url, signer)
    monkeypatch.setattr(Mirror, "alone", lambda self: here.writer.give_up())
    failure = here.failure(1)
    assert isinstance(failure, Interrupted)
    assert "the upload of the newest checkpoint was given up" in str(failure)
    assert [path.name for path in here.run.complete()] == ["step-00000001"]
    assert bucket.names() == ["run.yaml"]


PAYLOAD = ["model.safetensors", "trainer.json"]
SIGNED = [layout.MANIFEST, layout.MODEL_SIGNATURE, layout.CHECKPOINT_BUNDLE, layout.SLSA_BUNDLE]


@pytest.mark.parametrize("what", PAYLOAD + SIGNED)
def test_a_bit_that_flips_in_the_store_is_found_and_the_one_before_is_used(
    bucket: Bucket, tmp_path: Path, signer: keys.Signer, what: str
) -> None:
    """Oracle: the object that this test has damaged, by name; an auditor's `harness verify` fails as well."""
    here = launched(tmp_path / "run", bucket.url, signer)
    here.save(1, 2)
    bucket.flip(f"checkpoints/step-00000002/{what}")
    policy = from_keys(keys.public_keys(signer))
    told: list[str] = []

    def check(folder: Path, logged: Path) -> None:
        story.read(folder, policy, logged=logged)

    def report(name: str, error: HarnessError) -> None:
        told.append(f"{name}: {error}")

    bare = RunFolder(tmp_path / "bare")
    fetched = fetch_newest(here.store, bare, check, report)
    assert fetched.checkpoints == ["step-00000001"]
    assert len(told) == 1
    assert told[0].startswith("step-00000002: ")
    if what in PAYLOAD:
        with pytest.raises(VerificationFailed, match=f"step-00000002/{what}"):
            taken(bucket, tmp_path / "all")
    else:
        taken(bucket, tmp_path / "all", "1")
        assert verdict(tmp_path / "all", signer) == 1
    bucket.flip("checkpoints/step-00000001/model.safetensors")
    with pytest.raises(VerificationFailed, match="none of the 2 checkpoints is in order"):
        fetch_newest(here.store, RunFolder(tmp_path / "none"), check, report)


def test_a_disk_that_rots_is_not_copied_into_the_store(
    bucket: Bucket,
    tmp_path: Path,
    signer: keys.Signer,
) -> None:
    """Oracle: the bucket; a store that is added to a run of which one checkpoint is damaged."""
    here = launched(tmp_path / "run", f"s3://{bucket.name}/first", signer)
    here.save(1, 2)
    damaged = here.run.checkpoint(1) / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(bytes(data))
    said: list[str] = []
    late = Mirror(ObjectStore(bucket.url, patience=PATIENCE), here.run, False, lambda _: [], said.append)
    late.begin(2)
    late.sync()
    assert bucket.checkpoints() == ["pruned-step-00000001", "step-00000002"]
    assert "step-00000001 is damaged" in said[0]


def test_a_folder_with_another_history_is_refused(
    bucket: Bucket,
    tmp_path: Path,
    signer: keys.Signer,
) -> None:
    """Oracle: two runs, each by itself in order."""
    launched(tmp_path / "one", bucket.url, signer).save(1)
    other = launched(tmp_path / "other", f"s3://{bucket.name}/other", signer)
    other.save(2)
    before = sorted(path for path in (tmp_path / "other").rglob("*"))
    with pytest.raises(VerificationFailed, match="another history than this folder"):
        taken(bucket, tmp_path / "other")
    assert sorted(path for path in (tmp_path / "other").rglob("*")) == before


def test_a_log_that_only_the_store_has_signed_neither_replaces_ours_nor_sets_anything_aside(
    bucket: Bucket, tmp_path: Path, signer: keys.Signer
) -> None:
    """Oracle: the folder before; who runs the store has no key, and enters another checkpoint of step 1."""
    stranger = keys.load_signer(keys.create(tmp_path / "stranger").private)
    here = launched(tmp_path / "run", bucket.url, signer)
    here.save(1)
    copied = tmp_path / "copied"
    shutil.copytree(here.run.log, copied)
    book = log.read_claimed(copied)
    record = log_record.record_of(RUN_ID, 1, 1, "0" * 64, "0" * 64)
    log.append(copied, record, stranger, book.head.origin, opened_by=keys.public_keys(signer))
    for path in [path for path in copied.rglob("*") if path.is_file()]:
        here.store.put(f"log/{path.relative_to(copied).as_posix()}", path.read_bytes())
    before = {path: path.read_bytes() for path in here.run.root.rglob("*") if path.is_file()}
    policy = from_keys(keys.public_keys(signer))
    told: list[str] = []
    with pytest.raises(VerificationFailed, match="the log's head is signed by none of the accepted keys"):
        fetch_newest(
            here.store,
            here.run,
            lambda folder, logged: story.read(folder, policy, logged=logged),
            lambda name, error: told.append(name),
            lambda folder: handover.check_head(folder, policy, "there"),
        )
    assert {path: path.read_bytes() for path in here.run.root.rglob("*") if path.is_file()} == before
    assert verdict(here.run.root, signer) == 0


def test_fetch_brings_what_was_asked_for_and_goes_on_where_it_was(
    bucket: Bucket,
    tmp_path: Path,
    signer: keys.Signer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: the folders after each call of the command."""
    launched(tmp_path / "run", bucket.url, signer).save(1, 2, 3)
    folder = tmp_path / "fetched"
    expected = {
        "none": ["pruned-step-00000001", "pruned-step-00000002", "pruned-step-00000003"],
        "2": ["pruned-step-00000001", "pruned-step-00000003", "step-00000002"],
        "newest": ["pruned-step-00000001", "step-00000002", "step-00000003"],
        "all": ["step-00000001", "step-00000002", "step-00000003"],
    }
    for which, names in expected.items():
        assert main(["fetch", bucket.url, str(folder), "--payload", which]) == 0
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == names
        assert verdict(folder, signer) == (0 if which == "all" else verdict(folder, signer))
    capsys.readouterr()
    assert main(["fetch", bucket.url, str(folder), "--payload", "all"]) == 0
    assert "nothing new" in capsys.readouterr().out
    assert main(["fetch", bucket.url, str(folder), "--payload", "9"]) == 4
    assert main(["fetch", bucket.url, str(folder), "--payload", "some"]) == 2
    shutil.rmtree(folder / "checkpoints" / "step-00000003")
    bucket.flip("checkpoints/step-00000003/trainer.json")
    assert main(["fetch", bucket.url, str(folder), "--payload", "3"]) == 1
    assert (folder / ".tmp-fetch" / "payload" / "step-00000003" / "model.safetensors").exists()
    bucket.flip("checkpoints/step-00000003/trainer.json")
    bucket.flip("checkpoints/step-00000003/model.safetensors")  # which is here already
    assert main(["fetch", bucket.url, str(folder), "--payload", "3"]) == 0
    assert verdict(folder, signer) == 0


def test_what_other_fetches_have_left_is_removed_unless_a_job_is_at_work(
    bucket: Bucket, tmp_path: Path, signer: keys.Signer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: leftovers made by hand, first under a lock; a store without a run makes no folder."""
    launched(tmp_path / "run", bucket.url, signer).save(1)
    folder = tmp_path / "fetched"
    for name in (".tmp-log", "checkpoints/.tmp-step-00000009"):
        (folder / name).mkdir(parents=True)
    with files.locked(folder):
        assert main(["fetch", bucket.url, str(folder)]) == 3
    assert "another job is at work in this folder" in capsys.readouterr().err
    assert (folder / "checkpoints" / ".tmp-step-00000009").is_dir()
    assert main(["fetch", bucket.url, str(folder)]) == 0
    assert "removed .tmp-log, .tmp-step-00000009: left by a save or a fetch" in capsys.readouterr().out
    assert not list(folder.rglob(".tmp-*"))
    assert main(["fetch", f"{bucket.url}-typo", str(tmp_path / "typo")]) == 4
    assert "holds no checkpoint of a run: s3://" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("copied_by", ["server", "client"])
def test_what_goes_on_after_the_step_of_a_resume_is_set_aside_whole(
    bucket: Bucket, tmp_path: Path, signer: keys.Signer, monkeypatch: pytest.MonkeyPatch, copied_by: str
) -> None:
    """Oracle: boto3, the bytes before; an object that S3 does not copy by itself goes through the client."""
    here = launched(tmp_path / "run", bucket.url, signer)
    here.save(1, 2)
    inside = [name for name in bucket.names() if "/step-00000002/" in name]
    before = [bucket.read(name) for name in inside]
    if copied_by == "client":
        monkeypatch.setattr(client, "_COPY_LIMIT", 0)
    late = Mirror(here.store, here.run, False, lambda _: [], lambda _: None)
    assert late.begin(1) == ["step-00000001"]
    aside = [name.replace("/step-00000002/", "/damaged-step-00000002-1/") for name in inside]
    assert [bucket.read(name) for name in aside] == before
    assert not [name for name in bucket.names() if "/step-00000002/" in name]


def test_a_bare_machine_goes_on_from_a_store_under_either_key_of_a_hand_over(
    bucket: Bucket, tmp_path: Path, signer: keys.Signer
) -> None:
    """Oracle: which keys accept what an empty folder gets: the old and the new one, and no stranger's; before
    the new key has signed a checkpoint, and after."""
    new, other = (keys.load_signer(keys.create(tmp_path / name).private) for name in ("new", "other"))
    here = launched(tmp_path / "run", bucket.url, signer)
    here.save(1)
    handover.enter(here.run, rotation.build(signer, new, "2026-11-23T20:00:00Z", "the laptop is sold"), new)
    old = here.publisher
    head = log.read_claimed(here.run.log).head
    publisher = Publisher(here.run, RUN_ID, new, parent=old.parent, head=head, keep=old.keep)
    again(publisher, here.store, 1)
    writer = CheckpointWriter(here.run, Workers.alone(), publisher, store=here.store)
    after = replace(here, publisher=publisher, writer=writer)
    for step in (1, 2):
        if step == 2:
            after.save(2)
        for number, (who, name) in enumerate(((signer, "old"), (new, "new"), (other, ""))):
            bare = RunFolder(tmp_path / f"bare-{step}-{number}")
            policy, told = from_keys(keys.public_keys(who)), []
            fetched = partial(
                fetch_newest,
                here.store,
                bare,
                lambda folder, logged, policy=policy: story.read(folder, policy, logged=logged),
                lambda name, error, told=told: told.append(f"{name}: {error}"),
                lambda folder, policy=policy: handover.check_head(folder, policy, "there"),
            )
            if name:
                assert fetched().checkpoints == [layout.checkpoint_name(step)], told
                assert told == []
                assert verdict(bare.root, who) == 0
            else:
                with pytest.raises(VerificationFailed, match=f"none of the {step} checkpoints is in order"):
                    fetched()
            assert not list(bare.root.glob(".tmp-*"))
