"""What the tiers (`harness.audit.tiers.rules`) are computed from: the verified statements of checkpoints.

The ledger of the newest checkpoint is read, since each one holds what the ones before it found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.audit.folders import story as stories
from harness.audit.folders.opening import OpenedCheckpoint
from harness.audit.folders.story import Story
from harness.audit.tiers.rules import NOT_SIGNED, Evidence, Replay
from harness.errors import HarnessError
from harness.format.ledger import Ledger
from harness.provenance import later


def of_checkpoints(opened: Sequence[OpenedCheckpoint]) -> Evidence:
    """Of checkpoints that were examined, in the order of their commits."""
    return _gathered([stories.of(each) for each in opened if each.kind != "nonfinite"])


def of_story(story: Story) -> Evidence:
    """Of one checkpoint: its own segment, and the replays that lie in its folder."""
    return _gathered([story]) if story.verified else Evidence(nothing=NOT_SIGNED)


def _gathered(known: Sequence[Story]) -> Evidence:
    if not known:
        return Evidence(nothing="the run holds no authentic checkpoint")
    newest = known[-1].statement.predicate
    ledger = _ledger(known[-1])
    counted = newest["determinism"]["ledger"]
    return Evidence(
        segments=tuple((each.statement.step_from, each.statement.step_to) for each in known),
        precision=str(newest["launch"]["precision"]),
        ledger=ledger,
        unread_rows=0 if ledger is not None or counted is None else int(counted["rows"]),
        replays=tuple(replay for each in known for replay in _replays(each)),
    )


def _ledger(story: Story) -> Ledger | None:
    try:
        return stories.ledger(story)
    except HarnessError:
        return None  # the statement's own count of rows then stands for it


def _replays(story: Story) -> Iterator[Replay]:
    for each in story.added:
        if each.statement.kind == later.REPLAY:
            yield Replay(
                f"{story.statement.name}/{each.statement.name}",
                each.signer,
                each.key_id == story.key_id,
                int(story.statement.predicate["launch"]["world_size"]),
                each.statement.predicate,
            )
