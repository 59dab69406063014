"""`harness diff`: two checkpoints or two runs, tensors by their bytes, statements by their facts."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import cli
from harness.audit.diff import facts, tensors
from harness.audit.diff.ulp import Distance, Measure
from harness.commands import Outcome, diff
from harness.errors import EvidenceIncomplete, UsageError, VerificationFailed
from harness.format.ledger import Ledger, Row
from harness.format.safetensors_header import build
from harness.provenance.signing.keys import Signer


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    """An identity in tmp_path/me.*."""
    return run_folder.identity(tmp_path / "me")


@pytest.fixture
def root(tmp_path: Path, signer: Signer) -> Path:
    """A run with checkpoints 10, 20, 30."""
    return run_folder.build(tmp_path / "run", signer)


def compared(a: Path, b: Path, *words: str) -> Outcome:
    """`harness diff A B WORDS`."""
    parser = argparse.ArgumentParser()
    diff.add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    return diff.run(parser.parse_args([str(a), str(b), *words]))


def topics(outcome: Outcome) -> set[tuple[str, str]]:
    """(topic, name) of every fact that differs, over all steps."""
    return {(fact["topic"], fact["name"]) for step in outcome.document["steps"] for fact in step["facts"]}


def write(folder: Path, file: str, contents: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """A safetensors file with name → (dtype, shape, bytes)."""
    folder.mkdir(parents=True, exist_ok=True)
    header, _ = build([(name, dtype, shape) for name, (dtype, shape, _) in contents.items()], {})
    (folder / file).write_bytes(header + b"".join(data for _, _, data in contents.values()))
    return folder


def sides(tmp_path: Path, a: tuple[str, list[int], bytes], b: tuple[str, list[int], bytes]) -> dict:
    """The only difference between two folders with one tensor each, as the document shows it."""
    one = write(tmp_path / "a" / "step-00000001", "model.safetensors", {"w": a})
    other = write(tmp_path / "b" / "step-00000001", "model.safetensors", {"w": b})
    (found,) = compared(one, other).document["steps"][0]["differences"]
    return found


def test_a_twin_is_equal_and_only_its_identity_differs(root: Path, tmp_path: Path, signer: Signer) -> None:
    """Oracle: a run with the same tensors and another name, command, key and clock; exit code 0."""

    def another(step: int, predicate: run_folder.Predicate) -> None:
        predicate["run"]["name"] = "twin"
        predicate["launch"]["command"] = ["elsewhere"]
        predicate["created"] = "2027-01-01T00:00:00Z"
        predicate["environment"]["variables"] = {"SLURM_JOB_ID": str(step)}

    config = run_folder.CONFIG.replace("runs/sample", "runs/twin") + "track: {project: mine}\n"
    twin = run_folder.build(tmp_path / "twin", signer, tweak=another, config=config, resumes={10: "exact"})
    outcome = compared(root, twin)
    assert outcome.exit_code == 0
    assert outcome.document["equal"] is True
    names = topics(outcome)
    assert {topic for topic, _ in names} == {"identity"}
    assert {"run.dir", "track.project", "command", "created", "run.name", "segment.number"} <= {
        name for _, name in names
    }
    assert "step 20  5 tensors equal" in outcome.text


def test_a_differing_tensor_is_named_measured_and_decides(root: Path, tmp_path: Path, signer: Signer) -> None:
    """Oracle: a run whose head.bias is shifted by 2^-10; exit code 1."""
    other = run_folder.build(tmp_path / "other", signer, shift={"head.bias": 2.0**-10})
    outcome = compared(root, other)
    assert outcome.exit_code == 1
    assert outcome.document["first"] == {"step": 10, "part": "model", "tensor": "head.bias"}
    (found,) = outcome.document["steps"][0]["differences"]
    assert (found["name"], found["differing"], found["first"]) == ("head.bias", 3, (0,))
    assert "1 of 5 tensors differ" in outcome.text
    assert "optimizer equal" in outcome.text


def test_bytes_decide_whatever_the_manifests_say(root: Path, tmp_path: Path) -> None:
    """Oracle: one payload bit flipped in a copy whose MANIFEST.json still has the old digest."""
    copy = shutil.copytree(root, tmp_path / "copy")
    file = run_folder.checkpoint(copy, 20) / "optimizer-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    outcome = compared(root, copy)
    assert outcome.document["first"] == {
        "step": 20, "part": "optimizer", "tensor": "optimizer.head.bias.exp_avg",
    }  # fmt: skip
    assert [step["equal"] for step in outcome.document["steps"]] == [True, False, True]


def test_a_generator_state_that_differs_is_shown_apart_and_decides(root: Path, tmp_path: Path) -> None:
    """Oracle: one byte of the RNG file: the next dropout mask would be another one."""
    copy = shutil.copytree(root, tmp_path / "copy")
    file = run_folder.checkpoint(copy, 30) / "rng-rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    outcome = compared(root, copy)
    assert outcome.exit_code == 1
    assert "model equal, optimizer equal, rng 1 of 1" in outcome.text
    assert outcome.document["first"]["tensor"] == "rank-00000/torch.cpu"


def test_a_seed_a_commit_and_a_thread_count_are_facts_and_tensors_still_decide(
    root: Path, tmp_path: Path, signer: Signer
) -> None:
    """Oracle: three changed claims, each under its topic, and exit code 0."""

    def change(step: int, predicate: run_folder.Predicate) -> None:
        predicate["code"]["git_commit"] = "0" * 40
        predicate["determinism"]["settings"]["threads"] = 2
        predicate["environment"]["packages"]["torch"] = "2.14.0"
        predicate["data"]["corpus_sha256"] = "f" * 64

    config = run_folder.CONFIG.replace("seed: 3", "seed: 4")
    outcome = compared(root, run_folder.build(tmp_path / "other", signer, tweak=change, config=config))
    assert outcome.exit_code == 0
    assert {fact for fact in topics(outcome) if fact[0] != "identity"} == {
        ("config", "run.seed"), ("code", "git_commit"), ("determinism", "settings.threads"),
        ("environment", "packages.torch"), ("data", "corpus_sha256"),
    }  # fmt: skip
    assert "run.seed: 3 → 4" in outcome.text


def test_steps_that_only_one_run_has_are_named(root: Path, tmp_path: Path, signer: Signer) -> None:
    """Oracle: checkpoints 10, 20, 30 against 20, 40 with 20 common and another 50 pruned."""
    other = run_folder.build(tmp_path / "other", signer, steps=(20, 40, 50), pruned=(50,))
    document = compared(root, other).document
    assert [step["step"] for step in document["steps"]] == [20]
    assert document["only_in_a"] == ["step-00000010", "step-00000030"]
    assert document["only_in_b"] == ["step-00000040", "pruned-step-00000050"]


def test_without_a_common_step_it_cannot_tell(root: Path, tmp_path: Path, signer: Signer) -> None:
    """Oracle: exit code 4, and the steps of both."""
    other = run_folder.build(tmp_path / "other", signer, steps=(15,))
    with pytest.raises(EvidenceIncomplete, match="A has 10, 20, 30, B has 15"):
        compared(root, other)


def test_a_run_and_a_checkpoint_or_one_folder_twice_is_a_usage_error(root: Path) -> None:
    """Oracle: UsageError, which exits 2: a folder is always equal to itself."""
    with pytest.raises(UsageError, match="A is a run and B a checkpoint"):
        compared(root, run_folder.checkpoint(root, 10))
    with pytest.raises(UsageError, match="same folder"):
        compared(root, root)
    with pytest.raises(UsageError, match="elements"):
        compared(root, root.parent, "--elements", "0")


def test_a_pruned_checkpoint_cannot_be_compared(root: Path, tmp_path: Path, signer: Signer) -> None:
    """Oracle: EvidenceIncomplete, which exits 4."""
    other = run_folder.build(tmp_path / "other", signer, pruned=(10,))
    with pytest.raises(EvidenceIncomplete, match="holds no tensor"):
        compared(run_folder.checkpoint(root, 10), other / "checkpoints" / "pruned-step-00000010")


def test_two_checkpoints_of_different_steps_can_be_compared(root: Path) -> None:
    """Oracle: every model tensor of the sample depends on its step."""
    outcome = compared(run_folder.checkpoint(root, 10), run_folder.checkpoint(root, 20))
    assert outcome.exit_code == 1
    assert "step-00000010 | step-00000020" in outcome.text
    assert ("data", "cursor.step") in topics(outcome)


def test_another_number_of_shards_is_no_difference(tmp_path: Path) -> None:
    """Oracle: the same two tensors in one file and in two."""
    x, y = ("F32", [1], b"abcd"), ("F32", [1], b"efgh")
    one = write(tmp_path / "a" / "step-00000001", "model.safetensors", {"x": x, "y": y})
    other = write(tmp_path / "b" / "step-00000001", "model-00001-of-00002.safetensors", {"x": x})
    write(other, "model-00002-of-00002.safetensors", {"y": y})
    outcome = compared(one, other)
    assert outcome.exit_code == 0
    assert "not compared" in outcome.text  # neither folder has a statement, and that is said
    write(other, "model-00003-of-00003.safetensors", {"y": y})
    with pytest.raises(VerificationFailed, match="two files"):
        compared(one, other)


def test_a_tensor_that_one_side_lacks_or_shapes_otherwise_decides(tmp_path: Path) -> None:
    """Oracle: the reason in words, and exit code 1."""
    assert sides(tmp_path, ("F32", [2], bytes(8)), ("F32", [1, 2], bytes(8)))["reason"].startswith(
        "shape [2]"
    )
    assert sides(tmp_path, ("F32", [2], bytes(8)), ("I32", [2], bytes(8)))["reason"].startswith("dtype F32")
    write(tmp_path / "a" / "step-00000001", "optimizer-1.safetensors", {"m": ("F32", [1], bytes(4))})
    outcome = compared(tmp_path / "a" / "step-00000001", tmp_path / "b" / "step-00000001")
    assert "optimizer `m` F32 [1]: only in A" in outcome.text


def test_a_file_that_is_shorter_than_its_header_says_is_refused(tmp_path: Path) -> None:
    """Oracle: VerificationFailed before a byte is compared."""
    one = write(tmp_path / "a" / "step-00000001", "model.safetensors", {"w": ("F32", [2], bytes(8))})
    other = shutil.copytree(one, tmp_path / "b" / "step-00000001")
    with open(other / "model.safetensors", "r+b") as stream:
        stream.truncate((other / "model.safetensors").stat().st_size - 1)
    with pytest.raises(VerificationFailed):
        compared(one, other)


def test_measuring_is_capped_and_counting_is_not(tmp_path: Path) -> None:
    """Oracle: 1000 elements that all differ, 10 of them measured; the text says so."""
    one = write(tmp_path / "a" / "step-00000001", "model.safetensors", {"w": ("F32", [1000], bytes(4000))})
    ones = np.ones(1000, "<f4").tobytes()
    other = write(tmp_path / "b" / "step-00000001", "model.safetensors", {"w": ("F32", [1000], ones)})
    outcome = compared(one, other, "--elements", "10")
    (found,) = outcome.document["steps"][0]["differences"]
    assert (found["differing"], found["measured"], found["elements"]) == (1000, 10, 1000)
    assert "measured: 10 elements" in outcome.text


def test_a_difference_after_the_first_chunk_is_found_at_its_index(tmp_path: Path) -> None:
    """Oracle: numpy: one element in the third megabyte, whose norm covers the whole tensor."""
    values = np.linspace(1, 2, 900_000, dtype="<f4").reshape(900, 1000)
    changed = values.copy()
    changed[700, 5] = np.nextafter(changed[700, 5], np.float32(9))
    found = sides(tmp_path, ("F32", [900, 1000], values.tobytes()), ("F32", [900, 1000], changed.tobytes()))
    assert (found["differing"], found["first"]) == (1, (700, 5))
    assert found["distance"]["largest_ulp"] == 1
    assert found["measured"] == 1 << 18
    wide = tensors.compare(
        tensors.read(tmp_path / "a" / "step-00000001"), tensors.read(tmp_path / "b" / "step-00000001"),
        10**9, lambda count: None,
    ).differences[0]  # fmt: skip
    expected = np.linalg.norm((values - changed).astype("f8")) / np.linalg.norm(values.astype("f8"))
    assert wide.measured == 900_000
    assert wide.distance is not None
    assert wide.distance.relative_l2 == pytest.approx(expected, rel=1e-6)


NUMPY = {"F32": ("<f4", "<i4"), "F64": ("<f8", "<i8"), "F16": ("<f2", "<i2")}


def ordered(words: np.ndarray) -> list[int]:
    """Sign and magnitude as an integer that grows with the value."""
    low = -(2 ** (8 * words.itemsize - 1))
    return [int(word) if word >= 0 else low - int(word) for word in words]


@given(
    st.sampled_from(sorted(NUMPY)), st.binary(min_size=64, max_size=64), st.binary(min_size=64, max_size=64)
)
@settings(max_examples=300, deadline=None)
def test_distances_agree_with_numpy_on_any_bits(dtype: str, one: bytes, other: bytes) -> None:
    """Oracle: numpy, element by element; NaN and infinite elements are left out and counted."""
    floats, words = NUMPY[dtype]
    left, right = np.frombuffer(one, floats), np.frombuffer(other, floats)
    bits = np.frombuffer(one, words), np.frombuffer(other, words)
    finite = np.isfinite(left) & np.isfinite(right)
    measure = Measure(dtype)
    measure.add(one, other)
    found = measure.distance()
    assert measure.differing(one, other) == int((bits[0] != bits[1]).sum())
    pairs = zip(ordered(bits[0][finite]), ordered(bits[1][finite]), strict=True)
    assert found.largest_ulp == max((abs(a - b) for a, b in pairs), default=0)
    assert found.not_finite == int(((bits[0] != bits[1]) & ~finite).sum())
    with np.errstate(all="ignore"):
        wide = left[finite].astype(np.longdouble), right[finite].astype(np.longdouble)
        norm = np.sqrt((wide[0] ** 2).sum())
        expected = float(np.sqrt(((wide[0] - wide[1]) ** 2).sum()) / norm) if norm else math.nan
    if math.isfinite(expected) and found.relative_l2 is not None:
        assert found.relative_l2 == pytest.approx(expected, rel=1e-6)


def test_a_bfloat16_is_measured_as_torch_reads_it() -> None:
    """Oracle: torch: neighbours of 1.0 are 2^-7 apart; norms over float32 copies."""
    torch = pytest.importorskip("torch")
    one = torch.tensor([1.0, -2.0, 3.0], dtype=torch.bfloat16)
    other = torch.tensor([1.0 + 2.0**-7, -2.0, 3.0], dtype=torch.bfloat16)
    measure = Measure("BF16")
    measure.add(*(bytes(each.view(torch.uint8).tolist()) for each in (one, other)))
    expected = float((one.float() - other.float()).norm() / one.float().norm())
    found = measure.distance()
    assert found.largest_ulp == 1
    assert found.relative_l2 == pytest.approx(expected, rel=1e-6)


def test_the_sign_of_zero_differs_in_bits_and_in_nothing_else() -> None:
    """Oracle: IEEE 754: +0 and -0 are equal values."""
    measure = Measure("F32")
    plus, minus = np.float32(0.0).tobytes(), np.float32(-0.0).tobytes()
    measure.add(plus, minus)
    assert measure.differing(plus, minus) == 1
    assert measure.distance() == Distance(0, 0.0, 0)


def test_integers_are_counted_and_have_no_distance(tmp_path: Path) -> None:
    """Oracle: two of three bytes differ."""
    found = sides(tmp_path, ("U8", [3], b"\x01\x02\x03"), ("U8", [3], b"\x01\x05\x06"))
    assert (found["differing"], found["first"], found["distance"]) == (2, (1,), None)


def test_an_infinite_ratio_never_reaches_json(tmp_path: Path) -> None:
    """Oracle: strict JSON: A is zero everywhere, so there is no relative L2."""
    a, b = (np.full(4, value, "<f8").tobytes() for value in (0.0, 1.0))
    found = sides(tmp_path, ("F64", [4], a), ("F64", [4], b))
    assert found["distance"]["relative_l2"] is None
    json.dumps(found, allow_nan=False)


ROW = Row(
    "aten.index_put", None, "eager", "cpu", "float32", "model.py:8", "documented", 3, 1, 9, None, "torch"
)


def predicate() -> dict:
    """As much of a predicate as the comparison reads."""
    return {
        "run": {"id": "0", "name": "n", "seed": 1}, "sequence": 0, "steps": {"from": 0, "to": 1},
        "parent": "genesis", "start": None, "segment": {}, "launch": {"command": ["x"], "world_size": 1},
        "config": {"sha256": "1", "text": "run: {seed: 1}"}, "code": {}, "data": {}, "cursor": {},
        "environment": {}, "determinism": {"mode": "warn", "settings": {}}, "metrics": {}, "log": None,
        "created": "now", "outcome": "ok",
    }  # fmt: skip


def test_a_kernel_that_only_one_side_used_is_named_and_counts_are_not_compared() -> None:
    """Oracle: the same row seen another number of times is no difference; another op is one."""
    one = Ledger("warn", rows=(ROW,))
    more = Ledger("warn", rows=(Row(**(ROW.__dict__ | {"count": 99, "last_step": 50})),))
    assert facts.differences(predicate(), predicate(), (one, more)) == []
    (found,) = facts.differences(predicate(), predicate(), (one, Ledger("warn")))
    assert (found.topic, found.a, found.b) == ("kernels", "seen", facts.ABSENT)
    assert "aten.index_put" in found.name


def test_the_same_values_spelt_otherwise_are_no_difference_of_config() -> None:
    """Oracle: YAML flow and block style; a string that looks like a number is another value."""
    other = predicate()
    other["config"] = {"sha256": "2", "text": "run:\n  seed: 1\n"}
    (found,) = facts.differences(predicate(), other, (None, None))
    assert found.topic == "identity"
    other["config"]["text"] = 'run: {seed: "1"}'
    assert facts.differences(predicate(), other, (None, None))[0].topic == "config"


def test_a_config_that_is_no_yaml_is_compared_as_a_whole() -> None:
    """Oracle: one fact with both digests."""
    other = predicate()
    other["config"] = {"sha256": "2", "text": "a: [\x00"}
    (found,) = facts.differences(predicate(), other, (None, None))
    assert (found.topic, found.a, found.b) == ("config", "1", "2")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)


@given(JSON, JSON)
@settings(deadline=None)
def test_different_values_have_different_texts(one: object, other: object) -> None:
    """Oracle: JSON, which tells them apart."""
    same = json.dumps(one) == json.dumps(other)
    assert (facts.flat({"x": one}) == facts.flat({"x": other})) is same


def test_names_from_strangers_cannot_command_the_terminal(root: Path, tmp_path: Path, signer: Signer) -> None:
    """Oracle: no escape character in the text."""

    def poison(step: int, predicate: run_folder.Predicate) -> None:
        predicate["code"]["git_commit"] = "\x1b[31mred\nequal"

    outcome = compared(root, run_folder.build(tmp_path / "other", signer, tweak=poison))
    assert "\x1b" not in outcome.text
    assert r"\x1b[31mred\nequal" in outcome.text


def test_json_is_one_object_and_the_exit_code_is_kept(
    root: Path, tmp_path: Path, signer: Signer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: json.loads of stdout, and exit code 1."""
    other = run_folder.build(tmp_path / "other", signer, values="other")
    assert cli.main(["diff", str(root), str(other), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["first"]["tensor"] == "embed.weight"


def test_the_verb_runs_without_torch_and_numpy(root: Path, tmp_path: Path, signer: Signer) -> None:
    """Oracle: sys.modules of a process that compared two different runs."""
    other = run_folder.build(tmp_path / "other", signer, values="other", config=run_folder.CONFIG + "a: 1\n")
    code = (
        "import sys; from harness import cli; code = cli.main(sys.argv[1:])\n"
        "assert code == 1 and not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, "diff", str(root), str(other)], check=True, stdout=-3)


def test_with_keys_both_sides_are_verified_first(root: Path, tmp_path: Path, signer: Signer) -> None:
    """Oracle: a good twin, a stranger's key, then one flipped bit; without keys it says so."""
    twin = run_folder.build(tmp_path / "twin", signer)
    words = ["--key", str(tmp_path / "me.ed25519.pub"), str(tmp_path / "me.p256.pub")]
    assert compared(root, twin).text.startswith("not verified: ")
    good = compared(root, twin, *words)
    assert good.text.startswith("verified: both sides, signed by ")
    assert good.document["verified"]
    run_folder.identity(tmp_path / "stranger")
    with pytest.raises(VerificationFailed, match="accepted keys"):
        compared(root, twin, "--key", str(tmp_path / "stranger.ed25519.pub"))
    file = run_folder.checkpoint(twin, 30) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(VerificationFailed, match=r"head\.bias"):
        compared(root, twin, *words)
