"""Host memory that a checkpoint passes through: page-aligned, in huge pages, registered with CUDA, reused.

A first touch costs more than the copy that follows it (2 s for 1 GiB in the virtual machine of
scripts/bench/README.md, 0.3 s elsewhere), so memory is taken once, touched by a thread in the background, and
kept. Page alignment lets the kernel write it to disk without a copy of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch
from torch import Tensor

PAGE = 4096
_STRIDE = 64 << 20
"""Bytes touched in one call, so that a process that wants to end need not wait long."""


class HostMemory:
    """``size`` bytes, rounded up to pages; kept until the object and all views of it are gone."""

    def __init__(self, size: int) -> None:
        self.size = max(PAGE, -(-size // PAGE) * PAGE)
        self._map = mmap.mmap(-1, self.size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Kernels without transparent huge pages refuse; small pages only cost time.
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.tensor: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.view = memoryview(self._map)
        self._registered = False

    @property
    def pinned(self) -> bool:
        """Whether CUDA copies to it by itself, without blocking."""
        return self._registered

    def touch(self) -> None:
        """Give every page a place in memory; contents stay what they are only if nothing was written yet."""
        address = self.tensor.data_ptr()
        for offset in range(0, self.size, _STRIDE):
            # ctypes lets other threads run meanwhile; mmap.madvise(MADV_POPULATE_WRITE) holds them up.
            ctypes.memset(address + offset, 0, min(_STRIDE, self.size - offset))

    def register(self) -> None:
        """Lock the pages for CUDA; where the driver refuses, copies are slower and `pinned` stays False.

        torch's pinned allocator rounds up to a power of two, which wastes up to half of a large arena.
        """
        if not self._registered:
            code = torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), self.size, 0)
            self._registered = int(code) == 0

    def release(self) -> None:
        """Take the registration back; must come before the memory goes."""
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
            self._registered = False
