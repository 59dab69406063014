"""The checkpoint writer: whatever fails, and whenever, no half checkpoint has a name of a whole one."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.audit.verification.whole_run import verify_run
from harness.checkpoint import publisher, snapshot
from harness.checkpoint.keeping import Keep
from harness.checkpoint.publisher import Commit, Publication, Publisher
from harness.checkpoint.shards import Part
from harness.checkpoint.snapshot import Arena, FileImage
from harness.checkpoint.writer import CheckpointWriter, Save
from harness.errors import EnvironmentFault, HarnessError, Interrupted
from harness.format import files as durable
from harness.format import layout, strict_json
from harness.format.layout import RunFolder
from harness.format.manifest import Manifest
from harness.provenance.policy.rules import from_keys
from harness.provenance.signing import keys
from harness.provenance.transparency import log
from harness.training.statement import record
from harness.training.statement.record import RunFacts, Segment, StepFacts
from harness.workers import Workers

RUN_ID = "ab" * 16
TENSORS = {"w": torch.arange(5000, dtype=torch.float32), "b": torch.ones(3).half()}
CONFIG = "run: {}\n"


@pytest.fixture
def signer(tmp_path: Path) -> keys.Signer:
    """A fresh identity."""
    keys.create(tmp_path / "me")
    return keys.load_signer(tmp_path / "me.key")


def facts() -> RunFacts:
    """What every statement of these checkpoints says."""
    return RunFacts(
        run={"id": RUN_ID, "name": "test", "seed": 0},
        segment=Segment(0, "genesis"),
        launch={
            "command": ["test"], "launcher": "bare", "world_size": 1, "nodes": 1, "mesh": {},
            "precision": "fp32", "compile": False, "parallel": "ddp", "backend": "none",
        },
        config={"sha256": hashlib.sha256(CONFIG.encode()).hexdigest(), "text": CONFIG},
        code={"harness": "0", "git_commit": None, "dirty": None, "diff_sha256": None, "task": None},
        data={"kind": "test", "corpus_sha256": None, "tokenizer_sha256": None, "counts": {}},
        environment={},
        determinism_mode="off",
        determinism_settings={},
    )  # fmt: skip


def save_of(step: int) -> Save:
    """A checkpoint of constant tensors at ``step``."""
    cursor = {"step": step, "samples": step, "tokens": step, "epoch": 0, "position": step}
    trainer = {"step": step, "world_size": 1, "segment": 0, "cursor": cursor}
    now = StepFacts(step, cursor, None, None, None)

    def predicate(manifest: Manifest, parent: Commit | None, head: log.Head | None) -> dict[str, Any]:
        return record.predicate(facts(), now, manifest, parent, head)

    files = {layout.TRAINER: strict_json.dumps(trainer)}
    return Save(step, images_of(TENSORS), Publication(files, 1 << 16, predicate))


def images_of(tensors: dict[str, torch.Tensor], arena: Arena | None = None) -> tuple[FileImage, ...]:
    """The image of a model file with ``tensors``."""
    part = Part("model.safetensors", "model", tuple(tensors), 0, 0)
    return (arena or Arena(Workers.alone())).fill([part], {"model": tensors})


def made(tmp_path: Path, signer: keys.Signer, **options: Any) -> CheckpointWriter:
    """A writer of a run in ``tmp_path/run``."""
    run = RunFolder(tmp_path / "run")
    run.root.mkdir(exist_ok=True)
    run.run_config.write_text(CONFIG)
    publishing = Publisher(run, RUN_ID, signer, parent=None, head=None, **options)
    return CheckpointWriter(run, Workers.alone(), publishing)


def exit_code(tmp_path: Path, signer: keys.Signer) -> int:
    """What `harness verify` says."""
    return verify_run(tmp_path / "run", from_keys(keys.public_keys(signer))).exit_code


def test_what_is_written_is_what_the_safetensors_package_reads(tmp_path: Path, signer: keys.Signer) -> None:
    """Oracle: the safetensors package, and our verifier for the rest."""
    writing = made(tmp_path, signer)
    writing.save(save_of(1))
    writing.wait()
    loaded = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {"w": torch.float32, "b": torch.float16}
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in loaded)
    assert exit_code(tmp_path, signer) == 0


CALLS = ["write", "pwrite", "fsync", "rename", "open", "posix_fallocate", "replace"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [1, 2, 3, 5, 8, 13])
def test_a_call_that_fails_leaves_whole_checkpoints_only(
    tmp_path: Path, signer: keys.Signer, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """Oracle: after the failure no unfinished folder is left and the run verifies, a missing record aside."""
    writing = made(tmp_path, signer)
    writing.save(save_of(1))
    writing.wait()
    original: Callable[..., Any] = getattr(os, call)
    seen = 0

    def failing(*words: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
        return original(*words, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        writing.save(save_of(2))
        failure = _outcome(writing)
    assert failure is None or isinstance(failure, EnvironmentFault)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names <= {"step-00000001", "step-00000002"}
    assert exit_code(tmp_path, signer) in ({0, 4} if "step-00000002" in names else {0})


def _outcome(writing: CheckpointWriter) -> HarnessError | None:
    try:
        writing.wait()
    except HarnessError as error:
        return error
    return None


def test_a_failure_in_the_background_is_raised_once_and_by_the_next_call(
    tmp_path: Path, signer: keys.Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `failed` tells the loop at once; `wait` has the reason."""
    writing = made(tmp_path, signer)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    writing.save(save_of(1))
    with pytest.raises(EnvironmentFault, match="no space for the checkpoint of step 1"):
        writing.wait()
    assert not writing.failed
    writing.wait()


def test_keep_prunes_only_after_the_next_commit(tmp_path: Path, signer: keys.Signer) -> None:
    """Oracle: the folders, at each commit."""
    seen: list[list[str]] = []
    folder = tmp_path / "run" / "checkpoints"
    listed = [lambda _: seen.append(sorted(path.name for path in folder.iterdir()))]
    writing = made(tmp_path, signer, keep=Keep(newest=1), on_commit=listed)
    for step in (1, 2):
        writing.save(save_of(step))
        writing.wait()
    assert seen == [["step-00000001"], ["step-00000001", "step-00000002"]]
    assert sorted(path.name for path in folder.iterdir()) == ["pruned-step-00000001", "step-00000002"]
    assert exit_code(tmp_path, signer) == 0


def test_nothing_old_goes_when_the_new_does_not_read_back(tmp_path: Path, signer: keys.Signer) -> None:
    """Oracle: the old checkpoint is whole after the disk has returned other bytes of the new one."""
    newest = tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors"

    def spoil(commit: Commit) -> None:
        if commit.step == 2:
            data = bytearray(newest.read_bytes())
            data[-1] ^= 1
            newest.write_bytes(bytes(data))

    writing = made(tmp_path, signer, keep=Keep(newest=1), on_commit=[spoil])
    writing.save(save_of(1))
    writing.save(save_of(2))
    with pytest.raises(EnvironmentFault, match="does not give back what was written: tensor `b`"):
        writing.wait()
    loaded = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "model.safetensors")
    assert torch.equal(loaded["w"], TENSORS["w"])


def test_a_checkpoint_that_missed_the_log_is_entered_by_the_next_save(
    tmp_path: Path, signer: keys.Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the verifier; the disk was full between the rename and the log's entry."""
    writing = made(tmp_path, signer)
    writing.save(save_of(1))
    writing.wait()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(log, "append", full)
        writing.save(save_of(2))
        with pytest.raises(EnvironmentFault, match="no space left"):
            writing.wait()
    assert exit_code(tmp_path, signer) == 4
    writing.save(save_of(3))
    writing.wait()
    assert exit_code(tmp_path, signer) == 0


def test_a_checkpoint_whose_name_could_not_be_synced_is_the_parent_of_the_next(
    tmp_path: Path, signer: keys.Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the verifier; no log entry comes before a sync of the folder that holds the name."""
    writing = made(tmp_path, signer)
    writing.save(save_of(1))
    writing.wait()
    synced = durable.fsync_folder

    def failing(path: Path) -> None:
        if path.name == "checkpoints":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        synced(path)

    with monkeypatch.context() as patched:
        patched.setattr(durable, "fsync_folder", failing)
        for step in (2, 3):
            writing.save(save_of(step))
            with pytest.raises(EnvironmentFault, match="error"):
                writing.wait()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002"]
    assert exit_code(tmp_path, signer) == 4
    writing.save(save_of(4))
    writing.wait()
    assert exit_code(tmp_path, signer) == 0


def test_a_save_can_be_given_up(tmp_path: Path, signer: keys.Signer) -> None:
    """Oracle: exit code 75's error, and no trace of the save."""
    writing = made(tmp_path, signer)
    writing.save(save_of(1))
    writing.wait()
    writing.give_up()
    writing.save(save_of(2))
    with pytest.raises(Interrupted, match="given up at its deadline"):
        writing.wait()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_pruning_that_was_cut_off_is_completed(tmp_path: Path, signer: keys.Signer) -> None:
    """Oracle: the payload is gone after the next prune."""
    writing = made(tmp_path, signer)
    for step in (1, 2):
        writing.save(save_of(step))
        writing.wait()
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000001").rename(folder / "pruned-step-00000001")  # and then the power failed
    publisher.prune(RunFolder(tmp_path / "run"), [])
    assert sorted(path.name for path in (folder / "pruned-step-00000001").iterdir()) == [
        "MANIFEST.json",
        "model.sig",
        "provenance",
    ]


def test_a_folder_of_the_same_step_is_never_overwritten(tmp_path: Path, signer: keys.Signer) -> None:
    """Oracle: the stranger's file is still there."""
    stranger = tmp_path / "run" / "checkpoints" / "step-00000001"
    stranger.mkdir(parents=True)
    (stranger / "note").write_text("mine")
    writing = made(tmp_path, signer)
    writing.save(save_of(1))
    with pytest.raises(HarnessError, match="exists already"):
        writing.wait()
    assert (stranger / "note").read_text() == "mine"


def test_an_arena_is_reused_and_laid_out_anew_when_shapes_change() -> None:
    """Oracle: the bytes of the tensors themselves, by the safetensors package."""
    from safetensors.torch import load

    arena = Arena(Workers.alone())
    for size in (4, 4, 7):
        tensors = {"a": torch.rand(size), "b": torch.arange(size)}
        (image,) = images_of(tensors, arena)
        loaded = load(bytes(image.data))
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
        assert min(span.start for span in image.spans) % 4096 == 0


def test_a_dtype_that_safetensors_cannot_hold_is_an_error() -> None:
    """Oracle: the message names tensor and dtype."""
    with pytest.raises(HarnessError, match=r"`z` is torch\.complex32"):
        snapshot.serialize("f.safetensors", {"z": torch.zeros(1, dtype=torch.complex32)})
