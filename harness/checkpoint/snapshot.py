"""Off the device in one copy: the bytes of each safetensors file, laid out as they will be on disk.

An `Arena` is one piece of `HostMemory` that holds the files which this rank writes. Tensors are ordered by
item size and name and the header is padded to a page, so the arena's bytes are the files' bytes, aligned and
without holes: a writer needs no further copy, neither its own nor the kernel's.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.checkpoint import mesh
from harness.checkpoint.memory import PAGE, HostMemory
from harness.checkpoint.shards import Group, Part
from harness.errors import TrainingFailed
from harness.format import safetensors_header
from harness.format.safetensors_header import TensorSpan
from harness.workers import Workers

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of torch's dtypes."""

METADATA = {"format": "pt"}
"""Of every safetensors file that is written; Hugging Face readers ask for it."""

_Signature = tuple[tuple[Part, tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]], ...]

Tensors = Mapping[Group, Mapping[str, Tensor]]
"""Group → name → tensor, on any device; a `DTensor` counts with the shape of the whole."""


@dataclass(frozen=True)
class FileImage:
    """One safetensors file in memory."""

    path: str
    data: memoryview
    """The bytes of the file, header first; those of an arena are valid until its next `Arena.fill`."""
    spans: tuple[TensorSpan, ...]
    aligned: bool
    """Whether the memory starts on a page, so that it can be written around the page cache."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.data)


class Arena:
    """Reused host memory for the files that this rank writes."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._memory: HostMemory | None = None
        self._touching: threading.Thread | None = None
        self._signature: _Signature | None = None
        self._images: list[FileImage] = []
        self._targets: dict[tuple[str, str], Tensor] = {}

    @property
    def size(self) -> int:
        """Bytes of host memory that are held."""
        return 0 if self._memory is None else self._memory.size

    @property
    def pinned(self) -> bool:
        """Whether a GPU copies into it by itself."""
        return self._memory is not None and self._memory.pinned

    def prepare(self, parts: Sequence[Part], tensors: Tensors, *, niceness: int = 0) -> None:
        """Take the memory that `fill` will need, and touch it in the background.

        Raises `TrainingFailed` for a dtype that safetensors cannot hold.
        """
        own = [part for part in parts if part.rank == self._workers.rank]
        signature = tuple((part, _signature(part, tensors[part.group])) for part in own)
        if signature == self._signature:
            return
        self._join()
        layouts = [_layout(entries) for _, entries in signature]
        needed = sum(_rounded(len(header) + size) for header, _, size in layouts)
        fresh = self._memory is None or self._memory.size < needed
        if fresh:
            # The images and targets are views of the old memory, which goes with the last of them.
            self._images, self._targets = [], {}
            if self._memory is not None:
                self._memory.release()
            self._memory = HostMemory(needed)
        self._lay_out(signature, layouts)
        self._signature = signature
        cuda = any(tensor.is_cuda for group in tensors.values() for tensor in group.values())
        self._touching = threading.Thread(
            target=self._touch, args=(self._memory, fresh, cuda, niceness), name="arena"
        )
        self._touching.start()

    def fill(self, parts: Sequence[Part], tensors: Tensors) -> tuple[FileImage, ...]:
        """Copy the tensors of this rank's ``parts`` into the arena; takes part in collecting those of others.

        Blocks until the bytes are on the host. The images share the arena's memory: they must be written
        before the next call. Raises as `prepare` and `mesh.collect` do.
        """
        self.prepare(parts, tensors)
        self._join()
        on_device = False
        with torch.no_grad():
            for part in parts:
                for name in part.names:
                    tensor = tensors[part.group][name]
                    target = self._targets.get((part.path, name))
                    mesh.collect(self._workers, name, tensor, part.rank, target)
                    on_device = on_device or tensor.is_cuda
        if on_device:
            torch.cuda.synchronize()
        return tuple(self._images)

    def _lay_out(self, signature: _Signature, layouts: Sequence[_Layout]) -> None:
        if self._memory is None:
            raise TrainingFailed("an arena without memory")
        self._images, self._targets, offset = [], {}, 0
        self._headers = []
        for (part, entries), (header, spans, size) in zip(signature, layouts, strict=True):
            end = offset + len(header) + size
            self._headers.append((offset, header))
            self._images.append(FileImage(part.path, self._memory.view[offset:end], spans, aligned=True))
            for (name, dtype, shape), span in zip(entries, spans, strict=True):
                piece = self._memory.tensor[offset + span.start : offset + span.end]
                self._targets[part.path, name] = piece.view(dtype).view(shape)
            offset += _rounded(len(header) + size)

    def _touch(self, memory: HostMemory, fresh: bool, cuda: bool, niceness: int) -> None:
        if niceness and sys.platform.startswith("linux"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        if fresh:
            memory.touch()
        if cuda:
            memory.register()
        for offset, header in self._headers:
            memory.view[offset : offset + len(header)] = header

    def _join(self) -> None:
        if self._touching is not None:
            self._touching.join()
            self._touching = None


def serialize(path: str, tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a small safetensors file of CPU ``tensors``, such as a rank's RNG states."""
    arena = Arena(Workers.alone())
    part = Part(path, "model", tuple(tensors), 0, 0)
    return bytes(arena.fill([part], {"model": tensors})[0].data)


def image_of(path: str, data: bytes) -> FileImage:
    """The image of a safetensors file that is already in memory (`serialize`, perhaps of another rank)."""
    header = safetensors_header.parse(data, len(data), where=path)
    return FileImage(path, memoryview(data), header.tensors, aligned=False)


_Layout = tuple[bytes, tuple[TensorSpan, ...], int]
"""Header, spans, bytes of the tensors."""


def _signature(
    part: Part, tensors: Mapping[str, Tensor]
) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
    chosen = [(name, tensors[name]) for name in part.names]
    for name, tensor in chosen:
        if tensor.dtype not in DTYPES:
            raise TrainingFailed(
                f"`{name}` is {tensor.dtype}, which safetensors cannot hold",
                remedy="keep it out of the state dict or in another dtype",
            )
    # Descending item sizes keep every tensor aligned to its own size.
    chosen.sort(key=lambda pair: (-pair[1].element_size(), pair[0]))
    return tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in chosen)


def _layout(entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> _Layout:
    named = [(name, DTYPES[dtype], shape) for name, dtype, shape in entries]
    header, spans = safetensors_header.build(named, METADATA, alignment=PAGE)
    return bytes(header), tuple(spans), sum(span.end - span.start for span in spans)


def _rounded(size: int) -> int:
    return -(-size // PAGE) * PAGE
