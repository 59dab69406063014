"""How many CPU cores this process may use."""

from __future__ import annotations

import os


def process_cpu_count() -> int:
    """Cores that this process may run on, as `os.process_cpu_count` of Python 3.13 has it.

    All of the host's where the system does not say, as on macOS.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
