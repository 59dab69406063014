"""`harness fetch`: judged before it is put in place, cut off anywhere, a full disk, a store that changes."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import run_folder
from memory_store import URL, Store
from object_store import Bucket
from run_folder import SampleRun

from harness.checkpoint.mirror import Mirror
from harness.cli import main
from harness.commands import fetch as command
from harness.errors import EnvironmentFault
from harness.format import layout
from harness.provenance import log_record
from harness.provenance.transparency import log
from harness.stores import metrics
from harness.stores.client import ObjectStore


@pytest.fixture
def run(tmp_path: Path) -> SampleRun:
    """Three checkpoints, all with payload."""
    made = SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "me"))
    made.advance(10, 20, 30)
    return made


@pytest.fixture
def store(run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> Store:
    """What the command finds at any URL."""
    made = Store(run)
    monkeypatch.setattr(command, "ObjectStore", lambda url, patience: made)
    return made


def keys(tmp_path: Path) -> list[str]:
    """The options that trust the run's maker."""
    return ["--key", str(tmp_path / "me.ed25519.pub"), str(tmp_path / "me.p256.pub")]


def state(folder: Path) -> dict[str, bytes | None]:
    """Every path of a folder and what it holds; nothing for a folder that is not there."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


def test_what_is_good_is_put_in_place_and_what_was_not_judged_is_told(
    run: SampleRun, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: `harness verify` of a fresh folder, and of one that has a part; the lines of the command."""
    for which in ("none", "10", "all"):
        assert main(["fetch", URL, str(tmp_path / "there"), "--payload", which, *keys(tmp_path)]) == 0
        assert "judged      good: statements, lineage and log of 3 checkpoints" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "there"), *keys(tmp_path)]) == 0
    assert (tmp_path / "there" / "metrics.jsonl").read_bytes() == run.folder.metrics.read_bytes()
    assert main(["fetch", URL, str(tmp_path / "bare"), "--payload", "all"]) == 0
    said = capsys.readouterr().out
    assert f"nobody's signature was looked at; next: harness verify {tmp_path / 'bare'} --key PUB" in said
    assert state(tmp_path / "bare") == state(tmp_path / "there")
    assert not list(tmp_path.glob("*/.tmp-*"))
    assert main(["fetch", URL, str(tmp_path / "bare"), "--json", *keys(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["judged"] == {"checkpoints": 3, "signers": ["the given keys"]}
    for words in (["--head", "kept"], ["--key", str(tmp_path / "bare" / "x.pub")]):
        assert main(["fetch", URL, str(tmp_path / "bare"), *words]) == 2


STEP = "checkpoints/step-00000030"


def rolled_back(run: SampleRun, store: Store) -> None:
    """The store as it was one checkpoint earlier."""
    store.content = {name: data for name, data in store.content.items() if "step-00000030" not in name}
    two = log.read_claimed(run.folder.log).records[:2]
    for name in [name for name in store.content if name.startswith("log/")]:
        del store.content[name]
    for record in two:
        log.append(run.root.parent / "two", record, run.signer, log_record.origin_of(run.run_id))
    for path in [path for path in (run.root.parent / "two").rglob("*") if path.is_file()]:
        store.content[f"log/{path.relative_to(run.root.parent / 'two').as_posix()}"] = path.read_bytes()


def rewritten(run: SampleRun, store: Store) -> None:
    """Another run of the same key, name and steps."""
    other = SampleRun(run.root.parent / "other", run.signer)
    other.tweak = lambda step, facts: facts.update(created="2020-01-01T00:00:00Z")
    other.advance(10, 20, 30)
    store.send(other)


def unlogged(run: SampleRun, store: Store) -> None:
    """Two more checkpoints than the log names."""
    before = {name: data for name, data in store.content.items() if name.startswith("log/")}
    run.advance(40, 50)
    store.send(run)
    store.content = {
        name: data for name, data in store.content.items() if not name.startswith("log/")
    } | before


def cut_line(run: SampleRun, store: Store) -> None:
    """One digit of the metrics."""
    part = "metrics/step-00000030.jsonl"
    store.content[part] = store.content[part].replace(b'"step":25', b'"step":26')


ATTACKS: dict[str, tuple[Callable[[SampleRun, Store], object], int, str]] = {
    "a statement": (lambda run, store: store.flip(f"{STEP}/provenance/checkpoint.sigstore.json"), 1, STEP),
    "a manifest": (lambda run, store: store.flip(f"{STEP}/MANIFEST.json"), 1, f"{STEP}/MANIFEST.json"),
    "model.sig is gone": (lambda run, store: store.content.pop(f"{STEP}/model.sig"), 4, f"{STEP}"),
    "a line of metrics": (cut_line, 1, "metrics.jsonl"),
    "the config": (lambda run, store: store.content.update({"run.yaml": b"run: {}\n"}), 1, "run.yaml"),
    "the log's head": (lambda run, store: store.flip("log/checkpoint"), 1, "log"),
    "a rolled-back log": (rolled_back, 1, "rolled back"),
    "a rewritten history": (rewritten, 1, "history"),
    "more than the log names": (unlogged, 4, "2 checkpoints that its log does not name"),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("has_part", [False, True])
def test_nothing_that_fails_is_put_in_place(
    run: SampleRun,
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    has_part: bool,
) -> None:
    """Oracle: the folder before, or none; the exit code, and what the one line names. A fresh folder has no
    log that shows a roll-back, so a head was kept."""
    there, attack = tmp_path / "there", ATTACKS[name]
    assert main(["head", str(run.root), "--out", str(tmp_path / "kept")]) == 0
    if has_part:
        kept = dict(store.content)
        if attack[0] is not rolled_back:
            rolled_back(run, store)  # the folder has two of three
        assert main(["fetch", URL, str(there), "--payload", "none", *keys(tmp_path)]) == 0
        store.content = kept
    before = state(there)
    attack[0](run, store)
    capsys.readouterr()
    words = ["fetch", URL, str(there), "--payload", "none", *keys(tmp_path), "--head", str(tmp_path / "kept")]
    assert main(words) == attack[1]
    said = capsys.readouterr().err
    assert (len(said.splitlines()), attack[2] in said) == (1, True), said
    assert state(there) == before
    assert there.exists() == has_part


def test_a_strangers_key_and_a_damaged_payload(
    run: SampleRun, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: nothing but the folder; then all but the checkpoint, which is whole once the store is."""
    there = tmp_path / "there"
    run_folder.identity(tmp_path / "stranger")
    stranger = str(tmp_path / "stranger.ed25519.pub")
    assert main(["fetch", URL, str(there), "--key", stranger]) == 1
    assert "nothing was put in place" in capsys.readouterr().err
    assert not there.exists()
    store.flip(f"{STEP}/model.safetensors")
    assert main(["fetch", URL, str(there), *keys(tmp_path)]) == 1
    assert (
        f"the sha256 is not the one in MANIFEST.json: {URL}/{STEP}/model.safetensors"
        in capsys.readouterr().err
    )
    assert not (there / STEP).exists()
    store.flip(f"{STEP}/model.safetensors")
    assert main(["fetch", URL, str(there), *keys(tmp_path)]) == 0
    assert (there / STEP / "model.safetensors").exists()


def test_a_store_that_a_job_writes_to_meanwhile_is_read_again(
    run: SampleRun, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: `harness verify`. A checkpoint comes after the list was made; one is pruned before its payload
    is read; one is there and not in the log; the store changes at each reading."""
    there = tmp_path / "there"

    def pruned() -> None:
        run.prune(30)
        run.advance(40)
        store.send(run)

    store.hooks[f"{STEP}/model.safetensors"] = pruned
    assert main(["fetch", URL, str(there), *keys(tmp_path)]) == 0
    assert [path.name for path in (there / "checkpoints").glob("step-*")] == ["step-00000040"]
    assert main(["verify", str(there), *keys(tmp_path)]) in (0, 4)

    def more() -> None:
        run.advance(run.step + 10)
        store.send(run)

    store.hooks["log/checkpoint"] = more
    assert main(["fetch", URL, str(there), *keys(tmp_path)]) == 0
    logged = {name: data for name, data in store.content.items() if name.startswith("log/")}
    more()
    store.content |= logged
    capsys.readouterr()
    assert main(["fetch", URL, str(there), *keys(tmp_path)]) == 0
    assert "left out    step-00000060: not in the store's log yet" in capsys.readouterr().out

    def removed() -> None:
        name = f"checkpoints/step-{run.step:08}/model.sig"
        more()
        del store.content[name]
        store.hooks[f"checkpoints/step-{run.step:08}/model.sig"] = removed

    more()
    store.hooks[f"checkpoints/step-{run.step:08}/model.sig"] = removed
    assert main(["fetch", URL, str(tmp_path / "other")]) in (1, 4)


def in_a_child(work: Callable[[], object]) -> int:
    """How a process ends that does ``work``: its exit code, or the signal that killed it, negative."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = int(str(work()))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("trusted", [False, True])
def test_a_fetch_that_is_killed_anywhere_goes_on(
    run: SampleRun, store: Store, tmp_path: Path, trusted: bool
) -> None:
    """Oracle: SIGKILL before every ninth change of the disk, in a folder that must be set right as well; then
    the folder of a fetch that nobody has killed, and nothing that is whole by its name and is not."""
    words = ["--payload", "all", *(keys(tmp_path) if trusted else [])]
    start = tmp_path / "start"
    full = dict(store.content)
    rolled_back(run, store)
    assert main(["fetch", URL, str(start), *words]) == 0
    store.content = full
    assert main(["fetch", URL, str(tmp_path / "undisturbed"), *words]) == 0
    wanted, at = state(tmp_path / "undisturbed"), 1

    def killed_at(number: int) -> int:
        left = number

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def change(*some: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*some, **options)

            return change

        for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "write"):
            setattr(os, name, counted(getattr(os, name)))
        return main(["fetch", URL, str(tmp_path / "there"), *words])

    killed = 0
    while True:
        shutil.rmtree(tmp_path / "there", ignore_errors=True)
        shutil.copytree(start, tmp_path / "there")
        code = in_a_child(lambda at=at: killed_at(at))
        if code != -signal.SIGKILL:
            break
        killed += 1
        for name in (tmp_path / "there" / "checkpoints").glob("step-*"):
            assert state(name) == state(tmp_path / "undisturbed" / "checkpoints" / name.name)
        assert main(["fetch", URL, str(tmp_path / "there"), *words]) == 0, at
        found = state(tmp_path / "there")
        assert {name: data for name, data in found.items() if name in wanted} == wanted, at
        assert {name for name in found if name not in wanted and "/tile" not in name} == set(), at
        at += 9
    assert (code, killed > 8) == (0, True)


def test_a_full_disk_is_told_and_the_fetch_goes_on(
    run: SampleRun, store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 3 and one line; then 0, and a run that verifies. A limit of the size of files stands
    for the disk, at the log, at the metrics and at the payload."""
    wanted = ["fetch", URL, str(tmp_path / "there"), "--payload", "all", *keys(tmp_path)]

    def limited(size: int) -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return main(wanted)

    for size in (100, 2000, 6000):
        assert in_a_child(lambda size=size: limited(size)) == 3, size
        said = capfd.readouterr().err
        assert "fetching a run failed: File too large" in said, said
        assert len(said.splitlines()) == 1
    assert main(wanted) == 0
    assert main(["verify", str(tmp_path / "there"), *keys(tmp_path)]) == 0


def test_a_disk_that_is_full_at_the_statements_of_a_whole_checkpoint_is_told(
    run: SampleRun,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: exit code 3, "no space left", one line that names the file; then 0."""

    def full(source: Path, target: Path, **options: Any) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        assert main(["fetch", URL, str(tmp_path / "there")]) == 3
    said = capsys.readouterr().err
    assert f"no space left while fetching a run: {tmp_path / 'there' / '.tmp-fetch'}" in said
    assert "Errno" not in said
    assert main(["fetch", URL, str(tmp_path / "there")]) == 0


def test_metrics_are_joined_without_being_held(
    run: SampleRun, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the file that the run has; no object of theirs is asked for as a whole."""
    asked: list[str] = []
    get = store.get
    monkeypatch.setattr(store, "get", lambda path, limit: asked.append(path) or get(path, limit))
    pieces = type(store).pieces

    def piecewise(path: str, size: int) -> Iterator[memoryview]:
        before = len(asked)
        yield from pieces(store, path, size)
        del asked[before:]

    monkeypatch.setattr(store, "pieces", piecewise)
    assert main(["fetch", URL, str(tmp_path / "there")]) == 0
    assert not [path for path in asked if path.startswith(layout.METRICS_PARTS)]
    assert (tmp_path / "there" / "metrics.jsonl").read_bytes() == run.folder.metrics.read_bytes()
    monkeypatch.setattr(metrics, "_LIMIT", 10)
    assert main(["fetch", URL, str(tmp_path / "other")]) == 1


def sent(run: SampleRun, bucket: Bucket) -> Mirror:
    """The run's copy in the bucket."""
    made = Mirror(ObjectStore(bucket.url, patience=2), run.folder, False, lambda _: [], lambda _: None)
    made.begin(run.step)
    made.sync()
    return made


def test_what_came_late_to_the_store_comes_to_the_auditor(
    run: SampleRun, bucket: Bucket, tmp_path: Path
) -> None:
    """Oracle: `harness verify` of what was fetched: from a store that was added to a run with a pruned
    checkpoint; then with a statement that was entered in the log after its checkpoint was sent."""
    run.prune(10)
    mirror = sent(run, bucket)
    there = str(tmp_path / "there")
    assert main(["fetch", bucket.url, there, "--payload", "all", *keys(tmp_path)]) == 0
    assert main(["verify", there, *keys(tmp_path)]) == 0
    (tmp_path / "note.json").write_text("{}")
    note = ["--kind", "note", "--predicate-type", "https://example.com/note/v1"]
    note += ["--predicate", str(tmp_path / "note.json"), "--signing-key", str(tmp_path / "me.key")]
    assert main(["attest", str(run.saved[20].folder), *note, *keys(tmp_path)]) == 0
    mirror.sync()
    assert main(["fetch", bucket.url, there, *keys(tmp_path)]) == 0
    assert main(["verify", there, *keys(tmp_path)]) == 0
    assert (tmp_path / "there/checkpoints/step-00000020/provenance/note-0.sigstore.json").exists()
    assert main(["fetch", bucket.url, str(tmp_path / "fresh"), "--payload", "all", *keys(tmp_path)]) == 0
    assert main(["verify", str(tmp_path / "fresh"), *keys(tmp_path)]) == 0


def test_an_object_that_was_cut_or_has_grown_is_named(
    run: SampleRun, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the object that this test has changed; one that shrinks after the list was made, too."""
    sent(run, bucket)
    path = f"{STEP}/model.safetensors"
    whole = bucket.read(path)
    for data in (whole[:-1], whole + b"x", b""):
        bucket.client.put_object(Bucket=bucket.name, Key=f"runs/toy/{path}", Body=data)
        assert main(["fetch", bucket.url, str(tmp_path / "there"), *keys(tmp_path)]) == 1
        assert f"does not have {len(whole)} bytes: {bucket.url}/{path}" in capsys.readouterr().err
    store = ObjectStore(bucket.url, patience=2)
    for size in (len(whole), 1):
        with pytest.raises(Exception, match="has become shorter than"):
            list(store.pieces(path, size))


def test_a_network_that_goes_away_is_told_and_the_fetch_goes_on(
    run: SampleRun, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: exit code 3 at the log, the statements and the payload, and 0 once it is back."""
    sent(run, bucket)
    words = ["fetch", bucket.url, str(tmp_path / "there"), *keys(tmp_path)]
    get, pieces = ObjectStore.get, ObjectStore.pieces
    for place in ("log/", "/provenance/", "metrics/", "optimizer"):

        def cut(path: str, place: str = place) -> None:
            if place in path:
                raise EnvironmentFault("the store does not answer as it should", where=path)

        with monkeypatch.context() as gone:
            gone.setattr(ObjectStore, "get", lambda self, path, limit: cut(path) or get(self, path, limit))
            gone.setattr(
                ObjectStore, "pieces", lambda self, path, size: cut(path) or pieces(self, path, size)
            )
            assert main(words) == 3, place
    assert main(words) == 0
    assert not list((tmp_path / "there").glob(".tmp-*"))
