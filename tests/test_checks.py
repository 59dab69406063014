"""The rules of `harness verify`: each can fail, says what to do then, and nothing is interpreted too early.

`BREAKS` has one change for every rule, in the order of `harness.provenance.checks`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
import rotated
import run_folder
from attack import Scene, flip, signed, trusted
from attacks_on_timestamps import stamped, stranger
from jsonschema import Draft202012Validator
from run_folder import SampleRun

from harness import cli
from harness.audit.exports import export
from harness.audit.folders import opening, prepared
from harness.audit.verification import verify
from harness.errors import HarnessError, VerificationFailed
from harness.format import layout, safetensors_header, strict_json
from harness.format.manifest import FileEntry, Manifest
from harness.provenance import checks, corpora, later, seal
from harness.provenance.policy import rotation
from harness.provenance.transparency import log
from harness.provenance.transparency.heads import Kept
from harness.provenance.transparency.log import Head

VALIDATOR = Draft202012Validator(
    json.loads((Path(__file__).parents[1] / "docs" / "schema" / "verification-v1.schema.json").read_text())
)
SINCE = "since.head"
"""Beside the run where it is verified with the head that was kept."""
DOCS = Path(__file__).parents[1] / "docs" / "verify.md"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A run of checkpoints 10 and 20 with a countersignature, not to be changed."""
    folder = tmp_path_factory.mktemp("good")
    signer, stranger = run_folder.identity(folder / "signer"), run_folder.identity(folder / "stranger")
    root = run_folder.build(folder / "run", signer, steps=(10, 20))
    return Scene(root, signer, stranger, trusted(signer), root)


@pytest.fixture
def scene(good: Scene, tmp_path: Path) -> Scene:
    """A copy of it."""
    root = shutil.copytree(good.root, tmp_path / "run")
    return dataclasses.replace(good, root=root, target=root)


BREAKS: dict[str, Callable[[Scene], object]] = {}
Break = Callable[[Scene], object]


def breaks(check: str) -> Callable[[Break], Break]:
    """Register the change that breaks ``check``."""

    def register(change: Break) -> Break:
        BREAKS[check] = change
        return change

    return register


def exported(scene: Scene) -> Path:
    """An export of the newest checkpoint, which is then what is verified."""
    target = scene.root.parent / "out"
    export.export(scene.checkpoint(20), target, scene.policy, scene.signer, quiet=True)
    scene.target = target
    return target


def corpus(scene: Scene, sources: bytes | None = None, held_out: bytes = b"\0" * 32) -> Path:
    """A prepared corpus of two documents, which is then what is verified."""
    folder = scene.root.parent / "corpus"
    (folder / "documents").mkdir(parents=True)
    listed = {"a.txt": "1" * 64}
    names = "".join(f"{name}\0{digest}\n" for name, digest in listed.items())
    contents = {
        prepared.RECIPE: b"out: corpus\n",
        prepared.SOURCES: strict_json.dumps({"files": listed}) if sources is None else sources,
        prepared.DOCUMENTS["train"]: b"\xff" * 32,
        prepared.DOCUMENTS["held_out"]: held_out,
    }
    for path, data in contents.items():
        (folder / path).write_bytes(data)
    entries = [FileEntry(path, len(data), sha256(data)) for path, data in sorted(contents.items())]
    count, part = {"documents": 2, "bytes": 2}, {"documents": 1, "bytes": 1, "tokens": 1, "shards": 0}
    predicate = {
        "name": "corpus", "recipe": {"sha256": sha256(contents[prepared.RECIPE]), "text": "out: corpus\n"},
        "source": {"kind": "text", "hub": None, "files": 1, "bytes": 2, "sha256": sha256(names.encode())},
        "documents": {"read": count, "kept": count, "dropped": []},
        "split": {
            "rule": corpora.SPLIT_RULE, "held_out_share": "0.5", "in_both": 0,
            "train": part, "held_out": part,
        },
        "tokenizer": {
            "kind": "bytes", "origin": "built in", "sha256": "2" * 64, "vocabulary": 257, "library": None,
        },
        "code": {
            "harness": "0", "git_commit": None, "dirty": None, "diff_sha256": None, "source": None,
        },
        "license": None, "url": None, "created": "2026-11-23T20:00:00Z",
    }  # fmt: skip
    seal.seal_corpus(folder, Manifest(tuple(entries), ()), "corpus", predicate, scene.signer)
    scene.target = folder
    return folder


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@breaks("sizes")
def more_than_is_read(scene: Scene) -> None:
    for number in range(later.MOST + 1):
        (scene.checkpoint(20) / "provenance" / f"x-{number}.sigstore.json").write_bytes(b"")


@breaks("plain files")
def a_second_name(scene: Scene) -> None:
    (scene.root.parent / "name").hardlink_to(scene.model(20))


@breaks("key rotation")
def a_stranger_hands_over_to_a_stranger(scene: Scene) -> None:
    book = log.read_claimed(scene.root / "log")
    run = SampleRun(scene.root.parent / "other", scene.signer)
    data = rotation.build(scene.stranger, rotated.another(scene.root), rotated.AT, "mine now")
    scene.relog([*book.records, rotated.record_of(run, data)])


@breaks("statement present")
def no_statement(scene: Scene) -> None:
    scene.bundle(20).unlink()


@breaks("signature")
def a_stranger_signs(scene: Scene) -> None:
    scene.restate(20, lambda statement: None, by=scene.stranger)


@breaks("kept head")
def a_kept_head_covers_what_nobody_trusted_has_signed(scene: Scene) -> None:
    scene.relog(log.read_claimed(scene.root / "log").records, by=scene.stranger)
    scene.trust(identities=trusted(scene.stranger).identities)
    shutil.copy(scene.root / "log" / log.HEAD, scene.root.parent / SINCE)


@breaks("export statement")
def a_stranger_exports(scene: Scene) -> None:
    flip(exported(scene) / layout.EXPORT_BUNDLE, 40)


@breaks("corpus statement")
def a_stranger_prepares(scene: Scene) -> None:
    flip(corpus(scene) / layout.CORPUS_BUNDLE, 40)


@breaks("statement")
def a_field_too_many(scene: Scene) -> None:
    scene.restate(20, lambda statement: statement["predicate"].update(more=1))


@breaks("source statement")
def the_source_of_an_export_is_gone(scene: Scene) -> None:
    flip(exported(scene) / layout.source_bundle(0), 40)


@breaks("manifest present")
def no_manifest(scene: Scene) -> None:
    (scene.checkpoint(20) / layout.MANIFEST).unlink()


@breaks("manifest")
def another_manifest(scene: Scene) -> None:
    flip(scene.checkpoint(20) / layout.MANIFEST, 30)


@breaks("policy")
def the_checkpoint_is_revoked(scene: Scene) -> None:
    identity = sha256((scene.checkpoint(20) / layout.MANIFEST).read_bytes())
    scene.trust(revoked=frozenset({identity}))


@breaks("required")
def a_kind_that_nobody_has_signed(scene: Scene) -> None:
    scene.trust(required=frozenset({*scene.policy.required, "svr"}))


@breaks("later statement")
def a_stranger_adds(scene: Scene) -> None:
    path = scene.checkpoint(20) / later.path_of("note-0")
    path.write_bytes(signed(b"{}", scene.stranger))


@breaks("slsa")
def the_slsa_statement_says_more(scene: Scene) -> None:
    scene.restate(20, lambda statement: statement["predicate"].update(more=1), name=layout.SLSA_BUNDLE)


@breaks("model signature")
def the_model_signature_is_anothers(scene: Scene) -> None:
    shutil.copy(scene.checkpoint(10) / layout.MODEL_SIGNATURE, scene.checkpoint(20) / layout.MODEL_SIGNATURE)


@breaks("file set")
def a_file_too_many(scene: Scene) -> None:
    (scene.checkpoint(20) / "more.bin").write_bytes(b"x")


@breaks("headers")
def a_header_with_another_shape(scene: Scene) -> None:
    data = scene.model(20).read_bytes()
    scene.model(20).write_bytes(data.replace(b"[4,3]", b"[3,4]"))


@breaks("payload")
def a_weight(scene: Scene) -> None:
    flip(scene.model(20), -1)


@breaks("trainer.json")
def the_trainer_is_at_another_step(scene: Scene) -> None:
    flip(scene.checkpoint(20) / layout.TRAINER, -3)


@breaks("ledger.json")
def another_ledger(scene: Scene) -> None:
    flip(scene.checkpoint(20) / layout.LEDGER, -3)


@breaks("corpus facts")
def sources_that_are_not_those_of_the_statement(scene: Scene) -> None:
    corpus(scene, sources=b'{"files":{}}')


@breaks("split")
def a_document_of_the_other_split(scene: Scene) -> None:
    corpus(scene, held_out=b"\xfe" * 32)


@breaks("agreement")
def another_name(scene: Scene) -> None:
    folder = scene.checkpoint(20)
    folder.rename(folder.with_name("step-00000021"))


@breaks("checkpoints")
def no_checkpoint(scene: Scene) -> None:
    for step in (10, 20):
        shutil.rmtree(scene.checkpoint(step))


@breaks("lineage")
def the_first_is_gone(scene: Scene) -> None:
    shutil.rmtree(scene.checkpoint(10))


@breaks("start")
def a_start_that_nobody_has(scene: Scene) -> None:
    start = {"checkpoint": "0" * 64, "step": 1, "run": "0" * 32, "name": "x", "bundle_sha256": "0" * 64}
    scene.rebuild(start=start)
    other = run_folder.build(scene.root.parent / "other", scene.signer, seed=4)
    scene.beside = (other,)


@breaks("log")
def the_log_lacks_a_record(scene: Scene) -> None:
    scene.relog(log.read_claimed(scene.root / "log").records[:1])


@breaks("log files")
def a_file_in_the_log(scene: Scene) -> None:
    (scene.root / "log" / "more").write_bytes(b"x")


@breaks("log head")
def a_kept_head_of_a_longer_log(scene: Scene) -> None:
    book = log.read_claimed(scene.root / "log")
    scene.trust(log_heads=(Kept(Head(99, bytes(32), book.head.origin), "the head in x"),))


@breaks("timestamp")
def a_timestamp_of_an_unknown_authority(scene: Scene) -> None:
    stamped(scene, 1, by=stranger())


@breaks("metrics")
def a_line_is_gone(scene: Scene) -> None:
    path = scene.root / layout.METRICS
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


@breaks("run.yaml")
def a_config_that_nobody_signed(scene: Scene) -> None:
    (scene.root / layout.RUN_CONFIG).write_text("run: {}\n")


@breaks("policy.json")
def a_policy_that_nobody_named(scene: Scene) -> None:
    (scene.root / layout.POLICY).write_text("{}\n")


@breaks("freshness")
def an_old_state(scene: Scene) -> None:
    scene.trust(max_age=timedelta(minutes=1))


def found(scene: Scene) -> list[str]:
    """The checks that failed, in the order of the report."""
    since = scene.root.parent / SINCE
    kept = since if since.exists() else None
    report = verify.verify(scene.target, scene.policy, beside=scene.beside, since=kept, quiet=True)
    VALIDATOR.validate(report.document())
    for each in report.findings:
        assert all((each.what, each.where, each.remedy)), each
        assert str(each) == f"{each.what}: {each.where}; {each.remedy}"
    return [each.check for each in report.findings]


def in_order(names: list[str]) -> bool:
    """Whether the report tells them in the order of the checks."""
    return names == sorted(names, key=list(checks.REMEDIES).index)


@pytest.mark.parametrize("check", BREAKS)
def test_each_check_fails_and_its_finding_says_what_where_and_what_to_do(check: str, scene: Scene) -> None:
    """Oracle: the run as it was, which verifies; the change that this file has for the check."""
    BREAKS[check](scene)
    names = found(scene)
    assert check in names
    assert in_order(names)


def test_every_check_is_in_the_table_has_two_remedies_and_a_change_that_breaks_it() -> None:
    """Oracle: the type of the checks, and the table of docs/verify.md, in the same order."""
    names = list(get_args(checks.Check))
    assert list(checks.REMEDIES) == names == list(BREAKS)
    for wrong, missing in checks.REMEDIES.values():
        assert wrong.isprintable()
        assert missing.isprintable()
    rows = re.search(r"\| stage \|.*?\n\n", DOCS.read_text(), re.DOTALL)
    assert rows is not None
    cells = [row.split("|")[2] for row in rows[0].splitlines()[2:] if row]
    assert [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)] == names


def test_what_json_prints_is_what_the_published_schema_says(
    scene: Scene, good: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: docs/schema by jsonschema, for good and damaged folders of each kind, and for an error; a field
    that the schema does not name, and one that goes, are refused."""
    keys = [str(good.root.parent / f"signer.{kind}.pub") for kind in ("ed25519", "p256")]
    targets = [scene.root, scene.checkpoint(20), exported(scene), corpus(scene)]
    documents = []
    for damage in (False, True):
        for target in targets:
            if damage:
                flip(next(iter(target.rglob("MANIFEST.json"))), len(documents))
            assert cli.main(["verify", str(target), "--json", "--key", *keys]) == damage
            documents.append(json.loads(capsys.readouterr().out))
            VALIDATOR.validate(documents[-1])
    assert [each["kind"] for each in documents] == 2 * ["run", "checkpoint", "export", "corpus"]
    assert cli.main(["verify", str(scene.root), "--json"]) == 2
    VALIDATOR.validate(json.loads(capsys.readouterr().out))
    for change in ({**documents[0], "more": 1}, {key: documents[0][key] for key in list(documents[0])[1:]}):
        assert not VALIDATOR.is_valid(change)


PAIRS = [
    ("sizes", "signature"),
    ("plain files", "signature"),
    ("signature", "manifest"),
    ("statement", "file set"),
    ("manifest", "payload"),
    ("policy", "file set"),
    ("file set", "headers"),
    ("file set", "payload"),
    ("headers", "trainer.json"),
    ("payload", "agreement"),
    ("agreement", "metrics"),
    ("payload", "lineage"),
    ("lineage", "log files"),
    ("log files", "freshness"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_of_two_broken_rules_the_earlier_one_is_reported_first(first: str, second: str, scene: Scene) -> None:
    """Oracle: the order of the table; whoever stops at one error, as a resume does, gets the same one."""
    for check in (first, second):
        BREAKS[check](scene)
    names = found(scene)
    assert (names[0], in_order(names)) == (first, True)
    if checks.PLACES[second] <= checks.PLACES["trainer.json"]:  # type: ignore[index]
        report = verify.verify(scene.root, scene.policy, quiet=True)
        with pytest.raises(HarnessError) as caught:
            opening.open_checkpoint(scene.checkpoint(20), scene.policy)
        assert str(caught.value) == str(report.findings[0])


def test_what_is_wrong_is_raised_before_what_is_missing(scene: Scene) -> None:
    """Oracle: a statement that the policy wants and nobody has made, which the table has first, and a file
    that was changed: no evidence that is brought later makes that one good."""
    for check in ("required", "trainer.json"):
        BREAKS[check](scene)
    report = verify.verify(scene.checkpoint(20), scene.policy, quiet=True)
    assert [each.missing for each in report.findings if each.check in ("required", "trainer.json")] == [
        True,
        False,
    ]
    with pytest.raises(VerificationFailed, match=layout.TRAINER):
        opening.open_checkpoint(scene.checkpoint(20), scene.policy)


class Parsers:
    """Everything that a parser of somebody's bytes was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[bytes] = []
        for module, name in ((strict_json, "loads"), (safetensors_header, "parse")):
            monkeypatch.setattr(module, name, self._recording(getattr(module, name)))

    def _recording(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def record(data: bytes, *words: Any, **named: Any) -> Any:
            self.given.append(bytes(data))
            return real(data, *words, **named)

        return record


UNTRUSTED: dict[str, tuple[str, str | None]] = {
    "the statement": (layout.CHECKPOINT_BUNDLE, None),
    "the SLSA statement": (layout.SLSA_BUNDLE, None),
    "model.sig": (layout.MODEL_SIGNATURE, None),
    "a later statement": (later.path_of("note-0"), None),
    "the manifest": (layout.MANIFEST, layout.MANIFEST),
    "trainer.json": (layout.TRAINER, layout.TRAINER),
    "the ledger": (layout.LEDGER, layout.LEDGER),
}
MARK = b'{"nobody":"has signed this"}'


@pytest.mark.parametrize("name", UNTRUSTED)
def test_nothing_is_parsed_before_it_is_authentic(
    name: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the bytes that the parsers get; without the stranger's they get the signed ones."""
    path, plain = UNTRUSTED[name]
    target = scene.checkpoint(20) / path
    target.write_bytes(MARK if plain else signed(MARK, scene.stranger))
    parsers = Parsers(monkeypatch)
    assert found(scene)
    assert MARK not in parsers.given
    assert len(parsers.given) > 1
    if name in ("the statement", "the manifest"):
        rest = {(scene.checkpoint(20) / each).read_bytes() for each in (layout.TRAINER, layout.LEDGER)}
        assert not rest & set(parsers.given) - {(scene.checkpoint(10) / layout.LEDGER).read_bytes()}
    monkeypatch.undo()


def test_a_corpus_is_parsed_only_under_its_digest(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the corpus as it was made; then its list of sources is another one of the same size."""
    folder = corpus(scene)
    assert found(scene) == []
    changed = (folder / prepared.SOURCES).read_bytes().replace(b"1", b"2")
    (folder / prepared.SOURCES).write_bytes(changed)
    parsers = Parsers(monkeypatch)
    assert found(scene) == ["payload", "corpus facts"]
    assert changed not in parsers.given
