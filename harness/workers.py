"""The ranks of a run and how they agree: no pickle, and one rank's error is every rank's error.

torch.distributed's own object collectives pickle, so bytes travel here as uint8 tensors over gloo groups of
their own, apart from the gradient traffic of DDP (which may be NCCL): one group for the training thread, one
for the thread that writes checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from harness.cores import process_cpu_count
from harness.errors import HarnessError

T = TypeVar("T")


class ElsewhereError(HarnessError):
    """Another rank failed and reports it; this one leaves with the same code and says nothing."""

    silent = True


@dataclass(frozen=True)
class Workers:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device
    backend: str
    """``none`` for one process, else the gradient backend: ``gloo`` or ``nccl``."""
    control: dist.ProcessGroup | None
    cores: int
    """Cores of this host that are this rank's share; its loader and its background threads use them."""

    @staticmethod
    def alone(device: torch.device | None = None) -> Workers:
        """One process that has the host to itself."""
        return Workers(0, 1, device or torch.device("cpu"), "none", None, process_cpu_count())

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.rank == 0

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """The ``data`` of every rank, in order of rank, on every rank."""
        if self.control is None:
            return [data]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64), group=self.control)
        lengths = [int(size.item()) for size in sizes]
        padded = torch.zeros(max([*lengths, 1]), dtype=torch.uint8)
        padded[: len(data)] = _tensor(data)
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self.control)
        return [part[:length].numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Rank 0's ``data``, on every rank."""
        if self.control is None:
            return data
        size = torch.tensor([len(data)], dtype=torch.int64)
        dist.broadcast(size, 0, group=self.control)
        buffer = _tensor(data) if self.first else torch.empty(int(size.item()), dtype=torch.uint8)
        if size.item():
            dist.broadcast(buffer, 0, group=self.control)
        return buffer.numpy().tobytes()

    def agree(self, function: Callable[[], bytes]) -> bytes:
        """Rank 0 calls ``function``; every rank gets its result, or raises its error."""
        result = b""
        if self.first:
            try:
                result = function()
            except HarnessError as error:
                self.broadcast_bytes(_encode(error))
                raise
        failure = self.broadcast_bytes(b"")
        if failure:
            raise _decode(failure, 0)
        return self.broadcast_bytes(result)

    def first_only(self, function: Callable[[], T]) -> T | None:
        """Rank 0 calls ``function`` and has its result, the others None; its error is raised on all."""
        results: list[T] = []

        def call() -> bytes:
            results.append(function())
            return b""

        self.agree(call)
        return results[0] if results else None

    def together(self, function: Callable[[], T]) -> T:
        """Every rank calls its ``function``; when one raises, all raise the first failing rank's error."""
        result: T | None = None
        own: HarnessError | None = None
        try:
            result = function()
        except HarnessError as error:
            own = error
        failures = self.gather_bytes(b"" if own is None else _encode(own))
        failed = [rank for rank, data in enumerate(failures) if data]
        if failed:
            # A rank that only heard of a failure is not where it comes from.
            source = next((rank for rank in failed if not _is_hearsay(failures[rank])), failed[0])
            raise own if own is not None and source == self.rank else _decode(failures[source], source)
        return result  # type: ignore[return-value]

    def collected(self, function: Callable[[], bytes]) -> list[bytes]:
        """The results of every rank's ``function``, in order of rank; errors are raised as by `together`."""
        return self.gather_bytes(self.together(function))

    def sum_float64(self, vector: Tensor) -> Tensor:
        """The sum over the ranks of a float64 CPU ``vector``; the order of addition is that of the ranks."""
        if self.control is None:
            return vector
        parts = [torch.empty_like(vector) for _ in range(self.world_size)]
        dist.all_gather(parts, vector, group=self.control)
        return torch.stack(parts).sum(dim=0)


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _encode(error: HarnessError) -> bytes:
    fields = {
        "kind": type(error).__name__,
        "exit_code": error.exit_code,
        "what": error.what,
        "where": error.where,
        "remedy": error.remedy,
    }
    return json.dumps(fields).encode()


def _is_hearsay(data: bytes) -> bool:
    return bool(json.loads(data)["kind"] == ElsewhereError.__name__)


def _decode(data: bytes, rank: int) -> HarnessError:
    fields = json.loads(data)
    what = fields["what"] if _is_hearsay(data) else f"rank {rank}: {fields['what']}"
    error = ElsewhereError(what, where=fields["where"], remedy=fields["remedy"])
    error.exit_code = fields["exit_code"]
    return error
