"""Where a session begins or goes on: its tensors, its place in the data and its generators.

The order is the whole secret of exact resume: build and warm-up passes
(`harness.training.step.building`) → tensors → data cursor → generators last.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.checkpoint import restore, rng, state
from harness.checkpoint.restore import Loaded
from harness.checkpoint.snapshot import serialize
from harness.errors import ConfigError, TrainingFailed
from harness.format import layout
from harness.tasks.task import Batch
from harness.training.seeding import seed_rank, seed_shard
from harness.training.step.session import Session


def captured_rng(session: Session) -> bytes:
    """This rank's generators as the bytes of a safetensors file.

    An elastic run seeds them anew for every shard; between updates they are put where rank 0 of any world
    size has them, and the other ranks have nothing to save: empty.
    """
    if session.sums is not None:
        if not session.workers.first:
            return b""
        seed_shard(session.seed, 0, session.updates)
    name = state.rng_file(session.workers.rank)
    return serialize(name, rng.capture(session.task.generators()))


def wanted_files(rank: int, path: str) -> bool:
    """Whether rank ``rank`` needs the payload file ``path``, which is no part of the tensors, to resume."""
    return path in (layout.TRAINER, layout.LEDGER, state.rng_file(rank))


def resume(session: Session, loaded: Loaded) -> Iterator[Batch]:
    """Put the checkpoint's tensors, cursor and generators in place; returns the micro-batches that follow.

    A checkpoint of another world size has no generators for these ranks: they are seeded anew from (seed,
    rank, step), which the class ``same-data`` says, as are those of several ranks after an elastic run; its
    own follow its shards. Raises `TrainingFailed` for anything that does not fit, and `DamagedCheckpoint` on
    every rank when tensors are not what was signed.
    """
    trainer = loaded.trainer
    if trainer["groups"] != state.group_names(session.state):
        what = "the optimizer's parameter groups are not those of the checkpoint"
        raise TrainingFailed(what, remedy=state.AS_SAVED)
    state.load(session.state, loaded, trainer["aliases"])
    stream = _stream(session, trainer["step"])
    session.updates = trainer["step"]
    if session.sums is not None:
        return stream
    file = state.rng_file(session.workers.rank)
    own = loaded.files.get(file)
    ranks = trainer["world_size"]
    saved = [rank for rank in range(ranks) if state.rng_file(rank) in loaded.manifest.digests]
    if ranks != session.workers.world_size or (ranks > 1 and saved == [0]):  # rank 0's: of an elastic run
        seed_rank(session.seed, session.workers.rank, trainer["step"])
    elif own is None:
        what = f"the checkpoint has no generators for rank {session.workers.rank}"
        raise TrainingFailed(what, remedy="resume with the harness that saved it")
    else:
        rng.restore(restore.tensors_in(own, file), session.task.generators())
    return stream


def begin(session: Session, weights: Loaded | None) -> Iterator[Batch]:
    """A new run's micro-batches; ``weights``: the checkpoint of another run that it begins with.

    Raises `ConfigError` when that is another model's, `DamagedCheckpoint` when a tensor is not what was
    signed.
    """
    if weights is not None:
        try:
            state.load_weights(session.state, weights)
        except TrainingFailed as error:
            raise ConfigError(
                f"start.checkpoint holds another model: {error.what}",
                where=str(weights.folder),
                remedy="give this run's model the sizes in its config.json",
            ) from error
    return _stream(session, 0)


def _stream(session: Session, updates: int) -> Iterator[Batch]:
    """The micro-batches after so many ``updates``."""
    stream = session.batches.iterate(updates)
    if session.sums is None or not session.batches.workers:
        return stream
    from harness.training.elastic import loaders

    return loaders.same_as_here(session.batches, stream, updates)
