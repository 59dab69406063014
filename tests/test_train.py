"""`harness train` through the front door: real processes, real kills, real files."""

from __future__ import annotations

import base64
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nonfinite_tasks
import orjson
import psutil
import pytest
from authority import Authority, answering
from compare import differing
from conftest import TIMEOUT, Place, Process, finish
from fork_server import Forked
from toy_task import config

from harness.format import layout
from harness.provenance import statements

pytestmark = pytest.mark.slow

PAUSED = '{kind: "toy_task:Toy", options: {pause: 15}}'


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run of one process that was killed with step 12 as its newest checkpoint."""
    place = Place(tmp_path_factory.mktemp("killed"))
    place.write("toy.yaml", config(place.run, task=PAUSED))
    place.start_and_kill("checkpoints/step-00000012", ["train", "toy.yaml"])
    assert not (place.run / "checkpoints" / "step-00000018").exists()
    return place


@pytest.fixture
def partly(place: Place, killed: Place) -> Place:
    """A copy of the killed run, with its key."""
    for name in ("run", "config"):
        shutil.copytree(killed.root / name, place.root / name)
    place.write("toy.yaml", config(place.run, task=PAUSED))
    return place


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The same run, uninterrupted."""
    place = Place(tmp_path_factory.mktemp("twin"))
    place.write("toy.yaml", config(place.run))
    assert place.harness("train", "toy.yaml").code == 0
    return place


def predicate(checkpoint: Path) -> dict[str, object]:
    """What the checkpoint's statement says, read without our verifier."""
    bundle = orjson.loads((checkpoint / layout.CHECKPOINT_BUNDLE).read_bytes())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    return dict(statements.parse_checkpoint(payload, where=str(checkpoint)).predicate)


def keys(place: Place) -> list[str]:
    """``--key`` words for the place's own public keys."""
    folder = place.root / "config" / "harness"
    return [word for name in ("ed25519", "p256") for word in ("--key", str(folder / f"default.{name}.pub"))]


def ran(place: Place, command: list[str]) -> subprocess.CompletedProcess[str]:
    """``command`` in the place, to its end."""
    return subprocess.run(
        command,
        cwd=place.root,
        env=place.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )


def workers(process: Process) -> list[tuple[int, psutil.Process]]:
    """The ranks that torchrun, or a fork of ranks.py, has started."""
    children = psutil.Process(process.pid).children()
    if isinstance(process, Forked):
        return [(int(child.name().removeprefix("rank-")), child) for child in children]
    return [(int(child.environ()["RANK"]), child) for child in children if "harness" in child.cmdline()]


VARIANTS = {
    "one process": (1, {"precision": "fp32"}),
    "one process, bf16, data worker": (
        1,
        {"precision": "bf16", "train": "{steps: 24, global_batch: 12, micro_batch: 2, data_workers: 1}"},
    ),
    "one process, fp16, moving average": (1, {"precision": "fp16", "optimizer": "{ema: 0.9}"}),
    "two processes": (2, {"precision": "fp32"}),
    "three processes, bf16, each writes some files": (
        3,
        {"precision": "bf16", "checkpoint": "{every: 6, file_bytes: 600}"},
    ),
    "two processes, fsdp2": (2, {"parallel": "fsdp2", "checkpoint": "{every: 6, file_bytes: 600}"}),
    "three processes, fsdp2, bf16, moving average": (
        3,
        {"parallel": "fsdp2", "precision": "bf16", "optimizer": "{ema: 0.9}"},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(place: Place, variant: str) -> None:
    """Oracle: the uninterrupted twin, tensor by tensor, read by the safetensors package. "One process" is
    `python -m harness` itself, "two processes" torchrun; the others are forks."""
    processes, extra = VARIANTS[variant]
    place.write("toy.yaml", config(place.run, **{**extra, "task": PAUSED}))
    place.write("twin.yaml", config(place.root / "twin", **extra))
    torchrun = [] if variant == "two processes" else None
    how = {"processes": processes, "torchrun": torchrun, "fresh": variant == "one process"}
    place.start_and_kill("checkpoints/step-00000012", ["train", "toy.yaml"], **how)
    reached = place.steps()[-1]
    again = place.harness("train", "toy.yaml", **how)
    twin = place.harness("train", "twin.yaml", processes=processes)
    assert (again.code, twin.code) == (0, 0), again.err + twin.err
    assert "exact: same stack and world size" in again.out
    assert reached < 24
    assert place.steps() == list(range(1, 25))
    assert differing(place.run, place.root / "twin") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_stop_signal_saves_and_asks_to_be_requeued(place: Place, number: signal.Signals) -> None:
    """Oracle: exit code 75, a checkpoint of the very step, and the twin; nobody waits for a timestamp, whose
    authority takes longer than the test may."""
    place.write("toy.yaml", config(place.run, task=PAUSED))
    place.write("twin.yaml", config(place.root / "twin"))
    done = threading.Event()
    with answering(lambda request: b"x" * done.wait(1000)) as url:
        asking = [f"signing.timestamp={url}", "signing.timestamp_timeout=1000"]
        place.hold("checkpoints/step-00000006")
        process = place.start(["train", "toy.yaml", *asking], fresh=number == signal.SIGTERM)
        place.wait_for(process, "checkpoints/step-00000006")
        process.send_signal(number)
        place.go_on()
        stopped = finish(process)
        done.set()
    assert stopped.code == 75
    assert number.name in stopped.last_line
    step = place.steps()[-1]
    assert (place.run / "checkpoints" / layout.checkpoint_name(step)).is_dir()
    again = place.harness("train", "toy.yaml")
    assert again.code == 0
    assert f"step {step}, checkpoint" in again.out
    place.harness("train", "twin.yaml")
    missing = {layout.checkpoint_name(step)} - {layout.checkpoint_name(each) for each in (6, 12, 18, 24)}
    for name in missing:
        (place.run / "checkpoints" / name).rename(place.root / name)
    assert differing(place.run, place.root / "twin") == []


def test_a_signal_on_any_one_rank_stops_all_at_the_same_step(place: Place) -> None:
    """Oracle: one checkpoint with both ranks' generators, of the last step in the metrics; exit codes 75."""
    place.write("toy.yaml", config(place.run, task=PAUSED))
    place.hold("checkpoints/step-00000006")
    process = place.start(["train", "toy.yaml"], 2, torchrun=[])
    place.wait_for(process, "checkpoints/step-00000006")
    dict(workers(process))[1].send_signal(signal.SIGUSR1)
    place.go_on()
    stopped = finish(process)
    assert stopped.code != 0  # torchrun leaves with 1 whatever its workers say
    assert "exitcode  : 75" in stopped.err or "exitcode: 75" in stopped.err
    assert "exitcode  : -15" not in stopped.err
    assert (stopped.out + stopped.err).count("SIGUSR1 on rank 1: stopped after step") == 1
    newest = sorted((place.run / "checkpoints").glob("step-*"))[-1]
    assert int(newest.name.removeprefix("step-")) == place.steps()[-1]
    assert {path.name for path in newest.glob("rng-*")} == {
        f"rng-rank-0000{rank}.safetensors" for rank in (0, 1)
    }


def test_workers_of_a_killed_launcher_save_and_leave(place: Place) -> None:
    """Oracle: no worker is left, and the run can be started again at once."""
    place.write("toy.yaml", config(place.run, task=PAUSED))
    place.hold("checkpoints/step-00000006")
    process = place.start(["train", "toy.yaml"], 2, torchrun=[])
    place.wait_for(process, "checkpoints/step-00000006")
    children = [child for _, child in workers(process)]
    assert len(children) == 2
    process.kill()
    process.wait()
    place.go_on()
    _, alive = psutil.wait_procs(children, timeout=TIMEOUT)
    assert alive == []
    newest = sorted((place.run / "checkpoints").glob("step-*"))[-1]
    assert int(newest.name.removeprefix("step-")) == place.steps()[-1] < 24
    process.communicate()
    assert place.harness("train", "toy.yaml", processes=2).code == 0


def test_a_nan_stops_all_ranks_with_a_saved_state_and_its_origin(place: Place) -> None:
    """Oracle: exit code 1, a signed state before the step, and a verifier that does not call it good; the
    rank and micro-batch to which the order gives the marked sample, and the operator that makes a NaN of it,
    on every rank's screen and in the file that torchrun reads. Forward passes wait for each other, so that a
    rank which executed one alone would hang."""
    shutil.copy(Path(nonfinite_tasks.__file__), place.root)
    task = '{kind: "nonfinite_tasks:Ends", options: {fault: Talking}}'
    place.write("toy.yaml", config(place.run, task=task, checkpoint="{every: 1}"))
    told = place.root / "error.json"
    broken = place.harness("train", "toy.yaml", processes=2, environ={"TORCHELASTIC_ERROR_FILE": str(told)})
    assert broken.code == 1
    step, shard = nonfinite_tasks.first_seen(3)
    rank, micro_batch = divmod(shard, nonfinite_tasks.ACCUMULATION // 2)
    origin = (
        f"micro-batch {micro_batch} of rank {rank} it came back with the same bits from aten.log in `fault`"
    )
    said = f"harness: the loss of step {step} is nan; executed again in {origin}"
    assert broken.err.count(said) == 2, broken.err
    assert origin in orjson.loads(told.read_bytes())["message"]["message"]
    for number, words in ((rank, origin), (1 - rank, f"it began on rank {rank}")):
        events = (place.run / "events" / f"rank-0000{number}.jsonl").read_text()
        assert words in events
    aside = place.run / "checkpoints" / f"nonfinite-step-0000000{step - 1}"
    assert predicate(aside)["outcome"] == "nonfinite"
    assert place.steps()[-1] == step - 1
    verified = place.harness("verify", str(place.run), *keys(place))
    assert verified.code == 0, verified.out
    shutil.rmtree(aside.with_name(f"step-0000000{step - 1}"))
    aside.rename(aside.with_name(f"step-0000000{step - 1}"))
    assert place.harness("verify", str(place.run), *keys(place)).code == 1


@pytest.mark.parametrize(("fault", "parallel"), [("Raising", "fsdp2"), ("Parting", "ddp")])
def test_an_error_of_one_rank_in_the_second_execution_keeps_the_state_of_all(
    place: Place, fault: str, parallel: str
) -> None:
    """Oracle: one rank raises while the other is about to wait for it in a collective; the state before the
    step is that of the checkpoint of the step before, tensor by tensor, signed, and the error is told on both
    screens."""
    shutil.copy(Path(nonfinite_tasks.__file__), place.root)
    task = f'{{kind: "nonfinite_tasks:Ends", options: {{fault: {fault}}}}}'
    place.write("toy.yaml", config(place.run, task=task, checkpoint="{every: 1}", parallel=parallel))
    broken = place.harness("train", "toy.yaml", processes=2)
    assert broken.code == 1
    step, shard = nonfinite_tasks.first_seen(3)
    rank = shard // (nonfinite_tasks.ACCUMULATION // 2)
    why = f"rank {rank}: ValueError: the fault does not like to be looked at"
    said = f"harness: the loss of step {step} is nan; not executed again: {why}"
    assert broken.err.count(said) == 2, broken.err
    before = place.run / "checkpoints" / f"step-0000000{step - 1}"
    aside = before.with_name(f"nonfinite-{before.name}")
    assert predicate(aside)["outcome"] == "nonfinite"
    assert tensors(aside) == tensors(before)
    assert place.harness("verify", str(place.run), *keys(place)).code == 0


def tensors(checkpoint: Path) -> list[object]:
    """What the manifest says of each tensor of the model and the optimizer."""
    manifest = orjson.loads((checkpoint / layout.MANIFEST).read_bytes())
    kept = [each for each in manifest["tensors"] if not each["file"].startswith("rng-")]
    assert len(kept) > 12
    return kept


def test_another_config_is_another_run_unless_accepted(partly: Place) -> None:
    """Oracle: exit code 2 with the difference named; then the reason is in the signed statement."""
    words = ["train", "toy.yaml", "optimizer.lr=0.5"]
    refused = partly.harness(*words)
    assert refused.code == 2
    assert "optimizer.lr" in refused.last_line
    assert "--accept config --reason" in refused.last_line
    again = partly.harness(*words, "--accept", "config", "--reason", "warmer")
    assert again.code == 0, again.err
    segment = predicate(partly.run / "checkpoints" / "step-00000018")["segment"]
    assert isinstance(segment, dict)
    assert segment["class"] == "accepted"
    assert segment["accepted"] == ["config: warmer"]
    assert [item["what"] for item in segment["differences"]] == ["optimizer.lr"]
    assert partly.harness("verify", str(partly.run), *keys(partly)).code == 0


def test_another_world_size_is_the_same_data(partly: Place, twin: Place) -> None:
    """Oracle: the batch digests of an uninterrupted run of one process; every checkpoint has a timestamp,
    those that were there before too, by an authority of OpenSSL."""
    tsa = Authority("tsa")
    with answering(tsa.openssl(partly.root)) as url:
        again = partly.harness("train", "toy.yaml", f"signing.timestamp={url}", processes=2)
    assert again.code == 0, again.err
    assert (partly.run / "log" / "timestamps" / "4.tsr").exists()
    key = f"identities: [{{name: me, keys: [{partly.root}/config/harness/default.ed25519.pub]}}]"
    wanted = "timestamps: {certificates: [root.pem]}\nrequired: [checkpoint, slsa, log, timestamp]"
    partly.write("policy.yaml", f"format: harness-policy/1\n{key}\n{wanted}\n")
    verified = partly.harness("verify", str(partly.run), "--policy", "policy.yaml")
    assert verified.code == 0, verified.out
    assert "same-data" in again.out
    assert "launch.world_size: 1 → 2" in again.out
    segment = predicate(partly.run / "checkpoints" / "step-00000024")["segment"]
    assert isinstance(segment, dict)
    assert segment["class"] == "same-data"
    runs = [partly.run, twin.run]
    lines = [[orjson.loads(line) for line in (run / "metrics.jsonl").open("rb")] for run in runs]
    assert [line["batch"] for line in lines[0]] == [line["batch"] for line in lines[1]]


def test_a_damaged_checkpoint_is_named_and_skipped_and_never_deleted(partly: Place, twin: Place) -> None:
    """Oracle: the twin; the damaged folder is still there, and the run verifies. Nobody answers for the
    time-stamping authority, which is told and changes nothing."""
    model = partly.run / "checkpoints" / "step-00000012" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-3] ^= 1
    model.write_bytes(data)
    again = partly.harness("train", "toy.yaml", "signing.timestamp=http://127.0.0.1:1/")
    assert again.code == 0, again.err
    assert "has no timestamp: the authority did not answer: [Errno 111] Connection refused" in again.out
    assert "step-00000012: " in again.out
    assert "step 6, checkpoint" in again.out
    assert differing(partly.run, twin.run) == []
    (damaged,) = (partly.run / "checkpoints").glob("damaged-*")
    assert (damaged / "model.safetensors").read_bytes() == bytes(data)
    verified = partly.harness("verify", str(partly.run), *keys(partly))
    assert verified.code == 0, verified.out


def test_a_run_folder_has_the_names_that_other_tools_read(partly: Place) -> None:
    """Oracle: DESIGN section 3, read with a JSON parser alone; the class of a resume is said first."""
    again = partly.harness("train", "toy.yaml")
    assert again.code == 0, again.err
    assert again.out.startswith("resume  ")
    assert " exact: " in again.out.splitlines()[0]
    # What a sample is made of is the task's: of language tokens and tokens_per_s, of this one samples.
    wanted = {"step", "loss", "lr", "grad_norm", "samples", "samples_per_s", "mfu", "batch", "chain", "time"}
    for line in (partly.run / "metrics.jsonl").open("rb"):
        assert wanted <= orjson.loads(line).keys()
    newest = max((partly.run / "checkpoints").glob("step-*"))
    lines = map(orjson.loads, (partly.run / "events" / "rank-00000.jsonl").open("rb"))
    seen = [line for line in lines if line["event"] == "ledger"][-1]
    ledger = orjson.loads((newest / "ledger.json").read_bytes())
    assert (seen["step"], seen["rows"]) == (24, ledger["rows"])
    assert {each["observer"] for each in seen["coverage"]} == {
        each["observer"] for each in ledger["coverage"]
    }
    trainer = orjson.loads((newest / "trainer.json").read_bytes())
    assert (trainer["step"], trainer["cursor"]["samples"], trainer["scaler"]) == (24, 24 * 12, None)
    last = orjson.loads((partly.run / "metrics.jsonl").read_bytes().splitlines()[-1])
    assert float(trainer["schedule"]["rate"]) == last["lr"]
    assert last["samples"] == trainer["cursor"]["samples"]


def test_a_rank_that_fails_is_the_last_word_on_the_screen_and_not_taken_for_lost(place: Place) -> None:
    """Oracle: the last line under torchrun, no other rank's line, and the traceback in that rank's events."""
    place.write("toy.yaml", config(place.run, task='{kind: "toy_task:Toy", options: {crash: 20}}'))
    failed = place.harness("train", "toy.yaml", processes=2, torchrun=[])
    assert failed.code == 1
    tail = failed.err.strip().splitlines()[-12:]
    assert any("ValueError: the toy breaks here" in line for line in tail), failed.err
    assert "sign of life" not in failed.err
    assert failed.err.count("harness: ") == 1, failed.err
    events = [orjson.loads(line) for line in (place.run / "events" / "rank-00001.jsonl").open("rb")]
    assert "the toy breaks here" in events[-1]["traceback"]


def test_one_process_imports_nothing_that_only_compilers_sharding_and_elastic_runs_use(place: Place) -> None:
    """Oracle: sys.modules after a run whose first step is under the census; each of torch's takes a second or
    two, and what is not imported cannot run."""
    place.write("toy.yaml", config(place.run, train="{steps: 2, global_batch: 2, micro_batch: 2}"))
    code = (
        "import sys; from harness.cli import main; code = main(['train', 'toy.yaml'])\n"
        "names = ['torch._dynamo', 'torch.distributed.tensor', 'sympy', 'wandb', 'scipy', 'pyarrow']\n"
        "elastic = ('loaders', 'rehearsal', 'sharded_sums', 'tree_norm', 'tree_sums', 'whole_lanes')\n"
        "names += [f'harness.training.elastic.{name}' for name in elastic]\n"
        "names += ['harness.determinism.peers', 'harness.determinism.tree']\n"
        "print(code, *[name for name in names if name in sys.modules])"
    )
    done = ran(place, [sys.executable, "-c", code])
    assert done.stdout.splitlines()[-1] == "0", done.stdout + done.stderr
    coverage = predicate(place.run / "checkpoints" / "step-00000002")["determinism"]["ledger"]["coverage"]  # type: ignore[index]
    assert coverage["census_steps"] > 0


def test_two_jobs_cannot_train_in_one_folder(place: Place) -> None:
    """Oracle: exit code 3 for the second, and the first goes on."""
    long = "{steps: 100000, global_batch: 12, micro_batch: 2}"
    place.write("toy.yaml", config(place.run, task=PAUSED, train=long))
    first = place.start(["train", "toy.yaml"])
    place.wait_for(first, "checkpoints/step-00000006")
    second = place.harness("train", "toy.yaml")
    assert second.code == 3
    assert "another job is training in this folder" in second.last_line
    first.send_signal(signal.SIGTERM)
    assert finish(first).code == 75


@pytest.mark.parametrize("limit", [6000, 9000])
def test_a_disk_that_takes_no_more_loses_nothing(partly: Place, limit: int) -> None:
    """Oracle: exit code 3, every published checkpoint verifies, and more space is all that a resume needs."""
    code = f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code += "import sys; sys.argv[0] = 'harness'; runpy.run_module('harness', run_name='__main__')"
    words = ["-c", code, "train", "toy.yaml"]
    full = ran(partly, [sys.executable, *words])
    assert full.returncode == 3, full.stderr
    assert full.stderr.strip().splitlines()[-1].startswith("harness: ")
    verified = partly.harness("verify", str(partly.run), *keys(partly))
    assert verified.code == 0, verified.out
    assert partly.harness("train", "toy.yaml").code == 0
    assert partly.harness("verify", str(partly.run), *keys(partly)).code == 0


def test_the_world_size_that_was_asked_for_is_checked(place: Place) -> None:
    """Oracle: exit code 3, and no run folder."""
    place.write(
        "toy.yaml", config(place.run, train="{steps: 4, global_batch: 12, micro_batch: 2, world_size: 2}")
    )
    bare = place.harness("train", "toy.yaml")
    assert bare.code == 3
    assert "train.world_size is 2, but 1 process(es) run" in bare.last_line
    assert not place.run.exists()


def test_accelerate_launch_starts_what_it_was_asked_for_or_fails(place: Place) -> None:
    """Oracle: two ranks in the statement; where accelerate quietly starts one, an error says so."""
    place.write("toy.yaml", config(place.run, train="{steps: 6, global_batch: 12, micro_batch: 2}"))
    base = "compute_environment: LOCAL_MACHINE\nuse_cpu: true\nnum_machines: 1\nnum_processes: 2\n"
    place.write("one.yaml", base + "distributed_type: MULTI_CPU\n")
    place.write("two.yaml", base + "distributed_type: MULTI_GPU\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    train = ["-m", "harness", "train", "toy.yaml"]
    for words in (["--cpu", "--num_processes", "2"], ["--config_file", "one.yaml"]):
        silently_one = ran(place, [*launch, *words, *train])
        assert silently_one.returncode != 0
        assert "accelerate was asked for 2 processes and started 1" in silently_one.stderr
    two = ran(place, [*launch, "--config_file", "two.yaml", *train])
    assert two.returncode == 0, two.stderr
    facts = predicate(place.run / "checkpoints" / "step-00000006")["launch"]
    assert isinstance(facts, dict)
    assert (facts["launcher"], facts["world_size"]) == ("accelerate", 2)


def test_a_checkpoint_that_was_renamed_but_not_logged_is_completed(partly: Place) -> None:
    """Oracle: exit code 4 before, since a record is missing; 0 after the next launch."""
    head = partly.run / "log" / "checkpoint"
    partly.hold("checkpoints/step-00000018")
    process = partly.start(["train", "toy.yaml"])  # enters step 12 if the kill came before its record
    before = partly.root / "before"
    while process.poll() is None and head.read_text().splitlines()[1] != "2":
        time.sleep(0.01)
    shutil.copytree(partly.run / "log", before)
    partly.kill_at(process, "checkpoints/step-00000018")
    partly.go_on()
    # As after a crash between the rename of step 18 and its record.
    shutil.rmtree(partly.run / "log")
    shutil.copytree(before, partly.run / "log")
    verified = partly.harness("verify", str(partly.run), *keys(partly))
    assert verified.code == 4, verified.out
    assert partly.harness("train", "toy.yaml").code == 0
    assert partly.harness("verify", str(partly.run), *keys(partly)).code == 0


def test_a_log_that_was_cut_off_at_its_first_record_is_begun_anew(place: Place) -> None:
    """Oracle: the run verifies afterwards; a later log without head is an error, and so is an older one."""
    place.write("toy.yaml", config(place.run, task=PAUSED))
    place.start_and_kill("checkpoints/step-00000006", ["train", "toy.yaml"])
    head = place.run / "log" / "checkpoint"
    head.unlink(missing_ok=True)  # as after a crash between the record and the head
    place.start_and_kill("checkpoints/step-00000012", ["train", "toy.yaml"])
    older = place.root / "older"  # one record or two; the last checkpoint will have seen three
    shutil.copytree(place.run / "log", older)
    assert place.harness("train", "toy.yaml").code == 0
    assert place.harness("verify", str(place.run), *keys(place)).code == 0
    shutil.rmtree(place.run / "log")
    shutil.copytree(older, place.run / "log")
    rolled_back = place.harness("train", "toy.yaml")
    assert rolled_back.code == 1
    assert "restore log/ from a copy" in rolled_back.last_line
    head.unlink()
    assert place.harness("train", "toy.yaml").code == 4


def test_keep_removes_payloads_and_lineage_survives(place: Place) -> None:
    """Oracle: two complete checkpoints, two pruned ones without tensors, and a run that verifies."""
    place.write("toy.yaml", config(place.run, checkpoint="{every: 6, keep: 2}"))
    assert place.harness("train", "toy.yaml").code == 0
    names = sorted(path.name for path in (place.run / "checkpoints").iterdir())
    assert names == ["pruned-step-00000006", "pruned-step-00000012", "step-00000018", "step-00000024"]
    assert not list((place.run / "checkpoints" / names[0]).glob("*.safetensors"))
    verified = place.harness("verify", str(place.run), *keys(place))
    assert verified.code == 0, verified.out


def test_a_finished_run_has_nothing_to_do(place: Place) -> None:
    """Oracle: the same command again changes no file."""
    place.write("toy.yaml", config(place.run))
    assert place.harness("train", "toy.yaml").code == 0
    times = {path: path.stat().st_mtime_ns for path in (place.run / "checkpoints").rglob("*")}
    time.sleep(0.05)
    again = place.harness("train", "toy.yaml")
    assert again.code == 0
    assert "nothing to do" in again.last_line
    assert times == {path: path.stat().st_mtime_ns for path in (place.run / "checkpoints").rglob("*")}


def test_a_corpus_that_changed_is_another_run_and_its_files_are_named(place: Place) -> None:
    """Oracle: exit code 2 with the file that this test has changed; the folder is as it was."""
    documents = place.root / "documents"
    documents.mkdir()
    for number in range(8):
        (documents / f"{number}.txt").write_text(f"document {number} of eight\n" * 40)
    text = f"run: {{dir: {place.run}}}\nmodel: {{layers: 1, width: 16, heads: 1}}\n"
    text += "data: {kind: text, files: [documents/*.txt], sequence_length: 16, validation: 0}\n"
    text += "train: {steps: 100000, global_batch: 2, micro_batch: 2}\ncheckpoint: {every: 20}\n"
    place.write("text.yaml", text)
    process = place.start(["train", "text.yaml"])
    place.wait_for(process, "checkpoints/step-00000020")
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 75
    before = sorted(place.run.rglob("*"))
    (documents / "3.txt").write_text("something else\n" * 40)
    refused = place.harness("train", "text.yaml")
    assert refused.code == 2
    assert "data.corpus_sha256" in refused.last_line
    assert "3.txt" in refused.last_line
    assert "1.txt" not in refused.last_line
    assert sorted(place.run.rglob("*")) == before
