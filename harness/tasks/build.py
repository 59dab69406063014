"""The task of a config: built in, or the user's own by import path."""

from __future__ import annotations

import inspect
from pathlib import Path

from harness.data.extensions import check_arguments, load_class, source_digest
from harness.errors import ConfigError
from harness.settings import Settings
from harness.tasks.task import Task

BUILT_IN = ("language", "digits")


def build(settings: Settings, base: Path) -> Task:
    """The task of ``settings``, ready to train; ``base`` is the folder of the config.

    Raises `ConfigError` for an unknown kind or options that do not fit, and what the task itself raises.
    """
    kind, options = settings.task.kind, settings.task.options
    if kind == "language":
        return _language(settings, base)
    task = _class(kind, base)
    if "seed" in options:
        raise ConfigError("task.options.seed is run.seed", remedy="set run.seed")
    check_arguments(task, {"seed": settings.run.seed, **options}, "task.options")
    return task(seed=settings.run.seed, **options)


def source(settings: Settings, base: Path) -> tuple[str, str] | None:
    """Import path and hex sha256 of the file that defines a user's own task; None for a built-in one."""
    kind = settings.task.kind
    return None if kind in BUILT_IN else (kind, source_digest(_class(kind, base)))


def _language(settings: Settings, base: Path) -> Task:
    from harness.data.cache import prepare
    from harness.tasks.chat import Chat
    from harness.tasks.language import Language

    if settings.task.options:
        raise ConfigError(
            f"the language task has no option {next(iter(settings.task.options))!r}",
            remedy="its settings are the sections model, data and tokenizer",
        )
    if settings.model is None or settings.data is None:
        raise ConfigError("the language task needs the sections model and data")
    tokens = prepare(settings.data, settings.tokenizer, base)
    if tokens.counted is not None:
        return Chat(model=settings.model, data=settings.data, tokens=tokens, counted=tokens.counted)
    return Language(model=settings.model, data=settings.data, tokens=tokens)


def _class(kind: str, base: Path) -> type[Task]:
    if kind == "digits":
        from harness.tasks.digits import Digits

        return Digits
    found = load_class(kind, base, "task.kind", BUILT_IN)
    if not issubclass(found, Task):
        raise ConfigError(f"task.kind {kind!r} is no harness.tasks.task.Task", remedy="subclass it")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"task.kind {kind!r} lacks {missing}", remedy="define them")
    return found
