"""Reading configs: one YAML file, at most one level of ``extends``, then ``a.b=c`` overrides.

- an unknown or duplicate key is an error with file, line and the nearest name; nothing is ignored
- a later layer wins, mappings are merged key by key, lists are replaced whole: the file that ``extends``
  names, the file, the overrides
- the value of an override is read by the same rules as in the file (`harness.strict_yaml`)
- ``data.files``, ``data.cache`` and ``tokenizer.file`` are relative to the folder of the config that the
  command names; ``run.dir``, ``signing.key`` and
  ``signing.policy`` to the working directory
- a string that begins with ``~/`` is a path below the home folder; the resolved text writes it so again
- the resolved text holds every key, loads back to equal settings, and its sha256 is in every statement

Example::

    loaded = load(Path("configs/tiny.yaml"), ["train.steps=20"])
    loaded.settings.train.steps        # 20
    loaded.origins["train.steps"]      # 'override'
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from harness import privacy, strict_yaml
from harness.config_errors import explain, nearest_file
from harness.errors import ConfigError, unreadable_input
from harness.settings import Effect, Section, Settings, effect_of
from harness.strict_yaml import Path as Keys

EXTENDS = "extends"

Kind = TypeVar("Kind", bound=Section)


@dataclass(frozen=True)
class Loaded:
    """A config that was read and checked."""

    settings: Settings
    origins: Mapping[str, str]
    """Key to where its value came from: ``tiny.yaml:4``, ``base.yaml:3 (extends)``, ``override`` or
    ``default``."""
    files: tuple[Path, ...]
    """What was read: the file, then the one it extends."""

    @property
    def path(self) -> Path:
        """The config that the command named; its folder is the base of ``data.files``."""
        return self.files[0]


@dataclass(frozen=True)
class Difference:
    """A key with another value than before; None also stands for a key that is not there."""

    key: str
    before: Any
    after: Any
    effect: Effect
    """What it means for a run that is already on disk."""


@dataclass
class _Layers:
    """Values merged so far, and where each key was written."""

    value: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, str] = field(default_factory=dict)
    """Full place of a key, for errors: ``configs/tiny.yaml:4``."""
    origins: dict[Keys, str] = field(default_factory=dict)
    """The same, short."""

    def add(self, value: Mapping[str, Any], places: Mapping[Keys, tuple[str, str]]) -> None:
        """Lay ``value`` over what is there."""
        for name, inner in value.items():
            known = self.value.get(name)
            if known is not None and isinstance(known, dict) != isinstance(inner, dict) and inner is not None:
                place = next(place for keys, (place, _) in places.items() if keys[0] == name)
                kinds = ("a section", "a value") if isinstance(known, dict) else ("a value", "a section")
                raise ConfigError(f"{name} is {kinds[0]}, not {kinds[1]}", where=place)
        self._merge(self.value, value, ())
        for keys, (place, origin) in places.items():
            self.places[keys], self.origins[keys] = place, origin

    def _merge(self, below: dict[str, Any], above: Mapping[str, Any], keys: Keys) -> None:
        for name, value in above.items():
            inner = (*keys, name)
            if isinstance(value, dict) and isinstance(below.get(name), dict):
                self._merge(below[name], value, inner)
                continue
            if name in below:
                self._forget(inner)
            below[name] = value

    def _forget(self, keys: Keys) -> None:
        """Places below ``keys`` are gone with the mapping that is replaced."""
        for known in [known for known in self.places if known[: len(keys)] == keys]:
            del self.places[known], self.origins[known]


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read the config at ``path`` and lay ``overrides`` (``train.steps=20``) over it.

    Raises `ConfigError` with file and line, or the override, for everything that is not understood.
    """
    layers, files = _read_layers(path, overrides)
    settings = _validate(layers, str(path), Settings)
    if len(resolved_text(settings).encode()) > strict_yaml.LIMIT_BYTES:
        raise ConfigError(
            f"the resolved config is larger than {strict_yaml.LIMIT_BYTES} bytes", where=str(path)
        )
    return Loaded(settings, _origins(settings, layers.origins), tuple(files))


def load_as(kind: type[Kind], path: Path, overrides: Sequence[str] = ()) -> Kind:
    """A config of another ``kind`` than a run's, by the same rules as `load`."""
    layers, _ = _read_layers(path, overrides)
    return _validate(layers, str(path), kind)


def _read_layers(path: Path, overrides: Sequence[str]) -> tuple[_Layers, list[Path]]:
    """The file at ``path``, what it extends and ``overrides``, laid over each other; the files read."""
    document = _read_file(path)
    files = [path]
    layers = _Layers()
    base = document.value.pop(EXTENDS, None)
    if base is not None:
        files.append(_add_base(layers, path, base, document.lines[(EXTENDS,)]))
    layers.add(document.value, _places(path, document.lines))
    for override in _parse_overrides(overrides):
        layers.add(override.value, dict.fromkeys(override.written, (override.where, "override")))
    return layers, files


def parse(text: str, where: str) -> Settings:
    """The settings of a resolved config, such as the text of run.yaml; ``where`` names it in errors."""
    document = strict_yaml.read(text, where)
    layers = _Layers()
    layers.add(_mapping(document.value, where), _places(Path(where), document.lines))
    return _validate(layers, where, Settings)


def resolved_text(settings: Section) -> str:
    """Every key with its value as YAML, in the order of the schema; `parse` gives equal settings back."""
    lines: list[str] = []
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if not isinstance(value, BaseModel):
            lines.append(f"{name}: {_written(value)}")
            continue
        lines.append(f"{name}:")
        lines += [f"  {key}: {_written(_plain(getattr(value, key)))}" for key in type(value).model_fields]
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    return strict_yaml.write(privacy.abbreviated(value))


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Section) else value


def digest(text: str) -> str:
    """Hex sha256 of a resolved config's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def leaves(settings: Settings) -> dict[str, Any]:
    """Every key with its value: ``train.steps``, ``task.options.width``; an absent section is null."""
    found: dict[str, Any] = {}
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if not isinstance(value, BaseModel):
            found[name] = value
            continue
        for key in type(value).model_fields:
            inner = _plain(getattr(value, key))
            if isinstance(inner, Mapping) and inner:
                found |= {f"{name}.{key}.{option}": inner[option] for option in inner}
            else:
                found[f"{name}.{key}"] = inner
    return found


def compare(old: Settings, new: Settings) -> list[Difference]:
    """The keys whose values differ, in the order of the schema, each with its effect on a resume."""
    before, after = leaves(old), leaves(new)
    # A section or option mapping that is empty on one side is compared by what the other side holds.
    keys = [key for key in {**before, **after} if not _stands_for_none(key, before, after)]
    return [
        Difference(key, before.get(key), after.get(key), effect_of(key))
        for key in keys
        if (key in before) != (key in after) or not _equal(before[key], after[key])
    ]


def _equal(one: Any, other: Any) -> bool:
    """Equal values of equal kind: an option 1 is neither 1.0 nor true."""
    return strict_yaml.write(one) == strict_yaml.write(other)


def _stands_for_none(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return any(
        not one.get(key, True) and any(name.startswith(f"{key}.") for name in other)
        for one, other in ((before, after), (after, before))
    )


def _read_file(path: Path) -> strict_yaml.Document:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError("a config is a file", where=str(path))
        with path.open("rb") as file:
            data = file.read(strict_yaml.LIMIT_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError("no such config", where=str(path), remedy=nearest_file(path)) from error
    except OSError as error:
        raise unreadable_input(error, "the config", path, "check the path and its permissions") from error
    except ValueError as error:
        raise ConfigError(f"the config cannot be read: {error}", where=str(path)) from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError("not UTF-8", where=f"{path}:{line}") from error
    document = strict_yaml.read(text, str(path))
    return strict_yaml.Document(_mapping(document.value, str(path)), document.lines)


def _add_base(layers: _Layers, path: Path, base: Any, line: int) -> Path:
    """Read the file that ``path`` extends into ``layers``."""
    where = f"{path}:{line}"
    if not isinstance(base, str):
        raise ConfigError("extends names one other config", where=where)
    target = path.parent / base
    try:
        document = _read_file(target)
    except ConfigError as error:
        if error.where != str(target):
            raise
        raise ConfigError(f"extends {base!r}: {error.what}", where=where, remedy=error.remedy) from error
    if EXTENDS in document.value:
        raise ConfigError(
            f"{base} extends another config itself; one level only",
            where=f"{target}:{document.lines[(EXTENDS,)]}",
            remedy="merge the two",
        )
    layers.add(document.value, _places(target, document.lines, " (extends)"))
    return target


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        found = "nothing" if value is None else type(value).__name__
        raise ConfigError(f"a config is a mapping of sections, found {found}", where=f"{where}:1")
    return value


def _places(path: Path, lines: Mapping[Keys, int], note: str = "") -> dict[Keys, tuple[str, str]]:
    return {keys: (f"{path}:{line}", f"{path.name}:{line}{note}") for keys, line in lines.items()}


@dataclass(frozen=True)
class _Override:
    where: str
    """As errors name it: ``override train.steps=20``."""
    keys: Keys
    value: dict[str, Any]
    """The whole tree, from the first key."""
    written: tuple[Keys, ...]
    """Every key that is set, those inside a mapping included."""


def _parse_overrides(texts: Sequence[str]) -> list[_Override]:
    parsed: list[_Override] = []
    for text in texts:
        one = _parse_override(text)
        for other in parsed:
            shorter = min(len(one.keys), len(other.keys))
            if one.keys[:shorter] == other.keys[:shorter]:
                raise ConfigError(
                    f"{'.'.join(one.keys)} is overridden twice",
                    where=one.where,
                    remedy=f"remove it or {other.where.removeprefix('override ')}",
                )
        parsed.append(one)
    return parsed


def _parse_override(text: str) -> _Override:
    where = f"override {_clipped(text)}"
    key, equals, written = text.partition("=")
    keys = tuple(key.split("."))
    if not equals or not all(keys) or any(len(name) > strict_yaml.LIMIT_KEY for name in keys):
        raise ConfigError("an override is written key=value", where=where, remedy="train.steps=20")
    if len(keys) > strict_yaml.LIMIT_LEVELS:
        raise ConfigError("the key has too many parts", where=where)
    if not written.strip():
        raise ConfigError(
            "an override needs a value", where=where, remedy=f"write {key}=null, or {key}='\"\"'"
        )
    try:
        document = strict_yaml.read(written, "override", len(keys))
    except ConfigError as error:
        raise ConfigError(error.what, where=where, remedy=error.remedy) from error
    value = document.value
    for name in reversed(keys):
        value = {name: value}
    return _Override(where, keys, value, (keys, *((*keys, *inner) for inner in document.lines)))


def _clipped(text: str) -> str:
    # An argument that is no UTF-8 holds lone surrogates, which cannot be printed.
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def _validate(layers: _Layers, where: str, kind: type[Kind]) -> Kind:
    try:
        return kind.model_validate(privacy.expanded(layers.value))
    except ValidationError as error:
        raise explain(error, layers.places, where, kind) from error


def _origins(settings: Settings, origins: Mapping[Keys, str]) -> dict[str, str]:
    written = {".".join(keys): origin for keys, origin in origins.items()}
    return {key: written.get(key, "default") for key in leaves(settings)}
