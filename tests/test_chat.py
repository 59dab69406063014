"""Fine-tuning on chats: template, loss mask, packing, the child run, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Place
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import load_file as torch_file
from test_prepare import flip, key_words

from harness.data import chat
from harness.data.rows import Rows, turns
from harness.data.tokens import Counted, TokenData
from harness.errors import ConfigError
from harness.model.gpt import GPT
from harness.provenance import corpora
from harness.settings import Data, Model
from harness.tasks.chat import Chat
from harness.tasks.language import shape_of

ROOT = Path(__file__).parent.parent
TEMPLATE = (ROOT / "recipes" / "chat_template.jinja").read_bytes()
END = 256
"""Of the tokenizer of bytes."""


def talk(*texts: str) -> list[dict[str, str]]:
    """A user and an assistant in turns."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


CHATS = [
    [{"role": "system", "content": "Be short."}, *talk("2+2?", "4", "and 3 more?", "7 \u00fc")],
    *(talk(f"{number}+1?", str(number + 1)) for number in range(40)),
]
RECIPE = """
out: chats
source: {kind: chats, files: [raw.jsonl], field: messages}
format: {chat: chat_template.jinja}
validation: 0.2
workers: 1
"""
BASE = """
run: {dir: base}
model: {layers: 1, width: 16, heads: 2}
data: {kind: text, files: [raw.jsonl], sequence_length: 96, validation: 0}
train: {steps: 2, global_batch: 4, micro_batch: 2}
determinism: {mode: "off"}
"""
CHILD = (
    BASE.replace("dir: base", "dir: run").replace(
        "kind: text, files: [raw.jsonl], sequence_length: 96, validation: 0",
        "kind: prepared, files: [chats], sequence_length: 96",
    )
    + "start: {checkpoint: base/checkpoints/step-00000002}\ncheckpoint: {every: 1}\n"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, dict[str, Any]]:
    """Chats, prepared, and what the command said; to be copied before it is changed."""
    place = Place(tmp_path_factory.mktemp("chats"))
    place.write("raw.jsonl", "".join(json.dumps({"messages": each}) + "\n" for each in CHATS))
    place.write("recipe.yaml", RECIPE)
    (place.root / "chat_template.jinja").write_bytes(TEMPLATE)
    done = place.harness("prepare", "recipe.yaml", "--json")
    assert done.code == 0, done.err
    return place, json.loads(done.out)


def by_hand(messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Bytes and mask of a chat in the shipped template, written down without any template."""
    tokens: list[int] = []
    mask: list[int] = []
    for message in messages:
        answer = message["role"] == "assistant"
        head = f"### {'answer' if answer else message['role']}\n".encode()
        body = f"{message['content']}\n".encode()
        tokens += [*head, *body]
        mask += [0] * len(head) + [int(answer)] * len(body)
    return [*tokens, END], [*mask, int(messages[-1]["role"] == "assistant")]


def test_exactly_the_answers_and_the_end_after_them_count(made: tuple[Place, dict[str, Any]]) -> None:
    """Oracle: tokens and mask of every chat computed by hand, in the order of the file; no chat is lost."""
    place, told = made
    found: list[tuple[list[int], list[int]]] = []
    for path in sorted((place.root / "chats" / "shards").iterdir()):
        tensors = load_file(path)
        ends = np.flatnonzero(tensors["tokens"] == END)
        assert tensors["counted"][0] == 0
        for start, stop in itertools.pairwise(ends):
            each = slice(start + 1, stop + 1)
            found.append((tensors["tokens"][each].tolist(), tensors["counted"][each].tolist()))
    assert sorted(found) == sorted(by_hand(each) for each in CHATS)
    counted = sum(sum(mask) for _, mask in found)
    assert sum(told["chat"]["counted"].values()) == counted
    assert place.harness("verify", "chats", *key_words(place)).code == 0


@pytest.mark.slow
def test_a_child_run_names_the_template_and_refuses_another(
    made: tuple[Place, dict[str, Any]], tmp_path: Path
) -> None:
    """Oracle: the digest of the file in statement and checkpoint; a byte changed in the corpus' template is
    refused by name, at a first start and at a resume; so is a corpus with another template."""
    shutil.copytree(made[0].root, tmp_path / "copy")
    place = Place(tmp_path / "copy")
    place.write("base.yaml", BASE)
    place.write("child.yaml", CHILD)
    assert place.harness("train", "base.yaml").code == 0
    done = place.harness("train", "child.yaml", "train.micro_batch=1")
    assert done.code == 0, done.err
    assert "token_accuracy" in done.out
    shown = json.loads(place.harness("show", "run", "--json").out)
    digest = made[1]["chat"]["template_sha256"]
    assert digest in json.dumps(shown)
    assert (place.run / "checkpoints" / "step-00000002" / "chat_template.jinja").read_bytes() == TEMPLATE
    checked = place.harness("verify", "run", *key_words(place), "--with", "base")
    assert checked.code == 0, checked.out
    flip(place.root / "chats" / "chat_template.jinja")
    for words in ([], ["run.dir=fresh"]):
        refused = place.harness("train", "child.yaml", *words)
        assert (refused.code, "chat_template.jinja" in refused.last_line) == (1, True), refused.err
    assert place.harness("verify", "chats", *key_words(place)).code == 1
    shutil.rmtree(place.root / "chats")
    (place.root / "chat_template.jinja").write_bytes(TEMPLATE.replace(b"answer", b"reply"))
    assert place.harness("prepare", "recipe.yaml").code == 0
    refused = place.harness("train", "child.yaml", "train.micro_batch=1")
    assert (refused.code, "data.template_sha256" in refused.last_line) == (2, True), refused.err


def test_the_same_folder_with_another_template_is_refused(
    made: tuple[Place, dict[str, Any]], tmp_path: Path
) -> None:
    """Oracle: one word of the recipe's template changed; the same chats are held out under another one."""
    shutil.copytree(made[0].root, tmp_path / "copy")
    place = Place(tmp_path / "copy")
    (place.root / "chat_template.jinja").write_bytes(TEMPLATE.replace(b"answer", b"reply"))
    refused = place.harness("prepare", "recipe.yaml")
    assert (refused.code, "the template" in refused.last_line) == (2, True)
    assert place.harness("prepare", "recipe.yaml", "out=other").code == 0
    lists = [place.root / name / "documents" / "held-out.bin" for name in ("chats", "other")]
    assert lists[0].read_bytes() == lists[1].read_bytes()


@pytest.mark.parametrize(
    ("line", "words", "reason"),
    [
        ('{"messages": []}', [], "no list of messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', [], "nothing to learn"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', [], "another role"),
        ('{"messages": [{"role": "assistant", "content": "a", "x": 1}]}', [], "no {role, content}"),
        ("[1]", [], "no list of messages"),
        ("", ["format.chat=null"], "needs a template"),
        ("", ["format.template='a {text}'"], "choose one"),
        ("", ["format.chat=gone.jinja"], "cannot be read"),
    ],
)
def test_what_is_no_chat_is_refused_in_one_line(
    place: Place, line: str, words: list[str], reason: str
) -> None:
    """Oracle: exit code 2 and the word that helps."""
    place.write("raw.jsonl", json.dumps({"messages": CHATS[0]}) + f"\n{line}\n")
    place.write("recipe.yaml", RECIPE)
    (place.root / "chat_template.jinja").write_bytes(TEMPLATE)
    refused = place.harness("prepare", "recipe.yaml", *words)
    assert (refused.code, reason in refused.last_line) == (2, True), refused.err


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages[0].content }}", "marks nothing"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}{{ tools }}", "'tools' is undefined"),
        ("{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
         "with add_generation_prompt the template ends in"),
        ("{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}", "inside another"),
        ("{% generation %}", "no template"),
        ("{{ raise_exception('not for you') }}", "not for you"),
        ("{{ messages.__class__.__mro__ }}", "fails"),
    ],
)  # fmt: skip
def test_a_template_that_would_train_on_something_else_is_refused(source: str, reason: str) -> None:
    """Oracle: one fault each; the last tries to leave the sandbox."""
    with pytest.raises(ConfigError, match=reason):
        chat.Template(source.encode(), "t").stretches(talk("a", "b"), "here")


def test_no_text_can_pass_for_a_mark() -> None:
    """Oracle: the digest that marks are made of, taken of a chat that holds it for another one."""
    first = talk("a", "b")
    text = "\x02" + hashlib.sha256(chat.written(first)).hexdigest()
    stretches = chat.Template(TEMPLATE, "t").stretches(talk(text, text), "here")
    assert [each.counts for each in chat.joined(stretches)] == [False, True]
    assert stretches[-1].text == f"{text}\n"


def counted(lengths: list[int]) -> tuple[np.ndarray[Any, Any], Counted]:
    """Chats of so many tokens, ends included, the last of which counts."""
    tokens, mask = [END], [0]
    for number, length in enumerate(lengths):
        tokens += [number % 200] * (length - 1) + [END]
        mask += [0] * (length - 2) + [1, 1]
    array = np.array(tokens, np.uint16)
    return array, Counted((np.array(mask, np.uint8),), (np.array(mask, np.uint8),), END, b"t")


@given(st.lists(st.integers(3, 9), min_size=1, max_size=12), st.integers(9, 30))
def test_chats_are_packed_whole_in_order_and_none_is_lost(lengths: list[int], length: int) -> None:
    """Oracle: packing one chat after the other, by hand."""
    array, which = counted(lengths)
    rows = Rows((array,), which, which.train, length)
    tokens, counts = rows.gather(np.arange(rows.count))
    expected: list[list[int]] = []
    for number, size in enumerate(lengths):
        each = [number % 200] * (size - 1) + [END]
        if not expected or len(expected[-1]) + size > length + 1:
            expected.append([END])
        expected[-1] += each
    assert [row[: len(one)] for row, one in zip(tokens.tolist(), expected, strict=True)] == expected
    assert all(set(row[len(one) :]) <= {END} for row, one in zip(tokens.tolist(), expected, strict=True))
    assert counts[:, 1:].sum() == 2 * len(lengths)
    answers = list(turns((array,), which.train, END))
    assert [(len(each.prompt), len(each.answer)) for each in answers] == [(size - 1, 1) for size in lengths]


def test_a_chat_that_is_longer_than_a_row_is_an_error() -> None:
    """Oracle: one token more than fits."""
    array, which = counted([4, 9])
    assert Rows((array,), which, which.train, 9).count == 2
    with pytest.raises(ConfigError, match="a chat has 9 tokens, a sample 8"):
        Rows((array,), which, which.train, 8)


def test_neither_the_micro_batch_nor_padding_changes_the_loss() -> None:
    """Oracle: by hand, the mean over rows of the mean over a row's counted tokens; micro-batches of one
    give the same mean up to fp32 rounding."""
    array, which = counted([5, 9, 3, 3, 8, 4])
    data = TokenData((array,), (array,), None, END + 1, "0" * 64, None, None, {}, {}, counted=which)
    task = Chat(
        model=Model(layers=1, width=16, heads=2), data=Data(kind="prepared", sequence_length=11),
        tokens=data, counted=which,
    )  # fmt: skip
    torch.manual_seed(0)
    model = task.build_model()
    indices = np.arange(task.samples)
    tokens, counts = task.batch(indices, indices)
    assert len(set(counts.sum(dim=1).tolist())) > 1
    logs = torch.log_softmax(model(tokens[:, :-1]), dim=-1)
    rows = [
        -sum(logs[row, place, tokens[row, place + 1]] for place in np.flatnonzero(counts[row]))
        / counts[row].sum()
        for row in range(task.samples)
    ]
    expected = float(torch.stack(rows).detach().mean())
    assert float(task.loss(model, (tokens, counts)).detach()) == pytest.approx(expected, rel=1e-5)
    single = [
        float(task.loss(model, task.batch(indices[row : row + 1], indices)).detach()) for row in indices
    ]
    assert np.mean(single) == pytest.approx(expected, rel=1e-5)


def test_a_statement_that_counts_more_than_there_is_is_refused(made: tuple[Place, dict[str, Any]]) -> None:
    """Oracle: one number of a good predicate changed."""
    told = json.loads(json.dumps(made[1]))
    predicate = {name: told[name] for name in corpora.SCHEMA["properties"]}
    predicate["chat"]["counted"]["train"] = predicate["split"]["train"]["tokens"] + 1
    with pytest.raises(Exception, match="counts more tokens of train"):
        corpora.corpus_statement(subject_id="0" * 64, dir_hash="h1:x", name="x", predicate=predicate)


@pytest.fixture(scope="module")
def trained(made: tuple[Place, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A base run and its child."""
    root = tmp_path_factory.mktemp("trained") / "copy"
    shutil.copytree(made[0].root, root)
    place = Place(root)
    place.write("base.yaml", BASE)
    place.write("child.yaml", CHILD)
    for name in ("base", "child"):
        done = place.harness("train", f"{name}.yaml")
        assert done.code == 0, done.err
    return place


def evaluated(place: Place, run: str, *words: str) -> Any:
    """`harness evaluate` of a run's last checkpoint on the chats."""
    folder = f"{run}/checkpoints/step-00000002"
    done = place.harness("evaluate", folder, "--chats", "chats", *words, *key_words(place), "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.slow
def test_answers_are_generated_kept_and_signed(trained: Place) -> None:
    """Oracle: each answer is the likeliest token after token, by one pass over prompt and answer with weights
    that safetensors loads; `--once` finds the statement, another seed makes another one."""
    told = evaluated(trained, "run", "--new-tokens", "9")
    assert told["decoding"] == {"method": "greedy", "new_tokens": 9, "stop": "end of document"}
    items = [json.loads(line) for line in Path(trained.root / told["items"]).read_text().splitlines()]
    assert 0 < len(items) < len(CHATS)
    asked = {json.dumps(each[-1]["content"] + "\n"): each for each in CHATS}
    model = GPT(shape_of(Model(layers=1, width=16, heads=2), 96, 257))
    weights = torch_file(trained.run / "checkpoints" / "step-00000002" / "model.safetensors")
    model.load_state_dict(weights)
    model.eval()
    for item in items:
        assert json.dumps(item["answer"]) in asked
        output = [*item["output"].encode()] + ([END] if item["finished"] else [])
        if "\ufffd" in item["output"]:
            continue  # bytes that are no UTF-8 cannot be had back from the text
        prompt = [END, *item["prompt"].encode()]
        logits = model(torch.tensor([prompt + output]))[0, len(prompt) - 1 : -1]
        assert logits.argmax(dim=1).tolist() == output
        assert len(output) == 9 or item["finished"]
    again = evaluated(trained, "run", "--new-tokens", "9", "--once")
    assert (again["there"], again["items_sha256"]) == (True, told["items_sha256"])
    drawn = [
        evaluated(trained, "run", "--temperature", "1", "--new-tokens", "4", "--seed", seed)["items_sha256"]
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    report = trained.harness("report", "run", "--out", "report", *key_words(trained), "--json")
    assert report.code == 0, report.out
    assert len(json.loads(report.out)["evaluations"]) == 4
    assert "method greedy, new tokens 9" in (trained.root / "report" / "report.md").read_text()


@pytest.mark.slow
def test_a_base_model_is_asked_too_and_another_template_is_refused(trained: Place) -> None:
    """Oracle: the base has no template, so it takes the corpus'; the child refuses another than its own."""
    assert evaluated(trained, "base", "--new-tokens", "2")["metrics"]["exact_match"] == 0
    (trained.root / "chat_template.jinja").write_bytes(TEMPLATE.replace(b"answer", b"reply"))
    assert trained.harness("prepare", "recipe.yaml", "out=other").code == 0
    words = ["evaluate", "run/checkpoints/step-00000002", "--chats", "other", *key_words(trained)]
    refused = trained.harness(*words)
    assert (refused.code, "the template of the corpus" in refused.last_line) == (2, True), refused.err
