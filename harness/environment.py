"""What this process runs in, for the signed statement: facts that matter to a result, and nothing private.

- packages: the installed ones among those that harness needs, directly or not
- variables: an allow-list; everything else in the environment stays unknown
- no host name, no home folder, no user name, no address; where an allowed variable holds one, it is replaced
- what cannot be determined is null, never a guess
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

from harness import privacy
from harness.errors import EnvironmentFault

AUDITING = ("blake3", "cryptography", "orjson", "pydantic", "pyyaml")
"""Distributions that the auditing half needs."""

TRAINING = ("torch", "accelerate", "safetensors", "numpy", "tqdm", "tokenizers", "xxhash", "wandb", "jinja2")
"""Distributions of the extra ``train``."""

OPTIONAL = ("pyarrow", "scikit-learn", "torchao", "triton", "obstore", "python-pkcs11")
"""Distributions that a config can ask for."""

# wandb is imported only by a config that asks for it.
_NEEDED_TO_TRAIN = tuple(name for name in TRAINING if name != "wandb")

_VARIABLES = frozenset(
    {
        *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG"),
        *("HIP_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
        *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES"),
        *("KMP_AFFINITY", "MKL_CBWR", "PYTHONHASHSEED", "PYTHONOPTIMIZE", "TORCHINDUCTOR_MAX_AUTOTUNE"),
        *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID"),
        *("SLURM_RESTART_COUNT", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK"),
    }
)
_PREFIXES = ("NCCL_", "GLOO_")
# These hold addresses, host names and paths.
_PRIVATE = ("_FILE", "_COMM_ID", "_HOSTID", "_DIR", "_PATH")
_LONGEST_VALUE = 200

_GIT_SECONDS = 20.0
_GIT = ("git", "-c", "core.fsmonitor=false", "-c", "core.quotepath=true", "-c", "diff.noprefix=false")
# Full blob ids stand for the contents of changed binary files.
_GIT_DIFF = ("diff", "HEAD", "--full-index", "--no-ext-diff", "--no-textconv", "--no-color")
# Set by git for its hooks, these would point at another repository.
_GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_EXTERNAL_DIFF", "GIT_DIFF_OPTS")

Plain = str | int | bool | None


def facts(host: bool = False) -> dict[str, Any]:
    """The predicate's ``environment``: plain values and two flat objects, ``packages`` and ``variables``.

    The name of this machine only when ``host`` asks for it.
    """
    return {
        **({"host": socket.gethostname()} if host else {}),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": f"{platform.system()} {platform.release()}",
        "distribution": _distribution(),
        "machine": platform.machine(),
        "cpu": _processor(),
        "cpus": os.cpu_count(),
        "cpus_allowed": _allowed_cpus(),
        "memory_bytes": _memory(),
        "container": _container(os.environ, Path("/")),
        "virtual_environment": sys.prefix != sys.base_prefix,
        "packages": packages(),
        "variables": variables(os.environ),
    }


def code(folder: Path | None = None) -> dict[str, Plain]:
    """The predicate's ``code`` without the task: which harness, and which commit of the repository around
    ``folder`` (the working directory by default).

    ``harness`` is the version and the digest of the package's own sources. ``git_commit``, ``dirty`` and
    ``diff_sha256`` (of the tracked changes and the untracked .py files; null when there are none) are null
    together when git, a repository or git's consent is missing.
    """
    return {"harness": f"{version()}+{source_digest()[:16]}", **_repository(folder or Path.cwd())}


def version() -> str:
    """Version of the installed harness; ``0`` when it runs from a folder that was not installed."""
    try:
        return metadata.version("harness")
    except metadata.PackageNotFoundError:
        return "0"


def source_digest(package: Path | None = None) -> str:
    """Hex sha256 over the names and bytes of the package's .py files, in order of their names."""
    root = package or Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(root).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def packages() -> dict[str, str | None]:
    """Installed distributions that harness needs, directly or not, with their versions."""
    found: dict[str, str | None] = {}
    waiting = [*AUDITING, *TRAINING, *OPTIONAL]
    while waiting:
        name = _normal(waiting.pop())
        if name in found:
            continue
        headers = _headers(name)
        if headers is not None:
            versions = re.findall(r"^Version: *(\S+)", headers, re.MULTILINE)
            found[name] = versions[0] if versions else None
            waiting += _requirements(re.findall(r"^Requires-Dist: *(.+)", headers, re.MULTILINE))
    return dict(sorted(found.items()))


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Allowed variables of ``environ``; home, user and host are replaced in their values."""
    names = [
        name
        for name in sorted(environ)
        if name in _VARIABLES or (name.startswith(_PREFIXES) and not name.endswith(_PRIVATE))
    ]
    return {name: recorded(environ[name]) for name in names}


def require_training() -> None:
    """Raise `EnvironmentFault` with the command to run when the training half is not installed."""
    absent = missing(_NEEDED_TO_TRAIN)
    if absent:
        raise EnvironmentFault(
            f"training needs {', '.join(absent)}, not installed in {sys.executable}",
            remedy=f"run: {install_command()}",
        )


def missing(names: Iterable[str]) -> list[str]:
    """Those of ``names`` (distributions) whose module cannot be found; nothing is imported."""
    modules = {"scikit-learn": "sklearn", "pyyaml": "yaml"}
    return [name for name in names if util.find_spec(modules.get(name, name)) is None]


def install_command() -> str:
    """What installs the training half, from where this harness came from."""
    return f"{_relative(Path(sys.executable))} -m pip install '{_source()}[train]'"


def _source() -> str:
    """The checkout that runs, or the one that was installed (PEP 610); a name only when neither is known."""
    checkout = Path(__file__).parent.parent
    if (checkout / "pyproject.toml").exists():
        return _relative(checkout)
    try:
        record = json.loads(metadata.distribution("harness").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        record = {}
    url = str(record.get("url", ""))
    return _relative(Path(url.removeprefix("file://"))) if url.startswith("file://") else url or "harness"


def _relative(path: Path) -> str:
    """``path`` from the working directory when it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _normal(name: str) -> str:
    """Name of a distribution as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _headers(name: str) -> str | None:
    """The headers of an installed distribution's METADATA; None when it is not installed.

    `importlib.metadata` parses the long description too, for each of some sixty distributions.
    """
    try:
        text = metadata.distribution(name).read_text("METADATA")
    except metadata.PackageNotFoundError:
        return None
    return (text or "").partition("\n\n")[0]


def _requirements(lines: Iterable[str]) -> Iterator[str]:
    """Names in requirement lines (PEP 508), those of extras left out."""
    for line in lines:
        name = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line)
        if name and not re.search(r";.*\bextra\s*==", line):
            yield name[0]


def recorded(value: str) -> str:
    """An allowed variable's ``value`` as a statement may hold it: nothing private, nothing long."""
    value = privacy.scrubbed(value)
    plain = value.isprintable() and len(value) <= _LONGEST_VALUE
    return value if plain else f"<{len(value)} characters, not recorded>"


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None


def _processor() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor() or None
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or None


def _allowed_cpus() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _container(environ: Mapping[str, str], root: Path) -> str | None:
    """The kind of container that says so itself; null when none does."""
    if "KUBERNETES_SERVICE_HOST" in environ:
        return "kubernetes"
    if "APPTAINER_CONTAINER" in environ or "SINGULARITY_CONTAINER" in environ:
        return "apptainer"
    files = {"docker": root / ".dockerenv", "podman": root / "run/.containerenv"}
    return next((kind for kind, file in files.items() if file.exists()), None)


def _repository(folder: Path) -> dict[str, Plain]:
    unknown: dict[str, Plain] = {"git_commit": None, "dirty": None, "diff_sha256": None}
    deadline = time.monotonic() + _GIT_SECONDS
    try:
        answer = _git(folder, deadline, "rev-parse", "--show-toplevel", "--verify", "HEAD")
        top, commit = os.fsdecode(answer).splitlines()
        root = Path(top)
        diff = _git(root, deadline, *_GIT_DIFF)
        others = _git(root, deadline, "ls-files", "--others", "--exclude-standard", "-z", "--", "*.py")
    except (OSError, ValueError, subprocess.SubprocessError):
        return unknown
    untracked = sorted(name for name in others.split(b"\0") if name)
    dirty = bool(diff or untracked)
    return {
        "git_commit": commit,
        "dirty": dirty,
        "diff_sha256": _digest_of_changes(root, diff, untracked) if dirty else None,
    }


def refused_checkout(folder: Path | None = None) -> str | None:
    """The repository around ``folder`` that git does not read since another user owns it; else None."""
    try:
        _git(folder or Path.cwd(), time.monotonic() + _GIT_SECONDS, "rev-parse", "--git-dir")
    except subprocess.CalledProcessError as error:
        found = re.search(r"dubious ownership in repository at '(.+)'", os.fsdecode(error.stderr))
        return found[1] if found else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return None


def _git(folder: Path, deadline: float, *arguments: str) -> bytes:
    """Output of a git command. Raises when git is absent, refuses, or is not done by ``deadline``."""
    environ = {name: value for name, value in os.environ.items() if name not in _GIT_VARIABLES}
    return subprocess.run(
        [*_GIT, "-C", str(folder), *arguments],
        capture_output=True,
        check=True,
        env={**environ, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
        stdin=subprocess.DEVNULL,
        timeout=max(deadline - time.monotonic(), 0.1),
    ).stdout


def _digest_of_changes(root: Path, diff: bytes, untracked: Iterable[bytes]) -> str:
    digest = hashlib.sha256(diff)
    for name in untracked:
        file = root / os.fsdecode(name)
        # A link may lead anywhere; its target's name is what the repository would hold.
        content = os.fsencode(os.readlink(file)) if file.is_symlink() else file.read_bytes()
        digest.update(b"\0" + name + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()
