"""The reference of every key and the JSON schema, both made from `harness.settings`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from harness import strict_yaml
from harness.settings import Section, Settings, effect_of, section_of

_INTRODUCTION = """\
# Every key of a config

Made by `harness config --reference`; a test keeps it current. `harness config CONFIG` prints what a config
comes to and where each value was written, `harness config --schema` the JSON schema for an editor.

- One YAML file, then `key=value` overrides on the command line:
  `harness train configs/tiny.yaml train.steps=20`.
- `extends: other.yaml` lays the file over another one, one level deep. Mappings are merged key by key, lists
  are replaced.
- Unknown and duplicate keys are errors. Only `true` and `false` are booleans; `1e-3` is a number. Anchors,
  aliases and tags are refused.
- A leading `~/` is the home folder, and a path below it is recorded as `~/…` in run.yaml and every statement.
  No other `~` and no `$` is expanded.
- `run.dir`, `signing.key` and `signing.policy` are relative to the working directory; `data.files`,
  `data.cache` and `tokenizer.file` to the folder of the config that the command names.

**On resume** says what a changed value means for a run that is already on disk: `free` changes no bit of it,
`same-data` keeps the samples and their order but not the rounding, `another run` is refused unless
`--accept config` is given.

The configs here:

- [tiny.yaml](tiny.yaml): the smallest real run, on a CPU in seconds
- [speedrun.yaml](speedrun.yaml), [speedrun-chat.yaml](speedrun-chat.yaml): the models of `speedrun.sh`
- [digits.yaml](digits.yaml): another task than language
- [gpt-124m.yaml](gpt-124m.yaml): GPT-2 small's sizes on GPUs
"""

_EFFECTS = {"operational": "free", "same-data": "same-data", "another-run": "another run"}


def reference() -> str:
    """Markdown: a table for each section, a row for each key."""
    return "\n".join([_INTRODUCTION, *_blocks()])


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a config file; ``extends`` is allowed beside the settings."""
    made = Settings.model_json_schema()
    made["properties"]["extends"] = {
        "type": "string",
        "description": "Another config, relative to this one, over which this one is laid.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def _blocks() -> Iterator[str]:
    single = {name: field for name, field in Settings.model_fields.items() if section_of(name) is None}
    for name in Settings.model_fields:
        section = section_of(name)
        if section is not None:
            about = " ".join((section.__doc__ or "").split())
            yield f"## {name}\n\n{about}\n\n{_table(name, section.model_fields)}\n"
    yield f"## Outside any section\n\n{_table(None, single)}"


def _table(section: str | None, fields: dict[str, FieldInfo]) -> str:
    rows = ["| key | type | default | on resume | meaning |", "|---|---|---|---|---|"]
    for name, field in fields.items():
        key = name if section is None else f"{section}.{name}"
        meaning = " ".join((field.description or "").split())
        cells = (f"`{key}`", _kind(field), _default(field), _EFFECTS[effect_of(key)], meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    return f"`{strict_yaml.write(field.get_default(call_default_factory=True))}`"


def _kind(field: FieldInfo) -> str:
    """The type in words, with its bounds: ``integer > 0``."""
    return _words(field.annotation, list(field.metadata))


def _words(kind: Any, metadata: list[Any]) -> str:
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return _words(inner, [*more, *metadata])
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_words(member, metadata) for member in get_args(kind))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {_words(get_args(kind)[0], [])}"
    if get_origin(kind) is dict:
        return "mapping"
    return " ".join([_name(kind), *_bounds(metadata)])


def _name(kind: Any) -> str:
    if issubclass(kind, Section):
        return "mapping of " + ", ".join(f"`{name}`" for name in kind.model_fields)
    names = {int: "integer", float: "number", bool: "boolean", str: "text", NoneType: "null"}
    return "path" if issubclass(kind, PurePath) else names[kind]


def _bounds(metadata: list[Any]) -> Iterator[str]:
    """Bounds of a number; those of a Field lie in its own metadata."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
        for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            bound = getattr(item, attribute, None)
            if bound is not None and not isinstance(item, FieldInfo):
                yield f"{sign} {bound:g}"
