"""A place in which a forward and backward pass leaves no trace: everything that it may change is put back.

    with Sandbox(model, wrapped, generators, holders=(task,)) as sandbox:
        for _ in range(2):
            sandbox.rewind()                # state and generators as at the entry, or at `begin_here`
            loss = execute()                # forward and backward; gradients begin at None

Put back: gradients (the very tensors), buffers and plain tensors (values, and which tensor it is),
generators, plain attributes of modules and of ``holders``, and whether DDP broadcasts buffers at its next
pass. DDP sends nothing; FSDP2 cannot do without, so every rank must enter together.

What cannot be put back is refused before anything is executed (`obstacles`): gradient hooks of a user, which
may step an optimizer, and attributes that are iterators, files or the like. What nobody can see from here,
such as a line written to a file or a global variable, is the user's to know: ``determinism.budget: 0`` turns
double execution off.
"""

from __future__ import annotations

import copy
import io
import random
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from harness.checkpoint import rng
from harness.checkpoint.cut import is_sharded
from harness.checkpoint.rng import Generator

LARGEST_COPY = 1 << 20
"""Bytes of a holder's array that are copied; a larger one is data, and its version is compared instead."""
_DEPTH = 3
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"training"}


class Sandbox(AbstractContextManager["Sandbox"]):
    """See the module. ``holders`` are further objects whose plain attributes the pass may change."""

    def __init__(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        generators: Mapping[str, Generator],
        holders: Sequence[object] = (),
    ) -> None:
        self._model = model
        self._wrapped = wrapped
        self._generators = generators
        self._holders = holders
        self._parameters = list(model.parameters())
        self._stack = ExitStack()
        self._begin: _State | None = None

    def obstacles(self) -> list[str]:
        """Why this model must not be executed twice, one line each; none when it may."""
        found = [
            f"parameter `{name}` has a hook that runs when its gradient is there"
            for name, each in self._model.named_parameters()
            if is_hooked(each)
        ]
        known = set(map(id, self._generators.values()))
        for name, module in self._model.named_modules():
            place = name or type(module).__name__
            found += [f"`{place}.{each}` cannot be put back" for each in _odd(module, known)]
        return found

    def begin_here(self) -> None:
        """Before the next entry: what is executed there begins from the state as it is now."""
        self._begin = self._state()

    def __enter__(self) -> Sandbox:
        self._gradients = [each.grad for each in self._parameters]
        self._kept = self._state()
        self._from, self._begin = self._begin or self._kept, None
        self._stack = ExitStack()
        self._stack.callback(self._put_back)
        self._stack.enter_context(_apart(self._wrapped))
        return self

    def rewind(self) -> None:
        """State and generators as at the entry, or at `begin_here`; gradients gone."""
        for each in self._parameters:
            each.grad = None
        self._from.put_back(self._generators)

    def changed(self) -> list[str]:
        """Large data of the holders that the passes wrote to, which cannot be put back."""
        return [name for kept in self._from.attributes for name in kept.overwritten()]

    def moved(self) -> list[str]:
        """After a pass: what it has changed that the next one reads, besides gradients and generators."""
        return [name for kept in self._from.attributes for name in kept.moved()]

    def _state(self) -> _State:
        return _State(rng.capture(self._generators), _attributes(self._model, self._holders))

    def _put_back(self) -> None:
        self._kept.put_back(self._generators)
        for each, gradient in zip(self._parameters, self._gradients, strict=True):
            each.grad = gradient

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class Snapshot:
    """What a model and further ``holders`` (objects, classes, modules of code) hold besides parameters, as it
    is when this is made, to see what passes leave behind."""

    def __init__(self, model: nn.Module, holders: Sequence[object] = ()) -> None:
        self._kept = _attributes(model, holders)

    def moved(self) -> list[str]:
        """Names of what has other values by now."""
        return [name for kept in self._kept for name in (*kept.moved(), *kept.overwritten())]


def _attributes(model: nn.Module, holders: Sequence[object]) -> list[_Attributes]:
    found = [_Attributes(module) for module in model.modules()]
    return found + [_Attributes(each, LARGEST_COPY) for each in holders]


@dataclass(frozen=True)
class _State:
    """What a pass reads and may change, besides parameters and gradients, as it is when this is made."""

    generators: dict[str, Tensor]
    attributes: list[_Attributes]

    def put_back(self, generators: Mapping[str, Generator]) -> None:
        for kept in self.attributes:
            kept.put_back()
        rng.restore(self.generators, generators)


IDLE = "idle_in_a_sandbox"
"""Attribute of a gradient hook that does nothing but in an update of the run."""


def is_hooked(parameter: nn.Parameter) -> bool:
    """Whether a hook of a user runs when there is a gradient of ``parameter``."""
    after = (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()
    return bool(parameter._backward_hooks) or any(map(_acts, after))


def _acts(hook: object) -> bool:
    return not getattr(hook, IDLE, False)


class _Attributes:
    """What an object holds besides parameters and modules, as it is when this is made."""

    def __init__(self, owner: object, limit: int | None = None) -> None:
        self._owner = owner
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._data: list[tuple[str, Tensor, int]] = []
        self._copies: dict[str, Any] = {}
        self._buffers = dict(owner._buffers) if isinstance(owner, nn.Module) else {}
        self._plain = {name: value for name, value in _fields(owner) if name not in _TORCHS_OWN}
        for name, value in [*self._buffers.items(), *self._plain.items()]:
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self._keep(name, value, limit)
            elif _is_container(value) and (limit is None or _size(value) <= limit):
                self._copies[name] = _copied(value)

    def _keep(self, name: str, value: Tensor, limit: int | None) -> None:
        if limit is not None and value.numel() * value.element_size() > limit:
            self._data.append((name, value, value._version))
        else:
            self._tensors.append((value, value.detach().clone()))

    def put_back(self) -> None:
        """Names, tensors and contents of containers; only what differs is written."""
        if isinstance(self._owner, nn.Module):
            _same_entries(self._owner._buffers, self._buffers)
        plain = {name: value for name, value in _fields(self._owner) if name not in _TORCHS_OWN}
        for name in plain.keys() - self._plain.keys():
            del vars(self._owner)[name]
        for name, value in self._plain.items():
            if name not in plain or plain[name] is not value:
                vars(self._owner)[name] = value
        with torch.no_grad():
            for tensor, kept in self._tensors:
                tensor.copy_(kept)
        for name, kept in self._copies.items():
            _refill(self._plain[name], kept)

    def moved(self) -> list[str]:
        """Names of what is not as it was."""
        owner = self._owner
        if isinstance(owner, _BatchNorm) and owner.training:
            return []  # writes its statistics and reads none of them
        tensors = [(tensor, torch.equal(tensor, kept)) for tensor, kept in self._tensors]
        changed = {id(tensor) for tensor, same in tensors if not same}
        changed |= {
            id(self._plain[name]) for name, kept in self._copies.items() if not _same(self._plain[name], kept)
        }
        before = {**self._buffers, **self._plain}
        now = dict(owner._buffers) if isinstance(owner, nn.Module) else {}
        now |= {name: value for name, value in _fields(owner) if name not in _TORCHS_OWN}
        names = [
            name
            for name, value in before.items()
            if name not in now or id(value) in changed or not self._alike(name, value, now[name])
        ]
        return [f"{_named(owner)}.{name}" for name in [*names, *(now.keys() - before.keys())]]

    def _alike(self, name: str, before: Any, now: Any) -> bool:
        if name in self._copies and type(now) is type(before):
            return _same(now, self._copies[name])
        return _equal(now, before)

    def overwritten(self) -> list[str]:
        """Names of large tensors that were written to."""
        kind = _named(self._owner)
        return [f"{kind}.{name}" for name, tensor, version in self._data if tensor._version != version]


def _named(owner: object) -> str:
    """Its name, or that of its class: FSDP2 makes one of its own, `FSDPLinear` of `Linear`."""
    name = owner.__name__ if isinstance(owner, types.ModuleType | type) else type(owner).__name__
    return name.removeprefix("FSDP") if isinstance(owner, nn.Module) else name


def _fields(owner: object) -> list[tuple[str, Any]]:
    found = list(getattr(owner, "__dict__", {}).items())
    if isinstance(owner, types.ModuleType | type):
        return [(name, value) for name, value in found if not name.startswith("__")]
    return found


def _is_container(value: Any) -> bool:
    return isinstance(value, list | dict | set | np.ndarray) or _is_own_object(value)


def _is_own_object(value: Any) -> bool:
    """An instance of a user's plain class, whose attributes may be copied."""
    if isinstance(value, nn.Module | type | types.ModuleType | Tensor) or callable(value):
        return False
    module = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and module not in ("torch", "builtins", "numpy", "accelerate")


def _size(value: Any, depth: int = 0) -> int:
    """Bytes of a container, roughly; more than `LARGEST_COPY` for what is nested too deep to tell."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, list | tuple | set | dict):
        if len(value) > LARGEST_COPY // 64:
            return LARGEST_COPY + 1
        inner: Iterator[Any] = iter(value.values() if isinstance(value, dict) else value)
    elif _is_own_object(value):
        inner = iter(vars(value).values())
    else:
        return 64
    return LARGEST_COPY + 1 if depth > _DEPTH else 64 + sum(_size(each, depth + 1) for each in inner)


@dataclass(frozen=True)
class _Kept:
    """A container's own contents, and copies of those of the containers in it."""

    contents: Any
    inner: tuple[tuple[Any, _Kept], ...]


def _copied(value: Any, depth: int = 0) -> _Kept:
    if isinstance(value, np.ndarray):
        return _Kept(value.copy(), ())
    if isinstance(value, Tensor):
        return _Kept(value.detach().clone(), ())
    contents = dict(vars(value)) if _is_own_object(value) else copy.copy(value)
    each = contents.values() if isinstance(contents, dict) else contents
    deeper = [item for item in each if depth < _DEPTH and (_is_container(item) or _is_buffer(item))]
    return _Kept(contents, tuple((item, _copied(item, depth + 1)) for item in deeper))


def _is_buffer(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _refill(value: Any, kept: _Kept) -> None:
    """Put the contents back into the very container that held them."""
    if isinstance(value, np.ndarray):
        if value.flags.writeable:
            value[...] = kept.contents
    elif isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(kept.contents)
    elif isinstance(value, list):
        value[:] = kept.contents
    elif isinstance(value, set):
        value.clear()
        value.update(kept.contents)
    else:
        _same_entries(value if isinstance(value, dict) else vars(value), kept.contents)
    for item, inner in kept.inner:
        _refill(item, inner)


def _same(value: Any, kept: _Kept) -> bool:
    """Whether a container holds what it held."""
    if isinstance(value, np.ndarray):
        return bool(np.array_equal(value, kept.contents))
    if isinstance(value, Tensor):
        return torch.equal(value, kept.contents)
    contents = vars(value) if _is_own_object(value) else value
    if isinstance(contents, set):
        return bool(contents == kept.contents)
    pairs = [
        (list(each.items()) if isinstance(each, dict) else list(enumerate(each)))
        for each in (contents, kept.contents)
    ]
    if len(pairs[0]) != len(pairs[1]):
        return False
    alike = all(one[0] == other[0] and _equal(one[1], other[1]) for one, other in zip(*pairs, strict=True))
    return alike and all(_same(item, inner) for item, inner in kept.inner)


_PLAIN = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same one, or cannot be told apart."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and bool(np.array_equal(one, other))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, _PLAIN) and bool(one == other)


def _same_entries(target: dict[Any, Any], wanted: Mapping[Any, Any]) -> None:
    """Make ``target`` hold exactly ``wanted``, in its order, writing only when something differs."""
    if list(target) != list(wanted) or any(target[key] is not value for key, value in wanted.items()):
        target.clear()
        target.update(wanted)


def _odd(module: nn.Module, known: set[int]) -> list[str]:
    """Names of attributes whose state is hidden: iterators, open files, generators that nobody registered."""
    hidden = (io.IOBase, torch.Generator, np.random.Generator, random.Random)
    return [
        name
        for name, value in _fields(module)
        if (isinstance(value, hidden) and id(value) not in known) or hasattr(value, "__next__")
    ]


def _apart(wrapped: nn.Module) -> AbstractContextManager[Any]:
    """Passes of ``wrapped`` that leave its communication as it was."""
    if isinstance(wrapped, DistributedDataParallel):
        return _WithoutSync(wrapped)
    if is_sharded(wrapped):
        wrapped.set_requires_gradient_sync(True)
    return ExitStack()


class _WithoutSync(AbstractContextManager[None]):
    """DDP's ``no_sync``, which forgets whether buffers are due to be broadcast. None is in here: the first
    pass would run other operators than the next and, except on rank 0, begin from other buffers."""

    def __init__(self, wrapped: DistributedDataParallel) -> None:
        self._wrapped = wrapped
        self._inner = wrapped.no_sync()

    def __enter__(self) -> None:
        self._broadcasts = self._wrapped.require_forward_param_sync
        self._inner.__enter__()
        self._wrapped.require_forward_param_sync = False

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        self._wrapped.require_forward_param_sync = self._broadcasts
