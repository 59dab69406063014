"""`harness export`: a Hugging Face folder that says, signed, which checkpoint it was made of."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import run_folder
import torch
from attack import edit_json, flip, payload_of, signed, trusted
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from run_folder import SampleRun
from safetensors.torch import load_file
from tokenizers import Tokenizer

from harness import cli
from harness.audit.exports import export
from harness.audit.verification import verify
from harness.data import chat
from harness.data.documents import Document
from harness.data.tokenizer import ByteEncoder, train_bpe
from harness.errors import EnvironmentFault, UsageError, VerificationFailed
from harness.format import byte_tokenizer, files, layout, strict_json
from harness.format.byte_tokenizer import END_OF_DOCUMENT
from harness.model.gpt import GPT, Shape
from harness.provenance.signing import keys

TEMPLATE = (Path(__file__).parent.parent / "recipes" / "chat_template.jinja").read_bytes()
CHAT = [
    {"role": "system", "content": "Be  short ."},
    {"role": "user", "content": "2 + 2 ?"},
    {"role": "assistant", "content": "4, isn 't it \u00fc"},
]
SHAPE = Shape(vocabulary=20, context=16, layers=2, width=16, heads=4, kv_heads=2)


@pytest.fixture
def decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SampleRun:
    """A signed checkpoint, step 10, of a small decoder."""
    state = GPT(SHAPE).state_dict()
    tensors = {"model.safetensors": [(name, list(tensor.shape)) for name, tensor in state.items()]}
    monkeypatch.setattr(run_folder, "TENSORS", {**run_folder.TENSORS, **tensors})
    files = {"config.json": json.dumps(SHAPE.config()).encode()}
    run = SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "me"), files=files)
    run.advance(10)
    return run


@pytest.fixture
def made(decoder: SampleRun, tmp_path: Path) -> Path:
    """Its export."""
    export.export(
        decoder.saved[10].folder, tmp_path / "out", trusted(decoder.signer), decoder.signer, quiet=True
    )
    return tmp_path / "out"


def judged(folder: Path, run: SampleRun) -> tuple[int, str]:
    """Exit code and findings of `harness verify`."""
    report = verify.verify(folder, trusted(run.signer), quiet=True)
    return report.exit_code, "\n".join(map(str, report.findings))


def test_every_tensor_is_the_rows_of_the_checkpoint_under_the_names_of_qwen3(
    decoder: SampleRun, made: Path
) -> None:
    """Oracle: torch splits what the safetensors package reads; names as in transformers' Qwen3ForCausalLM."""
    ours, theirs = (
        load_file(decoder.saved[10].folder / "model.safetensors"),
        load_file(made / "model.safetensors"),
    )
    expected = {"model.embed_tokens.weight": ours["embedding.weight"], "model.norm.weight": ours["norm"]}
    for number in range(SHAPE.layers):
        here, there = f"blocks.{number}.", f"model.layers.{number}."
        query, key, value = ours[f"{here}attention.qkv.weight"].split([16, 8, 8])
        gate, up = ours[f"{here}mlp.up.weight"].chunk(2)
        expected |= {
            f"{there}input_layernorm.weight": ours[f"{here}attention_norm"],
            f"{there}self_attn.q_proj.weight": query,
            f"{there}self_attn.k_proj.weight": key,
            f"{there}self_attn.v_proj.weight": value,
            f"{there}self_attn.o_proj.weight": ours[f"{here}attention.out.weight"],
            f"{there}self_attn.q_norm.weight": ours[f"{here}attention.query_norm"],
            f"{there}self_attn.k_norm.weight": ours[f"{here}attention.key_norm"],
            f"{there}post_attention_layernorm.weight": ours[f"{here}mlp_norm"],
            f"{there}mlp.gate_proj.weight": gate,
            f"{there}mlp.up_proj.weight": up,
            f"{there}mlp.down_proj.weight": ours[f"{here}mlp.down.weight"],
        }
    assert set(theirs) == set(expected)
    assert all(torch.equal(theirs[name], expected[name]) for name in expected)
    assert json.loads((made / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_transformers_computes_what_the_decoder_computes(decoder: SampleRun, made: Path) -> None:
    """Oracle: transformers' own Qwen3, where it is installed; logits in fp32."""
    transformers = pytest.importorskip("transformers")
    ours = GPT(SHAPE)
    ours.load_state_dict(load_file(decoder.saved[10].folder / "model.safetensors"))
    tokens = torch.randint(0, SHAPE.vocabulary, (2, SHAPE.context))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(made).eval()(tokens).logits
        torch.testing.assert_close(theirs, ours.eval()(tokens), rtol=1e-4, atol=1e-5)


def test_an_export_verifies_and_names_its_checkpoint(decoder: SampleRun, made: Path, tmp_path: Path) -> None:
    """Oracle: exit code 0, the statement read by the test, and the same weights when exported again."""
    assert judged(made, decoder) == (0, "")
    source = payload_of(made / layout.EXPORT_BUNDLE)["predicate"]["source"]
    start = decoder.saved[10].as_start(decoder)
    assert {name: source[name] for name in start} == start
    again = tmp_path / "again"
    export.export(decoder.saved[10].folder, again, trusted(decoder.signer), decoder.signer, quiet=True)
    assert (again / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def _weight(folder: Path, run: SampleRun) -> None:
    flip(folder / "model.safetensors", -1)


def _config(folder: Path, run: SampleRun) -> None:
    flip(folder / "config.json", 5)


def _extra(folder: Path, run: SampleRun) -> None:
    (folder / "modeling.py").write_text("print()")


def _manifest(folder: Path, run: SampleRun) -> None:
    edit_json(folder / layout.MANIFEST, lambda each: each["tensors"].pop())


def _resigned(folder: Path, run: SampleRun, change: Callable[[dict[str, object]], object]) -> None:
    statement = payload_of(folder / layout.EXPORT_BUNDLE)
    change(statement["predicate"])
    (folder / layout.EXPORT_BUNDLE).write_bytes(signed(strict_json.dumps(statement), run.signer))


def _lie(folder: Path, run: SampleRun) -> None:
    _resigned(folder, run, lambda each: each["source"].update(step=20))  # type: ignore[attr-defined]


def _field(folder: Path, run: SampleRun) -> None:
    _resigned(folder, run, lambda each: each.update(note="x"))


def _stranger(folder: Path, run: SampleRun) -> None:
    statement = payload_of(folder / layout.EXPORT_BUNDLE)
    stranger = run_folder.identity(folder.parent / "stranger")
    (folder / layout.EXPORT_BUNDLE).write_bytes(signed(strict_json.dumps(statement), stranger))


def _no_source(folder: Path, run: SampleRun) -> None:
    (folder / layout.SOURCE_BUNDLE).unlink()


CHANGES = {
    "a weight": (_weight, "has other bytes than were signed", 1),
    "config.json": (_config, "config.json", 1),
    "a file too many": (_extra, "is not in the manifest", 1),
    "the manifest": (_manifest, "is not the manifest that the statement is about", 1),
    "the checkpoint it names": (_lie, "is not the statement of the checkpoint that the export names", 1),
    "an unknown field": (_field, "note is not a known field", 1),
    "who signed": (_stranger, "is signed by none of the", 1),
    "no statement of the checkpoint": (_no_source, "source.sigstore.json", 4),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_is_changed_in_an_export_is_found(decoder: SampleRun, made: Path, name: str) -> None:
    """Oracle: one change each, to a folder that verified before."""
    change, says, code = CHANGES[name]
    change(made, decoder)
    found, text = judged(made, decoder)
    assert (found, says in text) == (code, True), text


def _call(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(words.split())
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_an_export_carries_the_signatures_that_the_threshold_of_a_policy_counts(
    decoder: SampleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: `threshold` in docs/verify.md: distinct people under the checkpoint's statement, here too."""
    monkeypatch.chdir(tmp_path)
    for name in ("bob", "eve"):
        run_folder.identity(tmp_path / name)
    people = "identities: [{name: me, keys: [me.ed25519.pub]}, {name: bob, keys: [bob.ed25519.pub]}]\n"
    (tmp_path / "team.yaml").write_text(f"format: harness-policy/1\n{people}threshold: 2\n")
    folder = str(decoder.saved[10].folder)
    mine, team, wanted = "--key me.ed25519.pub", "--policy team.yaml", "signed by 1 of the 2 identities"
    assert _call(f"export {folder} one --signing-key me.key {mine}", capsys)[0] == 0
    code, text = _call(f"verify one {team}", capsys)
    assert (code, wanted in text, "export the checkpoint again" in text) == (4, True, True)
    code, text = _call(f"export {folder} two --signing-key me.key {team}", capsys)
    assert (code, wanted in text) == (4, True)
    said = "attest RUN --kind countersignature --signing-key"
    assert _call(f"{said} bob.key {mine}".replace("RUN", folder), capsys)[0] == 0
    assert _call(f"export {folder} two --signing-key me.key {team}", capsys)[0] == 0
    assert _call(f"verify two {team}", capsys)[0] == 0
    carried = tmp_path / "two" / layout.source_countersignature(0, "countersignature-0")
    statement = payload_of(carried)
    # By the same person as before, by a stranger, of another statement, not at all.
    carried.write_bytes((tmp_path / "two" / layout.SOURCE_BUNDLE).read_bytes())
    assert _call(f"verify two {team}", capsys)[0] == 4
    bob, eve = (keys.load_signer(tmp_path / f"{name}.key") for name in ("bob", "eve"))
    carried.write_bytes(signed(strict_json.dumps(statement), eve))
    assert _call(f"verify two {team}", capsys)[0] == 1
    carried.write_bytes(signed(strict_json.dumps({**statement, "subject": []}), bob))
    assert _call(f"verify two {team}", capsys)[0] == 1
    carried.unlink()
    assert _call(f"verify two {team}", capsys)[0] == 4


def test_only_a_checkpoint_that_verifies_is_exported_and_nothing_is_left_behind(
    decoder: SampleRun, tmp_path: Path
) -> None:
    """Oracle: a flipped weight, which only reading finds; a stranger's key; a target that exists, or lies
    where a run keeps what it has signed."""
    folder, trust = decoder.saved[10].folder, trusted(decoder.signer)
    flip(folder / "model.safetensors", -1)
    with pytest.raises(VerificationFailed, match="has other bytes than were signed"):
        export.export(folder, tmp_path / "new", trust, decoder.signer, quiet=True)
    stranger = run_folder.identity(tmp_path / "stranger")
    with pytest.raises(VerificationFailed, match="signed by none"):
        export.export(folder, tmp_path / "new", trusted(stranger), stranger, quiet=True)
    with pytest.raises(UsageError, match="the target exists"):
        export.export(folder, tmp_path, trust, decoder.signer, quiet=True)
    for inside in (folder / "new", folder / ".." / "step-00000099"):
        with pytest.raises(UsageError, match="would lie in"):
            export.export(folder, inside, trust, decoder.signer, quiet=True)
    with pytest.raises(UsageError, match="which of its checkpoints"):
        export.export(decoder.root, tmp_path / "new", trust, decoder.signer, quiet=True)
    assert [each.name for each in tmp_path.iterdir() if "new" in each.name] == []


def test_what_a_killed_export_has_left_is_removed_and_said_and_one_at_work_is_left_alone(
    decoder: SampleRun, tmp_path: Path
) -> None:
    """Oracle: a folder with half a file in it, first with the lock of a process at work, then without."""
    folder, trust = decoder.saved[10].folder, trusted(decoder.signer)
    left = tmp_path / ".tmp-new"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    with files.locked(left), pytest.raises(EnvironmentFault, match="another job is at work"):
        export.export(folder, tmp_path / "new", trust, decoder.signer, quiet=True)
    assert (left / "model.safetensors").read_bytes() == b"half"
    made = export.export(folder, tmp_path / "new", trust, decoder.signer, quiet=True)
    assert ".tmp-new, left by an export that was cut off, was removed first" in made.notes
    assert not left.exists()
    assert judged(tmp_path / "new", decoder)[0] == 0


def test_another_model_keeps_its_names_and_the_reason_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a config.json that is not ours; the tensors of the sample under their own names."""
    run = SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "me"))
    run.advance(10)
    words = [
        "export",
        str(run.saved[10].folder),
        str(tmp_path / "out"),
        "--signing-key",
        str(tmp_path / "me.key"),
    ]
    assert cli.main([*words, "--key", str(tmp_path / "me.ed25519.pub"), str(tmp_path / "me.p256.pub")]) == 0
    assert "is not ours to translate" in capsys.readouterr().out
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {"embed.weight", "head.bias"}
    assert judged(tmp_path / "out", run) == (0, "")
    assert cli.main(words) == 2


def chat_run(root: Path, *, stated: bytes = TEMPLATE) -> SampleRun:
    """A checkpoint, step 10, with a trained tokenizer and a template; its statement names ``stated``."""
    tokenizer = train_bpe([Document("d", json.dumps(CHAT).encode())], 300)
    files = {"tokenizer.json": tokenizer, layout.CHAT_TEMPLATE: TEMPLATE, "config.json": b"{}\n"}

    def name_it(step: int, predicate: dict[str, Any]) -> None:
        predicate["data"]["template_sha256"] = hashlib.sha256(stated).hexdigest()

    run = SampleRun(root / "run", run_folder.identity(root / "me"), files=files, tweak=name_it)
    run.advance(10)
    return run


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_the_tokenizer_of_bytes_has_the_same_ids_for_other_readers(text: str) -> None:
    """Oracle: the bytes of the text, and the text that they came from, by Hugging Face `tokenizers`; 256 is
    the end of a document."""
    reader = Tokenizer.from_str(byte_tokenizer.tokenizer_json().decode())
    reader.encode_special_tokens = True
    ids = reader.encode(text).ids
    assert ids == list(text.encode()) == ByteEncoder().encode(Document("d", text.encode()))[0].tolist()
    assert reader.decode(ids) == text
    assert reader.token_to_id(END_OF_DOCUMENT) == ByteEncoder.end == 256
    assert reader.get_vocab_size() == ByteEncoder.vocabulary


@pytest.mark.parametrize(("stated", "there"), [(ByteEncoder.digest, True), ("1" * 64, False), (None, False)])
def test_a_model_of_bytes_is_exported_with_a_tokenizer(
    tmp_path: Path, stated: str | None, there: bool
) -> None:
    """Oracle: the tokenizer that the statement names; `transformers` reads the folder, where it is there."""

    def name_it(step: int, predicate: dict[str, Any]) -> None:
        predicate["data"]["tokenizer_sha256"] = stated

    run, out = (
        SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "me"), tweak=name_it),
        tmp_path / "out",
    )
    run.advance(10)
    made = export.export(run.saved[10].folder, out, trusted(run.signer), run.signer, quiet=True)
    assert (out / "tokenizer.json").exists() == there
    assert any("tokens 0 to 255 are byte values" in note for note in made.notes) == there
    assert judged(out, run) == (0, "")
    if there and importlib.util.find_spec("transformers"):
        from transformers import AutoTokenizer

        reader, text = AutoTokenizer.from_pretrained(out), "Gr\u00fc\u00df \n\tdich"
        assert reader(text).input_ids == list(text.encode())
        assert (reader.eos_token_id, reader.bos_token_id, reader.pad_token_id) == (256, 256, 256)


def test_the_template_of_chats_is_exported_and_held_to_the_statement(tmp_path: Path) -> None:
    """Oracle: the recorded file, and one bit of it flipped in the export; a statement of another template."""
    run = chat_run(tmp_path)
    folder, out = run.saved[10].folder, tmp_path / "out"
    made = export.export(folder, out, trusted(run.signer), run.signer, quiet=True)
    assert (out / "chat_template.jinja").read_bytes() == TEMPLATE
    assert any("put eos_token first" in note for note in made.notes)
    assert judged(out, run) == (0, "")
    flip(out / "chat_template.jinja", 3)
    code, text = judged(out, run)
    assert (code, "chat_template.jinja" in text) == (1, True), text
    (tmp_path / "liar").mkdir()
    liar = chat_run(tmp_path / "liar", stated=b"another")
    with pytest.raises(VerificationFailed, match="is not the template that the checkpoint's statement names"):
        export.export(liar.saved[10].folder, tmp_path / "no", trusted(liar.signer), liar.signer, quiet=True)


def test_other_readers_write_the_text_that_was_trained_on(tmp_path: Path) -> None:
    """Oracle: the training side's stretches of a chat; read by transformers where it is installed, else by
    Jinja with the options that its own renderer sets and a {% generation %} that does nothing."""
    run, out = chat_run(tmp_path), tmp_path / "out"
    export.export(run.saved[10].folder, out, trusted(run.signer), run.signer, quiet=True)
    whole = "".join(each.text for each in chat.Template(TEMPLATE, "t").stretches(CHAT, "here"))
    asked = whole[: whole.index(CHAT[-1]["content"])]
    reader = _transformers(out) if importlib.util.find_spec("transformers") else _jinja(out)
    assert (reader(CHAT, False), reader(CHAT[:-1], True)) == (whole, asked)


def _jinja(folder: Path) -> Callable[[list[dict[str, str]], bool], str]:
    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  as Jinja declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    place = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    template = place.from_string((folder / "chat_template.jinja").read_text())
    return lambda messages, prompt: template.render(messages=messages, add_generation_prompt=prompt)


def _transformers(folder: Path) -> Callable[[list[dict[str, str]], bool], str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token):
        assert token == END_OF_DOCUMENT

    def rendered(messages: list[dict[str, str]], prompt: bool) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        tokens = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=prompt
        )
        assert tokenizer.decode(tokens) == text
        assert tokens == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
        return str(text)

    return rendered
