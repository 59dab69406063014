"""Model FLOPs utilisation: achieved over peak, on GPUs whose peak is published."""

from __future__ import annotations

# Dense (no sparsity) tensor-core peaks in FLOP/s for bf16/fp16, from NVIDIA's data sheets; first match wins.
_PEAK_HALF = (
    ("B200", 2250e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("V100", 125e12),
    ("T4", 65e12),
    ("RTX 4090", 165.2e12),
)
# fp32 training uses the float32 units (TF32 is off unless a user turns it on).
_PEAK_SINGLE = (
    ("B200", 75e12),
    ("H200", 67e12),
    ("H100 PCIe", 51e12),
    ("H100", 67e12),
    ("A100", 19.5e12),
    ("L40S", 91.6e12),
    ("V100", 15.7e12),
    ("T4", 8.1e12),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of one GPU in ``precision``; None when its data sheet is not in the table."""
    if precision == "fp8":
        half = _look_up(_PEAK_HALF, device_name)
        # Hopper, Ada and Blackwell double their bf16 rate in float8 (data sheets).
        return None if half is None else 2 * half
    return _look_up(_PEAK_SINGLE if precision == "fp32" else _PEAK_HALF, device_name)


def _look_up(table: tuple[tuple[str, float], ...], device_name: str) -> float | None:
    return next((peak for name, peak in table if name in device_name), None)
