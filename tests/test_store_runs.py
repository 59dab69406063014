"""Runs that keep their checkpoints in an object store, through the front door, against a real S3 server."""

from __future__ import annotations

import json
import shutil

import pytest
from compare import differing
from conftest import Place, finish
from object_store import Bucket, Server, bucket_of
from test_train import PAUSED, keys
from toy_task import config

from harness.cli import main
from harness.provenance.signing import keys as signing

pytestmark = pytest.mark.slow

SLOW_STORE = """
import os, pathlib, time
import obstore
put = obstore.put
def slow(store, path, *words, **options):
    if "step-00000012/" in path and "optimizer" in path:
        pathlib.Path(os.environ["SLOW_STORE"]).touch()
        time.sleep(120)
    return put(store, path, *words, **options)
if "SLOW_STORE" in os.environ:
    obstore.put = slow
"""


def checkpoint(bucket: Bucket, more: str = "", patience: int = 120) -> str:
    """The section `checkpoint` of a run in ``bucket``, which has ``patience`` seconds for an answer."""
    return f'{{every: 6, store: "{bucket.url}", store_timeout: {patience}{more}}}'


def audited(place: Place, bucket: Bucket) -> int:
    """Fetch everything into ``audited``, and what `harness verify` says to it."""
    shutil.rmtree(place.root / "audited", ignore_errors=True)
    fetched = place.harness("fetch", bucket.url, "audited", "--payload", "all")
    assert fetched.code == 0, fetched.err
    return place.harness("verify", "audited", *keys(place)).code


def test_two_ranks_killed_in_an_upload_go_on_exactly_on_a_bare_machine(bucket: Bucket, place: Place) -> None:
    """Oracle: an uninterrupted twin without a store, tensor by tensor; boto3 for what is in the bucket."""
    train = "{steps: 18, global_batch: 12, micro_batch: 2}"
    twin = "{every: 6, file_bytes: 1024}"
    place.write("twin.yaml", config(place.root / "twin", train=train, checkpoint=twin))
    assert place.harness("train", "twin.yaml", processes=2).code == 0
    (place.root / "slow_store.py").write_text(SLOW_STORE)
    (place.root / "toy_task.py").write_text(
        (place.root / "toy_task.py").read_text() + "\nimport slow_store\n"
    )
    only = checkpoint(bucket, ", store_only: true, keep: 2, file_bytes: 1024")
    place.write("toy.yaml", config(place.run, train=train, checkpoint=only))
    process = place.start(["train", "toy.yaml"], 2, {"SLOW_STORE": str(place.run / "uploading")})
    place.kill_at(process, "uploading")
    assert bucket.checkpoints() == ["step-00000006"]
    assert any("/step-00000012/" in name for name in bucket.names())
    shutil.rmtree(place.run)
    again = place.harness("train", "toy.yaml", processes=2)
    assert again.code == 0, again.err
    assert "step-00000006 was fetched from s3://" in again.out + again.err
    assert "exact: same stack and world size" in again.out
    assert place.steps() == list(range(1, 19))
    assert bucket.checkpoints() == ["pruned-step-00000006", "step-00000012", "step-00000018"]
    assert sorted(path.name for path in (place.run / "checkpoints").glob("*step-*")) == [
        "pruned-step-00000006",
        "pruned-step-00000012",
        "pruned-step-00000018",
    ]
    assert audited(place, bucket) == 0
    assert differing(place.root / "audited", place.root / "twin") == []


def test_a_run_goes_on_without_its_store_and_sends_everything_later(place: Place) -> None:
    """Oracle: exit codes, and `harness verify` of what an auditor gets in the end."""
    first, second = Server(), Server()
    try:
        lost = bucket_of(first, "bucket")
        place.environ |= first.environ
        more = ", on_failure: continue"
        place.write("toy.yaml", config(place.run, task=PAUSED, checkpoint=checkpoint(lost, more, 5)))
        place.hold("checkpoints/step-00000006")
        process = place.start(["train", "toy.yaml"])
        place.wait_for(process, "checkpoints/step-00000006")
        first.stop()
        place.go_on()
        done = finish(process)
        assert done.code == 3, done.err
        assert "a save has failed: the store does not answer as it should" in done.out + done.err
        assert place.steps() == list(range(1, 25))
        assert (place.run / "checkpoints" / "step-00000024").is_dir()
        found = bucket_of(second, "bucket")
        place.environ |= second.environ
        again = place.harness("train", "toy.yaml")
        assert again.code == 0, again.err
        assert "holds 0 checkpoints; 4 more go there now" in again.out + again.err
        assert found.checkpoints() == [f"step-{step:08}" for step in (6, 12, 18, 24)]
        assert audited(place, found) == 0
    finally:
        first.stop()
        second.stop()


def test_a_checkpoint_that_is_damaged_in_the_store_is_named_and_the_one_before_is_used(
    bucket: Bucket, place: Place
) -> None:
    """Oracle: the run as it was before the damage, tensor by tensor."""
    train = "{steps: 12, global_batch: 12, micro_batch: 2}"
    place.write("toy.yaml", config(place.run, train=train, checkpoint=checkpoint(bucket)))
    assert place.harness("train", "toy.yaml").code == 0
    place.run.rename(place.root / "before")
    bucket.flip("checkpoints/step-00000012/model.safetensors")
    again = place.harness("train", "toy.yaml")
    assert again.code == 0, again.err
    said = again.out + again.err
    assert "step-00000012 in the store is not in order: the sha256 is not the one in MANIFEST.json" in said
    assert "step-00000006 was fetched from" in said
    assert "exact: same stack and world size" in said
    assert bucket.checkpoints() == ["damaged-step-00000012-1", "step-00000006", "step-00000012"]
    assert differing(place.run, place.root / "before") == []
    assert audited(place, bucket) == 0
    assert place.harness("verify", str(place.run), *keys(place)).code == 0


def test_a_run_under_a_policy_goes_on_from_its_store_under_that_policy_alone(
    bucket: Bucket, place: Place
) -> None:
    """Oracle: the README's rules for a policy, and `harness verify` with the first policy of what auditors
    fetch, one after each launch and one for the first time: the copy is the one that the newest checkpoint
    names, and there is none where it names none."""
    public = [str(path) for path in signing.create(place.root / "me").public]
    for name, more in (("team", []), ("older", ["--max-age", "30d"])):
        out = ["--out", str(place.root / f"{name}.yaml")]
        assert main(["policy", "new", "--key", *public, *more, *out]) == 0
    only = checkpoint(bucket, ", store_only: true, keep: 1")
    place.write("toy.yaml", config(place.run, checkpoint=only, signing="{key: me.key, policy: team.yaml}"))
    accept = ["--accept", "policy,config", "--reason", "thirty days"]

    def launch(steps: int, policy: str, *words: str) -> str:
        """What a launch on a bare machine says."""
        shutil.rmtree(place.run, ignore_errors=True)
        done = place.harness("train", "toy.yaml", f"train.steps={steps}", f"signing.policy={policy}", *words)
        return f"{done.code}: {done.out}{done.err}"

    def found(folder: str) -> tuple[str, bool]:
        """What verify notes of the policy, and whether there is a copy."""
        assert place.harness("fetch", bucket.url, folder).code == 0
        done = place.harness("verify", folder, "--policy", "team.yaml", "--json")
        assert done.code == 0, done.out
        notes = [each for each in json.loads(done.out)["notes"] if "made under" in each or "policy" in each]
        return "".join(notes)[:32], (place.root / folder / "policy.json").exists()

    assert launch(6, "team.yaml").startswith("0: resume        none: a new run")
    assert found("audited") == ("made under the policy that is gi", True)
    assert "step-00000006 was fetched from" in (said := launch(6, "older.yaml"))
    assert said.startswith("2: ")
    assert "of the policy: max_age: run; " in said
    assert launch(12, "older.yaml", *accept).startswith("0: ")
    assert found("audited") == ("made under another policy than t", True)
    assert launch(18, "null", *accept).startswith("0: ")
    assert found("audited") == found("new") == ("", False)
    assert bucket.checkpoints() == ["pruned-step-00000006", "pruned-step-00000012", "step-00000018"]
