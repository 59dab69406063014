"""The resolved config: every key with its value and where it came from.

CONFIG is one YAML file, which may name another one that it extends; key=value overrides come last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness import config, strict_yaml
from harness.commands import Outcome
from harness.config_reference import reference, schema
from harness.errors import UsageError
from harness.terminal import style

EXAMPLE = "harness config configs/tiny.yaml train.steps=20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config and its overrides, or one of the two descriptions of all keys."""
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for example train.steps=20"
    )
    described = parser.add_mutually_exclusive_group()
    described.add_argument("--schema", action="store_true", help="print the JSON schema of a config")
    described.add_argument("--reference", action="store_true", help="print the reference of every key")


def run(arguments: argparse.Namespace) -> Outcome:
    """Print the config, the schema or the reference."""
    if arguments.schema:
        return Outcome(schema(), json.dumps(schema(), indent=2, ensure_ascii=False))
    if arguments.reference:
        return Outcome({"reference": reference()}, reference().rstrip("\n"))
    if arguments.config is None:
        raise UsageError("harness config needs a CONFIG", remedy=f"for example: {EXAMPLE}")
    loaded = config.load(arguments.config, arguments.overrides)
    digest = config.digest(config.resolved_text(loaded.settings))
    return Outcome(_document(loaded, digest), _text(loaded, digest))


def _document(loaded: config.Loaded, digest: str) -> dict[str, Any]:
    return {
        "config": loaded.settings.model_dump(mode="json"),
        "origins": dict(loaded.origins),
        "files": [str(path) for path in loaded.files],
        "sha256": digest,
    }


def _text(loaded: config.Loaded, digest: str) -> str:
    rows = [
        (key, strict_yaml.write(value), loaded.origins[key])
        for key, value in config.leaves(loaded.settings).items()
    ]
    keys, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    values = min(values, 40)
    lines = [
        f"{key:<{keys}} = {value:<{values}}  {style(origin, 'dim' if origin == 'default' else 'green')}"
        for key, value, origin in rows
    ]
    return "\n".join([*lines, f"sha256 of the resolved config  {digest}"])
