"""Checkpoints compared by the safetensors package, which knows nothing of this one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from harness.format.layout import RunFolder


def differing(one: Path, other: Path, after: int = 0) -> list[str]:
    """``CHECKPOINT/FILE/TENSOR`` for everything that is not the same bits in both runs after step ``after``.

    Fails when there is nothing to compare.
    """
    names = [path.name for path in RunFolder(one).complete() if int(path.name.removeprefix("step-")) > after]
    assert names, f"{one} has no checkpoint after step {after}"
    return [line for name in names for line in _differing(one, other, name)]


def _differing(one: Path, other: Path, name: str) -> list[str]:
    left, right = (root / "checkpoints" / name for root in (one, other))
    files = {path.name for folder in (left, right) for path in folder.glob("*.safetensors")}
    assert any(file.startswith("model") for file in files)
    assert any(file.startswith("rng-rank-") for file in files)
    assert any(file.startswith("optimizer") for file in files)
    found = []
    for file in sorted(files):
        a, b = load_file(left / file), load_file(right / file)
        found += [f"{name}/{file}/{key}" for key in sorted({*a, *b}) if not _same(a.get(key), b.get(key))]
    return found


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)))
