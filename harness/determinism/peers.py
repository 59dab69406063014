"""Who asks how many ranks there are, or talks to them: seen by Python's profiler while code runs.

    with Peers() as peers:
        task.loss(model, batch).backward()
    peers.asked(own=("/home/me/own_task.py",))      # ["`get_world_size` at own_task.py:12 loss"]

What asks for rank or world size, by torch.distributed, its process groups and device meshes, by rows of a
DTensor, by accelerate's state or by the variables of a launcher, counts where it is called by a person's own
code: libraries ask for many reasons, and torch itself at every turn. A collective
counts whoever begins it, but for FSDP2, whose own sums do not depend on who shares the work.

Not seen: what C++ does, what a compiled region has asked when it was traced, and on a GPU what a hook does
in the backward pass, which runs in threads of its own.
"""

from __future__ import annotations

import inspect
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
import torch.distributed as dist

VARIABLES = frozenset(
    {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK"}
    | {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"}
    | {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NNODES"}
    | {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "PMI_SIZE"}
)
"""Of torchrun (torch.distributed.run), Slurm (sbatch), Open MPI (mpirun) and MPICH."""
_QUESTIONS = frozenset({"get_rank", "get_world_size", "get_node_local_rank", "is_initialized"})
_OF_A_GROUP = frozenset({"rank", "size"})
_OF_A_MESH = frozenset({"get_rank", "get_local_rank", "get_coordinate", "size", "shape", "get_group"})
_OF_A_TENSOR = frozenset({"to_local", "device_mesh", "placements"})
_COLLECTIVES = (
    *("all_reduce", "all_gather", "all_to_all", "reduce", "broadcast", "gather", "scatter"),
    *("send", "recv", "isend", "irecv", "batch_"),
)
"""How torch.distributed and its functional collectives begin their names, which change: 2.13 has
`all_gather_single` for `all_gather_into_tensor`."""
_TORCH = os.path.dirname(torch.__file__) + os.sep
_C10D = inspect.getfile(dist.distributed_c10d)
_FUNCTIONAL = os.path.join(_TORCH, "distributed", "_functional_collectives.py")
_MESH = os.path.join(_TORCH, "distributed", "device_mesh.py")
_DTENSOR = os.path.join(_TORCH, "distributed", "tensor", "_api.py")
_ACCELERATE = os.path.join("accelerate", "state.py")
_FSDP = os.path.join(_TORCH, "distributed", "fsdp") + os.sep
_ENVIRONMENT = type(os.environ).__getitem__.__code__
_MAPPINGS = (_ENVIRONMENT.co_filename, inspect.unwrap(Mapping.get).__code__.co_filename)
"""What stands between `os.environ` and whoever reads it: os.getenv, get, in."""


class Peers(AbstractContextManager["Peers"]):
    """Notes questions and collectives of this thread while entered."""

    def __init__(self) -> None:
        self._questions: dict[tuple[str, str, int, str], None] = {}
        self._collectives: dict[str, None] = {}
        self._before: Any = None

    def __enter__(self) -> Peers:
        self._before = sys.getprofile()
        sys.setprofile(self._called)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self._before)

    def asked(self, own: Sequence[str] = ()) -> list[str]:
        """Who asked for rank or world size, each once; ``own``: files and folders that count although they
        lie among installed packages."""
        return [
            f"{what} at {os.path.basename(file)}:{line} {function}"
            for what, file, line, function in self._questions
            if is_own(file, own)
        ]

    def sent(self) -> list[str]:
        """Who began a collective, each once."""
        return list(self._collectives)

    def _called(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            name = argument.__name__
            if name in _OF_A_GROUP and "ProcessGroup" in (argument.__doc__ or ""):
                self._question(f"`{name}` of a process group", frame)
            return
        if event != "call":
            return
        code = frame.f_code
        if code is _ENVIRONMENT:
            name = frame.f_locals.get("key")
            name = os.fsdecode(name) if isinstance(name, bytes) else name  # of os.environb
            if name in VARIABLES:
                self._question(f"${name}", _outside(frame, _MAPPINGS))
        elif code.co_filename == _C10D:
            if code.co_name in _QUESTIONS:
                self._question(f"`{code.co_name}`", frame.f_back)
            elif _is_collective(code.co_name):
                self._collective(code.co_name, frame)
        elif (code.co_filename == _MESH and code.co_name in _OF_A_MESH) or (
            code.co_filename == _DTENSOR and code.co_name in _OF_A_TENSOR
        ):
            self._question(f"`{code.co_name}`", frame.f_back)
        elif code.co_name == "__init__" and code.co_filename.endswith(_ACCELERATE):
            self._question("accelerate's state", frame.f_back)
        elif code.co_filename == _FUNCTIONAL and _is_collective(code.co_name):
            self._collective(code.co_name, frame)

    def _question(self, what: str, caller: FrameType | None) -> None:
        if caller is not None and caller.f_code.co_filename != _C10D:
            code = caller.f_code
            self._questions[what, code.co_filename, caller.f_lineno, code.co_name] = None

    def _collective(self, name: str, frame: FrameType) -> None:
        """FSDP2's own have a frame of it between themselves and whoever called the model."""
        caller: FrameType | None = frame
        while caller is not None and _is_torchs(caller.f_code.co_filename):
            if caller.f_code.co_filename.startswith(_FSDP):
                return
            caller = caller.f_back
        if caller is not None and not caller.f_code.co_filename.startswith(_HARNESS):
            code = caller.f_code
            place = f"{os.path.basename(code.co_filename)}:{caller.f_lineno} {code.co_name}"
            self._collectives[f"`{name}` at {place}"] = None


_HARNESS = str(Path(__file__).resolve().parent.parent) + os.sep
_INSTALLED = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_PACKAGES = frozenset({"site-packages", "dist-packages"})


def is_own(file: str, own: Sequence[str] = ()) -> bool:
    """Whether ``file`` is a person's own code: neither installed nor ours, or at one of the paths ``own``."""
    if any(file == each or file.startswith(each + os.sep) for each in own):
        return True
    # Torch may lie beside another Python's packages, or on a path of a cluster's modules.
    return not file.startswith(("<", _HARNESS, _TORCH, *_INSTALLED)) and not _PACKAGES & {*Path(file).parts}


def home_of(kind: type[object]) -> list[str]:
    """Folders or file of the package that defines the class ``kind``; none for ours."""
    top = kind.__module__.partition(".")[0]
    module = sys.modules.get(top)
    if module is None or top == __name__.partition(".")[0]:
        return []
    file = getattr(module, "__file__", None)
    return [*getattr(module, "__path__", [] if file is None else [file])]


def own_code(objects: Sequence[object]) -> list[object]:
    """The classes of ``objects`` that are a person's own code, their bases, and the modules of these."""
    kinds = dict.fromkeys(base for each in objects for base in type(each).__mro__)
    found: dict[str, ModuleType] = {}
    own: list[object] = []
    for kind in kinds:
        module = sys.modules.get(kind.__module__)
        if module is not None and is_own(getattr(module, "__file__", None) or "<unknown>"):
            own.append(kind)
            found[kind.__module__] = module
    return [*own, *found.values()]


def _is_collective(function: str) -> bool:
    return function.removeprefix("_").startswith(_COLLECTIVES)


def _is_torchs(file: str) -> bool:
    return file.startswith((_TORCH, "<"))


def _outside(frame: FrameType, files: Sequence[str]) -> FrameType | None:
    """The nearest caller that is in none of ``files``."""
    caller = frame.f_back
    while caller is not None and caller.f_code.co_filename in files:
        caller = caller.f_back
    return caller
