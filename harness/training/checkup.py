"""What `harness doctor` looks at: the machine, the installation and one config, before a job is queued.

Nothing is changed. torch is imported only to plan the disk space of a config, so this also runs where only
the auditing half is installed. Each check is one function of what it needs; `run` lines them up.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import netrc
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness import config, environment
from harness.errors import HarnessError
from harness.format.layout import RunFolder
from harness.provenance import keys
from harness.settings import Settings
from harness.terminal import human_bytes
from harness.training import launch

Level = Literal["ok", "warn", "bad"]

_TORCH = (2, 11)
_OPEN_FILES = 1024
_SHARED_MEMORY = 64 << 20
_SKEW_SECONDS = 5.0
_SLOW_SECONDS = 1.0
_SPARE_BYTES = 64 << 20
"""Free space that a run needs besides its checkpoints."""


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    level: Level
    name: str
    text: str
    remedy: str | None = None


def run(path: Path | None, overrides: list[str], world_size: int | None) -> list[Check]:
    """Every check of this machine and, when given, of the config ``path``.

    ``world_size``: processes that a launch will have; None: what this process's environment says.
    """
    checks = [_python(), _packages(training=path is not None), *_clock()]
    checks += [_launcher(world_size), *_devices(), *_threads(), _open_files()]
    if path is None:
        return [*checks, _key(None, None), _folder(Path.cwd(), "working folder")]
    try:
        loaded = config.load(path, overrides)
    except HarnessError as error:
        return [*checks, Check("bad", "config", str(error))]
    settings = loaded.settings
    checks.append(Check("ok", "config", f"{path} is understood: run {settings.run_name}"))
    processes = world_size or settings.train.world_size or _environment_size()
    checks += [_batch(settings, processes), _key(settings.signing.key, settings.run.dir)]
    checks += [_folder(settings.run.dir, "run.dir"), *_run(settings.run.dir)]
    checks += _space(settings, loaded.path.parent, processes)
    checks += [*_shared_memory(settings), *_wandb(settings, os.environ)]
    return checks


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("ok", "python", f"{version} at {sys.executable}")


def _packages(*, training: bool) -> Check:
    absent = environment.missing(("torch", "accelerate", "safetensors", "numpy"))
    if absent and not training:
        text = f"the auditing half; training would also need {', '.join(absent)}"
        return Check("ok", "packages", text)
    if absent:
        text = f"{', '.join(absent)} not installed"
        return Check("bad", "packages", text, environment.install_command())
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _TORCH:
        return Check("bad", "packages", f"torch {version} is older than 2.11", "install a newer torch")
    others = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("accelerate", "safetensors"))
    return Check("ok", "packages", f"torch {version}, {others}")


def _clock() -> Iterator[Check]:
    now = time.gmtime()
    shown = time.strftime("%Y-%m-%dT%H:%M:%SZ", now)
    if not 2025 <= now.tm_year < 2100:
        yield Check("bad", "clock", f"says {shown}", "set it: statements carry the time")
    else:
        yield Check("ok", "clock", shown)


def _environment_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() and int(text) else 1


def _launcher(world_size: int | None) -> Check:
    try:
        found = launch.detect()
    except HarnessError as error:
        return Check("bad", "launcher", error.what, error.remedy)
    scheduler = next(
        (name for name in ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST") if name in os.environ), None
    )
    inside = {"SLURM_JOB_ID": "in a Slurm job", "KUBERNETES_SERVICE_HOST": "in Kubernetes", None: "by hand"}
    planned = f"; {world_size} asked for" if world_size and world_size != found.world_size else ""
    text = f"{found.launcher}, {inside[scheduler]}, {found.world_size} process(es){planned}"
    return Check("ok", "launcher", text)


def _devices() -> Iterator[Check]:
    gpus = _nvidia()
    if gpus is None:
        yield Check("ok", "devices", f"no NVIDIA GPU; {_cores()} CPU cores")
        return
    if isinstance(gpus, str):
        yield Check("bad", "devices", f"nvidia-smi fails: {gpus}", "check the driver")
        return
    yield Check("ok", "devices", f"{len(gpus)} GPU(s): {', '.join(sorted(set(gpus)))}")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("torch")
        if version.endswith("+cpu"):
            yield Check("bad", "devices", f"torch {version} cannot use them", "install a CUDA build of torch")


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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def _batch(settings: Settings, processes: int) -> Check:
    train = settings.train
    per_pass = train.micro_batch * processes
    if train.global_batch % per_pass:
        text = (
            f"global batch {train.global_batch} is no multiple of {train.micro_batch} x {processes} processes"
        )
        return Check("bad", "batch", text, "change train.micro_batch or the number of processes")
    steps = train.global_batch // per_pass
    text = f"{train.global_batch} = {train.micro_batch} x {processes} processes x {steps} accumulated"
    return Check("ok", "batch", text)


def _key(configured: Path | None, run_dir: Path | None) -> Check:
    if configured is None and not os.environ.get(keys.ENVIRONMENT) and not keys.user_key_path().exists():
        text = f"none yet; the first run makes {keys.user_key_path()}"
        return Check("warn", "signing key", text, "or make your own: harness keys new --out NAME")
    try:
        path, reason = keys.signing_key_path(configured, run_dir)
        signer = keys.load_signer(path)
    except HarnessError as error:
        return Check("bad", "signing key", str(error))
    if signer.p256 is None:
        text = f"{path} ({reason}) has no P-256 key, so there will be no model.sig"
        return Check("warn", "signing key", text, "harness keys new --out NAME")
    return Check("ok", "signing key", f"{signer.ed25519_id[:16]}…  {path} ({reason})")


def _folder(folder: Path, name: str) -> Check:
    """Whether a file can be written, synced and renamed there, and how long that takes."""
    there = _existing(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-doctor-", dir=there) as probe:
            started = time.perf_counter()
            target = Path(probe) / "new"
            with open(target, "wb") as stream:
                stream.write(b"0" * 4096)
                stream.flush()
                os.fsync(stream.fileno())
            target.rename(Path(probe) / "final")
            seconds = time.perf_counter() - started
            skew = abs((Path(probe) / "final").stat().st_mtime - time.time())
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


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _run(root: Path) -> Iterator[Check]:
    """What run.dir holds already, and whether a job is at work in it."""
    complete = RunFolder(root).complete()
    if complete:
        yield Check("ok", "run", f"continues from {complete[-1].name}, if that verifies")
    if not root.is_dir():
        return
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield Check("bad", "run", f"another job is training in {root}", "wait for it or stop it")
    finally:
        os.close(descriptor)


def _space(settings: Settings, base: Path, processes: int) -> Iterator[Check]:
    """Free space against what the run's checkpoints will take."""
    free = shutil.disk_usage(_existing(settings.run.dir)).free
    needed = _needed(settings, base, processes)
    if needed is None:
        level: Level = "ok" if free > _SPARE_BYTES else "bad"
        yield Check(level, "disk", f"{human_bytes(free)} free; what the run will take cannot be planned here")
        return
    each, total = needed
    text = f"{human_bytes(free)} free, {human_bytes(total)} of checkpoints to come ({human_bytes(each)} each)"
    if free < 2 * each + _SPARE_BYTES:
        yield Check("bad", "disk", text, "free space or change run.dir")
    elif free < total:
        yield Check("warn", "disk", text, "set checkpoint.keep, or checkpoint less often")
    else:
        yield Check("ok", "disk", text)


def _needed(settings: Settings, base: Path, processes: int) -> tuple[int, int] | None:
    """Bytes of one checkpoint and of all that are kept at once; None when they cannot be planned here."""
    if environment.missing(("torch", "numpy")):
        return None
    try:
        from harness.training.plan import plan

        planned = plan(settings, base, processes)
    except HarnessError:
        return None
    return planned.checkpoint_bytes, planned.disk_bytes


def _shared_memory(settings: Settings) -> Iterator[Check]:
    if settings.train.data_workers and Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        if free < _SHARED_MEMORY:
            text = f"{human_bytes(free)} free in /dev/shm, and train.data_workers is on"
            yield Check(
                "warn", "shared memory", text, "docker run --shm-size=1g, or an emptyDir of medium Memory"
            )
        else:
            yield Check("ok", "shared memory", f"{human_bytes(free)} free in /dev/shm")


def _wandb(settings: Settings, environ: Mapping[str, str]) -> Iterator[Check]:
    mode = settings.track.wandb
    if mode == "off":
        return
    if environment.missing(("wandb",)):
        yield Check("bad", "wandb", f"track.wandb is {mode} and wandb is not installed", "pip install wandb")
    elif mode == "online" and not (environ.get("WANDB_API_KEY") or _in_netrc("api.wandb.ai")):
        yield Check("bad", "wandb", "online, and no API key", "wandb login, or set WANDB_API_KEY")
    else:
        yield Check("ok", "wandb", f"{mode}, {importlib.metadata.version('wandb')}")


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
