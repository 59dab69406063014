"""The built-in tasks: samples, identity, evaluation, metrics, learning."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.data.order import Order
from harness.errors import ConfigError
from harness.settings import Settings
from harness.tasks.build import build, source
from harness.tasks.task import Task, spread

TRAIN = {"steps": 10, "global_batch": 8, "micro_batch": 4}
LENGTH = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty small text files with characters of one to four bytes."""
    for number in range(30):
        words = [hashlib.sha256(f"{number} {word}".encode()).hexdigest()[:14] for word in range(20)]
        (tmp_path / f"{number:02}.txt").write_text("é数🙂".join(words))
    return tmp_path


def language(folder: Path, **sections: Any) -> Task:
    data = {
        "kind": "text",
        "files": ["*.txt"],
        "validation": 0.3,
        "sequence_length": LENGTH,
        "cache": "cache",
    }
    values = {
        "run": {"dir": "runs/x"},
        "train": TRAIN,
        "model": {"layers": 1, "width": 16, "heads": 2},
        **sections,
        "data": data | sections.get("data", {}),
    }
    return build(Settings(**values), folder)


def digits(seed: int = 0, **options: Any) -> Task:
    values = {
        "run": {"dir": "r", "seed": seed},
        "train": TRAIN,
        "task": {"kind": "digits", "options": options},
    }
    return build(Settings(**values), Path())


def evaluated(task: Task, model: nn.Module, size: int = 4, limit: int = 1000) -> Tensor:
    """The sums over the whole evaluation."""
    model.eval()
    with torch.no_grad():
        return torch.stack([task.evaluate(model, batch) for batch in task.evaluation(size, limit)]).sum(0)


class Uniform(nn.Module):
    """Gives every token the same probability."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, self.vocabulary)


@pytest.mark.parametrize("make", [language, lambda _: digits(), lambda _: digits(shift=2)])
def test_a_batch_is_a_pure_function_of_index_and_epoch(folder: Path, make: Any) -> None:
    """Oracle: each sample asked for alone, in another task object, after other calls."""
    task, other = make(folder), make(folder)
    epochs, indices = Order(task.samples, 3).places(5, 12)
    together = task.batch(indices, epochs)
    other.batch(indices[::-1].copy(), epochs + 1)
    for row in (11, 0, 5):
        alone = other.batch(indices[row : row + 1], epochs[row : row + 1])
        assert all(
            torch.equal(part[row : row + 1], single) for part, single in zip(together, alone, strict=True)
        )


@pytest.mark.parametrize("make", [language, lambda _: digits()])
def test_evaluation_is_always_the_same_and_weighs_every_sample_once(folder: Path, make: Any) -> None:
    """Oracle: the same sums whatever the batch size, up to rounding, when all samples are taken."""
    task = make(folder)
    torch.manual_seed(0)
    model = task.build_model()
    sums = evaluated(task, model)
    assert torch.equal(sums, evaluated(task, model))
    torch.testing.assert_close(sums, evaluated(task, model, size=7))
    assert sums.dtype == torch.float64
    assert task.headline in task.metrics(sums)
    batches = task.evaluation(4, 3)
    assert len(batches) == 3
    assert len(batches[-1]) == len(batches[0])
    assert [len(batch[0]) for batch in batches] == [4, 4, 4]


@pytest.mark.parametrize("make", [language, lambda _: digits()])
def test_held_out_samples_are_never_trained_on(folder: Path, make: Any) -> None:
    """Oracle: no held-out sample's bytes among the training samples'."""
    task = make(folder)
    indices = np.arange(task.samples)
    train = {row.numpy().tobytes() for row in task.batch(indices, indices * 0)[0]}
    held_out = {row.numpy().tobytes() for batch in task.evaluation(8, 1000) for row in batch[0]}
    assert held_out
    assert not train & held_out


def test_bits_per_byte_of_a_uniform_guess(folder: Path) -> None:
    """Oracle: with bytes, log2(257) for each predicted token, over the predicted bytes (all but the ends)."""
    task = language(folder)
    sums = evaluated(task, Uniform(257))
    predicted = torch.cat([batch[0][:, 1:].flatten() for batch in task.evaluation(4, 1000)])
    metrics = task.metrics(sums)
    expected = math.log2(257) * len(predicted) / int((predicted != 256).sum())
    assert metrics["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert metrics["loss"] == pytest.approx(math.log(257), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(257, rel=1e-5)
    assert task.metrics(sums * torch.tensor([1e4, 1, 1]))["perplexity"] == math.inf


def test_bits_per_byte_with_bpe_counts_bytes_of_text(folder: Path) -> None:
    """Oracle: the bytes of the held-out text decoded by the tokenizer itself, over the windows evaluated."""
    import tokenizers

    task = language(folder, tokenizer={"kind": "bpe", "vocabulary": 300})
    library = tokenizers.Tokenizer.from_buffer(task.files()["tokenizer.json"])
    windows = torch.cat([batch[0] for batch in task.evaluation(4, 1000)])
    stream = [*windows[0].tolist(), *windows[1:, 1:].flatten().tolist()]
    text = library.decode(stream[1:], skip_special_tokens=True)
    counted = int(sum(batch[1].sum() for batch in task.evaluation(4, 1000)))
    # The last token may be a part of a character, whose bytes are counted at its first token.
    assert abs(counted - len(text.replace("\ufffd", "").encode())) <= 4
    assert task.metrics(evaluated(task, Uniform(300)))["bits_per_byte"] > 0


def test_the_language_loss_is_the_mean_over_tokens(folder: Path) -> None:
    """Oracle: log probabilities picked by hand."""
    task = language(folder)
    torch.manual_seed(0)
    model = task.build_model()
    batch = task.batch(np.arange(3), np.zeros(3, dtype=np.int64))
    picked = model(batch[0][:, :-1]).log_softmax(-1).gather(2, batch[0][:, 1:, None])
    torch.testing.assert_close(task.loss(model, batch), -picked.mean())


def test_the_language_identity_names_corpus_tokenizer_files_and_counts(folder: Path) -> None:
    """Oracle: the files in the folder; a changed file changes the corpus' digest and its own only."""
    before = language(folder).identity()
    (folder / "07.txt").write_text("another text, also long enough")
    after = language(folder).identity()
    assert set(before.files) == {path.name for path in folder.glob("*.txt")}
    assert {name for name in before.files if before.files[name] != after.files[name]} == {"07.txt"}
    assert before.digests["corpus"] != after.digests["corpus"]
    assert before.digests["tokenizer"] == after.digests["tokenizer"]
    assert before.counts["documents"] + before.counts["held_out_documents"] == 30
    assert after.counts["samples"] == language(folder).samples
    assert json.loads(language(folder).files()["config.json"])["vocab_size"] == 257


def test_nothing_held_out_means_an_empty_evaluation(folder: Path) -> None:
    """Oracle: no batches."""
    assert len(language(folder, data={"validation": 0}).evaluation(4, 4)) == 0
    assert len(digits(validation=0).evaluation(4, 4)) == 0


def test_documents_shorter_than_a_sample_are_an_error(folder: Path) -> None:
    """Oracle: the documented error, for the half that is too short."""
    with pytest.raises(ConfigError, match=r"the held-out documents have .* lower data\.sequence_length"):
        language(folder, data={"sequence_length": 7000})
    with pytest.raises(ConfigError, match="the training documents have"):
        language(folder, data={"sequence_length": 100_000})


def test_shards_without_bytes_are_evaluated_in_nats(tmp_path: Path) -> None:
    """Oracle: the loss of a uniform guess; no bits per byte are invented."""
    from safetensors.numpy import save_file

    for split in ("train", "held-out"):
        tensors = {"tokens": np.arange(200, dtype=np.uint16) % 9}
        save_file(tensors, tmp_path / f"{split}.safetensors", {"vocabulary": "9", "split": split})
    task = language(tmp_path, data={"kind": "tokens", "files": ["*.safetensors"]})
    assert task.headline == "loss"
    assert task.metrics(evaluated(task, Uniform(9))) == pytest.approx({"loss": math.log(9), "perplexity": 9})


def test_flops_per_sample_follow_the_model(folder: Path) -> None:
    """Oracle: the model's own count times the sequence, without touching the random generator."""
    task = language(folder)
    model = task.build_model()
    state = torch.get_rng_state()
    assert task.flops_per_sample() == model.flops_per_token(LENGTH) * LENGTH  # type: ignore[operator]
    assert torch.equal(torch.get_rng_state(), state)


def test_digits_are_those_of_scikit_learn() -> None:
    """Oracle: sklearn.datasets.load_digits, image by image."""
    from sklearn.datasets import load_digits

    table = load_digits()
    expected = sorted(
        (image.tobytes(), int(label)) for image, label in zip(table.images, table.target, strict=True)
    )
    task = digits()
    indices = np.arange(task.samples)
    parts = [task.batch(indices, indices * 0), *task.evaluation(64, 1000)]
    images = torch.cat([part[0] for part in parts]).squeeze(1).double() * 16
    labels = torch.cat([part[1] for part in parts]).tolist()
    assert sorted(zip([image.numpy().tobytes() for image in images], labels, strict=True)) == expected


def test_digits_are_learned_to_95_percent() -> None:
    """Oracle: accuracy on held-out images after 150 steps; a constant guess has about 0.1."""
    task = digits()
    torch.manual_seed(0)
    model = task.build_model()
    assert task.metrics(evaluated(task, model, size=64))["accuracy"] < 0.4
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = Order(task.samples, seed=0)
    for step in range(150):
        epochs, indices = order.places(step * 64, 64)
        task.loss(model, task.batch(indices, epochs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert task.metrics(evaluated(task, model, size=64))["accuracy"] >= 0.95


def test_shifted_digits_move_by_at_most_the_shift_and_differ_by_epoch() -> None:
    """Oracle: every moved image is one of the 25 moves of its original, made with numpy."""
    plain, moved = digits(), digits(shift=2)
    indices = np.arange(40)
    originals = plain.batch(indices, indices * 0)[0].squeeze(1).numpy()
    epochs = [moved.batch(indices, indices * 0 + epoch)[0].squeeze(1).numpy() for epoch in (0, 1)]
    for original, image in zip(originals, epochs[0], strict=True):
        padded = np.pad(original, 2)
        assert any((padded[i : i + 8, j : j + 8] == image).all() for i in range(5) for j in range(5))
    assert (epochs[0] != epochs[1]).any()


def test_digits_identity_is_the_file_of_the_wheel() -> None:
    """Oracle: the installed file itself."""
    import sklearn.datasets

    path = Path(sklearn.datasets.__file__).parent / "data/digits.csv.gz"
    files = digits().identity().files
    assert list(files.values()) == [hashlib.sha256(path.read_bytes()).hexdigest()]
    assert len(gzip.decompress(path.read_bytes()).splitlines()) == sum(digits().identity().counts.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widht": 3}, "did you mean 'width'"),
        ({"width": 0}, "task.options.width must be a positive integer"),
        ({"width": True}, "task.options.width must be a positive integer"),
        ({"dropout": 1}, "task.options.dropout must be"),
        ({"shift": 8}, "task.options.shift must be"),
        ({"validation": "0.1"}, "task.options.validation must be"),
    ],
)
def test_options_that_do_not_fit_are_errors(options: dict[str, Any], message: str) -> None:
    """Oracle: the message names the option."""
    with pytest.raises(ConfigError, match=message):
        digits(**options)


def test_the_seed_is_no_option() -> None:
    """Oracle: the remedy."""
    task = {"kind": "digits", "options": {"seed": 3}}
    with pytest.raises(ConfigError, match=r"task\.options\.seed is run\.seed"):
        build(Settings(run={"dir": "r"}, train=TRAIN, task=task), Path())  # type: ignore[arg-type]


def test_the_language_task_has_no_options(folder: Path) -> None:
    """Oracle: the documented error."""
    with pytest.raises(ConfigError, match="the language task has no option 'width'"):
        language(folder, task={"options": {"width": 3}})


@pytest.mark.parametrize(
    ("available", "size", "limit"), [(10, 3, 2), (10, 3, 99), (0, 3, 2), (5, 8, 1), (7, 1, 7)]
)
def test_held_out_samples_are_spread_evenly(available: int, size: int, limit: int) -> None:
    """Oracle: sorted, unique, inside, as many as fit, gaps that differ by at most one."""
    groups = spread(available, size, limit)
    chosen = [int(index) for group in groups for index in group]
    assert len(chosen) == min(available, size * limit)
    assert chosen == sorted(set(chosen))
    assert all(0 <= index < available for index in chosen)
    gaps = np.diff([*chosen, available])
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
    assert len(groups) <= limit


def test_built_in_tasks_have_no_source_of_their_own() -> None:
    """Oracle: None, as documented."""
    settings = Settings(run={"dir": "r"}, train=TRAIN, task={"kind": "digits"})  # type: ignore[arg-type]
    assert source(settings, Path()) is None
