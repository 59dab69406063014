"""What a run with `start.checkpoint` begins with: the weights of another run's verified checkpoint.

- Rank 0 opens the checkpoint as a resume opens its own: signatures, statements, exact file set, headers and
  small files first; each tensor is compared with its signed digest while it is read. Nothing is used before.
- Who may have signed it is said by `start.key` or `start.policy`; without them, by this run's own key.
- Only weights are taken: optimizer, data order and generators begin afresh, an average begins at the weights.
- Weights mean nothing under another tokenizer, so one is refused unless ``--accept tokenizer`` signs why.
- What else differs in config.json (a larger context, another dropout) is shown and signed as a difference.
- Every statement of the run names the checkpoint, its step, its run and the digest of its statement. A resume
  takes them from there and never looks for the parent again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from harness.audit.folders.opening import OpenedCheckpoint
from harness.checkpoint import candidates
from harness.checkpoint.restore import Loaded
from harness.errors import EvidenceIncomplete, ResumeRefused, UsageError
from harness.format import strict_json
from harness.provenance.policy.rules import Policy
from harness.settings import Settings
from harness.training.beginning.parent import opened_start, trust_of
from harness.training.statement.record import Difference, Segment
from harness.workers import Workers

_CONFIG = "config.json"
_ABSENT = "absent"
_LONGEST = 200
"""Characters of a value that are shown and signed."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a new run begins with."""

    loaded: Loaded
    opened: OpenedCheckpoint | None
    """On rank 0."""
    trust: str
    """Why its signer is trusted."""

    @property
    def reference(self) -> dict[str, Any]:
        """The predicate's ``start``; on rank 0."""
        opened = self._opened
        statement = opened.statement
        return {
            "checkpoint": opened.checkpoint_id,
            "step": statement.step_to,
            "run": statement.run_id,
            "name": statement.run_name,
            "bundle_sha256": opened.bundle_sha256,
        }

    @property
    def words(self) -> str:
        """One line for the first screen; on rank 0."""
        start = self.reference
        return (
            f"weights of step {start['step']} of {start['name']}, checkpoint {start['checkpoint'][:12]}, "
            f"signed by {self._opened.signer[:12]}; optimizer and data order are new"
        )

    @property
    def tokenizer(self) -> str | None:
        """Hex sha256 of the tokenizer that the weights were trained with; on rank 0."""
        digest: str | None = self._opened.statement.predicate["data"]["tokenizer_sha256"]
        return digest

    @property
    def _opened(self) -> OpenedCheckpoint:
        if self.opened is None:
            raise UsageError("only rank 0 opens the start checkpoint")
        return self.opened


def open_origin(workers: Workers, settings: Settings, own: Policy | None) -> Origin | None:
    """The checkpoint that the config names, or None when it names none; ``own``: this run's keys, on rank 0.

    Raises `ConfigError` when there is no such folder, `VerificationFailed` or `EvidenceIncomplete` when it
    does not verify.
    """
    if settings.start is None:
        return None
    opening = partial(opened_start, settings.start, own)
    loaded, opened = candidates.open_elsewhere(workers, opening, lambda path: path == _CONFIG)
    return Origin(loaded, opened, trust_of(settings.start))


def first_segment(
    origin: Origin | None,
    tokenizer: str | None,
    files: Mapping[str, bytes],
    accept: Sequence[str],
    bare: Segment,
) -> Segment:
    """``bare``, the first launch of a run, with what is not as it was in the run of ``origin``.

    ``tokenizer``: hex sha256 of this run's; ``files``: what the task adds to a checkpoint. Raises
    `ResumeRefused` when the weights were trained with another tokenizer and ``accept`` does not name it.
    """
    if origin is None:
        return bare
    before = origin.tokenizer
    differences = _config_differences(origin.loaded.files.get(_CONFIG), files.get(_CONFIG))
    if before != tokenizer:
        _refuse_tokenizer(origin, before, tokenizer, accept)
        differences.append(Difference("tokenizer", _short(before), _short(tokenizer)))
    return replace(bare, differences=tuple(differences))


def _refuse_tokenizer(origin: Origin, before: str | None, now: str | None, accept: Sequence[str]) -> None:
    if "tokenizer" in accept:
        return
    folder = origin.loaded.folder
    raise ResumeRefused(
        f"the weights were trained with the tokenizer {_short(before)}, this run has {_short(now)}",
        where=f"start.checkpoint {folder}",
        remedy=f"set tokenizer.kind=bpe tokenizer.file={folder / 'tokenizer.json'} (relative to the config), "
        "or continue and sign why: --accept tokenizer --reason TEXT",
    )


def _config_differences(before: bytes | None, after: bytes | None) -> list[Difference]:
    """Keys of config.json that the checkpoint and this run's model have otherwise."""
    one, other = (_object(data) for data in (before, after))
    return [
        Difference(f"{_CONFIG} {key}", _shown(one.get(key, _ABSENT)), _shown(other.get(key, _ABSENT)))
        for key in sorted({*one, *other})
        if one.get(key, _ABSENT) != other.get(key, _ABSENT)
    ]


def _shown(value: Any) -> str:
    return str(value)[:_LONGEST]


def _object(data: bytes | None) -> dict[str, Any]:
    document = {} if data is None else strict_json.loads(data, where=_CONFIG)
    if not isinstance(document, dict):
        raise EvidenceIncomplete("is no JSON object", where=_CONFIG)
    return document


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:12]}…"
