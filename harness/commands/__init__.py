"""The verbs of the command line, one module each, imported only when called.

A module has ``EXAMPLE`` (a command that works), ``add_arguments(parser)`` and ``run(arguments)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a verb came to."""

    document: Mapping[str, Any]
    """What ``--json`` prints: one object of plain JSON types."""
    text: str
    """What a person reads; empty when it was printed along the way."""
    exit_code: int = 0
    """0 good, 1 found bad, 2 usage, 3 environment, 4 cannot tell, 75 interrupted and saved."""
    silent: bool = False
    """Whether another rank prints it."""
