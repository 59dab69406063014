"""Making a run deterministic as far as torch can, saying what was changed, and reading back what holds.

- `off` and `warn` change nothing: no flag, no environment variable.
- `strict` must be applied before CUDA, NCCL and the model exist, because cuBLAS, NCCL and some layers read
  their settings once. Applied too late, it refuses instead of half working.
- `strict` raises at an operator that has no deterministic form; it never uses `warn_only`, which swaps
  kernels silently and is itself a change of the run.
- What holds is read back from torch, not remembered: at the start, and again after the first step, since a
  task or a library may have changed it by then (`read_again`).

Example::

    >>> apply("warn")
    []
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch

from harness import environment
from harness.errors import EnvironmentFault, TrainingFailed

Mode = Literal["off", "warn", "strict"]
Value = str | int | bool | None

# https://docs.nvidia.com/cuda/cublas/#results-reproducibility names these two.
_CUBLAS_WORKSPACES = (":4096:8", ":16:8")

# Read once, at NCCL's or Transformer Engine's start; a value that the user chose is kept and read back.
_STRICT_ENVIRONMENT = {
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}

# Variables that choose kernels or the order of additions. Thread counts are read back from torch instead.
_READ_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "DNNL_DEFAULT_FPMATH_MODE",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NCCL_ALGO",
    "NCCL_NVLS_ENABLE",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    "ONEDNN_CPU_ISA_HINTS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)

_STRICT_FLAGS = frozenset(
    {"deterministic_algorithms", "deterministic_warn_only", "fill_uninitialized_memory"}
    | {"inductor_deterministic", "cudnn_benchmark", "cudnn_deterministic"}
    | {"CUBLAS_WORKSPACE_CONFIG", *_STRICT_ENVIRONMENT}
)
"""What a run in strict mode stands on."""

_ALERT = re.compile(r"(?P<op>\S.*?) does not have a deterministic implementation")
_CUBLAS_ALERT = "not deterministic because it uses CuBLAS"


def apply(mode: Mode) -> list[str]:
    """Bring ``mode`` about; returns what was changed, one line each. Call it before anything touches CUDA.

    Raises `EnvironmentFault` when it is too late, or when CUBLAS_WORKSPACE_CONFIG forbids it.
    """
    if mode != "strict":
        return []
    before = read_back()
    if torch.backends.cuda.is_built():
        _strict_cuda()
    torch.use_deterministic_algorithms(True)
    torch._C._set_deterministic_fill_uninitialized_memory(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    after = read_back()
    return [f"{name} = {after[name]} (was {before[name]})" for name in after if after[name] != before[name]]


def _strict_cuda() -> None:
    """Environment variables for cuBLAS and NCCL, which read them once."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACES[0]) not in _CUBLAS_WORKSPACES:
        raise EnvironmentFault(
            f"CUBLAS_WORKSPACE_CONFIG={os.environ['CUBLAS_WORKSPACE_CONFIG']} is not deterministic",
            where="determinism.mode strict",
            remedy=f"unset it, or set {' or '.join(_CUBLAS_WORKSPACES)}",
        )
    wanted = {"CUBLAS_WORKSPACE_CONFIG": _CUBLAS_WORKSPACES[0], **_STRICT_ENVIRONMENT}
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    if missing and (torch.cuda.is_initialized() or torch.distributed.is_initialized()):
        raise EnvironmentFault(
            "CUDA or the process group was started before the deterministic settings",
            where="determinism.mode strict",
            remedy=f"export {' '.join(f'{name}={value}' for name, value in missing.items())} and start again",
        )
    os.environ.update(missing)


def read_back() -> dict[str, Value]:
    """Every setting that decides about bits, as it holds now. Nothing is initialised by asking."""
    return {
        **_flags(),
        **_cuda_flags(),
        **_processor_settings(),
        **{name: _variable(name) for name in _READ_VARIABLES},
    }


def read_again(mode: Mode, before: Mapping[str, Value]) -> tuple[dict[str, Value], list[str]]:
    """`read_back` once more, and what has changed since ``before``, as `name: value → value`.

    Raises `TrainingFailed` when something has undone what ``strict`` had set.
    """
    now = read_back()
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    changed = [f"{name}: {before.get(name)} → {now.get(name)}" for name in names]
    if mode == "strict" and not _STRICT_FLAGS.isdisjoint(names):
        raise TrainingFailed(
            f"the task or a library has undone strict settings by the first step: {'; '.join(changed)}",
            where="determinism.mode strict",
            remedy="take that out of the task, or train with determinism.mode=warn",
        )
    return now, changed


def _variable(name: str) -> str | None:
    value = os.environ.get(name)
    return None if value is None else environment.recorded(value)


def stack() -> dict[str, Value]:
    """The fingerprint of the stack: versions, devices and `read_back`. Equal stacks add in the same order."""
    import numpy

    return {
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "torch_commit": torch.version.git_version,
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        **_libraries(),
        **_processor(),
        **_devices(),
        **read_back(),
    }


def explain(error: RuntimeError) -> TrainingFailed | None:
    """Torch's refusal of a nondeterministic operator as an error that names the operator and the remedy.

    None for every other error.
    """
    text = str(error)
    if _CUBLAS_ALERT in text:
        return TrainingFailed(
            "cuBLAS is not deterministic without a fixed workspace",
            where="determinism.mode strict",
            remedy=f"export CUBLAS_WORKSPACE_CONFIG={_CUBLAS_WORKSPACES[0]}",
        )
    found = _ALERT.search(text)
    if found is None:
        return None
    from harness.determinism.catalogue import alternative_for_alert

    op = found["op"]
    instead = alternative_for_alert(op)
    return TrainingFailed(
        f"`{op}` does not have a deterministic implementation",
        where="determinism.mode strict",
        remedy=f"{f'use {instead}' if instead else 'replace it'}, or train with determinism.mode=warn",
    )


def _flags() -> dict[str, Value]:
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill_uninitialized_memory": torch._C._get_deterministic_fill_uninitialized_memory(),
        "inductor_deterministic": _inductor("deterministic"),
        "inductor_batch_invariant": _inductor("batch_invariant"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "sdp_flash": torch.backends.cuda.flash_sdp_enabled(),
        "sdp_memory_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "sdp_math": torch.backends.cuda.math_sdp_enabled(),
        "sdp_cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
    }


def _inductor(name: str) -> bool:
    """A flag of inductor. It is not imported for this, which takes seconds: unloaded, it has its default."""
    config = sys.modules.get("torch._inductor.config")
    if config is None:
        return os.environ.get(f"TORCHINDUCTOR_{name.upper()}") == "1"
    return bool(getattr(config, name, False))


def _cuda_flags() -> dict[str, Value]:
    if not torch.backends.cuda.is_built():
        return {}
    matmul = torch.backends.cuda.matmul
    return {
        "cudnn_enabled": torch.backends.cudnn.enabled,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_allow_tf32": matmul.allow_tf32,
        "matmul_bf16_reduced_precision": bool(matmul.allow_bf16_reduced_precision_reduction),
        "matmul_fp16_reduced_precision": bool(matmul.allow_fp16_reduced_precision_reduction),
    }


def _processor_settings() -> dict[str, Value]:
    """Threads inside operators cut sums. Those between operators run TorchScript's `fork` and nothing else:
    their number, which torch takes from the cores of the machine, is not among what decides."""
    threads = re.search(r"mkl_get_max_threads\(\)\s*:\s*(\d+)", torch.__config__.parallel_info())
    return {
        "threads": torch.get_num_threads(),
        "mkl_threads": int(threads[1]) if threads else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": bool(torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()),
        "mkldnn_deterministic": _mkldnn("deterministic"),
        "mkldnn_fp32_precision": _mkldnn("fp32_precision"),
    }


def _mkldnn(name: str) -> Value:
    """A setting of oneDNN; None where this torch has none of that name."""
    value = getattr(torch.backends.mkldnn, name, None)
    return value if value is None or isinstance(value, bool | str) else str(value)


_ISA = re.compile(r"^(sse|ssse|avx|amx|fma|f16c|bmi|asimd|sve|sme|bf16|i8mm)")


def _processor() -> dict[str, Value]:
    """Model and vector instructions of the processor: oneDNN and MKL choose their kernels by them."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {"cpu": platform.processor() or None, "cpu_instructions": None}
    fields = dict(re.findall(r"^([^\t:]+)\s*:\s*(.*)$", file.read_text(errors="replace"), re.MULTILINE))
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "cpu": fields.get("model name"),
        "cpu_instructions": " ".join(sorted(flag for flag in flags if _ISA.match(flag))) or None,
    }


_LIBRARIES = {"mkl": r"Math Kernel Library Version ([\d.]+)", "onednn": r"MKL-DNN v([\d.]+)"}


def _libraries() -> dict[str, Value]:
    """Versions of the libraries that multiply on a processor, as torch's build names them."""
    told = torch.__config__.show()
    found = {name: re.search(pattern, told) for name, pattern in _LIBRARIES.items()}
    return {name: match[1] if match else None for name, match in found.items()}


def _devices() -> dict[str, Value]:
    """Versions of the CUDA libraries and the names of the visible devices; nothing without a CUDA build."""
    if not torch.backends.cuda.is_built():
        return {}
    asked: Mapping[str, Callable[[], Value]] = {
        "cuda": lambda: torch.version.cuda,
        "hip": lambda: torch.version.hip,
        "cudnn": lambda: torch.backends.cudnn.version(),
        "nccl": _nccl_version,
        "driver": _driver,
        "devices": _device_names,
    }
    return {name: ask() for name, ask in asked.items()}


def _nccl_version() -> str | None:
    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(str(part) for part in torch.cuda.nccl.version())


def _driver() -> str | None:
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Module\s+(?:for \S+\s+)?(\d[\d.]+)", file.read_text()) if file.exists() else None
    return found[1] if found else None


def _device_names() -> str | None:
    if not torch.cuda.is_available():
        return None
    kinds = {
        f"{torch.cuda.get_device_name(index)} sm_{''.join(map(str, torch.cuda.get_device_capability(index)))}"
        for index in range(torch.cuda.device_count())
    }
    return ", ".join(sorted(kinds))
