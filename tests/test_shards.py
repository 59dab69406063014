"""Which tensor goes to which file and rank: nothing lost, nothing twice, even loads, the same everywhere."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint import shards
from harness.checkpoint.shards import Item, divide

ITEMS = st.lists(
    st.builds(lambda size, anywhere: (size, anywhere), st.integers(0, 5000), st.booleans()), max_size=30
).map(lambda drawn: [Item(f"t{number}", size, anywhere) for number, (size, anywhere) in enumerate(drawn)])


@given(ITEMS, ITEMS, st.integers(1, 9), st.integers(16, 4000))
def test_every_tensor_is_in_one_file(
    model: list[Item], optimizer: list[Item], world_size: int, file_bytes: int
) -> None:
    """Oracle: conservation; what only rank 0 has is written by rank 0; no file is empty or named twice."""
    parts = divide(model, optimizer, world_size, file_bytes)
    for group, items in (("model", model), ("optimizer", optimizer)):
        placed = [name for part in parts if part.group == group for name in part.names]
        assert sorted(placed) == sorted(item.name for item in items)
        for part in parts:
            if part.group == group:
                sizes = {item.name: item.size for item in items}
                assert part.size == sum(sizes[name] for name in part.names)
                only = {item.name for item in items if not item.anywhere}
                assert part.rank == 0 or not only & set(part.names)
    assert len({part.path for part in parts}) == len(parts)
    assert all(part.names and 0 <= part.rank < world_size for part in parts)


@given(ITEMS, st.integers(1, 9), st.integers(16, 4000), st.randoms())
def test_the_order_in_which_tensors_are_named_does_not_matter(
    model: list[Item], world_size: int, file_bytes: int, random: object
) -> None:
    """Oracle: the same items shuffled; ranks must agree without asking each other."""
    shuffled = list(model)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert divide(shuffled, [], world_size, file_bytes) == divide(model, [], world_size, file_bytes)


@given(st.lists(st.integers(0, 1000), max_size=50), st.integers(1, 8))
def test_loads_are_even(sizes: list[int], hands: int) -> None:
    """Oracle: Graham's bound: no hand has more than the mean and the largest piece together."""
    loads = [0] * hands
    for size, hand in zip(sizes, shards.deal(sizes, hands), strict=True):
        loads[hand] += size
    assert max(loads) <= sum(sizes) / hands + max(sizes, default=0)


def test_a_small_model_is_one_file_and_a_large_one_a_hugging_face_folder() -> None:
    """Oracle: the names and the index that `transformers` reads."""
    small = divide([Item("w", 10)], [Item("o", 20)], 4, 1000)
    assert [part.path for part in small] == ["model.safetensors", "optimizer-00001-of-00001.safetensors"]
    assert shards.index(small) == {}
    large = divide([Item("a", 900), Item("b", 900)], [], 1, 1000)
    assert [part.path for part in large] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    (index,) = shards.index(large).values()
    assert json.loads(index) == {
        "metadata": {"total_size": 1800},
        "weight_map": {part.names[0]: part.path for part in large},
    }


def test_every_rank_writes_when_that_is_worth_a_file() -> None:
    """Oracle: the writers of a model that one file would hold."""
    items = [Item(f"t{number}", 100) for number in range(8)]
    assert {part.rank for part in divide(items, [], 4, 1600)} == {0, 1, 2, 3}
    assert {part.rank for part in divide(items, [], 4, 160_000)} == {0}
