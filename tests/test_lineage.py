"""`harness lineage`: the graph of checkpoints, launches, data and code, drawn four ways."""

from __future__ import annotations

import argparse
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import run_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import cli
from harness.audit.exports import export
from harness.audit.lineage import text as lineage_text
from harness.audit.lineage.picture import Picture
from harness.commands import Outcome, lineage
from harness.errors import EvidenceIncomplete, UsageError
from harness.provenance.lineage import Graph, Member, Unreadable, graph
from harness.provenance.policy import rules
from harness.provenance.signing import keys
from harness.provenance.statements import CheckpointStatement


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """10, 20, a resume at 10 that skips the damaged 20, 20 again, 30; 10 is pruned at last."""
    run = run_folder.SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "me"))
    for step in (10, 20):
        run.train(step)
        run.save()
    change = {"what": "world_size", "before": "1", "after": "2"}
    run.resume("same-data", at=10, skipped=[run.set_aside(20)], differences=[change], accepted=["code"])
    for step in (20, 30):
        run.train(step)
        run.save()
    run.prune(10)
    return run.root


def drawn(path: Path, *words: str) -> Outcome:
    """`harness lineage PATH WORDS`, and the same with ``--json``."""
    parser = argparse.ArgumentParser()
    lineage.add_arguments(parser)
    text, document = (
        lineage.run(parser.parse_args([str(path), *words], argparse.Namespace(json=as_json)))
        for as_json in (False, True)
    )
    assert text.exit_code == document.exit_code
    return Outcome(document.document, text.text, text.exit_code)


def key_words(root: Path) -> list[str]:
    """``--key`` with both public halves of the run's signer."""
    return ["--key", str(root.parent / "me.ed25519.pub"), str(root.parent / "me.p256.pub")]


def statement(
    step: int, identity: str, parent: tuple[str, int] | None, **changes: object
) -> CheckpointStatement:
    """A statement with what the graph reads; ``sequence`` follows from the step."""
    segment = {
        "number": 0, "reason": "first launch", "class": "genesis", "differences": [], "accepted": [],
        "skipped": [], "resumed_from": None,
    }  # fmt: skip
    predicate = {
        "run": {"id": "0" * 32, "name": "r", "seed": 1}, "sequence": step // 10,
        "steps": {"from": parent[1] if parent else 0, "to": step},
        "parent": "genesis" if parent is None else {"checkpoint": parent[0], "step": parent[1]},
        "start": None, "segment": segment, "created": "2026-01-01T00:00:00Z", "state": {"sha256": "0" * 64},
        "launch": {"launcher": "bare", "world_size": 1, "nodes": 1, "precision": "fp32", "parallel": "ddp"},
        "data": {"kind": "d", "corpus_sha256": "c" * 64, "tokenizer_sha256": "b" * 64, "counts": {}},
        "code": {"harness": "0", "git_commit": None, "dirty": None, "diff_sha256": None, "task": None},
        "metrics": {"loss": "0.5", "evaluation": {}},
    }  # fmt: skip
    return CheckpointStatement(f"step-{step:08d}", identity, "h1:", predicate | changes)


def edges(found: Graph, kind: str) -> set[tuple[str, str]]:
    """(title of source, title of target) of every edge of ``kind``."""
    nodes = found.by_key()
    return {(nodes[edge.source].title, nodes[edge.target].title) for edge in found.edges if edge.kind == kind}


def test_every_ingredient_is_one_node_however_many_checkpoints_used_it() -> None:
    """Oracle: two checkpoints of one launch: one run, launch, data set, tokenizer and code."""
    first, second = statement(10, "1" * 64, None), statement(20, "2" * 64, ("1" * 64, 10))
    found = graph([Member("step-00000020", "complete", second), Member("step-00000010", "complete", first)])
    assert [len(found.of_kind(kind)) for kind in ("run", "launch", "dataset", "tokenizer", "code")] == [1] * 5
    assert edges(found, "parent") == {("step 10", "step 20")}
    assert edges(found, "saved") == {("launch 0", "step 10"), ("launch 0", "step 20")}
    assert len(found.edges) == 1 + 2 + 4  # parent, saved, and four into the launch


def test_a_parent_that_is_not_here_is_a_node_that_says_so() -> None:
    """Oracle: its id and step as the child names them."""
    found = graph([Member("step-00000020", "complete", statement(20, "2" * 64, ("1" * 64, 10)))])
    (absent,) = [node for node in found.nodes if node.state == "absent"]
    assert (absent.title, absent.facts["id"]) == ("step 10", "1" * 64)


def test_a_damaged_folder_and_its_replacement_of_the_same_id_are_two_nodes() -> None:
    """Oracle: equal training gives equal manifests, so the ids are equal; the child follows the good one."""
    again = statement(10, "1" * 64, None)
    child = statement(20, "2" * 64, ("1" * 64, 10))
    members = [
        Member("damaged-step-00000010-1", "damaged", again),
        Member("step-00000010", "complete", again),
    ]
    found = graph([*members, Member("step-00000020", "complete", child)])
    assert len(found.of_kind("checkpoint")) == 3
    assert edges(found, "parent") == {("step 10", "step 20")}


def test_a_resume_leads_from_its_checkpoint_to_the_launch_and_names_what_it_skipped(root: Path) -> None:
    """Oracle: the story of the fixture."""
    document = drawn(root).document
    titles = {node["key"]: node["title"] for node in document["nodes"]}
    named = {(edge["kind"], titles[edge["source"]], titles[edge["target"]]) for edge in document["edges"]}
    assert ("resumed", "step 10", "launch 1") in named
    assert ("skipped", "damaged-step-00000020-1", "launch 1") in named
    assert ("parent", "step 10", "damaged-step-00000020-1") in named
    assert ("parent", "step 10", "step 20") in named
    states = {node["title"]: node["state"] for node in document["nodes"] if node["kind"] == "checkpoint"}
    assert states == {
        "step 10": "pruned", "damaged-step-00000020-1": "damaged", "step 20": "complete",
        "step 30": "complete",
    }  # fmt: skip


def test_the_tree_shows_the_branch_of_the_damaged_checkpoint(root: Path) -> None:
    """Oracle: drawn by hand, as `git log --graph` would, ids and facts cut off."""
    lines = drawn(root).text.split("\n\n", 1)[1].splitlines()
    shapes = [re.sub(r"  .*", "", line) for line in lines]
    assert shapes[0] == "* step 30"
    assert "| x damaged-step-00000020-1" in shapes
    assert shapes[-2] == "o step 10"
    assert "|/" in shapes
    text = "\n".join(lines)
    assert "launch 1: same-data, resumed from step 10, 1 process, fp32" in text
    assert "changed world_size 1 → 2" in text
    assert "accepted code" in text
    assert "skipped step-00000020 (has other bytes than were signed)" in text


def test_lanes_that_end_far_right_bend_to_their_parent() -> None:
    """Oracle: drawn by hand: three children of one parent, then lanes 2 and 1 end in lane 0."""
    parent = statement(10, "0" * 64, None)
    names = ["damaged-step-00000020-1", "damaged-step-00000020-2"]
    members = [Member("step-00000010", "complete", parent)]
    members += [
        Member(name, "damaged", statement(20, str(number) * 64, ("0" * 64, 10)))
        for number, name in enumerate(names, 1)
    ]
    members.append(Member("step-00000020", "complete", statement(20, "9" * 64, ("0" * 64, 10))))
    found = graph(members)
    rows = [line.rstrip() for row in lineage_text.rows(found) for line in lineage_text._row(row, found)]
    assert [re.sub(r"  .*", "", line) for line in rows if not line.startswith("    ")] == [
        "| x damaged-step-00000020-1", "| | x damaged-step-00000020-2", "* | | step 20",
        "|_|/", "|/", "* step 10",
    ]  # fmt: skip


def test_without_a_key_it_says_not_verified(root: Path) -> None:
    """Oracle: the first line and the flag; exit code 0, since nothing was asked to be checked."""
    outcome = drawn(root)
    assert outcome.text.startswith("not verified")
    assert outcome.document["verified"] is False
    assert outcome.exit_code == 0


def test_with_the_key_a_good_run_is_verified(root: Path) -> None:
    """Oracle: the keys that signed it."""
    outcome = drawn(root, *key_words(root))
    assert outcome.text.startswith("verified: ")
    assert outcome.document["verified"] is True
    assert outcome.exit_code == 0


def test_a_folder_that_fails_is_drawn_by_its_name_and_believed_in_nothing(root: Path) -> None:
    """Oracle: a manifest with one byte more: exit code 1, no fact of its statement in the picture."""
    manifest = run_folder.checkpoint(root, 30) / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    outcome = drawn(root, *key_words(root))
    assert outcome.exit_code == 1
    assert outcome.text.startswith("FAILED")
    (node,) = [node for node in outcome.document["nodes"] if node["title"] == "step-00000030"]
    assert (node["state"], set(node["facts"])) == ("unreadable", {"name", "reason"})
    assert any(finding["check"] == "manifest" for finding in outcome.document["findings"])


def test_a_missing_checkpoint_in_the_middle_breaks_the_lineage(root: Path) -> None:
    """Oracle: without step 20, step 30 names a parent that is not here: exit code 1 with a key."""
    (run_folder.checkpoint(root, 20)).rename(root / "elsewhere")
    assert drawn(root).exit_code == 0
    outcome = drawn(root, *key_words(root))
    assert outcome.exit_code == 1
    assert any(finding["check"] == "lineage" for finding in outcome.document["findings"])
    assert any(node["state"] == "absent" for node in outcome.document["nodes"])


def test_a_key_that_did_not_sign_leaves_only_names(root: Path, tmp_path: Path) -> None:
    """Oracle: no run, launch or data in the graph, exit code 1."""
    run_folder.identity(tmp_path / "other")
    outcome = drawn(root, "--key", str(tmp_path / "other.ed25519.pub"))
    assert outcome.exit_code == 1
    assert {node["kind"] for node in outcome.document["nodes"]} == {"checkpoint"}
    assert "step-00000030" in outcome.text


def test_a_checkpoint_alone_is_drawn_with_its_parent_absent(root: Path) -> None:
    """Oracle: step 30 and its parent; with the key nothing is wrong with that."""
    outcome = drawn(run_folder.checkpoint(root, 30), *key_words(root))
    assert outcome.exit_code == 0
    assert "? step 20" in outcome.text


def test_a_run_without_checkpoints_cannot_be_drawn(tmp_path: Path) -> None:
    """Oracle: exit codes 4 and 2."""
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(EvidenceIncomplete):
        drawn(tmp_path / "empty")
    with pytest.raises(UsageError):
        drawn(tmp_path / "nothing")


def test_a_folder_without_a_statement_is_drawn_with_the_reason(root: Path) -> None:
    """Oracle: the reason of the reader."""
    (run_folder.checkpoint(root, 30) / "provenance" / "checkpoint.sigstore.json").write_bytes(b"{}")
    text = drawn(root).text
    assert "x step-00000030  unreadable  is a bundle with other fields" in text


def test_several_data_sets_and_codes_are_numbered_and_named_by_the_launches(tmp_path: Path) -> None:
    """Oracle: a run whose corpus and commit changed at step 20."""

    def change(step: int, predicate: run_folder.Predicate) -> None:
        if step > 10:
            predicate["data"]["corpus_sha256"] = "1" * 64
            predicate["code"]["git_commit"] = "2" * 40

    signer = run_folder.identity(tmp_path / "me")
    text = drawn(run_folder.build(tmp_path / "run", signer, resumes={10: "accepted"}, tweak=change)).text
    assert "data 2    toy  50 samples  sha256 111111111111…" in text
    assert "code 2    harness 0.1.0, commit 222222222222…" in text
    assert re.search(r"launch 1: accepted, .*data 2, code 2", text)


POISON = '<script>alert(1)</script>"]; click n0 "javascript:alert(1)" %%{init}%% `x` \x1b[2J\n--> end'


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A run whose every free string tries to be markup, syntax or an escape sequence."""

    def poison(step: int, predicate: run_folder.Predicate) -> None:
        predicate["run"]["name"] = POISON
        predicate["data"]["kind"] = POISON
        predicate["data"]["counts"] = {POISON: 1}
        predicate["code"] |= {"harness": POISON, "task": {"import_path": POISON, "sha256": "0" * 64}}
        predicate["metrics"]["evaluation"] = {POISON: "0.5"}
        item = {"what": POISON, "before": POISON, "after": POISON}
        skipped = {"name": POISON, "reason": POISON, "checkpoint": None}
        predicate["segment"] = predicate["segment"] | {
            "differences": [item], "accepted": [POISON], "skipped": [skipped],
        }  # fmt: skip

    return run_folder.build(tmp_path / "run", run_folder.identity(tmp_path / "me"), tweak=poison)


def test_strings_from_strangers_are_text_in_every_format(poisoned: Path) -> None:
    """Oracle: no element, attribute, directive or escape character that we did not write."""
    page = drawn(poisoned, "--format", "html").text
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(drawing).iter()}
        assert tags == {"svg", "a", "title", "rect", "text", "path", "circle"}
    assert all(re.fullmatch(r"#n\d+|#graph", link) for link in re.findall(r'href="([^"]*)"', page))
    assert "\x1b" not in drawn(poisoned).text
    for line in drawn(poisoned, "--format", "mermaid").text.splitlines()[2:]:
        assert MERMAID.fullmatch(line), line


def test_the_page_needs_nothing_from_outside(root: Path) -> None:
    """Oracle: no address but the SVG namespace, no script, and a policy that forbids both."""
    page = drawn(root, "--format", "html").text
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script|<link|<img|src=|@import|url\(", page)
    assert "default-src 'none'" in page
    for words in ("damaged-step-00000020-1", "launch 1: same-data", "not verified"):
        assert words in page


_LABEL = r'"[\w .,:+\-=…→#;/<>]*"'
MERMAID = re.compile(
    rf"  (n\d+(\(\[{_LABEL}\]\)|\{{\{{{_LABEL}\}}\}}|\[{_LABEL}\]|\[\({_LABEL}\)\]|\[/{_LABEL}/\])"
    r'|n\d+ (-->|==>|-\. "(resumed|skipped|began)" \.->) n\d+'
    r"|classDef [a-z]+ [a-z0-9#,: -]+|class n\d+(,n\d+)* [a-z]+)"
)
"""One line of a flowchart, as far as we use the grammar; mermaid 11.17 drew such a text."""


def test_mermaid_lines_follow_the_grammar(root: Path) -> None:
    """Oracle: the expression above; every arrow joins two nodes that have a line."""
    lines = drawn(root, "--format", "mermaid").text.splitlines()
    assert lines[0] == "flowchart TB"
    assert lines[1].startswith("  %% not verified")
    for line in lines[2:]:
        assert MERMAID.fullmatch(line), line
    declared = {line.split("[")[0].split("(")[0].split("{")[0].strip() for line in lines if '"' in line}
    for line in lines:
        arrow = re.fullmatch(r"  (n\d+) .*> (n\d+)", line)
        assert arrow is None or {arrow[1], arrow[2]} <= declared


@given(st.text(max_size=40))
@settings(deadline=None)
def test_any_label_survives_mermaid_as_text(label: str) -> None:
    """Oracle: undoing the entities gives the label back, and nothing but harmless signs is left."""
    escaped = lineage_text._escape(label)
    assert re.sub(r"#(\d+);", lambda match: chr(int(match[1])), escaped) == label
    assert not set(re.sub(r"#\d+;", "", escaped)) & set("\"`<>[](){}|;&%\n\\'")


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from(["complete", "pruned", "damaged"])),
        max_size=8,
    )
)
@settings(deadline=None)
def test_any_claims_can_be_drawn(claims: list[tuple[int, int, str]]) -> None:
    """Oracle: unverified statements may claim anything, cycles too: each folder gets one row, and it ends."""
    members = [
        Member(f"folder-{number}", state, statement(10 * own, str(own) * 64, (str(parent) * 64, 10 * parent)))  # type: ignore[arg-type]
        for number, (own, parent, state) in enumerate(claims)
    ]
    found = graph(members, [Unreadable("damaged-x", "broken")])
    rows = lineage_text.rows(found)
    keys = [row.node.key for row in rows]
    assert len(keys) == len(set(keys))
    assert {f"folder-{number}" for number in range(len(claims))} <= {
        row.node.facts.get("name") for row in rows
    }
    for row in rows:
        list(lineage_text._row(row, found))


def test_json_is_the_same_document_both_ways(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: json.loads of both; nobody else's format makes the document, which a long run has large."""
    assert cli.main(["lineage", str(root), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert cli.main(["lineage", str(root), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == plain
    monkeypatch.delattr(Picture, "document")
    assert [cli.main(["lineage", str(root), "--format", each]) for each in ("text", "mermaid", "html")] == [
        0
    ] * 3


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """`base` with checkpoints 10 and 20, and `child`, which began with 20; the folder of both."""
    signer = run_folder.identity(tmp_path / "me")
    base = run_folder.SampleRun(tmp_path / "base", signer, name="base")
    base.advance(10, 20)
    start = base.saved[20].as_start(base)
    run_folder.SampleRun(tmp_path / "child", signer, name="child", start=start).advance(10, 20)
    return tmp_path


def test_a_child_run_hangs_below_the_checkpoint_that_it_began_with(family: Path) -> None:
    """Oracle: drawn by hand; the runs have other names and the same steps."""
    outcome = drawn(family / "child", "--with", str(family / "base"))
    lines = outcome.text.split("\n\n", 1)[1].splitlines()
    assert [re.sub(r"  .*", "", line) for line in lines if line.startswith("*")] == [
        "* child step 20", "* child step 10", "* base step 20", "* base step 10",
    ]  # fmt: skip
    assert "launch 0: genesis, began with weights of base step 20" in outcome.text
    titles = {node["key"]: node["title"] for node in outcome.document["nodes"]}
    (edge,) = [edge for edge in outcome.document["edges"] if edge["kind"] == "began"]
    assert (titles[edge["source"]], titles[edge["target"]]) == ("base step 20", "launch 0")


def test_an_export_hangs_on_its_checkpoint_in_every_format(family: Path) -> None:
    """Oracle: alone its checkpoint is absent, beside its run it is not; a changed one is only a name."""
    signer = keys.load_signer(family / "me.key")
    out, trust = family / "out", rules.from_keys(keys.public_keys(signer))
    export.export(run_folder.checkpoint(family / "base", 20), out, trust, signer, quiet=True)
    words = ["--key", str(family / "me.ed25519.pub")]
    assert "? base step 20" in drawn(out, *words).text
    beside = drawn(family / "base", *words, "--with", str(out))
    assert beside.exit_code == 0
    assert "export    out  native of base step 20" in beside.text
    (edge,) = [edge for edge in beside.document["edges"] if edge["kind"] == "exported"]
    titles = {node["key"]: node["title"] for node in beside.document["nodes"]}
    assert (titles[edge["source"]], titles[edge["target"]]) == ("step 20", "out")
    assert "native of base step 20" in drawn(out, "--format", "html").text
    for line in drawn(out, "--format", "mermaid").text.splitlines()[2:]:
        assert MERMAID.fullmatch(line), line
    (out / "extra").write_bytes(b"x")
    changed = drawn(family / "base", *words, "--with", str(out))
    assert (changed.exit_code, "x out" in changed.text) == (1, True)


def test_a_start_that_is_not_at_hand_is_drawn_as_absent_and_said(family: Path) -> None:
    """Oracle: without --with exit code 0 and a note; with another run than the parent, exit code 4."""
    words = ["--key", str(family / "me.ed25519.pub")]
    alone = drawn(family / "child", *words)
    assert alone.exit_code == 0
    assert "? base step 20" in alone.text
    assert any("not at hand" in note for note in alone.document["notes"])
    wrong = drawn(family / "child", *words, "--with", str(family / "child"))
    assert wrong.exit_code == 4
    assert drawn(family / "child", *words, "--with", str(family / "base")).exit_code == 0


def test_a_nonfinite_state_is_drawn_aside_and_verifies(tmp_path: Path) -> None:
    """Oracle: a signed checkpoint with outcome nonfinite under its own kind of name."""
    run = run_folder.SampleRun(
        tmp_path / "run", run_folder.identity(tmp_path / "me"),
        tweak=lambda step, facts: facts.update(outcome="nonfinite" if step == 20 else "ok"),
    )  # fmt: skip
    for step in (10, 20):
        run.train(step)
        run.save()
    folder = run.saved[20].folder
    folder.rename(folder.with_name("nonfinite-step-00000020"))
    outcome = drawn(run.root)
    assert "x nonfinite-step-00000020" in outcome.text
    (node,) = [node for node in outcome.document["nodes"] if node["state"] == "nonfinite"]
    assert node["facts"]["step"] == 20
    assert drawn(run.root, *key_words(run.root)).exit_code == 0


def test_a_long_stretch_is_one_node_and_what_else_happened_is_not_in_it(tmp_path: Path) -> None:
    """Oracle: the steps, of which each is drawn or counted once; a resume and a failure end a stretch."""
    run = run_folder.SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "me"))
    run.advance(*range(1, 25))
    run.resume("exact", at=24)
    run.advance(*range(25, 73))
    broken = run.saved[48].folder / "provenance" / "checkpoint.sigstore.json"
    broken.write_bytes(broken.read_bytes().replace(b'"sig":"', b'"sig":"AAAA'))
    words = key_words(run.root)
    text = drawn(run.root, *words).text
    assert re.findall(r"\* step (\d+ to \d+  \d+ checkpoints)  loss (\S+ to \S+)", text) == [
        ("53 to 68  16 checkpoints", "1.01887 to 1.01471"),
        ("28 to 43  16 checkpoints", "1.03571 to 1.02326"),
        ("5 to 20  16 checkpoints", "1.2 to 1.05"),
    ]
    alone = {int(step) for step in re.findall(r"\* step (\d+)  [0-9a-f]{12}", text)}
    assert alone == set(range(1, 73)) - {*range(53, 69), *range(28, 44), *range(5, 21), 48}
    assert (
        "48 checkpoints between which nothing else happened are drawn as 3 nodes; --every draws each" in text
    )
    every = drawn(run.root, *words, "--every")
    assert len(re.findall(r"\* step \d+  [0-9a-f]{12}", every.text)) == 71
    assert "nothing else happened" not in every.text
    page = drawn(run.root, *words, "--format", "html").text
    # In each of two drawings: three of a pile; 48 as a name, and as a parent.
    assert page.count("<circle") == 2 * (72 - 48 + 3 * 3 + 1)
    assert all(f"<code>{saved.checkpoint}</code>" in page for step, saved in run.saved.items() if step != 48)
    assert drawn(run.root, *words, "--format", "mermaid").text.count("16 checkpoints") == 3
