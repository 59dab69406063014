"""Add a signed statement to a checkpoint: an evaluation, a verdict, a countersignature.

The checkpoint is verified first, every byte, with the keys or the policy that you trust; nothing is signed
about one that fails, nor what the given policy, else the one that the run was made under, would not accept.
The statement goes to CKPT/provenance/KIND-N.sigstore.json, and into the run's log when
the key is the run's own. test-result and replay take their predicate from a JSON file (docs/statements.md);
countersignature and svr need none; any other kind wants --predicate-type.

With --keyless nobody keeps a key: sigstore certifies whoever the identity token speaks of, which is in
$SIGSTORE_IDENTITY_TOKEN or given to a CI job, and logs the signature in public; a policy names whom it
accepts (docs/keys.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import harness
from harness.audit import attest, permission
from harness.audit.attest import Added
from harness.audit.folders.opening import OpenedCheckpoint
from harness.audit.verification import verify
from harness.commands import Outcome
from harness.commands.trust import add_signing_key, add_trust, required, signer_of
from harness.errors import UsageError, VerificationFailed
from harness.format import files, layout, moments, strict_json
from harness.provenance import later
from harness.provenance.findings import raise_first
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import keyless
from harness.provenance.signing.keyless import KeylessSigner
from harness.provenance.signing.keys import Signer

UNVERIFIED = "nothing is signed about a checkpoint that nobody has verified"
"""Why who signs about a checkpoint has to say whom to trust."""

EXAMPLE = (
    "harness attest runs/tiny/checkpoints/step-00000040 --kind countersignature --signing-key bob.key "
    "--key alice.ed25519.pub alice.p256.pub"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, what to say of it, who says it, and whom to trust."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--kind", metavar="KIND", help=f"{', '.join(later.SCHEMAS)}, countersignature, or other"
    )
    what.add_argument("--enter", action="store_true", help="enter statements of others in the run's log")
    parser.add_argument("--predicate", type=Path, metavar="FILE", help="JSON file with the predicate")
    parser.add_argument("--predicate-type", metavar="URI", help="of a kind that is none of ours")
    who = parser.add_mutually_exclusive_group()
    add_signing_key(who)
    who.add_argument("--keyless", action="store_true", help="sign by sigstore, with an identity token")
    parser.add_argument(
        "--sigstore-config",
        type=Path,
        metavar="FILE",
        help="client trust config of a sigstore instance (default: the public one)",
    )
    add_trust(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Verify, sign, write, enter in the log."""
    folder: Path = arguments.checkpoint
    if layout.kind_of(folder) != "checkpoint":
        raise UsageError("is a run folder", where=str(folder), remedy="name one of its checkpoints")
    signer, reason = _signer(arguments)
    whom = required(arguments, str(folder), UNVERIFIED)
    opened = verified(folder, whom, quiet=arguments.json)
    if arguments.enter:
        if not isinstance(signer, Signer):
            raise UsageError("the run's log is signed with a key", remedy="leave out --keyless")
        names = attest.enter(opened, signer)
        shown = ", ".join(names) or "nothing: the log names them all"
        return Outcome({"checkpoint": opened.checkpoint_id, "entered": names}, f"entered  {shown}")
    asked = permission.require(opened, arguments.kind, signer, whom)
    added = _add(arguments, opened, signer)
    document = {
        "checkpoint": opened.checkpoint_id,
        "path": str(added.path),
        "name": added.name,
        "bundle_sha256": added.bundle_sha256,
        "log_record": added.record,
        "log": added.reason,
        "policy": asked,
        **_who(signer),
    }
    record = "not in the log" if added.record is None else f"record {added.record}"
    lines = [
        f"added  {added.path}",
        f"  signed by  {reason}",
        f"  policy     {asked}",
        f"  log        {record}: {added.reason}",
    ]
    return Outcome(document, "\n".join(lines))


def _signer(arguments: argparse.Namespace) -> tuple[Signer | KeylessSigner, str]:
    """Who signs, and how to say it."""
    if not arguments.keyless:
        if arguments.sigstore_config is not None:
            raise UsageError(
                "--sigstore-config is of --keyless alone", remedy="add --keyless, or leave it out"
            )
        signer, reason = signer_of(arguments.signing_key, arguments.checkpoint)
        return signer, f"ed25519 {signer.ed25519_id[:16]}… ({reason})"
    file: Path | None = arguments.sigstore_config
    remedy = "give a client trust config (docs/keys.md)"
    given = None if file is None else files.read_given(file, "the config", keyless.ROOT_LIMIT, remedy)
    found = keyless.load_signer(given)
    return found, f"{found.subject.identity} (issuer {found.subject.issuer})"


def _who(signer: Signer | KeylessSigner) -> dict[str, str]:
    if isinstance(signer, Signer):
        return {"key_id": signer.ed25519_id}
    return {"issuer": signer.subject.issuer, "identity": signer.subject.identity}


def verified(folder: Path, whom: Policy, *, quiet: bool) -> OpenedCheckpoint:
    """The checkpoint, every byte of which was verified. Raises the first failure."""
    report = verify.verify(folder, whom, quiet=quiet)
    raise_first(report.findings)
    if not report.checkpoints:
        raise VerificationFailed("could not be verified", where=str(folder))
    return report.checkpoints[0]  # opened once: another one may lie there by now


def _add(arguments: argparse.Namespace, opened: OpenedCheckpoint, signer: Signer | KeylessSigner) -> Added:
    kind, file = arguments.kind, arguments.predicate
    if kind in (later.COUNTERSIGNATURE, later.SVR) and file is not None:
        raise UsageError(f"a {kind} takes no --predicate", remedy="leave it out")
    if kind == later.COUNTERSIGNATURE:
        return attest.countersign(opened, signer)
    if kind == later.SVR:
        return attest.add(opened, kind, _verification(), signer)
    if file is None:
        raise UsageError("needs --predicate FILE", where=f"--kind {kind}", remedy="see docs/statements.md")
    remedy = "give one JSON object (docs/statements.md)"
    data = files.read_given(file, "the predicate", later.LIMIT, remedy)
    try:
        predicate = strict_json.loads(data, where=str(file))
    except VerificationFailed as error:
        raise UsageError(f"the predicate {error.what}", where=str(file), remedy=remedy) from error
    return attest.add(opened, kind, predicate, signer, predicate_type=arguments.predicate_type)


def _verification() -> dict[str, Any]:
    """What was checked just now, as an in-toto Simple Verification Result."""
    return {
        "verifier": {"id": f"urn:harness:verify:{harness.__version__}"},
        "timeCreated": moments.now(),
        "properties": ["HARNESS_CHECKPOINT_VERIFIED"],
    }
