"""Configs: layers, origins, errors that name file, line and nearest key, and what a change means."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from harness import config, config_reference, strict_yaml
from harness.cli import main
from harness.errors import ConfigError
from harness.settings import Settings

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MINIMAL = "run: {dir: runs/x}\ntrain: {steps: 10, global_batch: 8, micro_batch: 4}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A config with nothing but what is required."""
    made = tmp_path / "c.yaml"
    made.write_text(MINIMAL)
    return made


def test_a_later_layer_wins_and_each_value_knows_where_it_came_from(path: Path) -> None:
    """Oracle: the three layers, written here."""
    base = path.with_name("base.yaml")
    base.write_text(MINIMAL + "optimizer:\n  lr: 0.5\n  beta1: 0.8\ndata: {kind: text, files: [a, b]}\n")
    path.write_text("extends: base.yaml\noptimizer: {lr: 0.25}\ndata: {files: [c]}\n")
    loaded = config.load(path, ["optimizer.eps=1e-6", "run.seed=7"])
    made = loaded.settings
    assert (made.optimizer.lr, made.optimizer.beta1, made.optimizer.eps) == (0.25, 0.8, 1e-6)
    assert made.data is not None
    assert made.data.files == ["c"]
    names = ("optimizer.lr", "optimizer.beta1", "optimizer.eps", "run.seed", "precision")
    assert [loaded.origins[name] for name in names] == [
        "c.yaml:2", "base.yaml:5 (extends)", "override", "override", "default",
    ]  # fmt: skip
    assert loaded.files == (path, base)


WRONG: dict[str, tuple[str, list[str], str, str]] = {
    "misspelt": (MINIMAL + "optimizr: {lr: 1}\n", [], "c.yaml:3", "optimizer"),
    "a required section misspelt": (
        "run: {dir: x}\ntrian: {steps: 1, global_batch: 1, micro_batch: 1}\n",
        [],
        "c.yaml:2",
        "mean 'train'",
    ),
    "a required key misspelt": (
        MINIMAL.replace("steps", "stepz"),
        [],
        "c.yaml:2",
        "unknown key 'train.stepz' (and 1 more: train.steps)",
    ),
    "misspelt inside": (MINIMAL + "optimizer:\n  lr: 1\n  wieght_decay: 1\n", [], "c.yaml:5", "weight_decay"),
    "misspelt override": (MINIMAL, ["train.stepz=3"], "train.stepz=3", "train.steps"),
    "no value": (MINIMAL, ["train.steps"], "train.steps", "="),
    "wrong type": (MINIMAL + "optimizer: {lr: fast}\n", [], "c.yaml:3", "number"),
    "a boolean for a number": (MINIMAL + "run: {seed: true}\n", [], "c.yaml", "run"),
    "out of range": (MINIMAL, ["optimizer.beta1=1.5"], "optimizer.beta1=1.5", "1"),
    "missing": ("run: {dir: x}\n", [], "c.yaml", "train"),
    "twice": (MINIMAL + "run: {seed: 1}\n", [], "c.yaml:3", "duplicate key 'run', first on line 1"),
    "overridden twice": (MINIMAL, ["run.seed=1", "run.seed=2"], "run.seed=2", "overridden twice"),
    "overridden inside and whole": (MINIMAL, ["run={dir: a}", "run.seed=2"], "run.seed=2", "twice"),
    "a section for a value": (MINIMAL, ["precision.bits=16"], "precision.bits=16", "precision"),
    "home": (MINIMAL, ["run.dir=~alice/run"], "run.dir=~alice/run", "not expanded"),
    "two lines": (MINIMAL, ['run.name="a\\nb"'], "override run.name", "one line"),
    "warm-up": (MINIMAL, ["schedule.warmup=11"], "schedule.warmup=11", "exceeds train.steps 10"),
    "heads": (MINIMAL, ["model.width=10"], "model.width=10", "multiple of 2 x heads"),
    "key and value heads": (MINIMAL, ["model.kv_heads=4"], "model.kv_heads=4", "does not divide"),
    "files that nobody reads": (MINIMAL, ["data.files=[a.txt]"], "data.files=[a.txt]", "set data.kind"),
    "another task's section": (MINIMAL, ["task.kind=digits", "model.width=12"], "model.width=12", "digits"),
    "a list": ("- 1\n", [], "c.yaml", "mapping"),
    "empty": ("", [], "c.yaml", ""),
    "derived": (MINIMAL + "accumulation: 2\n", [], "c.yaml:3", "accumulation"),
    "batch": (MINIMAL, ["train.global_batch=7"], "global_batch", "multiple"),
    "two levels": ("extends: a.yaml\n" + MINIMAL, [], "a.yaml", "extends"),
    "no base": ("extends: nowhere.yaml\n" + MINIMAL, [], "c.yaml:1", "nowhere.yaml"),
    "fsdp": (MINIMAL, ["parallel=fsdp"], "parallel=fsdp", "fsdp2"),
    "an unknown rule": (MINIMAL, ["checkpoint.keep={oldest: 1}"], "keep={oldest: 1}", "choose from newest"),
    "a rule within": (MINIMAL, ["checkpoint.keep={best: {metric: x, mood: max}}"], "best", "metric, mode"),
    "a rule's value": (MINIMAL, ["checkpoint.keep={newest: 0}"], "newest: 0", "greater than 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_names_the_place_and_what_was_meant(path: Path, name: str) -> None:
    """Oracle: file and line, or the override; one line of text."""
    text, overrides, where, what = WRONG[name]
    path.write_text(text)
    path.with_name("a.yaml").write_text("extends: b.yaml\n")
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides)
    message = str(caught.value)
    assert where in message
    assert what in message
    assert "\n" not in message


def outcome(load: Callable[[], object]) -> str:
    """What came of ``load``: nothing, or one line of error."""
    try:
        load()
    except ConfigError as error:
        return str(error)
    return ""


STARTS = st.sampled_from([MINIMAL, "run: ", "train: {", "extends: ", "task: {kind: digits, options: "])


@given(
    st.text(max_size=80).map(str.encode)
    | st.tuples(STARTS, st.text(max_size=30)).map("".join).map(str.encode)
    | st.binary(max_size=60).map(MINIMAL.encode().__add__)
)
def test_any_file_is_a_config_or_one_line_of_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """Oracle: no other exception; the file is named."""
    file = tmp_path_factory.mktemp("any") / "c.yaml"
    file.write_bytes(data)
    message = outcome(lambda: config.load(file))
    assert "\n" not in message
    assert message == "" or "c.yaml" in message


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(["bf16", "all", "$x"])
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.", min_size=1), inner, max_size=3)
    ),
    max_leaves=4,
)
LEAVES = list(config.leaves(config.parse(MINIMAL, "minimal")))
PATHS = ("run.dir", "data.cache", "tokenizer.file", "signing.key")


@given(st.sampled_from(LEAVES), ANYTHING)
def test_any_value_of_any_key_is_taken_as_it_is_or_one_line_of_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    """Oracle: the value itself: nothing is converted; an error names the key."""
    file = tmp_path_factory.mktemp("any") / "c.yaml"
    file.write_text(MINIMAL)
    made: list[config.Loaded] = []
    override = f"{key}={strict_yaml.write(value)}"
    message = outcome(lambda: made.append(config.load(file, [override])))
    assert "\n" not in message
    if not made:
        assert key.partition(".")[0] in message
        return
    found = made[0].settings.model_dump(mode="json")
    for name in key.split("."):
        found = found[name]
    if isinstance(value, dict) or value is None:
        return  # a section takes its defaults
    assert found == (str(Path(value)) if key in PATHS else value)
    assert isinstance(found, bool) == isinstance(value, bool)


ASSIGNED = st.tuples(st.sampled_from(LEAVES), st.text("={}[]: \n'\"a1.", max_size=9)).map("=".join)


@given(st.lists(st.text(max_size=20) | ASSIGNED, max_size=3))
def test_any_override_is_understood_or_one_line_of_error(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[str]
) -> None:
    """Oracle: no other exception."""
    file = tmp_path_factory.mktemp("any") / "c.yaml"
    file.write_text(MINIMAL)
    assert "\n" not in outcome(lambda: config.load(file, overrides))


OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "run.seed": st.integers(0, 2**31),
        "optimizer.lr": st.floats(1e-9, 10),
        "optimizer.clip": st.none() | st.floats(0.1, 10),
        "task.options": st.dictionaries(
            st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.integers(0, 9) | st.text(max_size=5)
        ),
        "data.files": st.lists(st.from_regex(r"[a-z0-9 #:*,-]{1,8}", fullmatch=True), max_size=3),
        "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
        "checkpoint.keep": st.just("all") | st.integers(1, 5),
        "schedule.kind": st.sampled_from(["constant", "cosine", "wsd"]),
    },
)


def settings_of(changes: dict[str, Any]) -> Settings:
    """The minimal settings with ``changes``."""
    made: dict[str, Any] = {
        "run": {"dir": "runs/x"},
        "train": {"steps": 10, "global_batch": 8, "micro_batch": 4},
    }
    if changes.get("data.files"):
        changes = {**changes, "data.kind": "text"}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            made.setdefault(section, {})[name] = value
        else:
            made[section] = value
    return Settings.model_validate(made)


@given(OVERRIDES)
def test_the_resolved_text_gives_equal_settings_back(changes: dict[str, Any]) -> None:
    """Oracle: the settings themselves; so the digest stands for all of them."""
    made = settings_of(changes)
    text = config.resolved_text(made)
    again = config.parse(text, "run.yaml")
    assert again == made
    assert config.compare(made, again) == []
    assert config.digest(config.resolved_text(again)) == config.digest(text)


@given(OVERRIDES, OVERRIDES)
def test_settings_differ_just_where_their_texts_do(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Oracle: equal digests, and only then no difference."""
    first, second = settings_of(one), settings_of(other)
    same = config.resolved_text(first) == config.resolved_text(second)
    assert (config.compare(first, second) == []) == same


EFFECTS = {
    "run.dir": ("other", "operational"),
    "checkpoint.every": (3, "operational"),
    "train.data_workers": (2, "operational"),
    "track.wandb": ("offline", "operational"),
    "train.micro_batch": (2, "same-data"),
    "compile": (True, "same-data"),
    "run.seed": (1, "another-run"),
    "optimizer.lr": (1.0, "another-run"),
    "train.global_batch": (16, "another-run"),
    "precision": ("bf16", "another-run"),
    "data.sequence_length": (32, "another-run"),
    "model.width": (96, "another-run"),
}


@pytest.mark.parametrize("key", EFFECTS)
def test_a_change_has_its_effect_on_a_resume(key: str) -> None:
    """Oracle: the README on resume: what makes another run, what only rounding, what nothing."""
    value, effect = EFFECTS[key]
    before = settings_of({})
    after = settings_of({"train": {"steps": 10, "global_batch": 8, "micro_batch": 4}, key: value})
    assert {(item.key, item.effect) for item in config.compare(before, after)} == {(key, effect)}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
@pytest.mark.parametrize("processes", [1, 2])
def test_every_config_that_is_shipped_loads_and_divides(file: Path, processes: int) -> None:
    """Oracle: the loader, the published schema, and the number of processes."""
    made = config.load(file).settings
    assert made.train.global_batch % (made.train.micro_batch * processes) == 0
    schema = config_reference.schema()
    jsonschema.validate(json.loads(made.model_dump_json()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**json.loads(made.model_dump_json()), "unknown": 1}, schema)


def test_the_schema_and_the_loader_agree_on_what_is_missing() -> None:
    """Oracle: each refuses a config without its required keys."""
    for absent in ("run", "train"):
        document = json.loads(settings_of({}).model_dump_json())
        del document[absent]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, config_reference.schema())
        with pytest.raises(ValidationError):
            Settings.model_validate(document)


def test_the_reference_of_every_key_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: `harness config --reference`, which also names every key."""
    assert main(["config", "--reference"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "README.md").read_text()
    text = config_reference.reference()
    assert [
        key for key in config.leaves(settings_of({"start": {"checkpoint": "a"}})) if f"`{key}`" not in text
    ] == []


def test_config_prints_each_value_with_its_origin(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the file and the override."""
    assert main(["config", str(path), "run.seed=4", "--json"]) == 0
    shown = capsys.readouterr().out
    assert "override" in shown
    assert "c.yaml:2" in shown
    assert isinstance(json.loads(shown), dict)
