"""What a store holds of a run, told from the names of its objects alone, and which of it somebody wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from harness.errors import EvidenceIncomplete, UsageError
from harness.format import layout


@dataclass(frozen=True)
class Contents:
    """What a store holds, by the names of its objects."""

    objects: Mapping[str, int]
    """Path → size."""

    @cached_property
    def _folders(self) -> Mapping[str, Mapping[str, int]]:
        """Folder below checkpoints/ → path in it → size."""
        found: dict[str, dict[str, int]] = {}
        for path, size in self.objects.items():
            top, _, rest = path.partition("/")
            folder, _, inside = rest.partition("/")
            if top == layout.CHECKPOINTS and folder:
                found.setdefault(folder, {})[inside] = size
        return found

    @property
    def names(self) -> list[str]:
        """Every folder below checkpoints/, finished or not."""
        return sorted(self._folders)

    @cached_property
    def all(self) -> list[str]:
        """Names of checkpoints with payload or without, by step."""
        names = {*self.complete, *self.pruned}
        return sorted(names, key=layout.step_of)

    @cached_property
    def complete(self) -> list[str]:
        """Names of checkpoints with payload, by step."""
        return self._finished("")

    @property
    def pruned(self) -> list[str]:
        """Names of checkpoints whose payload is gone, by step; without the prefix."""
        return [name.removeprefix(layout.PRUNED) for name in self._finished(layout.PRUNED)]

    @property
    def unfinished(self) -> list[str]:
        """Names of checkpoints that are older than the newest complete one and have no manifest."""
        complete = self.complete
        numbers = {name: layout.parse_checkpoint_name(name) for name in self.names if name not in complete}
        newest = layout.parse_checkpoint_name(complete[-1]) if complete else None
        return [name for name, step in numbers.items() if step is not None and step < (newest or 0)]

    def of(self, folder: str) -> dict[str, int]:
        """Path below checkpoints/``folder`` → size."""
        return dict(self._folders.get(folder, {}))

    def _finished(self, prefix: str) -> list[str]:
        found = []
        for name in self.names:
            step = layout.parse_checkpoint_name(name.removeprefix(prefix))
            done = layout.MANIFEST in self._folders[name]
            if name.startswith(prefix) and step is not None and done:
                found.append((step, name))
        return [name for _, name in sorted(found)]


Selection = Callable[[Sequence[str]], Sequence[str]]
"""Which of the names of complete checkpoints, by step."""


def newest(complete: Sequence[str]) -> list[str]:
    """Of the names of checkpoints in order, the last."""
    return list(complete[-1:])


def parse_selection(text: str) -> Selection:
    """What ``newest``, ``all``, ``none`` or a list of steps (``100,200``) means. Raises `UsageError`."""
    fixed: dict[str, Selection] = {
        "newest": newest,
        "all": list,
        "none": lambda _: [],
    }
    if text in fixed:
        return fixed[text]
    steps = text.split(",")
    if not all(step.isascii() and step.isdigit() for step in steps):
        raise UsageError(
            f"{text!r} selects no checkpoints",
            where="--payload",
            remedy="newest, all, none, or steps: 100,200",
        )
    names = [layout.checkpoint_name(int(step)) for step in steps]

    def these(complete: Sequence[str]) -> Sequence[str]:
        absent = [name for name in names if name not in complete]
        if absent:
            raise EvidenceIncomplete(f"the store has no {', '.join(absent)}", where="--payload")
        return names

    return these
