"""Predicates of later statements, as an evaluator, a replayer and an auditor write them."""

from __future__ import annotations

from typing import Any

TIME = "2026-11-24T20:00:00Z"


def replay() -> dict[str, Any]:
    """Steps 10 to 20, executed again with the same bits."""
    return {
        "verdict": "equal",
        "reason": "every compared digest is the recorded one",
        "steps": {"from": 10, "to": 20},
        "started_from": {"checkpoint": "a" * 64, "step": 10},
        "compared": [
            {"what": "state", "count": 1, "equal": True, "recorded": "b" * 64, "replayed": "b" * 64},
            {"what": "chain", "count": 10, "equal": True, "recorded": None, "replayed": None},
        ],
        "first_divergence": None,
        "suspects": [],
        "fingerprint": {"same": True, "differences": []},
        "floor": None,
        "checkpoints": [{"checkpoint": "c" * 64, "step": 20}],
        "replayer": {"harness": "0.1.0", "environment": {"python": "3.11.7"}},
        "created": TIME,
    }


def test_result() -> dict[str, Any]:
    """An evaluation on a held-out split."""
    return {
        "result": "PASSED",
        "configuration": [{"name": "held-out", "digest": {"sha256": "d" * 64}}],
        "passedTests": ["loss below 2"],
        "harness_evaluation": {
            "metrics": {"loss": "1.25", "bits_per_byte": "1.8"},
            "examples": 1000,
            "dataset": {"name": "wheel", "split": "held-out", "sha256": "d" * 64},
            "procedure": {"name": "teacher forcing", "version": "1", "settings": {"context": 256}},
            "decoding": {"temperature": "0.0", "max_tokens": 0},
            "environment": {"python": "3.11.7"},
            "created": TIME,
        },
    }


test_result.__test__ = False  # type: ignore[attr-defined]


def svr() -> dict[str, Any]:
    """An auditor has verified the checkpoint."""
    return {
        "verifier": {"id": "https://example.org/auditor/v1"},
        "timeCreated": TIME,
        "properties": ["HARNESS_CHECKPOINT_VERIFIED"],
    }
