"""The recipe of `harness prepare`: which raw files, what is done to their text, and what becomes of it.

Read by the rules of `harness.config`: one YAML file, at most one ``extends``, then ``a.b=c`` overrides.
``source.files`` and ``tokenizer.file`` are relative to the folder of the recipe, ``out`` and ``signing.key``
to the working directory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StrictBool, StrictStr, model_validator

from harness import config, strict_yaml
from harness.settings import (
    CHATS,
    OPERATIONAL,
    WHEEL,
    Data,
    Fraction,
    Number,
    Positive,
    Section,
    Signing,
    Tokenizer,
    Word,
    WrittenPath,
    WrittenPattern,
    disagreement,
    require_read,
)

_PLACES = re.compile(r"\{(.*?)\}")
_HUB = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", re.ASCII)


def _pattern(value: Any) -> Any:
    try:
        re.compile(value)
    except (TypeError, re.error) as error:
        raise ValueError(f"must be a regular expression: {error}") from error
    return value


def _template(value: Any) -> Any:
    if isinstance(value, str) and (
        "text" not in _PLACES.findall(value) or set(_PLACES.findall(value)) - {"text", "name"}
    ):
        raise ValueError("must hold {text}, and may hold {name}, in braces")
    return value


def _hub(value: Any) -> Any:
    if isinstance(value, str) and not _HUB.fullmatch(value):
        raise ValueError("must be OWNER/NAME@COMMIT with the 40 digits of a commit; a branch moves")
    return value


class Source(Section):
    """The raw files."""

    kind: Word = WHEEL
    """`wheel` (the .py files of installed packages, checked against RECORD), `text`, `jsonl`, `parquet`,
    `chats` (JSON lines whose field holds a list of messages), or the import path of a user's own corpus."""
    packages: list[Word] = Field(default_factory=lambda: ["torch"])
    """For `wheel`: names of the installed distributions."""
    files: list[WrittenPattern] = Field(default_factory=list)
    """For the file kinds: paths or glob patterns, relative to the recipe, or inside the `hub` dataset."""
    field: Word = "text"
    """For `jsonl` and `parquet`: the field that holds the document's text; for `chats`: the messages."""
    hub: Annotated[StrictStr, BeforeValidator(_hub)] | None = None
    """`OWNER/NAME@COMMIT`: a Hugging Face dataset, whose `files` are downloaded first; needs a network."""
    limit_bytes: Positive | None = None
    """Use whole files, in order, until so many bytes are reached; all of them when null."""

    @model_validator(mode="after")
    def _files_are_read(self) -> Source:
        require_read("source", self.kind, self.files)
        return self


class Format(Section):
    """What is done to each document's text, in this order, before any filter sees it."""

    newlines: Literal["keep", "lf"] = "keep"
    """`lf` turns CR LF and CR into LF."""
    unicode: Literal["keep", "nfc"] = "keep"
    """`nfc` composes characters (Unicode normalization form C)."""
    strip: StrictBool = False
    """Whether white space at both ends goes."""
    template: Annotated[StrictStr, BeforeValidator(_template)] = "{text}"
    """The document, with `{text}` and perhaps `{name}`, its name in the source."""
    chat: WrittenPath | None = None
    """The Jinja template of chats, relative to the recipe: documents are lists of messages, and only what the
    template has between `{% generation %}` and `{% endgeneration %}` counts in the loss."""

    @model_validator(mode="after")
    def _one_template(self) -> Format:
        if self.chat is not None and self.template != "{text}":
            raise disagreement("format.template", "format.template and format.chat are both set; choose one")
        return self


class Filters(Section):
    """Which documents are dropped. They are asked in this order, and the first that fits is counted."""

    min_bytes: Positive = 1
    """Shorter documents are dropped."""
    max_bytes: Positive | None = None
    """Longer documents are dropped."""
    ascii_share: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Documents with a smaller share of ASCII bytes are dropped."""
    drop: list[Annotated[StrictStr, BeforeValidator(_pattern)]] = Field(default_factory=list)
    """Regular expressions (Python's); a document in which one is found is dropped."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Whether a document whose bytes have been there before, in the order of the files, is dropped."""


class Recipe(Section):
    """A prepared corpus."""

    out: WrittenPath = Field(json_schema_extra=OPERATIONAL)
    """Folder that is made, relative to the working directory."""
    name: Word | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """Name in the statement and in policies; the folder's name when null."""
    source: Source = Source()
    format: Format = Format()
    filters: Filters = Filters()
    tokenizer: Tokenizer = Tokenizer()
    validation: Fraction = 0.05
    """Share of the documents held out: those whose sha256 begins with the smallest numbers."""
    shard_bytes: Positive = 64 << 20
    """Bytes of raw files that become one shard of each split; a larger file has one of its own."""
    license: Word | None = None
    """Licence of the text, for those who read the manifest."""
    url: Word | None = None
    """Where the text comes from."""
    workers: Positive | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """Processes; as many as the CPUs when null. The bytes are the same at any number."""
    signing: Signing = Field(default=Signing(), json_schema_extra=OPERATIONAL)

    @model_validator(mode="after")
    def _chats_have_a_template(self) -> Recipe:
        if self.source.kind == CHATS and self.format.chat is None:
            raise disagreement("format.chat", "source.kind chats needs a template; set format.chat")
        return self

    @property
    def data(self) -> Data:
        """The source as the section `data` of a run."""
        source = self.source
        return Data(kind=source.kind, packages=source.packages, files=source.files, field=source.field)

    @property
    def title(self) -> str:
        """The name, or the folder's."""
        return self.name or self.out.name


def load(path: Path, overrides: list[str]) -> Recipe:
    """The recipe at ``path``. Raises `ConfigError`."""
    return config.load_as(Recipe, path, overrides)


def text_of(recipe: Recipe) -> str:
    """Every key on which the bytes of the corpus depend, as YAML."""
    lines = []
    for name, field in Recipe.model_fields.items():
        if field.json_schema_extra == OPERATIONAL:
            continue
        value = getattr(recipe, name)
        plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        lines.append(f"{name}: {strict_yaml.write(plain)}\n")
    return "".join(lines)
