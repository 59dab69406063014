"""What `harness doctor` looks at for one config: batch, key, policy, folder, store, timestamps, data, space.

Nothing is changed, but for an object that is put into the store and removed again. torch is imported only for
what cannot be told without it: the size of a checkpoint and whether the device has the precision.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import netrc
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from harness import config, environment
from harness.audit.folders import prepared, sealed
from harness.data.corpus import WheelFiles
from harness.data.documents import FILE_KINDS, matching_files, prepared_folder
from harness.errors import HarnessError
from harness.format import leftovers
from harness.format.layout import RunFolder
from harness.provenance.policy import reader
from harness.provenance.policy import rules as policy
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import keys
from harness.provenance.transparency import timestamp, timestamp_client
from harness.settings import PREPARED, WHEEL, Data, Settings
from harness.stores.client import ObjectExistsError, ObjectStore
from harness.stores.contents import Contents
from harness.training.beginning import own_policy
from harness.training.beginning.parent import opened_start, trust_of
from harness.training.doctor.machine import Check, Level, environment_size, existing, signing_key, writable
from harness.training.step import compiler
from harness.words import human_bytes

_SHARED_MEMORY = 64 << 20
_STORE_SECONDS = 10
"""For which a store that does not answer is asked again."""
_SPARE_BYTES = 64 << 20
"""Free space that a run needs besides its checkpoints."""


def of_run(path: Path, overrides: list[str], world_size: int | None, rules: Path | None) -> Iterator[Check]:
    """The checks of the config ``path``.

    ``world_size``: processes that a launch will have; None: what the config asks for, else what this
    process's environment says. ``rules``: the policy that the run's checkpoints are to satisfy.
    """
    try:
        loaded = config.load(path, overrides)
    except HarnessError as error:
        yield Check("bad", "config", str(error))
        return
    settings, base = loaded.settings, loaded.path.parent
    yield Check("ok", "config", f"{path} is understood: run {settings.run_name}")
    yield from _world_size(settings.train.world_size, world_size)
    yield _batch(settings, world_size or settings.train.world_size or environment_size())
    key, signer = signing_key(settings.signing.key, settings.run.dir)
    yield key
    if rules is not None:
        yield from trusted(rules, signer, settings)
    yield from _own_policy(settings, signer)
    yield writable(settings.run.dir, "run.dir")
    yield from _run(settings.run.dir)
    yield from _start(settings, signer)
    yield from _store(settings)
    yield from timestamps(settings, rules)
    yield from _data(settings, base)
    yield from _shared_memory(settings)
    yield from _compiler(settings)
    yield from _wandb(settings, os.environ)
    yield from _with_torch(settings, base)


def _start(settings: Settings, signer: keys.Signer | None) -> Iterator[Check]:
    """The checkpoint of another run that this one is to begin with; a run that has begun needs it no more."""
    if settings.start is None or RunFolder(settings.run.dir).complete():
        return
    own = None if signer is None else policy.from_keys(keys.public_keys(signer))
    try:
        opened = opened_start(settings.start, own)
    except HarnessError as error:
        yield Check("bad", "start", str(error))
        return
    statement = opened.statement
    text = f"step {statement.step_to} of {statement.run_name}, {trust_of(settings.start)}; tensors not read"
    yield Check("ok", "start", text)


def _world_size(asked: int | None, planned: int | None) -> Iterator[Check]:
    """`train.world_size` against the launch that is planned, or that this process is part of."""
    if asked is None:
        return
    started = planned or (environment_size() if "WORLD_SIZE" in os.environ else None)
    if started is not None and started != asked:
        text = f"train.world_size is {asked}, and {started} processes are to run"
        yield Check("bad", "world size", text, f"torchrun --nproc-per-node {asked} -m harness train …")
    elif started is None and asked > 1:
        text = f"{asked} by train.world_size: launch with torchrun --nproc-per-node {asked}"
        yield Check("ok", "world size", text)
    else:
        yield Check("ok", "world size", f"{asked}, as train.world_size says")


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


def trusted(file: Path, signer: keys.Signer | None, settings: Settings | None) -> Iterator[Check]:
    """Whether the policy in ``file`` accepts what ``signer`` signs now, for the run of ``settings``."""
    try:
        yield _satisfied(file, reader.load(file), signer, settings, "policy")
    except HarnessError as error:
        yield Check("bad", "policy", str(error))


def _own_policy(settings: Settings, signer: keys.Signer | None) -> Iterator[Check]:
    """Whether `signing.policy` accepts what the run is going to sign, and what its author may not mean."""
    try:
        own = own_policy.load(settings)
        if own is not None:
            fits = _satisfied(own.path, own.policy, signer, settings, own_policy.KEY)
            yield fits
            end = None
            if signer is not None and fits.level != "bad":
                end = own_policy.require_satisfiable(own, signer, own_policy.claimed_run(settings))
            if end is not None:
                yield Check("ok" if end.state == "far" else "warn", "policy ends", end.words)
            for each in own.odd:
                yield Check("warn", own_policy.KEY, f"{each.what}: {each.where}", each.remedy)
    except HarnessError as error:
        yield Check("bad", own_policy.KEY, str(error))


def _compiler(settings: Settings) -> Iterator[Check]:
    """What compiled code needs on a CPU; on a GPU it is Triton that decides."""
    found = compiler.lack() if settings.compile else None
    if settings.compile and found is None:
        yield Check("ok", "compile", "a C++ compiler and Python's headers are there")
    elif found is not None:
        yield Check("warn" if shutil.which("nvidia-smi") else "bad", "compile", *found)


def _satisfied(
    file: Path, rules: Policy, signer: keys.Signer | None, settings: Settings | None, name: str
) -> Check:
    """``rules`` against the key that is to sign. Raises as `own_policy.objections`."""
    accepted = ", ".join(identity.name for identity in rules.identities)
    if signer is None:
        return Check("ok", name, f"{file} is understood; it accepts {accepted}")
    run_id = None if settings is None else own_policy.claimed_run(settings)
    objections = own_policy.objections(rules, signer, settings, run_id)
    if objections:
        return Check("bad", name, f"{file}: {'; '.join(objections)}", "change the key or the policy")
    if rules.threshold > 1:
        text = f"{file}: {rules.threshold} people must sign, and a run has one signer"
        return Check("warn", name, text, "the others sign afterwards")
    return Check("ok", name, f"{file} accepts the signing key; it accepts {accepted}")


def _run(root: Path) -> Iterator[Check]:
    """What run.dir holds already, and whether a job is at work in it."""
    try:
        complete = RunFolder(root).complete()
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # not there yet, or what `writable` has told
    if complete:
        yield Check("ok", "run", f"continues from {complete[-1].name}, if that verifies")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if left := leftovers.found(RunFolder(root)):
            names = ", ".join(path.name for path in left)
            yield Check("ok", "leftovers", f"left by what was cut off, removed by the next launch: {names}")
    except BlockingIOError:
        yield Check("bad", "run", f"another job is training in {root}", "wait for it or stop it")
    finally:
        os.close(descriptor)


def _store(settings: Settings) -> Iterator[Check]:
    """Whether `checkpoint.store` answers, can be written, and refuses to make an object twice; the object is
    removed again."""
    url = settings.checkpoint.store
    if url is None:
        return
    probe = f".probe-{secrets.token_hex(8)}"
    try:
        store = ObjectStore(url, patience=_STORE_SECONDS)
        complete = Contents(store.objects()).complete
        store.create(probe, b"harness doctor")
        try:
            store.create(probe, b"harness doctor")
            text = f"{url} makes an object twice: two jobs that write there are not found out"
            yield Check("bad", "store", text, "use a store that knows If-None-Match")
        except ObjectExistsError:
            newest = f"; continues from {complete[-1]}, if that verifies" if complete else ""
            yield Check("ok", "store", f"{url} can be written; it holds {len(complete)} checkpoints{newest}")
        store.delete([probe])
    except HarnessError as error:
        yield Check("bad", "store", str(error))


def timestamps(settings: Settings, rules: Path | None) -> Iterator[Check]:
    """Whether `signing.timestamp` answers, and the policy in ``rules`` takes what it says."""
    url, text = settings.signing.timestamp, b"harness doctor"
    if url is None:
        return
    try:
        stamp = timestamp_client.ask(url, text, seconds=settings.signing.timestamp_timeout)
        told = timestamp.opened_by_anybody(stamp, text, where=url)
    except HarnessError as error:
        yield Check("warn", "timestamps", str(error), "a run trains without, and asks again for each head")
        return
    try:
        named = reader.load(rules).authorities if rules is not None else ()
        if named:
            timestamp.opened(stamp, text, named, where=url)
    except HarnessError as error:
        yield Check("bad", "timestamps", str(error))
        return
    yield Check("ok", "timestamps", f"{url} answers as {told.authority}, at {told.moment} by its clock")


def _data(settings: Settings, base: Path) -> Iterator[Check]:
    """Whether the files of the corpus are there; they are not read."""
    data = settings.data
    if data is None:
        return
    try:
        count = _files(data, base)
    except HarnessError as error:
        yield Check("bad", "data", str(error))
        return
    if count is None:
        yield Check("ok", "data", f"{data.kind} is the user's own and was not looked at")
    else:
        yield Check("ok", "data", f"{count:,} files of kind {data.kind}")


def _files(data: Data, base: Path) -> int | None:
    """Number of the corpus's files; None for a user's own kind. Raises what opening the corpus raises."""
    if data.kind == WHEEL:
        return len(WheelFiles(data.packages).names())
    if data.kind in FILE_KINDS:
        return len(FILE_KINDS[data.kind](data, base).names())
    if data.kind == PREPARED:
        folder = prepared_folder(data, base)
        return len(sealed.manifest(folder, prepared.claimed(folder)).files)
    return len(matching_files(data.files, base)) if data.kind == "tokens" else None


def _shared_memory(settings: Settings) -> Iterator[Check]:
    if settings.train.data_workers and Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        if free < _SHARED_MEMORY:
            text = f"{human_bytes(free)} free in /dev/shm, and train.data_workers is on"
            remedy = "docker run --shm-size=1g, or an emptyDir of medium Memory"
            yield Check("warn", "shared memory", text, remedy)
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


def _with_torch(settings: Settings, base: Path) -> Iterator[Check]:
    """Precision and disk space; without torch only how much is free."""
    try:
        free = shutil.disk_usage(existing(settings.run.dir)).free
    except OSError:
        return  # `writable` has told
    if environment.missing(("torch", "numpy")):
        level: Level = "ok" if free > _SPARE_BYTES else "bad"
        yield Check(level, "disk", f"{human_bytes(free)} free; what the run takes cannot be told here")
        return
    if settings.precision != "fp32":
        yield _precision(settings.precision)
    try:
        from harness.training.plan import plan

        # The number of processes changes no checkpoint.
        planned = plan(settings, base, 1)
    except HarnessError as error:
        yield Check("bad", "task", str(error))
        return
    already = len(RunFolder(settings.run.dir).complete()) * planned.checkpoint_bytes
    yield _space(free, planned.checkpoint_bytes, max(planned.disk_bytes - already, 0))


def _precision(name: str) -> Check:
    import torch

    from harness.training.optimizer import precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = precision(name, device)
    except HarnessError as error:
        return Check("bad", "precision", error.what, error.remedy)
    if name == "fp8" and environment.missing(("torchao",)):
        return Check("bad", "precision", "fp8 needs torchao, which is not installed", "pip install torchao")
    return Check("ok", "precision", f"{name} on {device.type}: {chosen.reason}")


def _space(free: int, each: int, total: int) -> Check:
    """Free bytes against those of one checkpoint and of all that are still to come at once."""
    text = f"{human_bytes(free)} free, {human_bytes(total)} of checkpoints to come ({human_bytes(each)} each)"
    if free < min(2 * each, total) + _SPARE_BYTES:
        return Check("bad", "disk", text, "free space or change run.dir")
    if free < total + _SPARE_BYTES:
        return Check("warn", "disk", text, "set checkpoint.keep, or checkpoint less often")
    return Check("ok", "disk", text)
