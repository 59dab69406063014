"""How this process was started, and whether that is what was asked for.

A launcher that quietly starts fewer processes than asked turns an 8-GPU run into a 1-GPU run with other
numbers (`accelerate launch --cpu --num_processes 2` does, and a config file with MULTI_CPU outside mpirun).
So the world size that really runs is compared with every place where one was asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from harness import privacy
from harness.errors import EnvironmentFault

_COUNT_OPTIONS = ("--num_processes", "--num-processes")
_FILE_OPTIONS = ("--config_file", "--config-file")


@dataclass(frozen=True)
class Launch:
    """The processes of this run, and who started them."""

    launcher: str
    """``bare``, ``torchrun`` or ``accelerate``."""
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    command: tuple[str, ...]
    """The command line of this process, home folder written as ``~``."""

    @property
    def nodes(self) -> int:
        """Machines that take part."""
        return max(1, self.world_size // max(1, self.local_world_size))


def detect(expected: int | None = None) -> Launch:
    """Read the launch from the environment; ``expected`` is ``train.world_size``.

    Raises `EnvironmentFault` when the world size is not what the launcher or the config asked for.
    """
    return from_environment(os.environ, _parent_command(), sys.orig_argv, expected)


def from_environment(
    environ: Mapping[str, str], parent: Sequence[str], command: Sequence[str], expected: int | None
) -> Launch:
    """`detect` without looking around: the same from given facts."""
    world_size = _integer(environ, "WORLD_SIZE", 1)
    accelerate = any(name.startswith("ACCELERATE_") for name in environ)
    elastic = "TORCHELASTIC_RUN_ID" in environ
    launcher = "accelerate" if accelerate else "torchrun" if elastic else "bare"
    launch = Launch(
        launcher=launcher if world_size == 1 or launcher != "bare" else "environment",
        rank=_integer(environ, "RANK", 0),
        local_rank=_integer(environ, "LOCAL_RANK", 0),
        world_size=world_size,
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", world_size),
        command=tuple(map(privacy.without_home, command)),
    )
    _check(launch, environ, parent, expected)
    return launch


def _check(launch: Launch, environ: Mapping[str, str], parent: Sequence[str], expected: int | None) -> None:
    asked = _asked_of_parent(parent) if launch.launcher == "accelerate" else None
    if asked is not None and asked != launch.world_size:
        raise EnvironmentFault(
            f"accelerate was asked for {asked} processes and started {launch.world_size}",
            where=" ".join(parent),
            remedy=f"use torchrun --nproc-per-node {asked}, or accelerate's --multi_gpu (also for CPUs)",
        )
    tasks = _integer(environ, "SLURM_NTASKS", 1) if "SLURM_PROCID" in environ else 1
    in_step = environ.get("SLURM_STEP_ID", "").isdigit()
    if launch.launcher == "bare" and in_step and tasks > 1:
        raise EnvironmentFault(
            f"srun started {tasks} tasks that do not know of each other",
            where="SLURM_NTASKS",
            remedy="start one task per node and let it run torchrun (see README, On a cluster)",
        )
    if expected is not None and expected != launch.world_size:
        raise EnvironmentFault(
            f"train.world_size is {expected}, but {launch.world_size} process(es) run",
            where=f"launched by {launch.launcher}",
            remedy=f"launch with torchrun --nproc-per-node {expected} -m harness train …",
        )


def _asked_of_parent(parent: Sequence[str]) -> int | None:
    """How many processes the command line of `accelerate launch`, or its config file, asks for."""
    on_line = _option(parent, _COUNT_OPTIONS)
    if on_line is not None:
        return int(on_line) if on_line.isdigit() else None
    file = _option(parent, _FILE_OPTIONS)
    try:
        document = yaml.safe_load(Path(file or _accelerate_default()).read_bytes())
    except (OSError, yaml.YAMLError):
        return None  # accelerate has read it, or started without one
    count = document.get("num_processes") if isinstance(document, dict) else None
    return count if isinstance(count, int) and count > 0 else None


def _option(words: Sequence[str], names: Sequence[str]) -> str | None:
    for position, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in names:
            return value if equals else "".join(words[position + 1 : position + 2])
    return None


def _accelerate_default() -> Path:
    """Where `accelerate config` writes (accelerate.commands.config.config_args)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", cache)).expanduser() / "accelerate" / "default_config.yaml"


def _parent_command() -> list[str]:
    try:
        data = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode("utf-8", "replace") for word in data.split(b"\0") if word]


def _integer(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name)
    if text is None:
        return default
    if not text.isdigit():
        raise EnvironmentFault(
            f"{name}={text!r} is not a number", where="environment", remedy="use a launcher"
        )
    return int(text)
