"""What pydantic finds wrong with a config, as one line: key, value, rule, place and remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from harness.errors import ConfigError
from harness.settings import Section, Settings, section_of

_RULES = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text; quote it",
    "list_type": "must be a list, [a, b]",
    "dict_type": "must be a mapping of keys",
    "model_type": "must be a section of keys",
    "path_type": "must be a path",
    "finite_number": "must be finite",
}


def explain(
    error: ValidationError,
    places: Mapping[tuple[str, ...], str],
    where: str,
    model: type[Section] = Settings,
) -> ConfigError:
    """The first problem of ``error`` in full, the keys of the others by name.

    ``places`` tells where each key was written; ``where`` names the file as a whole; ``model`` is what the
    file was read as.
    """
    problems: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        problems.setdefault(_keys(details, model), []).append(details)
    # What is there and wrong comes first: a key that is missing may be the one that was misspelt.
    keys, *others = sorted(problems, key=lambda each: problems[each][0]["type"] == "missing")
    place = _place(keys, places, where)
    more = f" (and {len(others)} more: {_listed(others)})" if others else ""
    what, remedy = _problem(keys, problems[keys], model)
    return ConfigError(f"{what}{more}", where=place, remedy=remedy)


def nearest_file(path: Path) -> str | None:
    """A remedy that names the config in the same folder whose name is nearest to ``path``."""
    try:
        names = sorted(each.name for each in path.parent.glob("*.y*ml"))
    except (OSError, ValueError):
        return None
    close = get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else None


def _keys(details: ErrorDetails, model: type[Section]) -> tuple[str, ...]:
    """The key that a problem is about; a part of a location that is no key names a member of a union."""
    named = details.get("ctx", {}).get("key")
    if named is not None:
        return tuple(str(named).split("."))
    location = [str(part) for part in details["loc"]]
    section = model.model_fields
    if location and location[0] in section and section_of(location[0], model) is None:
        return (location[0],)
    return tuple(location[:2])


def _problem(
    keys: tuple[str, ...], found: Sequence[ErrorDetails], model: type[Section]
) -> tuple[str, str | None]:
    first, name = found[0], _clipped(".".join(keys))
    if first["type"] == "extra_forbidden":
        return f"unknown key {name!r}", _nearest_key(keys, model)
    if first["type"] == "missing":
        return f"{name} is missing", f"add it to the file, or give {name}=… on the command line"
    if first["type"] == "disagreement":
        return str(first["ctx"]["text"]), None
    rules = list(dict.fromkeys(map(_rule, found)))
    value = _clipped(repr(first["input"]))
    rule = " or ".join([rules[0], *(each.removeprefix("must be ") for each in rules[1:])])
    return f"{name} = {value}: {rule}", _nearest_word(found)


def _rule(details: ErrorDetails) -> str:
    if details["type"] == "literal_error":
        return f"must be {details['ctx']['expected']}"
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input should be")
    return _RULES.get(details["type"], f"must be{message}" if message.startswith(" ") else message)


def _nearest_key(keys: tuple[str, ...], model: type[Section]) -> str | None:
    """The nearest key of the same section, else the section that has a key of that name."""
    section = section_of(keys[0], model) if len(keys) > 1 else model
    siblings = [] if section is None else list(section.model_fields)
    close = get_close_matches(keys[-1], siblings, n=1)
    if close:
        return f"did you mean {'.'.join((*keys[:-1], close[0]))!r}?"
    elsewhere = [
        f"{name}.{keys[-1]}"
        for name in model.model_fields
        if (other := section_of(name, model)) is not None and keys[-1] in other.model_fields
    ]
    if elsewhere:
        return f"did you mean {elsewhere[0]!r}?"
    return f"choose from {', '.join(siblings)}" if siblings else None


def _nearest_word(found: Iterable[ErrorDetails]) -> str | None:
    for details in found:
        if details["type"] == "literal_error" and isinstance(details["input"], str):
            words = [word.strip(" '") for word in details["ctx"]["expected"].replace(" or ", ",").split(",")]
            close = get_close_matches(details["input"], words, n=1)
            if close:
                return f"did you mean {close[0]!r}?"
    return None


def _place(keys: tuple[str, ...], places: Mapping[tuple[str, ...], str], where: str) -> str:
    """Where the key was written, else a key inside it, else the section above it."""
    inside = (place for known, place in places.items() if known[: len(keys)] == keys)
    above = (places[keys[:length]] for length in range(len(keys) - 1, 0, -1) if keys[:length] in places)
    return next((place for found in ((places.get(keys),), inside, above) for place in found if place), where)


def _listed(keys: Sequence[tuple[str, ...]]) -> str:
    shown = ", ".join(_clipped(".".join(each)) for each in keys[:3])
    return shown if len(keys) <= 3 else f"{shown}, …"


def _clipped(text: Any) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
