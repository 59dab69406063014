"""Merge the weights of checkpoints of one model into a Hugging Face folder: their weighted sum. Needs torch.

Only from checkpoints that verify with your keys or policy. Each tensor is summed in float64 and rounded once:
the same checkpoints and weights give the same bytes. The folder is signed and carries the statement of every
source; `harness verify` checks it without torch, `harness lineage --with FOLDER` draws it below all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path

from harness import environment
from harness.audit.exports import export
from harness.commands import Outcome
from harness.commands.trust import add_signing_key, add_trust, required, signer_of
from harness.errors import UsageError, visible

EXAMPLE = (
    "harness merge runs/tiny/checkpoints/step-00000040 runs/tiny/checkpoints/step-00000060 "
    "--out out/soup --key alice.ed25519.pub alice.p256.pub"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoints, their weights, the new folder, whom to trust, and who signs."""
    parser.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="CKPT", help="checkpoint folders, two or more"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist"
    )
    parser.add_argument(
        "--weights", metavar="W,…", help="one decimal a checkpoint, as 0.7,0.3 (default: the same for all)"
    )
    add_trust(parser)
    add_signing_key(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Verify all, merge, sign."""
    policy = required(arguments, " ".join(map(str, arguments.checkpoints)), "only what verifies is merged")
    weights = _weights(arguments.weights, len(arguments.checkpoints))
    environment.require_training()
    from harness.checkpoint import average

    signer, reason = signer_of(arguments.signing_key, arguments.out)
    mix = export.Mix(tuple(map(str, weights)), partial(average.combine, weights))
    made = export.merge(arguments.checkpoints, arguments.out, policy, signer, mix, quiet=arguments.json)
    document = {
        "path": str(made.folder),
        "export": made.export_id,
        "layout": made.layout.name,
        "weights": list(mix.weights),
        "sources": [dict(source) for source in made.sources],
        "signed_by": signer.ed25519_id,
        "notes": list(made.notes),
    }
    lines = [
        f"merged    {made.folder}",
        *(
            f"  {weight:<9} step {source['step']} of {source['name']}  {source['checkpoint']}"
            for weight, source in zip(mix.weights, made.sources, strict=True)
        ),
        f"  layout    {made.layout.name}: {made.layout.reason}",
        f"  signed by {signer.ed25519_id[:16]}… ({reason})",
        *(f"  note      {note}" for note in made.notes),
    ]
    return Outcome(document, "\n".join(map(visible, lines)))


def _weights(text: str | None, count: int) -> Sequence[Decimal]:
    """One a checkpoint. Raises `UsageError` for another number of them, or what is no plain decimal."""
    if count < 2:
        raise UsageError("one checkpoint alone is nothing to merge", remedy="name two, or use harness export")
    if text is None:
        # What is signed is what is multiplied with: a share that no decimal writes exactly is cut.
        return [Decimal(str(1 / count))] * count
    try:
        weights = [Decimal(word.strip()) for word in text.split(",")]
    except InvalidOperation as error:
        raise UsageError(
            "holds something that is no number", where=f"--weights {text}", remedy="0.7,0.3"
        ) from error
    if len(weights) != count or not all(each.is_finite() for each in weights):
        what = f"gives {len(weights)} weights for {count} checkpoints"
        raise UsageError(
            what, where=f"--weights {text}", remedy="one finite decimal for each, in their order"
        )
    return weights
