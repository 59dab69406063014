"""Every random number generator of a process, as tensors and back.

Names and contents of the tensors (one set a rank, in ``rng-rank-NNNNN.safetensors``):

- ``python.state`` uint32 (625,): `random.getstate` version 3; ``python.gauss`` float64 (0 or 1,)
- ``numpy.keys`` uint32 (624,), ``numpy.position`` int64 (1,), ``numpy.gauss`` float64 (0 or 1,): the legacy
  global MT19937 of numpy
- ``torch.cpu`` uint8: the CPU generator; ``torch.cuda.N`` uint8: the generator of device N
- ``generator.NAME`` uint8: a registered generator; a `torch.Generator`'s state, or strict JSON of the state
  of a `numpy.random.Generator` or `random.Random`
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.errors import TrainingFailed
from harness.format import strict_json

Generator = torch.Generator | np.random.Generator | random.Random

_PYTHON_VERSION = 3
_JSON_INTEGER_LIMIT = 2**53


def capture(generators: Mapping[str, Generator]) -> dict[str, Tensor]:
    """The state of all global generators of this process and of the registered ``generators``."""
    state = _python_tensors(random.getstate(), "python") | _numpy_tensors()
    state["torch.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        device = torch.cuda.current_device()
        state[f"torch.cuda.{device}"] = torch.cuda.get_rng_state(device)
    for name, generator in generators.items():
        state[f"generator.{name}"] = _generator_tensor(name, generator)
    return state


def restore(state: Mapping[str, Tensor], generators: Mapping[str, Generator]) -> None:
    """Set every generator to ``state``, as `capture` returned it.

    Raises `TrainingFailed` when a generator has no state or a state has no generator: nothing is left as
    it happened to be.
    """
    expected = set(capture(generators))
    if set(state) != expected:
        missing, extra = sorted(expected - set(state)), sorted(set(state) - expected)
        raise TrainingFailed(
            f"RNG states do not match this process: without a state {missing}, without a generator {extra}",
            remedy="resume with the same devices and registered generators, or --accept them as a change",
        )
    random.setstate(_python_state(state, "python"))
    _restore_numpy(state)
    torch.set_rng_state(state["torch.cpu"].clone())
    for name in state:
        if name.startswith("torch.cuda."):
            torch.cuda.set_rng_state(state[name].clone(), int(name.removeprefix("torch.cuda.")))
    for name, generator in generators.items():
        _restore_generator(generator, state[f"generator.{name}"])


def _python_tensors(state: tuple[Any, ...], prefix: str) -> dict[str, Tensor]:
    version, words, gauss = state
    if version != _PYTHON_VERSION:
        what = f"python's random state has the unknown version {version}"
        raise TrainingFailed(what, remedy="use another version of Python")
    return {
        f"{prefix}.state": torch.tensor(words, dtype=torch.uint32),
        f"{prefix}.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }


def _python_state(state: Mapping[str, Tensor], prefix: str) -> tuple[int, tuple[int, ...], float | None]:
    gauss = state[f"{prefix}.gauss"].tolist()
    return _PYTHON_VERSION, tuple(state[f"{prefix}.state"].tolist()), gauss[0] if gauss else None


def _numpy_tensors() -> dict[str, Tensor]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    if name != "MT19937":
        raise TrainingFailed(f"numpy's global generator is {name}, not MT19937", remedy="do not replace it")
    return {
        "numpy.keys": torch.from_numpy(np.array(keys, dtype=np.uint32)),
        "numpy.position": torch.tensor([position], dtype=torch.int64),
        "numpy.gauss": torch.tensor([gauss] if has_gauss else [], dtype=torch.float64),
    }


def _restore_numpy(state: Mapping[str, Tensor]) -> None:
    gauss = state["numpy.gauss"].tolist()
    np.random.set_state(
        (
            "MT19937",
            state["numpy.keys"].numpy(),
            int(state["numpy.position"].item()),
            len(gauss),
            gauss[0] if gauss else 0.0,
        )
    )


def _generator_tensor(name: str, generator: Generator) -> Tensor:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        document = _exact(generator.bit_generator.state)
    elif isinstance(generator, random.Random):
        version, words, gauss = generator.getstate()
        document = {"version": version, "words": list(words), "gauss": None if gauss is None else gauss.hex()}
    else:
        raise TrainingFailed(
            f"generator {name!r} is a {type(generator).__name__}",
            remedy="register a torch.Generator, numpy.random.Generator or random.Random",
        )
    return torch.frombuffer(bytearray(strict_json.dumps(document)), dtype=torch.uint8)


def _restore_generator(generator: Generator, tensor: Tensor) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(tensor.clone())
        return
    document = strict_json.loads(tensor.numpy().tobytes(), where="a generator's state")
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _from_exact(document)
    else:
        gauss = None if document["gauss"] is None else float.fromhex(document["gauss"])
        generator.setstate((document["version"], tuple(document["words"]), gauss))


def _exact(value: Any) -> Any:
    """A bit generator's state in JSON: arrays as lists, integers beyond 2**53 as ``{"hex": …}``."""
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": [_exact(item) for item in value.tolist()]}
    if isinstance(value, int) and abs(value) > _JSON_INTEGER_LIMIT:
        return {"hex": hex(value)}
    return value


def _from_exact(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"hex"}:
        return int(value["hex"], 16)
    if isinstance(value, dict) and set(value) == {"dtype", "values"}:
        return np.array([_from_exact(item) for item in value["values"]], dtype=value["dtype"])
    if isinstance(value, dict):
        return {key: _from_exact(item) for key, item in value.items()}
    return value
