"""Write a checkpoint's weights as a Hugging Face folder, with its provenance carried along. Needs no torch.

Only from a checkpoint that verifies with your keys or policy. Where an architecture of transformers computes
the same, its names are used (`AutoModelForCausalLM.from_pretrained(DIR)`); otherwise the tensors keep their
names, and the reason is said. The export is signed, names the checkpoint, and `harness verify DIR` checks it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.audit import export as exporting
from harness.commands import Outcome
from harness.commands.trust import add_trust, trusted
from harness.errors import UsageError
from harness.provenance import keys

EXAMPLE = "harness export runs/tiny/checkpoints/step-00000060 out/tiny --key me.ed25519.pub me.p256.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the new folder, whom to trust, and who signs."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint folder")
    parser.add_argument("target", type=Path, metavar="DIR", help="folder to write; must not exist")
    add_trust(parser)
    parser.add_argument(
        "--sign-with",
        type=Path,
        metavar="FILE",
        help="NAME.key that signs the export (default: $HARNESS_SIGNING_KEY, else your own key)",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Verify, write, sign."""
    policy = trusted(arguments)
    if policy is None:
        raise UsageError(
            "whom to trust is not said, and only a checkpoint that verifies is exported",
            where=str(arguments.checkpoint),
            remedy="give --key NAME.ed25519.pub (and NAME.p256.pub), or --policy FILE",
        )
    path, reason = keys.signing_key_path(arguments.sign_with, arguments.target)
    signer = keys.load_signer(path)
    made = exporting.export(arguments.checkpoint, arguments.target, policy, signer, quiet=arguments.json)
    source = made.source
    document = {
        "path": str(made.folder),
        "export": made.export_id,
        "layout": made.layout.name,
        "reason": made.layout.reason,
        "source": dict(source),
        "signed_by": signer.ed25519_id,
        "notes": list(made.notes),
    }
    lines = [
        f"exported  {made.folder}",
        f"  from      step {source['step']} of {source['name']}  {source['checkpoint']}",
        f"  layout    {made.layout.name}: {made.layout.reason}",
        f"  signed by {signer.ed25519_id[:16]}… ({reason})",
        *(f"  note      {note}" for note in made.notes),
    ]
    return Outcome(document, "\n".join(lines))
