"""A user's own class by import path, ``package.module:Class``.

The folder of the config is on ``sys.path`` while the module is imported, and only then: a module beside the
config is found, and an import that happens later, inside a function, must find its own way. What lay beside
one config is imported anew for another, which may have modules of the same names.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from harness.errors import ConfigError

_beside: dict[str, str] = {}
"""Imported modules that lay beside a config → the folder of that config."""


def load_class(import_path: str, base: Path, key: str, built_in: Sequence[str] = ()) -> type[Any]:
    """The class at ``import_path``, modules beside ``base`` included; ``key`` is the config key it is from.

    ``built_in`` are the short names the key also takes, for the error of a misspelt one.

    Raises `ConfigError` when the path is malformed, the import fails or there is no such class.
    """
    module_name, _, class_name = import_path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
        hint = f"{nearest(import_path, built_in)} or an import path, package.module:Class"
        raise ConfigError(f"{key} {import_path!r} is not known", remedy=hint)
    try:
        with _importable(base):
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script's exit code would be taken for the run's
        raise ConfigError(
            f"{key} {import_path!r} cannot be imported: {type(error).__name__}: {error}",
            remedy=f"the module must be installed or lie in {base}",
        ) from error
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        names = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise ConfigError(
            f"{key} {import_path!r}: no class {class_name!r} there", remedy=nearest(class_name, names)
        )
    return found


def check_arguments(kind: type[Any], arguments: Mapping[str, Any], key: str) -> None:
    """Raise `ConfigError` unless ``kind(**arguments)`` is a call that its constructor takes.

    ``key`` is the config key the arguments come from.
    """
    signature = inspect.signature(kind)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        unknown = [name for name in arguments if name not in signature.parameters]
        hint = nearest(unknown[0], list(signature.parameters)) if unknown else f"set it under {key}"
        raise ConfigError(f"{key} does not fit {kind.__name__}: {error}", remedy=hint) from error


def source_digest(kind: type[Any]) -> str:
    """Hex sha256 of the file that defines ``kind``."""
    try:
        path = Path(inspect.getfile(kind))
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (TypeError, OSError) as error:
        raise ConfigError(
            f"the source of {kind.__module__}:{kind.__qualname__} cannot be read: {error}",
            remedy="keep it in a .py file: its digest goes into every checkpoint",
        ) from error


def nearest(name: str, names: Sequence[str]) -> str:
    """A remedy that names the candidate nearest to ``name``, or all of them."""
    close = get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(sorted(names)) or 'nothing'}"


@contextmanager
def _importable(base: Path) -> Iterator[None]:
    entry = str(base.resolve())
    for name in [name for name, folder in _beside.items() if folder != entry]:
        sys.modules.pop(name, None)
        del _beside[name]
    before = set(sys.modules)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)
        for name in set(sys.modules) - before:
            top = name.partition(".")[0]
            if top not in before and PathFinder.find_spec(top, [entry]) is not None:
                _beside[name] = entry
