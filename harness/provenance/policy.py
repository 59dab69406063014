"""Who may sign what. A policy comes from its user, never from the folder that it judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import UsageError
from harness.provenance.keys import PublicKey


@dataclass(frozen=True)
class Policy:
    """The keys that are trusted for checkpoint statements, the log and model.sig."""

    keys: tuple[PublicKey, ...]

    @property
    def statement_keys(self) -> tuple[PublicKey, ...]:
        """Keys that may sign statements and log heads."""
        return tuple(key for key in self.keys if key.algorithm == "ed25519")

    @property
    def model_keys(self) -> tuple[PublicKey, ...]:
        """Keys that may sign model.sig."""
        return tuple(key for key in self.keys if key.algorithm == "p256")


def from_keys(keys: Sequence[PublicKey]) -> Policy:
    """The policy that trusts exactly ``keys``. Raises `UsageError` without an Ed25519 key."""
    policy = Policy(tuple(keys))
    if not policy.statement_keys:
        raise UsageError(
            "no Ed25519 key was given, and statements are signed with one",
            remedy="add --key NAME.ed25519.pub",
        )
    return policy
