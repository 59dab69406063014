"""Ways to save a run's state, each with its own rule for the newest: the peers of crash_states.py, faults.py.

A state is that of a small model, its optimizer and the generators. Every saver is used as its documentation
says; where it has no rule for the newest, a common one is taken and named.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict

Contents = dict[str, bytes]
"""Every part of a state by its name, as bytes."""


class Saved:
    """A model, its optimizer and the generators, at some step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.step = 0

    def advance(self, step: int) -> None:
        """To the state of ``step``: the same whenever it is called."""
        self.step = step
        torch.manual_seed(step)
        random.seed(step)
        np.random.seed(step)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape))
                slots = {"step": torch.tensor(float(step))}
                slots |= {name: torch.rand(parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = slots

    def contents(self) -> Contents:
        """What a load must bring back."""
        tensors: dict[str, Tensor] = dict(self.model.state_dict())
        for number, parameter in enumerate(self.model.parameters()):
            tensors |= {f"{number}.{name}": value for name, value in self.optimizer.state[parameter].items()}
        generators = {
            "python": repr(random.getstate()).encode(),
            "numpy": repr(np.random.get_state()).encode(),
            "torch": torch.get_rng_state().numpy().tobytes(),
        }
        return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} | generators


def truth(step: int) -> Contents:
    """The contents of the state of ``step``."""
    made = Saved()
    made.advance(step)
    return made.contents()


class Saver(Protocol):
    """Saves states into one folder, one after the other."""

    folder: Path
    made: Saved

    def save(self) -> None:
        """Save `made`; when this returns, the user takes it for saved."""
        ...

    def newest(self) -> bool:
        """Load the newest into `made`, by its own rule; False when it finds none. Raises as it does."""
        ...


class TorchSave:
    """torch.save to the final name, newest by the step in it: the seed project's manager."""

    suffix = ""

    def __init__(self, folder: Path, made: Saved) -> None:
        self.folder, self.made = folder, made

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step-{self.made.step:08d}.pt"
        torch.save(_state(self.made), f"{final}{self.suffix}")
        if self.suffix:
            os.replace(f"{final}{self.suffix}", final)

    def newest(self) -> bool:
        found = sorted(self.folder.glob("step-*.pt")) if self.folder.is_dir() else []
        if found:
            _adopt(self.made, torch.load(found[-1], weights_only=True))
        return bool(found)


class TorchSaveRenamed(TorchSave):
    """torch.save to a temporary name, then a rename, nothing synced."""

    suffix = ".tmp"


class Accelerated:
    """accelerate.save_state with automatic naming; load_state without a name takes the newest."""

    limit: int | None = None

    def __init__(self, folder: Path, made: Saved) -> None:
        self.folder, self.made = folder, made
        project = ProjectConfiguration(
            project_dir=str(folder), automatic_checkpoint_naming=True, total_limit=self.limit
        )
        self.accelerator = Accelerator(cpu=True, project_config=project)
        self.accelerator.prepare(made.model, made.optimizer)

    def save(self) -> None:
        self.accelerator.project_configuration.iteration = self.made.step
        # safetensors renames its file by a system call of its own, which no library can see; torch.save not.
        self.accelerator.save_state(safe_serialization=False)

    def newest(self) -> bool:
        folder = self.folder / "checkpoints"
        if not folder.is_dir() or not any(folder.iterdir()):
            return False
        self.accelerator.load_state()
        self.made.step = int(next(iter(self.made.optimizer.state.values()))["step"])
        return True


class AcceleratedLimited(Accelerated):
    """The same with total_limit=2."""

    limit = 2


class AcceleratedOne(Accelerated):
    """The same with total_limit=1."""

    limit = 1


class Distributed:
    """DCP into a folder a step; newest by torchtitan's rule: the highest step whose folder has .metadata."""

    def __init__(self, folder: Path, made: Saved) -> None:
        self.folder, self.made = folder, made

    def target(self) -> Path:
        """Where the state of now goes."""
        return self.folder / f"step-{self.made.step}"

    def save(self) -> None:
        model, optimizer = get_state_dict(self.made.model, self.made.optimizer)
        state = {"model": model, "optimizer": optimizer, "rest": _rest(self.made)}
        dcp.save(state, checkpoint_id=self.target(), no_dist=True)

    def source(self) -> Path | None:
        """The newest."""
        found = {}
        for entry in self.folder.iterdir() if self.folder.is_dir() else []:
            match = re.fullmatch(r"step-(\d+)", entry.name)
            if match and (entry / ".metadata").is_file():
                found[int(match[1])] = entry
        return found[max(found)] if found else None

    def newest(self) -> bool:
        source = self.source()
        if source is None:
            return False
        model, optimizer = get_state_dict(self.made.model, self.made.optimizer)
        rest = _rest(self.made)
        dcp.load({"model": model, "optimizer": optimizer, "rest": rest}, checkpoint_id=source, no_dist=True)
        # DCP fills the tensors in place; other values it replaces in the dict.
        _adopt_rest(self.made, rest)
        return True


class DistributedInPlace(Distributed):
    """DCP over the same folder again and again."""

    def target(self) -> Path:
        return self.folder / "newest"

    def source(self) -> Path | None:
        return self.target() if self.target().is_dir() else None


PEERS: Mapping[str, type[Any]] = {
    "torch.save to the final name": TorchSave,
    "torch.save and rename": TorchSaveRenamed,
    "accelerate": Accelerated,
    "accelerate, total_limit=2": AcceleratedLimited,
    "accelerate, total_limit=1": AcceleratedOne,
    "DCP, torchtitan's rule": Distributed,
    "DCP over the same folder": DistributedInPlace,
}


def _rest(made: Saved) -> dict[str, Any]:
    _, keys, *others = np.random.get_state()
    return {
        "step": made.step,
        "torch": torch.get_rng_state(),
        "python": repr(random.getstate()),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": repr(others),
    }


def _adopt_rest(made: Saved, rest: Mapping[str, Any]) -> None:
    import ast

    made.step = rest["step"]
    torch.set_rng_state(rest["torch"])
    random.setstate(ast.literal_eval(rest["python"]))
    others = ast.literal_eval(rest["numpy_rest"])
    np.random.set_state(("MT19937", rest["numpy"].numpy().astype(np.uint32), *others))


def _state(made: Saved) -> dict[str, Any]:
    return {
        "model": made.model.state_dict(),
        "optimizer": made.optimizer.state_dict(),
        "rest": _rest(made),
    }


def _adopt(made: Saved, state: Mapping[str, Any]) -> None:
    made.model.load_state_dict(state["model"])
    made.optimizer.load_state_dict(state["optimizer"])
    _adopt_rest(made, state["rest"])
