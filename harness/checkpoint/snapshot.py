"""Off the device in one copy: the bytes of each safetensors file, laid out as they will be on disk.

An `Arena` is host memory (pinned when the tensors live on a GPU) that is allocated at the first save and
reused: fresh memory costs page faults that are slower than the copy itself. Tensors are ordered by item size
and name and the header is padded to a page, so the arena's bytes are the file's bytes, aligned and without
holes, and a writer needs no further copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.errors import TrainingFailed
from harness.format import safetensors_header
from harness.format.safetensors_header import TensorSpan

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

_METADATA = {"format": "pt"}
_PAGE = 4096

_Signature = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


@dataclass(frozen=True)
class FileImage:
    """One safetensors file in memory: header, then the tensors' bytes."""

    path: str
    header: bytes
    body: memoryview
    """The bytes after the header; valid until the arena's next `Arena.fill`."""
    spans: tuple[TensorSpan, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + len(self.body)


class _Layout:
    """Where each tensor of one file lies in the arena, for one set of names, dtypes and shapes."""

    def __init__(self, path: str, signature: _Signature, memory: Tensor) -> None:
        self.path = path
        entries = [(name, DTYPES[dtype], shape) for name, dtype, shape in signature]
        header, spans = safetensors_header.build(entries, _METADATA, alignment=_PAGE)
        self.header, self.spans = bytes(header), tuple(spans)
        self.body = memory
        base = len(self.header)
        self.views = {
            name: memory[span.start - base : span.end - base].view(dtype).view(shape)
            for (name, dtype, shape), span in zip(signature, self.spans, strict=True)
        }

    def image(self) -> FileImage:
        return FileImage(self.path, self.header, self.body.numpy().data, self.spans)


class Arena:
    """Reused host memory for the files of a checkpoint."""

    def __init__(self) -> None:
        self._signature: dict[str, _Signature] = {}
        self._layouts: list[_Layout] = []

    def fill(self, files: Mapping[str, Mapping[str, Tensor]]) -> tuple[FileImage, ...]:
        """Copy every tensor of ``files`` (path → name → tensor, any device) into the arena.

        Blocks until the bytes are on the host. The images share the arena's memory: they must be written
        before the next call. Raises `TrainingFailed` for a dtype that safetensors cannot hold.
        """
        signature = {path: _signature(tensors) for path, tensors in files.items()}
        if signature != self._signature:
            self._layouts = [_layout(path, entries, files[path]) for path, entries in signature.items()]
            self._signature = signature
        on_device = False
        with torch.no_grad():
            for layout in self._layouts:
                for name, tensor in files[layout.path].items():
                    layout.views[name].copy_(tensor, non_blocking=True)
                    on_device = on_device or tensor.is_cuda
        if on_device:
            torch.cuda.synchronize()
        return tuple(layout.image() for layout in self._layouts)


def serialize(path: str, tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a small safetensors file, such as a rank's RNG states."""
    image = Arena().fill({path: tensors})[0]
    return image.header + bytes(image.body)


def image_of(path: str, data: bytes) -> FileImage:
    """The image of a safetensors file that is already in memory (`serialize`, perhaps of another rank)."""
    header = safetensors_header.parse(data, len(data), where=path)
    return FileImage(path, data[: header.data_start], memoryview(data)[header.data_start :], header.tensors)


def _signature(tensors: Mapping[str, Tensor]) -> _Signature:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TrainingFailed(
                f"`{name}` is {tensor.dtype}, which safetensors cannot hold",
                remedy="keep it out of the state dict or in another dtype",
            )
    # Descending item sizes keep every tensor aligned to its own size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    return tuple((name, tensors[name].dtype, tuple(tensors[name].shape)) for name in order)


def _layout(path: str, signature: _Signature, tensors: Mapping[str, Tensor]) -> _Layout:
    size = sum(_bytes(tensors.values()))
    pinned = any(tensor.is_cuda for tensor in tensors.values())
    return _Layout(path, signature, torch.zeros(size, dtype=torch.uint8, pin_memory=pinned))


def _bytes(tensors: Iterable[Tensor]) -> Iterable[int]:
    return (tensor.numel() * tensor.element_size() for tensor in tensors)
