"""Energy: what counters say, what becomes of it in a report, and nothing where there is no counter."""

from __future__ import annotations

import itertools
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.report import costs, runs
from harness.training.telemetry import energy
from harness.training.telemetry.metrics import Events


def package(root: Path, number: str, name: str, microjoules: int, largest: int = 1_000_000) -> Path:
    """One zone of a powercap folder."""
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{largest}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_packages_are_added_up_past_the_largest_value_and_parts_are_not(tmp_path: Path) -> None:
    """Oracle: by hand: 0.9 J of one package that began anew, 0.5 J of the other; core and dram are parts."""
    one = package(tmp_path, "0", "package-0", 800_000)
    other = package(tmp_path, "1", "package-1", 0)
    package(tmp_path, "0:0", "core", 5)
    package(tmp_path, "2", "psys", 5)
    counters = energy.packages(tmp_path)
    assert [counter() for counter in counters] == [0, 0]
    one.write_text("700000")
    other.write_text("500000")
    assert [counter() for counter in counters] == pytest.approx([0.9, 0.5])
    other.write_text("unreadable")
    assert energy.packages(tmp_path) == []
    assert energy.packages(tmp_path / "nothing") == []


def launch(root: Path, rank: int, readings: Iterator[float]) -> None:
    """A launch that saves once and ends, as the loop drives its meter."""
    events = Events(root / "events" / f"rank-{rank:05d}.jsonl")
    meter = energy.Meter(energy.RAPL, [lambda: next(readings)])
    meter.note(events, 50)
    meter.close(events)
    events.close()


def test_a_report_adds_launches_and_ranks(tmp_path: Path) -> None:
    """Oracle: by hand: 3600 J and 1800 J of one rank's launches, 1800 J of the other's, are 2 Wh."""
    (tmp_path / "checkpoints").mkdir()
    launch(tmp_path, 0, iter([100.0, 1100.0, 3700.0]))
    launch(tmp_path, 0, iter([0.0, 1000.0, 1800.0]))
    launch(tmp_path, 1, iter([5.0, 6.0, 1805.0]))
    with (tmp_path / "events" / "rank-00000.jsonl").open("a") as file:
        file.write(json.dumps({"event": "energy", "source": "x", "launch": "y", "joules": None}) + "\n")
    run = runs.read(tmp_path)
    assert run.energy == {energy.RAPL: 7200.0}
    assert costs.energy(run) == f"2 Wh ({energy.RAPL})"


def test_without_a_counter_nothing_is_written_and_the_report_says_so(tmp_path: Path) -> None:
    """Oracle: no event; the words of the report, also for a counter that stands still."""
    (tmp_path / "checkpoints").mkdir()
    events = Events(tmp_path / "events" / "rank-00000.jsonl")
    meter = energy.Meter()
    meter.note(events, 1)
    meter.close(events)
    assert events.path.read_bytes() == b""
    launch(tmp_path, 1, itertools.repeat(7.0))
    assert costs.energy(runs.read(tmp_path)) == "not recorded"


def test_a_counter_that_breaks_does_not_stop_a_run(tmp_path: Path) -> None:
    """Oracle: one warning, once."""

    def readings() -> Iterator[float]:
        yield 0.0
        raise OSError("gone")

    numbers = readings()
    events = Events(tmp_path / "rank-00000.jsonl")
    meter = energy.Meter(energy.NVML, [lambda: next(numbers)])
    meter.note(events, 1)
    meter.close(events)
    (line,) = events.path.read_text().splitlines()
    assert json.loads(line)["level"] == "warning"


def test_a_gpu_is_asked_by_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a library that knows one device; no GPU was at hand."""
    library = types.ModuleType("pynvml")
    asked: list[str] = []

    class NVMLError(Exception):
        pass

    library.NVMLError = NVMLError  # type: ignore[attr-defined]
    library.nvmlInit = lambda: None  # type: ignore[attr-defined]
    library.nvmlDeviceGetHandleByUUID = lambda uuid: asked.append(uuid) or uuid  # type: ignore[attr-defined]
    library.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 2500  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", library)
    found = types.SimpleNamespace(uuid="abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    made = energy.meter(torch.device("cuda", 0), 3)
    assert (made.source, asked) == (energy.NVML, ["GPU-abc"])

    def old(handle: str) -> int:
        raise NVMLError("not supported")

    library.nvmlDeviceGetTotalEnergyConsumption = old  # type: ignore[attr-defined]
    assert energy.meter(torch.device("cuda", 0), 0).source is None
