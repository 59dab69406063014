"""Entering a sweep into its register, before any member runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness import config
from harness.errors import ResumeRefused
from harness.format import files, moments
from harness.sweeps.members import Member, reached, resolved, shared_text
from harness.sweeps.register import NAME, Plan, Register, read


def enter(folder: Path, path: Path, wanted: Sequence[Member], claims: str | None = None) -> Register:
    """Write down what the members ``wanted`` of the config at ``path`` are, and return all that is planned.

    ``claims``: hex sha256 of the claims file.

    Raises `ResumeRefused` when a variant of that name was another one before.
    """
    before = read(folder)
    now = {member.variant: shared_text(resolved(path, member)) for member in wanted}
    known = {} if before is None else dict(before.variants)
    for name, text in now.items():
        if name in known:
            _refuse_change(folder, name, known[name], text)
    # Operational keys may change, so the newest text is kept.
    variants = {**known, **now}
    seeds = tuple(
        dict.fromkeys([*(before.plans[-1].seeds if before else ()), *(each.seed for each in wanted)])
    )
    names = tuple(variants)
    plans = () if before is None else before.plans
    if not plans or (plans[-1].seeds, plans[-1].variants, plans[-1].claims) != (seeds, names, claims):
        created = moments.now()
        finished = 0 if before is None else _finished(folder, before)
        plans = (*plans, Plan(created, seeds, names, finished, claims))
    register = Register(variants, plans)
    folder.mkdir(parents=True, exist_ok=True)
    if before != register:
        files.write_durable(folder / NAME, register.dumps())
    return register


def _refuse_change(folder: Path, name: str, before: str, after: str) -> None:
    where = str(folder / NAME)
    changes = config.compare(config.parse(before, where), config.parse(after, "the config"))
    real = [change for change in changes if change.effect != "operational"]
    if real:
        shown = "; ".join(f"{one.key}: {one.before} → {one.after}" for one in real[:5])
        raise ResumeRefused(
            f"the {f'variant {name}' if name else 'config'} is not what this sweep began with: {shown}",
            where=where,
            remedy="use another --out, or add a --variant",
        )


def _finished(folder: Path, register: Register) -> int:
    count = 0
    for name in register.names:
        variant = name.rpartition("seed-")[0].removesuffix("-")
        steps = config.parse(register.variants[variant], NAME).train.steps
        count += reached(Member(name, variant, 0, folder / name, ())) >= steps
    return count
