"""What `harness doctor` looks at on a machine: packages, clock, launcher, devices, limits, key, folders.

Nothing is changed, and torch is not imported, so this also runs where only the auditing half is installed.
Each check is one function of what it needs; `machine` lines them up. What belongs to one config is in
`harness.training.doctor.one_config`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness import environment
from harness.cores import process_cpu_count
from harness.errors import HarnessError
from harness.format import moments
from harness.provenance.signing import keys
from harness.training.ranks import launch
from harness.words import counted, listed

Level = Literal["ok", "warn", "bad"]

LOCK = Path(environment.__file__).parent.parent / "requirements.lock"
"""The lock file of a checkout; an installed copy of the package has none."""

_TORCH = (2, 11)
_OPEN_FILES = 1024
_SKEW_SECONDS = 5.0
_SLOW_SECONDS = 1.0


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    level: Level
    name: str
    text: str
    remedy: str | None = None


def machine(world_size: int | None, *, training: bool) -> list[Check]:
    """The checks that need no config.

    ``world_size``: processes that a launch will have; None: what this process's environment says.
    ``training``: whether a run is to be trained here, which an auditor's machine need not be able to.
    """
    checks = [_python(), _packages(training=training), *locked(LOCK), _clock(), _launcher(world_size)]
    return [*checks, *_devices(world_size or environment_size()), *_threads(), _open_files()]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("ok", "python", f"{version} at {sys.executable}")


def _packages(*, training: bool) -> Check:
    absent = environment.missing(("torch", "accelerate", "safetensors", "numpy"))
    if absent and not training:
        text = f"the auditing half; training would also need {', '.join(absent)}"
        return Check("ok", "packages", text)
    if absent:
        text = f"training needs {', '.join(absent)}, not installed"
        return Check("bad", "packages", text, f"run: {environment.install_command()}")
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _TORCH:
        return Check("bad", "packages", f"torch {version} is older than 2.11", "install a newer torch")
    others = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("accelerate", "safetensors"))
    return Check("ok", "packages", f"torch {version}, {others}")


def locked(lock: Path) -> Iterator[Check]:
    """Installed versions against the file ``lock``; nothing without one. A build tag (``+cpu``) is no
    difference.
    """
    try:
        lines = lock.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    wanted = dict(line.split("==") for line in lines if re.fullmatch(r"[\w.-]+==[\w.!+-]+", line))
    installed = {name: version for name, version in environment.packages().items() if name in wanted}
    differing = [
        f"{name} {version} (lock: {wanted[name]})"
        for name, version in installed.items()
        if (version or "").partition("+")[0] != wanted[name]
    ]
    if differing:
        shown = listed(differing, 5)
        yield Check("warn", "lock file", f"other versions than tested: {shown}", "scripts/setup.sh")
    else:
        yield Check("ok", "lock file", f"{len(installed)} packages are as {lock.name} says")


def _clock() -> Check:
    now = moments.now()
    if not "2025" <= now < "2100":
        return Check("bad", "clock", f"says {now}", "set it: statements carry the time")
    return Check("ok", "clock", now)


def environment_size() -> int:
    """Processes of the launch that this process is part of; 1 when it was started by hand."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() and int(text) else 1


def _launcher(world_size: int | None) -> Check:
    try:
        found = launch.detect()
    except HarnessError as error:
        return Check("bad", "launcher", error.what, error.remedy)
    where = "in a Slurm job" if "SLURM_JOB_ID" in os.environ else "by hand"
    where = "in Kubernetes" if "KUBERNETES_SERVICE_HOST" in os.environ else where
    count = counted(found.world_size, "process", "es")
    planned = f"; {world_size} planned" if world_size and world_size != found.world_size else ""
    return Check("ok", "launcher", f"{found.launcher}, {where}, {count} here{planned}")


def _devices(processes: int) -> Iterator[Check]:
    gpus = _nvidia()
    if gpus is None:
        yield Check("ok", "devices", f"no NVIDIA GPU; {process_cpu_count()} CPU cores")
        return
    if isinstance(gpus, str):
        yield Check("bad", "devices", f"nvidia-smi fails: {gpus}", "check the driver")
        return
    visible = _visible(len(gpus), os.environ.get("CUDA_VISIBLE_DEVICES"))
    shown = "" if visible == len(gpus) else f", {visible} of them in CUDA_VISIBLE_DEVICES"
    yield _enough(visible, processes, f"{len(gpus)} GPU(s): {', '.join(sorted(set(gpus)))}{shown}")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("torch")
        if version.endswith("+cpu"):
            yield Check("bad", "devices", f"torch {version} cannot use them", "install a CUDA build of torch")


def _enough(visible: int, processes: int, text: str) -> Check:
    """GPUs against the processes of a launch, of which another machine may run some."""
    if visible == 0:
        return Check("warn", "devices", f"{text}; training would use the CPU", "check CUDA_VISIBLE_DEVICES")
    if processes > visible:
        remedy = f"start at most {visible} processes on this machine (torchrun --nproc-per-node {visible})"
        return Check("warn", "devices", f"{text}; fewer than {processes} processes", remedy)
    if processes < visible and processes == 1:
        remedy = f"to use all: torchrun --nproc-per-node {visible} -m harness train …"
        return Check("ok", "devices", f"{text}; one process uses one", remedy)
    return Check("ok", "devices", text)


def _visible(installed: int, variable: str | None) -> int:
    """GPUs that CUDA shows to this process: its list ends at the first entry that is no device."""
    if variable is None:
        return installed
    count = 0
    for entry in variable.split(","):
        name = entry.strip()
        if not name.startswith(("GPU-", "MIG-")) and not (name.isdigit() and int(name) < installed):
            break
        count += 1
    return count


def _nvidia() -> list[str] | str | None:
    """Names of the GPUs with their drivers; a reason when they cannot be listed; None without the tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines if done.returncode == 0 and lines else (done.stderr or done.stdout).strip()[:200] or "no GPU"


def _threads() -> Iterator[Check]:
    threads = os.environ.get("OMP_NUM_THREADS")
    if shutil.which("nvidia-smi"):
        return
    if threads == "1":
        yield Check("ok", "threads", "OMP_NUM_THREADS=1: sums keep their order")
    else:
        text = f"OMP_NUM_THREADS is {threads or 'not set'}: with several CPU threads an indexing backward is"
        remedy = "set OMP_NUM_THREADS=1, or determinism.mode=strict (docs/determinism.md)"
        yield Check("warn", "threads", f"{text} not reproducible", remedy)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _OPEN_FILES:
        return Check("warn", "open files", f"the limit is {soft}", f"ulimit -n {min(hard, 65536)}")
    return Check("ok", "open files", f"the limit is {soft}")


def signing_key(configured: Path | None, run_dir: Path | None) -> tuple[Check, keys.Signer | None]:
    """Who would sign, without making the key that a first run makes."""
    try:
        if configured is None and not os.environ.get(keys.ENVIRONMENT) and not keys.user_key_path().exists():
            return _key_to_come(keys.user_key_path()), None
        path, reason = keys.signing_key_path(configured, run_dir)
        signer = keys.load_signer(path)
    except (HarnessError, OSError) as error:
        return Check("bad", "signing key", str(error)), None
    if signer.p256 is None:
        text = f"{path} ({reason}) has no P-256 key, so there will be no model.sig"
        return Check("warn", "signing key", text, "harness keys new --out NAME"), signer
    return Check("ok", "signing key", f"{signer.ed25519_id[:16]}…  {path} ({reason})"), signer


def _key_to_come(path: Path) -> Check:
    made = writable(path.parent, "signing key")
    if made.level == "bad":
        remedy = f"name a key by signing.key or ${keys.ENVIRONMENT}: harness keys new --out NAME"
        return Check("bad", "signing key", f"none yet, and {made.text}", remedy)
    text = f"none yet; the first run makes {path}"
    return Check("warn", "signing key", text, "or make your own: harness keys new --out NAME")


def writable(folder: Path, name: str) -> Check:
    """Whether a file can be written, synced and renamed in ``folder``, or in what is there of its path."""
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-doctor-", dir=existing(folder)) as probe:
            started = time.perf_counter()
            modified = _write_durably(Path(probe))
            seconds = time.perf_counter() - started
            skew = abs(modified - time.time())
    except OSError as error:
        text = f"{folder}: cannot write, sync and rename: {error.strerror or error}"
        return Check("bad", name, text, "change run.dir or its permissions")
    if skew > _SKEW_SECONDS:
        text = f"{folder}: the file server's clock is {skew:.0f} s off"
        return Check("warn", name, text, "synchronise the clocks")
    if seconds > _SLOW_SECONDS:
        text = f"{folder}: one small durable write takes {seconds:.1f} s"
        return Check("warn", name, text, "choose a faster disk")
    return Check("ok", name, f"{folder}: a durable write takes {1000 * seconds:.0f} ms")


def _write_durably(folder: Path) -> float:
    """Write, sync and rename a file in ``folder``; returns when the file system says that was."""
    with open(folder / "new", "wb") as stream:
        stream.write(b"0" * 4096)
        stream.flush()
        os.fsync(stream.fileno())
    return (folder / "new").rename(folder / "final").stat().st_mtime


def existing(folder: Path) -> Path:
    """The deepest folder on the way to ``folder`` that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
