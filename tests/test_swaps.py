"""What was verified is what is used: a file that is exchanged between the check and the use is found.

Each test calls the front door of a verb, or of a resume, with a hook at the worst moment: everything has been
checked, nothing has been used yet. Oracle throughout: without the exchange the same call succeeds.
"""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import run_folder
import torch
from attack import edit_json, flip, trusted
from memory_store import Store
from run_folder import SampleRun
from safetensors.numpy import save_file
from torch import nn

from harness.audit.diff import comparison
from harness.audit.exports import export
from harness.audit.folders import opening, payload, story
from harness.audit.replay import segment
from harness.audit.run import own_files
from harness.audit.verification import many, verify
from harness.audit.verification.report import Report
from harness.checkpoint import restore, writer
from harness.checkpoint.candidates import Candidates, Found, open_elsewhere
from harness.checkpoint.restore import DamagedCheckpoint, Loaded
from harness.commands import attest, report
from harness.data import cache, tokens
from harness.data.tokens import TokenData
from harness.errors import EnvironmentFault, HarnessError, VerificationFailed
from harness.format import files, layout
from harness.format.layout import RunFolder
from harness.format.manifest import Manifest
from harness.provenance import log_record
from harness.provenance.signing import keys
from harness.provenance.transparency import log
from harness.provenance.transparency.heads import Kept
from harness.report import facts
from harness.settings import Data, Model, Tokenizer
from harness.stores import fetch as fetching
from harness.tasks.language import Language
from harness.training.beginning import resume
from harness.training.beginning.resume import HeldRun
from harness.training.evaluation import examples
from harness.training.recorder import Recorder
from harness.workers import Workers

MODEL, TRAINER = "model.safetensors", "trainer.json"
Swap = Callable[[Path], None]
"""Given the folder, exchanges something in it."""


@pytest.fixture
def run(tmp_path: Path) -> SampleRun:
    """A run of checkpoints 10 and 20."""
    made = SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "me"))
    made.advance(10, 20)
    return made


def before(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, swap: Callable[[], object]) -> None:
    """Have ``swap`` happen once, just before ``module.name`` is called."""
    real, left = getattr(module, name), [swap]

    def hooked(*words: Any, **named: Any) -> Any:
        while left:
            left.pop()()
        return real(*words, **named)

    monkeypatch.setattr(module, name, hooked)


def replaced(path: Path, data: bytes) -> None:
    """Put another file in the place of ``path``, as a rename does."""
    other = path.with_name("other")
    other.write_bytes(data)
    os.replace(other, path)


def longer(folder: Path) -> None:
    replaced(folder / MODEL, (folder / MODEL).read_bytes() + b"x")


def shorter(folder: Path) -> None:
    replaced(folder / MODEL, (folder / MODEL).read_bytes()[:-1])


def other_bytes(folder: Path) -> None:
    flip(folder / MODEL, -1)


def the_same_bytes(folder: Path) -> None:
    """A verifier cannot know that nothing else was there meanwhile."""
    replaced(folder / MODEL, (folder / MODEL).read_bytes())


def gone(folder: Path) -> None:
    (folder / MODEL).unlink()


@pytest.mark.parametrize("swap", [longer, shorter, other_bytes, the_same_bytes, gone])
@pytest.mark.parametrize("kind", ["run", "checkpoint", "export"])
def test_verify_finds_what_is_exchanged_after_names_sizes_and_headers_were_checked(
    run: SampleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: Swap, kind: str
) -> None:
    """Oracle: the file as it was verifies, and after the exchange the finding names it."""
    policy, folder = trusted(run.signer), run.saved[20].folder
    target = {"run": run.root, "checkpoint": folder, "export": tmp_path / "out"}[kind]
    if kind == "export":
        export.export(folder, target, policy, run.signer, quiet=True)
        folder = target
    assert verify.verify(target, policy, quiet=True).exit_code == 0
    before(monkeypatch, payload, "check", lambda: swap(folder))
    report = verify.verify(target, policy, quiet=True)
    (finding,) = (each for each in report.findings if each.check == "payload")
    assert report.exit_code == (4 if swap is gone else 1)
    assert (finding.where, "is missing" if swap is gone else "changed while it was verified") == (
        str(folder / MODEL),
        finding.what.partition(":")[0],
    )


@pytest.mark.parametrize("when", ["opened", "read"])
def test_payload_that_the_machine_does_not_let_verify_read_is_no_verdict(
    run: SampleRun, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Oracle: DESIGN.md section 2: exit code 3 is the environment, 4 would say that evidence is not there."""
    config = run.saved[20].folder / "config.json"

    def opened(path: Path | str) -> object:
        if path == config:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    def read(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    real = files._open_regular
    if when == "opened":
        monkeypatch.setattr(files, "_open_regular", opened)
    else:
        monkeypatch.setattr(payload.os, "readv", read)
    with pytest.raises(EnvironmentFault, match="cannot be read") as fault:
        verify.verify(run.root, trusted(run.signer), quiet=True)
    assert fault.value.where is not None
    assert Path(fault.value.where).parent.parent == run.root / "checkpoints"


@pytest.mark.parametrize("name", [MODEL, "config.json", layout.CHECKPOINT_BUNDLE])
def test_export_writes_nothing_that_it_did_not_verify(
    run: SampleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Oracle: the same export an exchange earlier; afterwards no folder is there."""
    folder, policy = run.saved[20].folder, trusted(run.signer)
    export.export(folder, tmp_path / "good", policy, run.signer, quiet=True)
    before(monkeypatch, export, "_check_alike", lambda: flip(folder / name, -3))
    with pytest.raises(VerificationFailed):
        export.export(folder, tmp_path / "out", policy, run.signer, quiet=True)
    assert not (tmp_path / "out").exists()


def test_diff_compares_what_it_verified(
    run: SampleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the twin's bytes; an exchanged tensor is no difference, and another statement no fact."""
    twin = SampleRun(tmp_path / "twin", run.signer)
    twin.advance(10, 20)
    policy, other = trusted(run.signer), twin.saved[20].folder

    def compared(swap: Callable[[], object] = lambda: None) -> comparison.Result:
        planned = comparison.plan(run.root, twin.root)
        found = comparison.verified(planned, policy, quiet=True)
        swap()
        return comparison.compare(planned, comparison.ELEMENTS, lambda done: None, found)

    assert (compared().equal, compared().trust) == (True, "the given keys")
    facts = [step.facts for step in compared().steps]
    bundle = (other / layout.CHECKPOINT_BUNDLE).read_bytes()
    found = compared(lambda: (other / layout.CHECKPOINT_BUNDLE).write_bytes(b"{}"))
    assert [step.facts for step in found.steps] == facts
    (other / layout.CHECKPOINT_BUNDLE).write_bytes(bundle)
    with pytest.raises(VerificationFailed, match="changed while it was compared"):
        compared(lambda: flip(other / MODEL, -1))


def test_a_replay_compares_with_the_lines_that_were_checked(
    run: SampleRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the lines of the run that was written."""
    policy = trusted(run.signer)
    good = segment.authentic(run.folder, policy).steps
    real = own_files.check_metrics

    def checked(*words: Any) -> None:
        real(*words)
        run.folder.metrics.write_bytes(run.folder.metrics.read_bytes().replace(b'"lr":0.001', b'"lr":0.002'))

    monkeypatch.setattr(own_files, "check_metrics", checked)
    assert segment.authentic(run.folder, policy).steps == good
    assert b'"lr":0.002' in run.folder.metrics.read_bytes()


REPORTED: dict[str, Swap] = {
    "metrics.jsonl": lambda root: replaced(root / "metrics.jsonl", _other_loss(root / "metrics.jsonl")),
    "run.yaml": lambda root: replaced(root / "run.yaml", b"run: {name: forged}\n"),
    "a statement": lambda root: edit_payload(
        root / "checkpoints" / "step-00000020" / layout.CHECKPOINT_BUNDLE,
        lambda told: told["run"].update(name="forged"),
    ),
    "a forged damaged checkpoint": lambda root: _damaged(root),
}


def _other_loss(path: Path) -> bytes:
    *lines, last = path.read_bytes().splitlines(keepends=True)
    line = json.loads(last) | {"loss": 0.001, "lr": 7.0}
    return b"".join(lines) + json.dumps(line).encode() + b"\n"


def _damaged(root: Path) -> None:
    folder = root / "checkpoints" / "damaged-step-00000099-0"
    shutil.copytree(root / "checkpoints" / "step-00000020", folder)
    edit_payload(folder / layout.CHECKPOINT_BUNDLE, lambda told: told["run"].update(name="forged"))


def edit_payload(bundle: Path, edit: Callable[[Any], object]) -> None:
    """Change the predicate in ``bundle``, whose signature then is of something else."""

    def change(document: Any) -> None:
        statement = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
        edit(statement["predicate"])
        document["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

    edit_json(bundle, change)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", REPORTED)
def test_a_report_tells_what_was_verified(
    run: SampleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, when: str
) -> None:
    """Oracle: the report of the untouched run; the folder holds something else only while it is read, before
    or after the verification."""
    policy = trusted(run.signer)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")  # a report says when it was made

    def told(out: str) -> str:
        done = report.write_report([run.root], tmp_path / out, policy, None)
        assert done.exit_code == 0
        return (tmp_path / out / "report.md").read_text().replace(f"\n{DAMAGED}\n", "")

    good = told("good")
    shutil.copytree(run.root, tmp_path / "kept")
    real = report.verify_run

    def verified(*words: Any, **named: Any) -> Any:
        if when == "before":
            shutil.rmtree(run.root)
            shutil.copytree(tmp_path / "kept", run.root)
        found = real(*words, **named)
        if when == "after":
            REPORTED[name](run.root)
        return found

    monkeypatch.setattr(report, "verify_run", verified)
    if when == "before":
        REPORTED[name](run.root)
    assert told("swapped") == good


DAMAGED = "- `damaged-step-00000099-0`: set aside; nothing of it counts"


def test_lines_that_no_checkpoint_has_signed_are_no_part_of_a_verified_report(
    run: SampleRun, tmp_path: Path
) -> None:
    """Oracle: the last signed loss; without a policy the last line is shown, as it was."""
    with run.folder.metrics.open("ab") as stream:
        line = json.loads(run.folder.metrics.read_bytes().splitlines()[-1])
        chained = {name: line[name] for name in line if name != "chain"} | {"step": 21, "loss": 0.001}
        stream.write(json.dumps(chained).encode() + b"\n")
    for policy, step in ((trusted(run.signer), 20), (None, 21)):
        done = report.write_report([run.root], tmp_path / f"{step}", policy, None)
        assert (done.exit_code, done.document["runs"][0]["last_step"]) == (0, step)
    assert (
        "1 line of metrics.jsonl after step 20: signed by no checkpoint yet"
        in (tmp_path / "20" / "report.md").read_text()
    )


class Bare(SampleRun):
    """A run without step digests."""

    def _predicate(self, manifest: Manifest) -> Any:
        told = super()._predicate(manifest)
        absent = dict.fromkeys(("chain", "lines", "gradients", "state"))
        return {**told, "metrics": {**told["metrics"], **absent}}


@pytest.mark.parametrize(("kind", "signed"), [(SampleRun, True), (Bare, False)])
def test_a_verified_report_says_when_no_checkpoint_signs_its_lines(
    tmp_path: Path, kind: type[SampleRun], signed: bool
) -> None:
    """Oracle: a run with step digests and one without; the verification finds nothing wrong in either."""
    run = kind(tmp_path / "run", run_folder.identity(tmp_path / "me"))
    run.advance(10, 20)
    done = report.write_report([run.root], tmp_path / "out", trusted(run.signer), None)
    page = (tmp_path / "out" / "report.md").read_text()
    assert (done.exit_code, "metrics.jsonl is signed by no checkpoint" in page) == (0, not signed)


def test_a_ledger_that_is_exchanged_after_the_verification_is_not_shown(
    run: SampleRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the ledger as it was verified, which is shown."""
    _, judged = found = report._read(run.root, trusted(run.signer))
    assert judged is not None
    assert facts.newest_ledger(found[0]) is not None
    path = run.saved[20].folder / "ledger.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(VerificationFailed, match="changed after it was verified"):
        facts.newest_ledger(found[0])


def wanted(path: str) -> bool:
    """The small files that a resume keeps."""
    return path in (TRAINER, "ledger.json", "rng-rank-00000.safetensors")


def candidates(run: SampleRun) -> Candidates:
    """The way back through its checkpoints, as a resume has it."""
    return Candidates(Workers.alone(), run.folder, trusted(run.signer), wanted)


def filled(loaded: Loaded) -> dict[str, torch.Tensor]:
    """The weights, read as a resume reads them."""
    targets = {name: torch.empty(shape) for name, (_, shape) in loaded.described("model").items()}
    loaded.fill({("model", name): tensor for name, tensor in targets.items()})
    return targets


def newest(found: Found) -> str | None:
    """The name of the checkpoint that was found."""
    return None if found.loaded is None else found.loaded.folder.name


def another_checkpoint(run: SampleRun) -> Swap:
    """Put every file of step 10, authentic in itself, in the place of step 20's."""

    def swap(folder: Path) -> None:
        for name in ("MANIFEST.json", MODEL, TRAINER, layout.CHECKPOINT_BUNDLE):
            (folder / name).write_bytes((run.saved[10].folder / name).read_bytes())

    return swap


@pytest.mark.parametrize(
    "name", [TRAINER, "ledger.json", "rng-rank-00000.safetensors", "MANIFEST.json", "all"]
)
def test_a_resume_goes_back_when_a_small_file_is_exchanged(
    run: SampleRun, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Oracle: step 20 as it was; then step 10, with step 20 named among what was skipped."""
    found = candidates(run).next()
    assert newest(found) == "step-00000020"
    folder = run.saved[20].folder
    swap = another_checkpoint(run) if name == "all" else lambda folder: flip(folder / name, -2)
    before(monkeypatch, restore, "load", lambda: swap(folder))
    found = candidates(run).next()
    assert newest(found) == "step-00000010"
    assert [(each.name, each.checkpoint) for each in found.skipped] == [
        ("step-00000020", run.saved[20].checkpoint)
    ]


def test_a_resume_passes_over_a_checkpoint_of_another_run(run: SampleRun, tmp_path: Path) -> None:
    """Oracle: step 20 of the run whose log it is; step 30, signed with the same key, is named and stays."""
    other = SampleRun(tmp_path / "other", run.signer, seed=4)
    other.advance(30)
    foreign = run.folder.checkpoints / "step-00000030"
    shutil.copytree(other.saved[30].folder, foreign)
    origin = resume.log_origin(HeldRun(run.folder, 0, tmp_path / "me.key", run.signer, ""))
    found = Candidates(Workers.alone(), run.folder, trusted(run.signer), wanted, origin).next()
    assert newest(found) == "step-00000020"
    assert [(each.name, each.checkpoint) for each in found.skipped] == [
        ("step-00000030", other.saved[30].checkpoint)
    ]
    assert foreign.is_dir()


@pytest.mark.parametrize("swap", [longer, shorter, other_bytes])
def test_a_resume_takes_no_tensor_that_is_exchanged(run: SampleRun, swap: Swap) -> None:
    """Oracle: the tensors of the file that was verified; `DamagedCheckpoint` sends a resume one back."""
    loaded = candidates(run).next().loaded
    assert loaded is not None
    assert filled(loaded)
    swap(run.saved[20].folder)
    with pytest.raises(DamagedCheckpoint):
        filled(loaded)


def test_the_log_gets_the_digest_of_the_statement_that_was_verified(
    run: SampleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the record that a save would have made; the crash came between the rename and the entry."""
    bundle = run.saved[20].folder / layout.CHECKPOINT_BUNDLE
    expected = log.read(run.folder.log, keys.public_keys(run.signer)).records[-1]
    run.folder.log.rename(tmp_path / "log")
    record = log.read(tmp_path / "log", keys.public_keys(run.signer)).records[0]
    log.append(run.folder.log, record, run.signer, log_record.origin_of(run.run_id))
    found = candidates(run).next()
    before(monkeypatch, resume, "_read_log", lambda: bundle.write_bytes(b"{}"))
    held = HeldRun(run.folder, 0, tmp_path / "me.key", run.signer, "")
    resume.open_run(held, found, [])
    assert log.read(run.folder.log, keys.public_keys(run.signer)).records[-1] == expected


def test_a_head_that_a_revoked_key_signs_meanwhile_is_not_covered_by_what_was_kept(
    run: SampleRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the head that was kept before the revocation, under which the log is good until it grows."""
    publics = keys.public_keys(run.signer)
    book = log.read(run.folder.log, publics)
    moments = {key.key_id: "2099-01-01T00:00:00Z" for key in publics}
    kept = Kept(book.head, "the kept head", "2026-11-24T00:00:00Z")
    policy = dataclasses.replace(
        trusted(run.signer), revoked=frozenset(moments), revoked_from=moments, log_heads=(kept,)
    )
    assert verify.verify(run.folder.root, policy, quiet=True).exit_code == 0

    def grow() -> None:
        log.append(run.folder.log, book.records[-1] + b" ", run.signer, book.head.origin)

    before(monkeypatch, many, "examine", grow)
    found = [str(each) for each in verify.verify(run.folder.root, policy, quiet=True).findings]
    assert any("signed" in each and "log/checkpoint" in each for each in found), found


@pytest.mark.parametrize("name", ["config.json", "MANIFEST.json", MODEL])
def test_a_start_takes_nothing_that_is_exchanged(
    run: SampleRun, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Oracle: the same start before; a tensor is found when it is read, anything else before."""

    def opened() -> Loaded:
        policy = trusted(run.signer)
        return open_elsewhere(
            Workers.alone(),
            lambda: opening.open_checkpoint(run.saved[20].folder, policy),
            lambda path: path == "config.json",
        )[0]

    assert filled(opened())
    before(monkeypatch, restore, "load", lambda: flip(run.saved[20].folder / name, -2))
    with pytest.raises(VerificationFailed):
        filled(opened())


class Weights(nn.Module):
    """A model with the parameters of the sample run."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(1, 3)
        del self.head.weight


def test_evaluate_computes_with_what_it_verified(run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the weights as they were verified; another authentic checkpoint in their place is none."""
    folder, policy, cpu = run.saved[20].folder, trusted(run.signer), torch.device("cpu")
    found = attest.verified(folder, policy, quiet=True)
    assert found.checkpoint_id == run.saved[20].checkpoint
    examples.with_weights(Weights(), found, cpu)
    swap, real = another_checkpoint(run), verify.verify

    def verified(*words: Any, **named: Any) -> Report:
        report = real(*words, **named)
        swap(folder)
        return report

    monkeypatch.setattr(verify, "verify", verified)
    found = attest.verified(folder, policy, quiet=True)
    assert found.checkpoint_id == run.saved[20].checkpoint
    with pytest.raises(VerificationFailed):
        examples.with_weights(Weights(), found, cpu)


SWAPS: dict[str, tuple[str, Swap]] = {
    "a tensor, when its bytes were compared": ("publish", other_bytes),
    "a small file, when its bytes were compared": ("publish", lambda folder: flip(folder / TRAINER, -2)),
    "the manifest, when the statements were checked": (
        "_fetch_checkpoint",
        lambda folder: edit_json(folder / "MANIFEST.json", lambda document: document["tensors"].pop()),
    ),
}


@pytest.mark.parametrize("name", SWAPS)
def test_a_run_that_was_fetched_is_not_believed_for_having_been_compared(
    run: SampleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Oracle: without an exchange step 20 is fetched, verified and loaded; with one neither a resume nor
    `harness verify` takes it."""
    policy, store = trusted(run.signer), Store(run)

    def fetched(root: Path) -> tuple[Found, int]:
        there = RunFolder(root)
        fetching.fetch_newest(
            store,  # type: ignore[arg-type]
            there,
            lambda folder, logged: story.read(folder, policy, logged=logged),
            _never,
        )
        found = Candidates(Workers.alone(), there, policy, wanted).next()
        try:
            weights = found.loaded and filled(found.loaded)
        except DamagedCheckpoint:
            weights = None
        return found if weights else Found(None, None, ()), verify.verify(root, policy, quiet=True).exit_code

    found, code = fetched(tmp_path / "good")
    assert (found.loaded is not None, code) == (True, 0)
    hook, swap = SWAPS[name]
    folder = "step-00000020"
    whole, statements = f".tmp-fetch/payload/{folder}", f"checkpoints/pruned-{folder}"
    place = {"publish": whole, "_fetch_checkpoint": statements}[hook]
    real = getattr(fetching.durable if hook == "publish" else fetching, hook)

    def hooked(*words: Any) -> None:
        target = tmp_path / "bad" / place
        if hook == "_fetch_checkpoint" or words[0] == target:
            swap(target)
        real(*words)

    monkeypatch.setattr(fetching.durable if hook == "publish" else fetching, hook, hooked)
    found, code = fetched(tmp_path / "bad")
    assert (found.loaded, code) == (None, 1)


def _never(name: str, error: HarnessError) -> None:
    raise error


def test_a_file_of_another_size_is_not_what_was_written(run: SampleRun) -> None:
    """Oracle: the files as they were; the disk then gives back one byte more."""
    folder = run.saved[20].folder
    manifest = Manifest.parse((folder / "MANIFEST.json").read_bytes(), where="")
    written = writer.Written(manifest.files, manifest.tensors, 0)
    writer.verify_written(folder, written)
    longer(folder)
    with pytest.raises(EnvironmentFault, match="does not give back what was written"):
        writer.verify_written(folder, written)


TOKENS = np.arange(200, dtype=np.uint16)


def shard(path: Path, tokens: np.ndarray[Any, Any] = TOKENS) -> None:
    """Token shard of the user's own."""
    save_file({"tokens": tokens}, path, {"vocabulary": "1000", "split": "train"})


def corpus(folder: Path, kind: str) -> TokenData:
    """A shard that the user made, or the token cache of a text; the same in each process of a run."""
    tokenizer = Tokenizer()
    if kind == "tokens":
        return cache.prepare(Data(kind="tokens", files=["a.safetensors"]), tokenizer, folder)
    data = Data(kind="text", files=["a.txt"], validation=0.0, cache=folder / "cache")
    return cache.prepare(data, tokenizer, folder)


def made(folder: Path, kind: str) -> tuple[TokenData, Path]:
    """The corpus in ``folder``, opened, and the file that its tokens are in."""
    shard(folder / "a.safetensors")
    (folder / "a.txt").write_text("words " * 50)
    opened = corpus(folder, kind)
    (file,) = folder.glob("a.safetensors") if kind == "tokens" else folder.glob("cache/*/train.bin")
    return opened, file


@pytest.mark.parametrize("kind", ["tokens", "cache"])
def test_a_run_trains_on_the_shard_that_was_hashed_whatever_takes_its_name(tmp_path: Path, kind: str) -> None:
    """Oracle: the tokens before; the other file, of the same size, has other digests when it is opened."""
    opened, file = made(tmp_path, kind)
    before, digest = opened.train[0].tolist(), opened.held[0].sha256
    replaced(file, file.read_bytes()[:-2] + b"\1\1")
    assert opened.train[0].tolist() == before
    opened.require_unchanged()
    if kind == "tokens":
        assert corpus(tmp_path, kind).held[0].sha256 != digest
    else:
        with pytest.raises(VerificationFailed, match=r"cached tokens are damaged \(train.bin\)"):
            corpus(tmp_path, kind)


@pytest.mark.parametrize("kind", ["tokens", "cache"])
def test_what_is_written_into_a_shard_is_found_before_the_next_checkpoint(tmp_path: Path, kind: str) -> None:
    """Oracle: the same call before; new permissions and the same bytes written again are no change."""
    opened, file = made(tmp_path, kind)
    data = Data(kind="tokens", sequence_length=4)
    task = Language(model=Model(layers=1, width=8, heads=1), data=data, tokens=opened)
    recorder = object.__new__(Recorder)
    recorder._workers, recorder._session = Workers.alone(), SimpleNamespace(task=task)  # type: ignore[assignment]
    file.chmod(0o600)
    file.write_bytes(content := file.read_bytes())
    task.require_unchanged()
    with file.open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(b"\1\1")
    assert file.read_bytes() != content
    with pytest.raises(VerificationFailed, match="changed while it was trained on"):
        recorder.save(10)


@pytest.mark.parametrize("place", [-2, 0])
def test_what_is_written_into_a_shard_right_after_it_was_opened_is_found(tmp_path: Path, place: int) -> None:
    """Oracle: the bytes of the file. Its beginning, the header, and its end have gone through a buffer once,
    and a clock of coarse ticks gives it the times that it had."""
    file = tmp_path / "a.safetensors"
    shard(file)
    opened = corpus(tmp_path, "tokens")
    opened.require_unchanged()
    (held,) = opened.held
    flip(file, place)
    held._stamp = files.stamp(file.stat())
    with pytest.raises(VerificationFailed, match="changed while it was trained on"):
        opened.require_unchanged()


def test_a_shard_that_changes_while_it_is_hashed_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same shard a moment later."""
    shard(tmp_path / "a.safetensors")
    real = tokens.Mapped._digest

    def digest(opened: tokens.Mapped) -> str:
        found = real(opened)
        flip(tmp_path / "a.safetensors", -1)
        return found

    monkeypatch.setattr(tokens.Mapped, "_digest", digest)
    with pytest.raises(VerificationFailed, match="changed while it was read"):
        corpus(tmp_path, "tokens")
    monkeypatch.undo()
    assert corpus(tmp_path, "tokens").counts["tokens"] == len(TOKENS)


@pytest.mark.parametrize("place", ["header", "tokens"])
def test_what_is_parsed_of_a_shard_is_what_was_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Oracle: the shard as it was, although another one has its name once it is digested."""
    shard(tmp_path / "a.safetensors")
    digest = corpus(tmp_path, "tokens").corpus
    hook = {"header": "header", "tokens": "array"}[place]
    shard(tmp_path / "b", TOKENS[::-1].copy())
    other = (tmp_path / "b").read_bytes()
    before(monkeypatch, tokens.Mapped, hook, lambda: replaced(tmp_path / "a.safetensors", other))
    opened = corpus(tmp_path, "tokens")
    assert (opened.corpus, opened.train[0].tolist()) == (digest, TOKENS.tolist())
    opened.require_unchanged()
