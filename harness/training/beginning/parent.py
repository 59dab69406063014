"""The checkpoint that `start.checkpoint` names, opened and authenticated; without torch, for doctor too."""

from __future__ import annotations

from harness.audit.folders import opening
from harness.audit.folders.opening import OpenedCheckpoint
from harness.errors import ConfigError, VerificationFailed
from harness.format import layout
from harness.provenance.policy import reader
from harness.provenance.policy import rules as policies
from harness.provenance.policy.rules import Policy
from harness.provenance.signing.keys import load_public
from harness.settings import Start


def opened_start(start: Start, own: Policy | None) -> OpenedCheckpoint:
    """The checkpoint that ``start`` names; every check but that of payload bytes. ``own``: this run's keys.

    Raises `ConfigError` when it is no checkpoint, `VerificationFailed` or `EvidenceIncomplete` for what is
    wrong with it.
    """
    folder = start.checkpoint
    if layout.kind_of(folder) != "checkpoint":
        raise ConfigError(
            "start.checkpoint is a run folder, and which of its checkpoints is meant is not said",
            where=str(folder),
            remedy=f"name one: {folder}/{layout.CHECKPOINTS}/step-…",
        )
    opened = opening.open_checkpoint(folder, policy_of(start, own))
    if opened.kind == "nonfinite":
        raise VerificationFailed("is the state of a run that became non-finite", where=str(folder))
    return opened


def policy_of(start: Start, own: Policy | None) -> Policy:
    """Who may have signed the checkpoint; this run's own keys when ``start`` does not say.

    Raises `UsageError` for keys or a policy out of the run that they are to judge.
    """
    layout.require_outside([*start.key, *([] if start.policy is None else [start.policy])], start.checkpoint)
    if start.policy is not None:
        return reader.load(start.policy)
    if start.key:
        return policies.from_keys([load_public(path) for path in start.key])
    if own is None:
        raise ConfigError("nobody is trusted with start.checkpoint", remedy="set start.key or start.policy")
    return own


def trust_of(start: Start) -> str:
    """Whom the config trusts with the checkpoint, in words."""
    if start.policy is not None:
        return f"trusted by start.policy {start.policy}"
    return "trusted by start.key" if start.key else "trusted: this run's own key, since start.key is not set"
