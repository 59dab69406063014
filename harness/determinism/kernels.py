"""Names of the CUDA kernels of one step, through torch's profiler, and those known to be order-dependent.

The profiler (Kineto) records what the driver ran, so it also sees kernels that no operator names: those of
other packages and of compiled regions. Names do not tell everything: flash attention's backward pass has one
family of kernels for both its forms, so a row here is a hint, and says so in its source.

Example::

    >>> known_kernel("void at::native::indexFuncLargeIndex<float>(...)").op
    'index_add'
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

PROFILER = "kernel name in the profiler"


@dataclass(frozen=True)
class KnownKernel:
    """A family of kernels that adds in no fixed order."""

    op: str
    pattern: re.Pattern[str]
    alternative: str


def _known(op: str, pattern: str, alternative: str) -> KnownKernel:
    return KnownKernel(op, re.compile(pattern), alternative)


_STRICT = "determinism.mode=strict"

KNOWN = (
    _known("flash attention backward", r"flash_bwd_dq_dk_dv", f"{_STRICT}, or SDPBackend.MATH"),
    _known("memory-efficient attention backward", r"fmha_cutlassB", f"{_STRICT}, or SDPBackend.MATH"),
    _known("scatter with addition", r"_scatter_gather_elementwise_kernel.*[Aa]dd", _STRICT),
    _known("index_add", r"indexFunc(?:Large|Small)Index", _STRICT),
    _known("upsampling backward", r"upsample_\w+_backward_out_frame", "mode='nearest'"),
    _known("NCCL reduction with NVLS", r"ncclDevKernel_(?:AllReduce|ReduceScatter)\w*NVLS", _STRICT),
)


def known_kernel(name: str) -> KnownKernel | None:
    """The family that a kernel's name belongs to, if it is one of `KNOWN`."""
    return next((kernel for kernel in KNOWN if kernel.pattern.search(name)), None)


def available() -> bool:
    """Whether this build can record CUDA kernels and no other profiler is running."""
    can = torch.profiler.ProfilerActivity.CUDA in torch.profiler.supported_activities()
    return can and torch.cuda.is_available() and not torch._C._autograd._profiler_enabled()


class KernelRecorder:
    """Records the kernels that run between `start` and `stop`, with their counts."""

    def __init__(self) -> None:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def start(self) -> bool:
        """Begin to record. False when the driver forbids it: then coverage shows no profiler, and no more."""
        try:
            self._profile.start()
        except RuntimeError:
            return False
        return True

    def stop(self) -> dict[str, int]:
        """Kernel names and how often each ran. Waits for the device."""
        self._profile.stop()
        return {event.key: event.count for event in self._profile.key_averages()}
