"""Generators: what is drawn after a restore is what would have been drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint import rng, snapshot
from harness.errors import TrainingFailed

KINDS = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "python": lambda seed: random.Random(seed),
    "PCG64": lambda seed: np.random.default_rng(seed),
    "MT19937": lambda seed: np.random.Generator(np.random.MT19937(seed)),
    "Philox": lambda seed: np.random.Generator(np.random.Philox(seed)),
    "SFC64": lambda seed: np.random.Generator(np.random.SFC64(seed)),
}


def draw(generators: Mapping[str, rng.Generator]) -> list[float]:
    """One draw of each kind; normals, since these keep a second value back."""
    values = [random.random(), random.gauss(), float(np.random.normal()), float(torch.randn(3)[0])]
    for generator in generators.values():
        if isinstance(generator, torch.Generator):
            values.append(float(torch.randn(1, generator=generator)))
        elif isinstance(generator, random.Random):
            values.append(generator.gauss())
        else:
            values += [float(generator.normal()), float(generator.integers(2**40, dtype=np.int64))]
    return values


def through_a_file(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` as bytes of a safetensors file and back, by the safetensors package."""
    from safetensors.torch import load

    return load(snapshot.serialize("rng-rank-00000.safetensors", state))


@given(seed=st.integers(0, 2**32 - 1), drawn=st.integers(0, 5))
def test_every_generator_goes_on_where_it_was(seed: int, drawn: int) -> None:
    """Oracle: the draws that the same generators give when nobody interrupts."""
    generators = {name: make(seed) for name, make in KINDS.items()}
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for _ in range(drawn):
        draw(generators)
    state = through_a_file(rng.capture(generators))
    expected = [draw(generators) for _ in range(3)]
    fresh = {name: make(seed + 1) for name, make in KINDS.items()}
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    rng.restore(state, fresh)
    assert [draw(fresh) for _ in range(3)] == expected


def test_a_capture_changes_nothing() -> None:
    """Oracle: two captures in a row are the same bits."""
    generators = {name: make(1) for name, make in KINDS.items()}
    first, second = rng.capture(generators), rng.capture(generators)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first.keys() == second.keys()


@pytest.mark.parametrize(("saved", "here"), [(["a"], ["a", "b"]), (["a", "b"], ["a"]), ([], ["a"])])
def test_a_generator_without_a_state_or_a_state_without_a_generator_is_an_error(
    saved: list[str], here: list[str]
) -> None:
    """Oracle: the name of the odd one is in the message, and no generator has moved."""
    state = rng.capture({name: torch.Generator().manual_seed(1) for name in saved})
    before = torch.get_rng_state()
    odd = sorted(set(saved) ^ set(here))[0]
    with pytest.raises(TrainingFailed, match=rf"generator\.{odd}"):
        rng.restore(state, {name: torch.Generator().manual_seed(2) for name in here})
    assert torch.equal(before, torch.get_rng_state())


def test_an_object_that_is_no_generator_is_refused() -> None:
    """Oracle: the message names its type."""
    with pytest.raises(TrainingFailed, match="RandomState"):
        rng.capture({"old": np.random.RandomState(1)})  # type: ignore[dict-item]
