"""The settings: every key documented, bounded and marked with its effect on a resume."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from harness import settings
from harness.settings import Settings, effect_of, field_of, section_of

NEEDED: dict[str, Any] = {"run": {"dir": "x"}, "train": {"steps": 1, "global_batch": 1, "micro_batch": 1}}
SECTIONS = [name for name in Settings.model_fields if section_of(name) is not None]
KEYS = [
    *(name for name in Settings.model_fields if section_of(name) is None),
    *(f"{name}.{key}" for name in SECTIONS for key in section_of(name).model_fields),  # type: ignore[union-attr]
]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_documented_and_has_an_effect(key: str) -> None:
    """Oracle: the field's own text; the reference and the schema are made from it."""
    text = field_of(key).description or ""
    assert text.endswith(".")
    assert text[0].isupper() or text[0] == "`"
    assert effect_of(key) in ("operational", "same-data", "another-run")


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_says_what_it_is_for(name: str) -> None:
    """Oracle: its docstring."""
    section = section_of(name)
    assert section is not None
    assert (section.__doc__ or "").strip().endswith(".")


def test_a_misspelt_effect_would_be_the_strictest() -> None:
    """Oracle: every mark in the table is one of the two that loosen; all else is another run."""
    marks = {
        str(extra["resume"])
        for key in KEYS
        if isinstance(extra := field_of(key).json_schema_extra, dict) and "resume" in extra
    }
    assert marks == {"operational", "same-data"}
    assert effect_of("task.options.anything") == "another-run"
    with pytest.raises(KeyError):
        effect_of("train.nothing")


def test_settings_do_not_change() -> None:
    """Oracle: pydantic's frozen models, at both levels."""
    made = Settings.model_validate(NEEDED)
    with pytest.raises(ValidationError):
        made.precision = "bf16"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        made.train.steps = 2  # type: ignore[misc]


def test_only_the_language_task_has_its_sections() -> None:
    """Oracle: docs/tasks.md: a task brings its own model and data."""
    language = Settings.model_validate(NEEDED)
    assert all(getattr(language, name) is not None for name in settings.LANGUAGE_SECTIONS)
    other = Settings.model_validate({**NEEDED, "task": {"kind": "digits"}})
    assert all(getattr(other, name) is None for name in settings.LANGUAGE_SECTIONS)
    with pytest.raises(ValidationError, match="takes no section model"):
        Settings.model_validate({**NEEDED, "task": {"kind": "digits"}, "model": {}})


def test_a_run_is_called_after_its_folder_until_it_has_a_name() -> None:
    """Oracle: both cases."""
    assert Settings.model_validate({**NEEDED, "run": {"dir": "runs/a"}}).run_name == "a"
    assert Settings.model_validate({**NEEDED, "run": {"dir": "runs/a", "name": "b"}}).run_name == "b"
    for unnamed in (".", "/", "..", "a/.."):
        with pytest.raises(ValidationError, match="gives the run no name"):
            Settings.model_validate({**NEEDED, "run": {"dir": unnamed}})
        assert Settings.model_validate({**NEEDED, "run": {"dir": unnamed, "name": "b"}}).run_name == "b"


@pytest.mark.parametrize("text", ["~/run", "$HOME/run", "a/$x", "", "a\nb", "a\x1b[2J", "\u2028"])
def test_a_path_is_neither_expanded_nor_a_trick_for_the_screen(text: str) -> None:
    """Oracle: an error, so that run.yaml and every line of output say what was used."""
    with pytest.raises(ValidationError):
        Settings.model_validate({**NEEDED, "run": {"dir": text}})
