"""Write a checkpoint's weights as a Hugging Face folder, with its provenance carried along. Needs no torch.
Or a prepared corpus' manifest as Croissant metadata: PATH is the corpus, and TARGET a new .json file.

Only from a checkpoint that verifies with your keys or policy. Where an architecture of transformers computes
the same, its names are used (`AutoModelForCausalLM.from_pretrained(DIR)`); otherwise the tensors keep their
names, and the reason is said. The export is signed, names the checkpoint, and `harness verify DIR` checks it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.audit.exports import croissant
from harness.audit.exports import export as exporting
from harness.audit.folders import prepared
from harness.commands import Outcome
from harness.commands.trust import add_signing_key, add_trust, required, signer_of
from harness.errors import visible
from harness.provenance.policy.rules import Policy

EXAMPLE = "harness export runs/tiny/checkpoints/step-00000060 out/tiny --key alice.ed25519.pub alice.p256.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the new folder, whom to trust, and who signs."""
    parser.add_argument("checkpoint", type=Path, metavar="PATH", help="checkpoint folder, or prepared corpus")
    parser.add_argument(
        "target", type=Path, metavar="TARGET", help="folder or .json file to write; must not exist"
    )
    add_trust(parser)
    add_signing_key(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Verify, write, sign."""
    policy = required(arguments, str(arguments.checkpoint), "only what verifies is exported")
    if prepared.is_corpus(arguments.checkpoint):
        return _croissant(arguments.checkpoint, arguments.target, policy)
    signer, reason = signer_of(arguments.signing_key, arguments.target)
    made = exporting.export(arguments.checkpoint, arguments.target, policy, signer, quiet=arguments.json)
    (source,) = made.sources
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
    return Outcome(document, "\n".join(map(visible, lines)))


def _croissant(folder: Path, target: Path, policy: Policy) -> Outcome:
    written = croissant.export(folder, target, policy)
    what = f"Croissant 1.0 of the corpus {written['name']}, {written['version']}"
    text = f"exported  {target}\n  {visible(what)}"
    return Outcome({"path": str(target), "croissant": written}, text)
