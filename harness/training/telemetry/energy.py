"""Energy that a launch takes, where the device counts it; nothing is estimated.

- A GPU: NVML's counter of the device of each rank (millijoules since the driver was loaded; Volta and newer),
  through `nvidia-ml-py` (``pip install 'harness[energy]'``).
- A CPU: RAPL's counters of the packages, /sys/class/powercap/intel-rapl:N/energy_uj (microjoules, beginning
  anew after max_energy_range_uj), read by the first rank of each host; by default only root may read them.
  They count the whole host, other programs included, which the source says.

A reading goes into events/ at every save and at the end of a launch; no signature covers those files. A
launch that was killed has the reading of its last save.

Sources: NVML API reference, nvmlDeviceGetTotalEnergyConsumption; Linux kernel,
Documentation/power/powercap/powercap.rst.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from harness.training.telemetry.metrics import Events

POWERCAP = Path("/sys/class/powercap")
EVENT = "energy"
NVML = "NVML, the GPU alone"
RAPL = "RAPL, the CPU packages of the whole host"

_READ_EVERY = 60.0
"""Seconds. RAPL's counters begin anew after 262 kJ on many CPUs: 20 minutes at 200 W."""

Counter = Callable[[], float]
"""Joules since some moment."""


class Meter:
    """Joules since it was made; ``source`` is None, and nothing is written, where no counter can be read."""

    def __init__(self, source: str | None = None, counters: Sequence[Counter] = ()) -> None:
        self.source = source
        self._counters = counters
        self._began = time.time()
        self._lock = threading.Lock()
        self._first = self._total()
        self._closed = threading.Event()
        if counters:
            threading.Thread(target=self._keep_up, daemon=True).start()

    def note(self, events: Events, step: int | None = None) -> None:
        """Write the reading of now; ``step``: the one that was just saved."""
        if self.source is None:
            return
        try:
            joules = self._total() - self._first
        except OSError as error:
            events.write("energy cannot be read", "warning", reason=str(error))
            self.source = None
            return
        events.write(EVENT, source=self.source, launch=self._began, joules=joules, step=step)

    def close(self, events: Events) -> None:
        """Write the last reading."""
        self._closed.set()
        self.note(events)

    def _total(self) -> float:
        with self._lock:
            return sum(counter() for counter in self._counters)

    def _keep_up(self) -> None:
        """Read often enough that no counter begins anew twice unseen."""
        with suppress(OSError):  # the next reading says so
            while not self._closed.wait(_READ_EVERY):
                self._total()


def meter(device: torch.device, local_rank: int) -> Meter:
    """The meter of this rank."""
    if device.type == "cuda":
        counter = _nvml(device)
        return Meter() if counter is None else Meter(NVML, [counter])
    found = packages(POWERCAP) if local_rank == 0 else []
    return Meter(RAPL, found) if found else Meter()


def _nvml(device: torch.device) -> Counter | None:
    try:
        import pynvml
    except ImportError:
        return None
    library: Any = pynvml
    try:
        library.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = library.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (library.NVMLError, AttributeError):
        return None

    def joules() -> float:
        try:
            return float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
        except library.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    return joules


def packages(root: Path) -> list[Counter]:
    """A counter for each package; none when one of them cannot be read."""
    found: list[Counter] = []
    with suppress(OSError, ValueError):
        for folder in sorted(root.glob("intel-rapl:*")):
            # intel-rapl:0:1 is a part of package 0 and counted there.
            if folder.name.count(":") == 1 and (folder / "name").read_text().startswith("package"):
                found.append(_Package(folder))
        return found
    return []


class _Package:
    """RAPL's counter of a package, past its largest value too."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = int(self._file.read_text())
        self._total = 0

    def __call__(self) -> float:
        now = int(self._file.read_text())
        self._total += now - self._last if now >= self._last else now + self._range - self._last
        self._last = now
        return self._total / 1e6
