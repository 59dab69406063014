"""The digits task: 1,797 scanned digits of 8 x 8 pixels (UCI "Optical Recognition of Handwritten Digits"),
which the scikit-learn wheel ships, and a small convolutional net. Trains to a real accuracy in seconds.

The file is checked against the digest in the wheel's RECORD; scikit-learn itself is not imported.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from harness.data.corpus import files_digest, recorded_files
from harness.errors import ConfigError, VerificationFailed
from harness.tasks.task import Batch, Batches, Identity, Task, spread

_PACKAGE = "scikit-learn"
_FILE = "sklearn/datasets/data/digits.csv.gz"
_SIDE = 8
_CLASSES = 10
_WHITE = 16.0
_KERNEL = 3


class Digits(Task):
    """A batch is ``(images, labels)``: float32 (batch, 1, 8, 8) from 0 to 1, int64 (batch,)."""

    unit = "image"
    units_per_sample = 1
    headline = "accuracy"

    def __init__(
        self, *, seed: int, width: int = 32, dropout: float = 0.1, shift: int = 0, validation: float = 0.2
    ) -> None:
        """``width`` channels, ``dropout`` before the last layer, training images moved by up to ``shift``
        pixels (another move each epoch), a share ``validation`` held out by the digest of the image."""
        _check_options(width=width, dropout=dropout, shift=shift, validation=validation)
        self._seed, self._width, self._dropout, self._shift = seed, width, dropout, shift
        table, self._files = _read_table()
        held_out = np.array([_share(row) < validation for row in table])
        self._train = _tensors(table[~held_out])
        self._held_out = _tensors(table[held_out])
        self.samples = len(self._train[1])

    def identity(self) -> Identity:
        """The file of the wheel."""
        return Identity(
            kind="digits",
            digests={"corpus": files_digest(self._files), "tokenizer": None},
            counts={"samples": self.samples, "held_out_samples": len(self._held_out[1])},
            files=self._files,
        )

    def build_model(self) -> nn.Module:
        """Two convolutions and a linear layer, with torch's default initial weights."""
        return DigitsNet(self._width, self._dropout)

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> Batch:
        """The images ``indices``, moved as (seed, epoch, index) says."""
        rows = torch.from_numpy(indices)
        images, labels = self._train
        images = images[rows]
        if self._shift:
            moves = [self._move(int(epoch), int(index)) for epoch, index in zip(epochs, indices, strict=True)]
            images = torch.stack([_moved(image, *move) for image, move in zip(images, moves, strict=True)])
        return images, labels[rows]

    def _move(self, epoch: int, index: int) -> tuple[int, int]:
        """How far down and right the image ``index`` is moved in ``epoch``."""
        generator = np.random.default_rng((self._seed, epoch, index))
        down, right = generator.integers(-self._shift, self._shift + 1, size=2).tolist()
        return down, right

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy in nats."""
        images, labels = batch
        return F.cross_entropy(model(images).float(), labels)

    def evaluation(self, size: int, limit: int) -> Sequence[Batch]:
        """Held-out images, as they are."""
        images, labels = self._held_out
        groups = [torch.from_numpy(group) for group in spread(len(labels), size, limit)]
        return Batches(len(groups), lambda number: (images[groups[number]], labels[groups[number]]))

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums of nats, right answers and images."""
        images, labels = batch
        logits = model(images).float()
        nats = F.cross_entropy(logits, labels, reduction="none").double().sum()
        right = (logits.argmax(dim=1) == labels).double().sum()
        return torch.stack((nats, right, torch.ones_like(labels).double().sum()))

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """``accuracy``, from 0 to 1, and ``loss`` in nats."""
        nats, right, images = sums.tolist()
        return {"accuracy": right / images, "loss": nats / images}

    def flops_per_sample(self) -> int:
        """Six operations a weight and place it is applied at (one multiply-add forward, two backward)."""
        width, inner = self._width, (_SIDE // 2) ** 2
        first = _SIDE**2 * _KERNEL**2 * width
        second = inner * _KERNEL**2 * width * 2 * width
        return 6 * (first + second + inner * 2 * width * _CLASSES)

    def files(self) -> dict[str, bytes]:
        """config.json with the sizes of the net."""
        config = {"model_type": "harness-digits", "architectures": ["DigitsNet"], "width": self._width}
        config |= {"dropout": self._dropout, "num_labels": _CLASSES, "image_size": _SIDE, "num_channels": 1}
        return {"config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


class DigitsNet(nn.Module):
    """Convolution, convolution with stride 2, linear."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, _KERNEL, padding=1)
        self.second = nn.Conv2d(width, 2 * width, _KERNEL, padding=1, stride=2)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(2 * width * (_SIDE // 2) ** 2, _CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, 10) of ``images`` (batch, 1, 8, 8)."""
        x = F.relu(self.second(F.relu(self.first(images))))
        logits: Tensor = self.output(self.dropout(x.flatten(1)))
        return logits


def _check_options(*, width: Any, dropout: Any, shift: Any, validation: Any) -> None:
    rules = {
        "width": (type(width) is int and width > 0, "a positive integer"),
        "dropout": (type(dropout) in (int, float) and 0 <= dropout < 1, "a number from 0 to below 1"),
        "shift": (type(shift) is int and 0 <= shift < _SIDE, "an integer from 0 to 7"),
        "validation": (
            type(validation) in (int, float) and 0 <= validation < 1,
            "a number from 0 to below 1",
        ),
    }
    for name, (good, rule) in rules.items():
        if not good:
            raise ConfigError(f"task.options.{name} must be {rule}")


def _read_table() -> tuple[NDArray[np.uint8], dict[str, str]]:
    """The images' rows (1797, 65), pixels then label, and the name and digest of the file."""
    files = recorded_files(_PACKAGE, lambda name: name == _FILE)
    path, expected = files.get(_FILE, (None, ""))
    content = path.read_bytes() if path is not None and path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != expected:
        raise VerificationFailed(
            "file differs from its digest in RECORD", where=_FILE, remedy=f"install {_PACKAGE} again"
        )
    text = io.StringIO(gzip.decompress(content).decode("ascii"))
    return np.loadtxt(text, delimiter=",").astype(np.uint8), {_FILE: expected}


def _share(row: NDArray[np.uint8]) -> float:
    return int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "big") / 2**64


def _tensors(table: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(table[:, :-1].astype(np.float32) / np.float32(_WHITE))
    return images.view(-1, 1, _SIDE, _SIDE), torch.from_numpy(table[:, -1].astype(np.int64))


def _moved(image: Tensor, down: int, right: int) -> Tensor:
    """``image`` (1, 8, 8) moved; what moves in is black."""
    padding = (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0))
    padded = F.pad(image, padding)
    top, left = max(-down, 0), max(-right, 0)
    return padded[:, top : top + _SIDE, left : left + _SIDE]
