"""What is read of a checkpoint folder before it is verified: its small files, as bytes."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Evidence:
    """The small files of a checkpoint folder, as read; None for one that is not there."""

    where: str
    """The folder, for messages."""
    name: str
    """The folder's own name."""
    bundle: bytes | None
    bundle_sha256: str
    """Of the statement's bundle, hex, as the log records it."""
    manifest: bytes | None
    slsa: bytes | None
    model_signature: bytes | None
    there: Set[str] = frozenset()
    """Paths of all files in the folder, those too that are not read."""
    later: Mapping[str, bytes] = field(default_factory=dict)
    """Path → bytes of statements that were added afterwards."""
    seen: Mapping[str, str] = field(default_factory=dict)
    """Hex sha256 of a bundle → the moment at which a kept or timestamped log head shows it there."""
    is_known: bool = False
    """Whether statement and manifest are, byte for byte, those that were verified before
    (`harness.provenance.verifier.is_known`)."""

    def at(self, name: str) -> str:
        """Path of the file ``name`` in the folder, for messages."""
        return f"{self.where}/{name}"
