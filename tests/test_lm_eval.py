"""lm-eval's tasks on a verified checkpoint, from a local folder, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Place
from safetensors.torch import load_file
from test_chat import BASE, END
from test_prepare import key_words

from harness.model.gpt import GPT
from harness.settings import Model
from harness.tasks.language import shape_of
from harness.training.evaluation import lm_eval_tasks

pytest.importorskip("lm_eval")

OFFLINE = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
ROWS = [
    {"question": f"{number} + 1 =", "choices": [str(number + 1), "no", "an orange"], "right": number % 3}
    for number in range(6)
]
CHOICE = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: suite/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc}]
"""
TEXT = """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: suite/rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 5, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def trained(place: Place) -> Place:
    """A base run of two steps, and a folder of tasks."""
    place.write("raw.jsonl", "".join(json.dumps(each) + "\n" for each in ROWS) * 30)
    place.write("base.yaml", BASE)
    assert place.harness("train", "base.yaml").code == 0
    (place.root / "suite").mkdir()
    place.write("suite/rows.jsonl", "".join(json.dumps(each) + "\n" for each in ROWS))
    place.write("suite/sums.yaml", CHOICE)
    place.write("suite/answers.yaml", TEXT)
    return place


def evaluated(place: Place, *words: str) -> Any:
    """The finished command."""
    folder = "base/checkpoints/step-00000002"
    asked = ["evaluate", folder, *words, "--tasks", "suite", *key_words(place), "--json"]
    return place.harness(*asked, environ={**OFFLINE, "HF_HOME": str(place.root / "hf")})


def likelihood(model: GPT, text: str, answer: str) -> float:
    """Of ``answer`` after ``text``, in nats."""
    tokens = torch.tensor([[*text.encode(), *answer.encode()]])
    chances = torch.log_softmax(model(tokens[:, :-1])[0].double(), dim=-1)
    places = range(len(text.encode()) - 1, tokens.shape[1] - 1)
    return sum(float(chances[place, tokens[0, place + 1]]) for place in places)


@pytest.mark.slow
def test_lm_eval_asks_the_checkpoint_and_the_result_is_signed(trained: Place) -> None:
    """Oracle: the likelihood of each choice and the greedy text, from weights that safetensors loads; a
    changed row is another suite; data outside of the folder is refused."""
    done = evaluated(trained, "--lm-eval", "sums", "answers")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    model = GPT(shape_of(Model(layers=1, width=16, heads=2), 96, END + 1))
    model.load_state_dict(load_file(trained.root / "base/checkpoints/step-00000002/model.safetensors"))
    model.requires_grad_(False).eval()
    right = 0
    for row in ROWS:
        scores = [likelihood(model, str(row["question"]), f" {each}") for each in row["choices"]]  # type: ignore[attr-defined]
        right += scores.index(max(scores)) == row["right"]
    assert told["metrics"]["sums acc"] == pytest.approx(right / len(ROWS))
    assert told["metrics"]["answers exact_match"] == 0
    items = [json.loads(line) for line in (trained.root / told["items"]).read_text().splitlines()]
    assert len(items) == 2 * len(ROWS)
    tokens = [END, *str(ROWS[0]["question"]).encode()]
    for _ in range(5):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    text = bytes(each for each in tokens[len(str(ROWS[0]["question"])) + 1 :] if each != END)
    made = next(each for each in items if each["task"] == "answers" and each["doc_id"] == 0)
    assert made["resps"] == [[text.decode("utf-8", "replace").partition(".")[0]]]
    assert told["decoding"]["method"] == "greedy"
    again = json.loads(evaluated(trained, "--lm-eval", "sums", "answers", "--once").out)
    assert again["there"]
    digest = lm_eval_tasks.suite_digest(trained.root / "suite")
    with (trained.root / "suite" / "rows.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    assert lm_eval_tasks.suite_digest(trained.root / "suite") != digest
    (trained.root / "suite" / "rows.jsonl").rename(trained.root / "rows.jsonl")
    trained.write("suite/sums.yaml", CHOICE.replace("suite/rows.jsonl", "rows.jsonl"))
    outside = evaluated(trained, "--lm-eval", "sums")
    assert (outside.code, "outside of its folder" in outside.last_line) == (2, True), outside.err
    assert Path(trained.root / told["statement"]).is_file()
