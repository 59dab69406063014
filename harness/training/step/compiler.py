"""What code that torch.compile generates for a CPU is compiled with. Needs no torch."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from harness.errors import EnvironmentFault

HEADER = "Python.h"


def lack() -> tuple[str, str] | None:
    """What is missing, and what to do; None where nothing is.

    Source: `torch._inductor.config.cpp.cxx` and `torch._inductor.cpp_builder` of torch 2.13, whose own error
    is the output of the compiler.
    """
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        what = f"no C++ compiler {name} is on PATH"
        return what, "install one (Debian, Ubuntu: g++), name one in CXX, or set compile=false"
    include = Path(sysconfig.get_path("include"))
    if not (include / HEADER).is_file():
        what = f"{include} has no {HEADER}"
        return what, "install Python's headers (Debian, Ubuntu: python3-dev), or set compile=false"
    return None


def require() -> None:
    """Raise `EnvironmentFault` unless generated code can be compiled."""
    found = lack()
    if found is not None:
        what, remedy = found
        raise EnvironmentFault(f"{what}, which compiled code on a CPU needs", where="compile", remedy=remedy)
