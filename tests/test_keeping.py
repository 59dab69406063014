"""Which checkpoints stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint.keeping import Best, Keep

SCORES = {
    10: {"loss": 5.0, "accuracy": 0.1},
    20: {"loss": 3.0, "accuracy": 0.4},
    30: {"loss": 4.0},
    40: {"loss": 3.0, "accuracy": 0.3},
    50: {"loss": 4.5, "accuracy": 0.2},
}
CASES: dict[str, tuple[Keep, list[int]]] = {
    "all": (Keep(), []),
    "newest": (Keep(newest=2), [10, 20, 30]),
    "more than there are": (Keep(newest=9), []),
    "every": (Keep(newest=1, every=20), [10, 30]),
    "pinned": (Keep(newest=1, pinned=frozenset({30, 70})), [10, 20, 40]),
    "lowest, the later of equals": (Keep(newest=1, best=Best("loss", "min", 1)), [10, 20, 30]),
    "two lowest": (Keep(newest=1, best=Best("loss", "min", 2)), [10, 30]),
    "highest, of those that have it": (Keep(newest=1, best=Best("accuracy", "max", 1)), [10, 30, 40]),
    "a metric that nothing has": (Keep(newest=1, best=Best("other", "max", 3)), [10, 20, 30, 40]),
    "several": (Keep(newest=1, every=30, best=Best("loss", "min", 1), pinned=frozenset({10})), [20]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_goes(name: str) -> None:
    """Oracle: worked out by hand."""
    keep, dropped = CASES[name]
    assert keep.dropped(SCORES) == dropped


@given(
    st.dictionaries(
        st.integers(1, 500), st.dictionaries(st.sampled_from("ab"), st.floats(-9, 9)), min_size=1
    ),
    st.integers(1, 5),
    st.integers(0, 50),
    st.builds(Best, st.sampled_from("ab"), st.sampled_from(["min", "max"]), st.integers(1, 4)),
    st.frozensets(st.integers(1, 500)),
)
def test_no_rule_ever_drops_the_newest_or_what_another_wants(
    scores: dict[int, dict[str, float]], newest: int, every: int, best: Best, pinned: frozenset[int]
) -> None:
    """Oracle: each rule alone."""
    dropped = set(Keep(newest, every, best, pinned).dropped(scores))
    assert max(scores) not in dropped
    for alone in (Keep(newest), Keep(newest, best=best), Keep(newest, every), Keep(newest, pinned=pinned)):
        assert dropped <= set(alone.dropped(scores))
