"""`harness merge`: the weighted sum of verified checkpoints, signed, with all parents in the lineage."""

from __future__ import annotations

import argparse
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import run_folder
import torch
from attack import payload_of, signed, trusted
from run_folder import SampleRun
from safetensors.torch import load_file

from harness.audit.verification import verify
from harness.checkpoint import average
from harness.commands import Outcome, lineage, merge
from harness.errors import HarnessError, UsageError, VerificationFailed
from harness.format import layout, strict_json
from harness.provenance import exports

CONFIG = {"config.json": b"{}\n"}


@pytest.fixture
def parents(tmp_path: Path) -> list[SampleRun]:
    """Two runs of one signer with other tensors, a checkpoint each."""
    signer = run_folder.identity(tmp_path / "me")
    runs = [SampleRun(tmp_path / name, signer, name=name, values=name) for name in ("a", "b")]
    for run in runs:
        run.advance(10)
    return runs


def merged(parents: list[SampleRun], out: Path, *words: str) -> Outcome:
    """`harness merge CKPT CKPT --out OUT WORDS`."""
    me = parents[0].root.parent / "me"
    parser = argparse.ArgumentParser()
    merge.add_arguments(parser)
    folders = [str(run.saved[10].folder) for run in parents]
    trust = ["--key", f"{me}.ed25519.pub", f"{me}.p256.pub", "--signing-key", f"{me}.key"]
    parser.add_argument("--json", action="store_true")
    return merge.run(parser.parse_args([*folders, "--out", str(out), *trust, *words, "--json"]))


def judged(folder: Path, run: SampleRun) -> tuple[int, str]:
    """Exit code and findings of `harness verify`."""
    report = verify.verify(folder, trusted(run.signer), quiet=True)
    return report.exit_code, "\n".join(map(str, report.findings))


def test_a_merge_is_the_weighted_sum_and_verifies(parents: list[SampleRun], tmp_path: Path) -> None:
    """Oracle: Python's own floats over what the safetensors package reads; the same bytes when made again."""
    merged(parents, tmp_path / "out", "--weights", "0.7,0.3")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    sides = [load_file(run.saved[10].folder / "model.safetensors") for run in parents]
    assert set(ours) == set(sides[0])
    for name, tensor in ours.items():
        pairs = zip(*(side[name].flatten().tolist() for side in sides), strict=True)
        expected = [struct.unpack("<f", struct.pack("<f", 0.7 * a + 0.3 * b))[0] for a, b in pairs]
        assert tensor.flatten().tolist() == expected
    assert judged(tmp_path / "out", parents[0]) == (0, "")
    merged(parents, tmp_path / "again", "--weights", "0.7,0.3")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second


def test_the_lineage_shows_every_parent(parents: list[SampleRun], tmp_path: Path) -> None:
    """Oracle: the two checkpoints; verified, and in the drawing too."""
    merged(parents, tmp_path / "out")
    parser = argparse.ArgumentParser()
    lineage.add_arguments(parser)
    words = ["--key", str(tmp_path / "me.ed25519.pub"), "--with", str(tmp_path / "b"), str(tmp_path / "out")]
    typed, listed = (
        lineage.run(parser.parse_args([str(tmp_path / "a"), *words], argparse.Namespace(json=as_json)))
        for as_json in (False, True)
    )
    assert typed.exit_code == 0, typed.text
    titles = {node["key"]: node["title"] for node in listed.document["nodes"]}
    edges = [edge for edge in listed.document["edges"] if edge["kind"] == "exported"]
    assert [(titles[edge["source"]], edge["note"]) for edge in edges] == [
        ("a step 10", "weight 0.5"),
        ("b step 10", "weight 0.5"),
    ]
    assert "merged 0.5 : 0.5" in typed.text


def _without_second(folder: Path, run: SampleRun) -> None:
    (folder / layout.source_bundle(1)).unlink()


def _swapped(folder: Path, run: SampleRun) -> None:
    first, second = folder / layout.source_bundle(0), folder / layout.source_bundle(1)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def _third(folder: Path, run: SampleRun) -> None:
    (folder / layout.source_bundle(2)).write_bytes((folder / layout.source_bundle(1)).read_bytes())


def _resigned(change: Callable[[dict[str, object]], object]) -> Callable[[Path, SampleRun], None]:
    def tamper(folder: Path, run: SampleRun) -> None:
        path = folder / layout.EXPORT_BUNDLE
        document = payload_of(path)
        change(document["predicate"]["merge"])
        path.write_bytes(signed(strict_json.dumps(document), run.signer))

    return tamper


WRONG: dict[str, tuple[Callable[[Path, SampleRun], None], str]] = {
    "a parent's statement removed": (_without_second, "source-2"),
    "parents' statements swapped": (_swapped, "is not the statement of the checkpoint"),
    "a third parent's statement": (_third, "is not in the manifest"),
    "a weight too many": (_resigned(lambda made: made["weights"].append("0.5")), "has weights for"),
    "no other parent": (_resigned(lambda made: made.update(others=[])), "has weights for"),
    "another method": (_resigned(lambda made: made.update(method="by feeling")), "method"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_tampered_merge_fails(name: str, parents: list[SampleRun], tmp_path: Path) -> None:
    """Oracle: one change each; the last three are signed with the right key."""
    merged(parents, tmp_path / "out")
    tamper, words = WRONG[name]
    tamper(tmp_path / "out", parents[0])
    code, found = judged(tmp_path / "out", parents[0])
    assert code in (1, 4)
    assert words in found


def test_what_cannot_be_merged_leaves_nothing(parents: list[SampleRun], tmp_path: Path) -> None:
    """Oracle: an error that says why, and no folder."""
    odd = SampleRun(tmp_path / "odd", parents[0].signer, name="odd", files={"config.json": b'{"a": 1}'})
    odd.advance(10)
    chats = [
        SampleRun(tmp_path / name, parents[0].signer, name=name, files=CONFIG | {"chat_template.jinja": text})
        for name, text in (("chat", b"1"), ("other", b"2"))
    ]
    for run in chats:
        run.advance(10)
    wrong: list[tuple[list[SampleRun], list[str], type[HarnessError], str]] = [
        ([parents[0], odd], [], UsageError, "config.json is not that of"),
        (parents, ["--weights", "0.5"], UsageError, "gives 1 weights for 2"),
        (parents, ["--weights", "0.5,x"], UsageError, "no number"),
        (parents, ["--weights", "nan,1"], UsageError, "gives 2 weights"),
        (parents[:1], [], UsageError, "nothing to merge"),
        (parents, ["--weights", "1e300,1e300"], UsageError, "not finite"),
        ([parents[0], *chats], [], UsageError, "chat_template.jinja is not that of"),
    ]
    for runs, words, kind, text in wrong:
        with pytest.raises(kind, match=text):
            merged(runs, tmp_path / "out", *words)
    file = parents[1].saved[10].folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(VerificationFailed, match="other bytes than were signed"):
        merged(parents, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    merged([parents[0], chats[0]], tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == b"1"


def test_whole_numbers_must_be_the_same_and_halves_are_rounded_once() -> None:
    """Oracle: torch in float64, and the rule for what has no average."""
    weights = merge._weights("0.25,0.75", 2)
    for dtype, kind in (("F16", torch.float16), ("BF16", torch.bfloat16), ("F64", torch.float64)):
        sides = [torch.randn(33, generator=torch.Generator().manual_seed(n)).to(kind) for n in (1, 2)]
        raw = [side.view(torch.uint8).numpy().tobytes() for side in sides]
        found = torch.frombuffer(bytearray(average.combine(weights, dtype, raw)), dtype=kind)
        assert torch.equal(found, (sides[0].double() * 0.25 + sides[1].double() * 0.75).to(kind))
    assert average.combine(weights, "I64", [b"12345678"] * 2) == b"12345678"
    with pytest.raises(ValueError, match="no average"):
        average.combine(weights, "I64", [b"12345678", b"12345679"])
    assert average.combine(weights, "F32", [b"", b""]) == b""


def test_an_export_of_one_checkpoint_has_no_field_merge(parents: list[SampleRun]) -> None:
    """Oracle: the schema lets it be absent, so that earlier exports verify."""
    assert "merge" not in exports.SCHEMA["required"]
