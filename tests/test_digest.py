"""Digests of batches and of the random number generator."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.determinism.digest import batch_digest, rng_digest

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip
shapes = st.lists(st.integers(0, 4), max_size=3)


@given(shapes, st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
def test_the_same_content_has_the_same_digest_whatever_its_layout_in_memory(shape, dtype, seed):
    """Oracle: a copy, and a view with other strides, hold the same values."""
    values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    strided = values.t().contiguous().t() if values.dim() == 2 else values
    digest = batch_digest((values,))
    assert len(bytes.fromhex(digest)) == 16
    assert digest == batch_digest((values.clone(),)) == batch_digest((strided,))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40), st.data())
def test_one_flipped_bit_changes_the_digest(values, data):
    """Oracle: the flip itself."""
    tensor = torch.tensor(values, dtype=torch.int32)
    flipped = tensor.clone()
    flipped[data.draw(st.integers(0, len(values) - 1))] ^= 1 << data.draw(st.integers(0, 30))
    assert batch_digest((tensor,)) != batch_digest((flipped,))


def test_dtype_shape_order_and_grouping_count():
    """Oracle: the batches differ in exactly that, all over the same bytes."""
    zeros = torch.zeros(4, dtype=torch.int32)
    batches = [
        (zeros,),
        (zeros.view(torch.float32),),
        (zeros.view(2, 2),),
        (zeros[:2], zeros[2:]),
        (zeros[:1], zeros[1:]),
        (zeros[1:], zeros[:1]),
        (),
    ]
    assert len({batch_digest(batch) for batch in batches}) == len(batches)


def test_minus_zero_and_a_permutation_are_seen():
    """Oracle: values that compare equal, or whose sum is equal, have other bytes."""
    assert batch_digest((torch.tensor([0.0]),)) != batch_digest((torch.tensor([-0.0]),))
    assert batch_digest((torch.tensor([1, 2]),)) != batch_digest((torch.tensor([2, 1]),))


def test_a_tensor_that_requires_grad_is_read_like_any_other():
    """Oracle: its detached copy."""
    tensor = torch.ones(3, requires_grad=True)
    assert batch_digest((tensor,)) == batch_digest((torch.ones(3),))


def test_a_device_tensor_is_not_copied_unasked():
    """Oracle: a tensor that is not on the CPU (meta) is refused with the name of the way to ask."""
    with pytest.raises(ValueError, match="copy_from_device"):
        batch_digest((torch.ones(2, device="meta"),))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_device_tensor_is_copied_when_asked():
    """Oracle: the same values on the CPU."""
    values = torch.arange(5)
    assert batch_digest((values.cuda(),), copy_from_device=True) == batch_digest((values,))


def test_the_generator_digest_follows_the_state_and_draws_nothing():
    """Oracle: the generator's own state before and after, and what it draws next."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    digest = rng_digest()
    assert digest == rng_digest()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(1)
    assert digest != rng_digest()
    torch.set_rng_state(before)
    assert digest == rng_digest()


def test_digests_take_few_calls():
    """Oracle: the calls, of C too, that a profiler sees, with some to spare; they are of every step."""
    batch = (torch.zeros(1, 32, dtype=torch.int64), torch.zeros(1, 32, dtype=torch.int64))
    for digest in (lambda: batch_digest(batch), rng_digest):
        digest()
        assert len(_calls(digest)) < 30


def _calls(call) -> list[str]:
    made = []
    sys.setprofile(lambda frame, event, _: made.append(event) if event.endswith("call") else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return made
