"""Whether a policy will accept a statement that is about to be added to a checkpoint, asked before the work.

The policy that is asked is the one that is given (``--policy``); where keys are given instead, that under
which the run says it was made: policy.json, if it is the copy that the verified statement names. A statement
that the policy would refuse makes the whole checkpoint fail under it, after an evaluation of hours, perhaps.

Example::

    told = permission.require(opened, later.TEST_RESULT, signer, whom)     # "team.yaml accepts it"
"""

from __future__ import annotations

from harness.audit.folders.opening import OpenedCheckpoint
from harness.audit.run import handover
from harness.errors import ConfigError, EvidenceIncomplete, UsageError, VerificationFailed, visible
from harness.format import files, layout, moments
from harness.provenance import later
from harness.provenance.policy import canonical, fit, reader
from harness.provenance.policy.rules import Policy
from harness.provenance.signing.keyless import KeylessSigner
from harness.provenance.signing.keys import Signer, public_keys

_GIVEN = "the given policy"
_REMEDY = "sign with a key that it accepts, or have its authors change it"


def require(opened: OpenedCheckpoint, kind: str, signer: Signer | KeylessSigner, whom: Policy) -> str:
    """One line of which policy was asked and accepts a statement of ``kind`` by ``signer``, or of why none
    was asked. ``whom``: what ``opened`` was verified with.

    Raises `UsageError` when the policy would not accept it, `VerificationFailed` for a hand-over in the run's
    log that breaks a rule.
    """
    if not whom.is_of_keys:
        _ask(_GIVEN, whom, opened, kind, signer, _REMEDY)
        return f"{_GIVEN} accepts it"
    named = opened.statement.policy
    if named is None:
        return "none was asked: keys are given, and the run was made under none"
    name = visible(f"{named['name']}, under which the run was made,")
    try:
        own = _copy(opened, named["sha256"])
    except (ConfigError, EvidenceIncomplete, UsageError, VerificationFailed) as error:
        return f"none was asked: {name} cannot be read here: {error}"
    _ask(
        name, own, opened, kind, signer, f"{_REMEDY}; or give the policy that is to accept it: --policy FILE"
    )
    return f"{name} accepts it"


def _ask(
    name: str, rules: Policy, opened: OpenedCheckpoint, kind: str, signer: Signer | KeylessSigner, remedy: str
) -> None:
    statement, now = opened.statement, moments.now()
    who = public_keys(signer)[0] if isinstance(signer, Signer) else signer.subject
    # A countersignature is the checkpoint's own statement, with its time.
    created = str(statement.predicate["created"]) if kind == later.COUNTERSIGNATURE else now
    rules = handover.trust(opened.folder, rules).policy
    found = fit.later_objection(rules, who, (statement.run_id, statement.run_name), kind, created, now)
    if found is not None:
        what = f"{name} would not accept this statement of kind {kind}: {found}"
        raise UsageError(what, where=str(opened.folder), remedy=remedy)


def _copy(opened: OpenedCheckpoint, sha256: str) -> Policy:
    """The policy that the statement of ``opened`` names. Raises `EvidenceIncomplete` or `VerificationFailed`
    where its copy is not at hand, `ConfigError` when this version does not know its rules."""
    run = layout.run_of(opened.folder)
    if run is None:
        raise EvidenceIncomplete("lies in no run, which would hold it", where=str(opened.folder))
    data = files.read_limited(run.policy, canonical.LIMIT)
    if canonical.digest(data) != sha256:
        raise VerificationFailed("is another policy's copy", where=str(run.policy))
    read = reader.parse(data.decode("utf-8", "replace"), where=str(run.policy), folder=run.root)
    if canonical.written(read) != data:  # it may name files of this machine, which its author has not read
        raise VerificationFailed("is no copy as this version writes one", where=str(run.policy))
    return read
