"""A user's own task by import path."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness.data.order import Order
from harness.errors import ConfigError
from harness.settings import Settings
from harness.tasks.build import build, source

EXAMPLES = Path(__file__).parent.parent / "examples"
TRAIN = {"steps": 10, "global_batch": 8, "micro_batch": 4}


def settings(kind: str, **options: Any) -> Settings:
    return Settings(run={"dir": "r"}, train=TRAIN, task={"kind": kind, "options": options})


@pytest.fixture
def module(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A folder with a module of a name that no other test imports."""
    name = f"own_{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"
    return tmp_path / f"{name}.py", name


@pytest.mark.slow
def test_the_example_is_short_and_learns() -> None:
    """Oracle: under 60 lines; from a coin's 0.5 to 0.95 of held-out points, with its own config's numbers."""
    assert len((EXAMPLES / "own_task.py").read_text().splitlines()) < 60
    config = Settings(**yaml.safe_load((EXAMPLES / "own_task.yaml").read_text()))
    task = build(config, EXAMPLES)
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr)
    order, size = Order(task.samples, seed=0), config.train.global_batch
    for step in range(config.train.steps):
        epochs, indices = order.places(step * size, size)
        task.loss(model, task.batch(indices, epochs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        sums = torch.stack([task.evaluate(model, batch) for batch in task.evaluation(64, 16)]).sum(0)
    assert task.metrics(sums)["accuracy"] > 0.95
    assert task.flops_per_sample() is None
    assert task.files() == task.generators() == {}


def test_the_source_is_the_file_that_defines_the_class() -> None:
    """Oracle: the sha256 of the example's file."""
    expected = hashlib.sha256((EXAMPLES / "own_task.py").read_bytes()).hexdigest()
    assert source(settings("own_task:Spirals"), EXAMPLES) == ("own_task:Spirals", expected)


def test_the_folder_is_on_the_path_only_while_importing(module: tuple[Path, str]) -> None:
    """Oracle: sys.path before and after."""
    path, name = module
    path.write_text(
        "import sys\nfrom harness.tasks.digits import Digits\nSEEN = list(sys.path)\n"
        "class Mine(Digits): ...\n"
    )
    before = list(sys.path)
    build(settings(f"{name}:Mine", width=4), path.parent)
    assert sys.path == before
    assert str(path.parent) in sys.modules[name].SEEN


def test_each_config_has_the_modules_beside_it_whatever_others_call_theirs(
    tmp_path: Path, module: tuple[Path, str]
) -> None:
    """Oracle: two folders with modules of the same names, a helper that the task imports among them."""
    name = module[1]
    for word in ("a", "b"):
        (tmp_path / word).mkdir()
        (tmp_path / word / f"helper_{name}.py").write_text(f"WORD = {word!r}\n")
        (tmp_path / word / f"{name}.py").write_text(
            f"from harness.tasks.digits import Digits\nfrom helper_{name} import WORD\n"
            "class Mine(Digits):\n    word = WORD\n"
        )
    for word in ("a", "b", "a"):
        base = tmp_path / word
        assert build(settings(f"{name}:Mine", width=4), base).word == word  # type: ignore[attr-defined]
        digest = hashlib.sha256((base / f"{name}.py").read_bytes()).hexdigest()
        assert source(settings(f"{name}:Mine"), base) == (f"{name}:Mine", digest)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("", "digitz", "task.kind 'digitz' is not known; did you mean 'digits'"),
        ("", "NAME", "is not known"),
        ("", "NAME:", "is not known"),
        ("", "../NAME:Mine", "is not known"),
        ("", "no_such_module:Mine", "cannot be imported: ModuleNotFoundError"),
        ("1/0", "NAME:Mine", "cannot be imported: ZeroDivisionError"),
        ("import sys; sys.exit(0)", "NAME:Mine", "cannot be imported: SystemExit"),
        ("class Mien: ...", "NAME:Mine", "no class 'Mine' there; did you mean 'Mien'"),
        ("Mine = 3", "NAME:Mine", "no class 'Mine' there"),
        ("class Mine: ...", "NAME:Mine", "is no harness.tasks.task.Task"),
        (
            "from harness.tasks.task import Task\nclass Mine(Task):\n    def loss(self, model, batch): ...",
            "NAME:Mine",
            "lacks __init__, batch, build_model, evaluate, evaluation, identity, metrics",
        ),
    ],
)
def test_a_task_that_is_none_is_a_clear_error(
    module: tuple[Path, str], text: str, kind: str, message: str
) -> None:
    """Oracle: one line that says what is wrong."""
    path, name = module
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        build(settings(kind.replace("NAME", name)), path.parent)


def test_options_that_the_constructor_does_not_take_are_an_error() -> None:
    """Oracle: the nearest parameter's name."""
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        build(settings("own_task:Spirals", widht=3), EXAMPLES)
