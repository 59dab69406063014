"""Chats: what one is, and how a template turns it into text of which some stretches count in the loss.

A template is a Jinja file as `transformers` reads it (``chat_template.jinja``), with ``{% generation %}``
around what the model is to learn to say::

    {%- for message in messages %}
    <|{{ message.role }}|>
    {% generation %}{{ message.content }}{% endgeneration %}
    {%- endfor %}

- ``messages`` and ``add_generation_prompt`` are defined, and ``raise_exception``; another name is an error.
- It runs in Jinja's sandbox with the options of `transformers` (utils/chat_template_utils.py: trim_blocks,
  lstrip_blocks, loop controls), so other tools that read it get the same text.
- What it gives for the messages before the last answer, with ``add_generation_prompt``, must be the text
  before that answer: otherwise the model would be asked in other words than it was trained with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import ConfigError, EnvironmentFault
from harness.settings import ROLES

Message = Mapping[str, str]


@dataclass(frozen=True)
class Stretch:
    """Neighbouring characters that all count in the loss, or all do not."""

    text: str
    counts: bool


def messages_of(value: object, where: str) -> list[dict[str, str]]:
    """The messages of a chat. Raises `ConfigError` unless each has a known role and text, nothing else, and
    one is the assistant's."""
    remedy = "a chat is a list of {role, content}; role is system, user or assistant"
    if not isinstance(value, list) or not value:
        raise ConfigError("no list of messages", where=where, remedy=remedy)
    for number, each in enumerate(value):
        if not isinstance(each, dict) or set(each) != {"role", "content"}:
            raise ConfigError(f"message {number} is no {{role, content}}", where=where, remedy=remedy)
        if each["role"] not in ROLES or not isinstance(each["content"], str):
            raise ConfigError(f"message {number} has another role, or no text", where=where, remedy=remedy)
    if not any(each["role"] == "assistant" for each in value):
        raise ConfigError("no message is the assistant's: nothing to learn", where=where, remedy=remedy)
    return value


def parse(text: bytes, where: str) -> list[dict[str, str]]:
    """The messages in the text of a document. Raises `ConfigError` when there are none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"no chat: {error}", where=where, remedy="use source.kind=chats") from error
    return messages_of(value, where)


def written(messages: Sequence[Message]) -> bytes:
    """The one way to write a chat: what is digested, filtered and looked up as a duplicate.

    Raises `ConfigError` for text that is no Unicode.
    """
    ordered = [{"role": each["role"], "content": each["content"]} for each in messages]
    try:
        return json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"a message is not Unicode: {error.reason}") from error


def read_template(path: Path) -> bytes:
    """The bytes of a template. Raises `ConfigError` when it cannot be read or compiled."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"format.chat cannot be read ({error.strerror})", where=str(path)) from error
    Template(source, str(path))
    return source


class Template:
    """A compiled template.

    Raises `EnvironmentFault` without `jinja2`, `ConfigError` when ``source`` is no template or marks nothing.
    """

    def __init__(self, source: bytes, where: str) -> None:
        self.digest = hashlib.sha256(source).hexdigest()
        self._where = where
        self._jinja = _jinja()
        try:
            self._template = _environment(self._jinja).from_string(source.decode())
        except (UnicodeDecodeError, self._jinja.TemplateError) as error:
            raise ConfigError(f"no template: {error}", where=where, remedy="check format.chat") from error

    def stretches(self, messages: Sequence[Message], where: str) -> list[Stretch]:
        """The text of a chat. Raises `ConfigError` when no character of it counts, or when the template asks
        for the last answer in other words."""
        made = [each for each in self._marked(messages) if each.text]
        if not any(each.counts for each in made):
            raise ConfigError(
                "the template marks nothing of this chat with {% generation %}",
                where=where,
                remedy=self._where,
            )
        if messages[-1]["role"] == "assistant":
            self._require_same_prompt(messages, made, where)
        return made

    def _require_same_prompt(self, messages: Sequence[Message], made: Sequence[Stretch], where: str) -> None:
        last = max(number for number, each in enumerate(made) if each.counts)
        before = "".join(each.text for each in made[:last])
        asked = "".join(each.text for each in self._marked(messages[:-1], prompt=True))
        if asked != before:
            raise ConfigError(
                f"with add_generation_prompt the template ends in {asked[-30:]!r}, before the answer it has "
                f"{before[-30:]!r}",
                where=where,
                remedy=f"make them equal in {self._where}",
            )

    def _marked(self, messages: Sequence[Message], *, prompt: bool = False) -> Iterator[Stretch]:
        # The marks hold a digest of the very text that they stand in, so no text can hold them.
        nonce = hashlib.sha256(written(messages)).hexdigest()
        opening, closing = f"\x02{nonce}", f"\x03{nonce}"
        try:
            text = self._template.render(
                messages=[dict(each) for each in messages],
                add_generation_prompt=prompt,
                raise_exception=self._refuse,
                generation_marks=(opening, closing),
            )
        except self._jinja.TemplateError as error:
            raise ConfigError(f"the template fails: {error}", where=self._where) from error
        before, *marked = text.split(opening)
        yield Stretch(before, False)
        for each in marked:
            inside, *outside = each.split(closing)
            if len(outside) != 1:
                raise ConfigError(
                    "{% generation %} inside another, or changed by a filter", where=self._where
                )
            yield Stretch(inside, True)
            yield Stretch(outside[0], False)

    def _refuse(self, reason: str) -> None:
        raise self._jinja.TemplateError(reason)


def joined(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Neighbours of one kind as one."""
    found: list[Stretch] = []
    for each in stretches:
        if found and found[-1].counts == each.counts:
            found[-1] = Stretch(found[-1].text + each.text, each.counts)
        else:
            found.append(each)
    return found


def _environment(jinja: Any) -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``: puts the marks around what is inside."""

        tags = {"generation"}  # noqa: RUF012  as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = nodes.Name("generation_marks", "load")
            return nodes.CallBlock(self.call_method("_put", [marks]), [], [], body).set_lineno(line)

        def _put(self, marks: tuple[str, str], caller: Any) -> str:
            return f"{marks[0]}{caller()}{marks[1]}"

    return ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja.StrictUndefined,
        extensions=[Generation, loopcontrols],
    )


def _jinja() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise EnvironmentFault("format.chat needs jinja2", remedy="pip install 'harness[train]'") from error
    return jinja2
