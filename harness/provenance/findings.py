"""What a verification found: collected, so that every failure is reported and not only the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from harness.errors import EvidenceIncomplete, HarnessError, UsageError, VerificationFailed, visible
from harness.provenance.checks import PLACES, REMEDIES, Check

P = ParamSpec("P")
T = TypeVar("T")
Reason = tuple[str, str] | tuple[str, str, str]
"""What, where, and what to do next if that is not what the check says of itself."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or that is missing."""

    what: str
    where: str
    remedy: str
    check: Check
    """The rule that it breaks."""
    missing: bool
    """Whether evidence is absent (exit code 4) rather than wrong (exit code 1)."""

    def __str__(self) -> str:
        return str(self.error)

    @property
    def error(self) -> HarnessError:
        """The finding as an exception."""
        kind = EvidenceIncomplete if self.missing else VerificationFailed
        return kind(self.what, where=self.where, remedy=self.remedy)


@dataclass
class Findings:
    """Collects findings, the checks that passed, and remarks."""

    failed: list[Finding] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the reader should know and is no failure."""

    def bad(self, check: Check, what: str, where: str, remedy: str | None = None) -> None:
        """Evidence is wrong; what to do next is that of ``check`` unless ``remedy`` says better."""
        self._add(check, what, where, remedy, missing=False)

    def missing(self, check: Check, what: str, where: str, remedy: str | None = None) -> None:
        """Evidence is absent."""
        self._add(check, what, where, remedy, missing=True)

    def note(self, text: str) -> None:
        """Say something once; as `visible`, since names in it may come from strangers."""
        text = visible(text)
        if text not in self.notes:
            self.notes.append(text)

    def attempt(self, check: Check, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """``function``'s result; None and a finding when it raises `VerificationFailed` or its like."""
        try:
            result = function(*args, **kwargs)
        except (VerificationFailed, EvidenceIncomplete, UsageError) as error:
            absent = isinstance(error, EvidenceIncomplete)
            self._add(check, error.what, error.where or check, error.remedy, missing=absent)
            return None
        self.passed.append(check)
        return result

    def all_of(self, check: Check, reasons: Iterator[Reason]) -> None:
        """Each of ``reasons`` is a failure of ``check``; none means that it passed."""
        before = len(self.failed)
        for reason in reasons:
            self.bad(check, *reason)
        if len(self.failed) == before:
            self.passed.append(check)

    def extend(self, other: Findings) -> None:
        """Add what another collection holds."""
        self.failed += other.failed
        self.passed += other.passed
        for text in other.notes:
            self.note(text)

    def raise_first(self) -> None:
        """Raise the first in the order of the checks; what is wrong comes before what is missing."""
        raise_first(self.ordered)

    @property
    def ordered(self) -> list[Finding]:
        """What has failed, in the order of the checks (`harness.provenance.checks`)."""
        return sorted(self.failed, key=lambda each: PLACES[each.check])

    def _add(self, check: Check, what: str, where: str, remedy: str | None, *, missing: bool) -> None:
        usual = REMEDIES[check].missing if missing else REMEDIES[check].wrong
        self.failed.append(Finding(visible(what), visible(where), remedy or usual, check, missing))

    @property
    def exit_code(self) -> int:
        """0 when nothing was found, 1 when something is wrong, 4 when something is only missing."""
        if not self.failed:
            return 0
        return EvidenceIncomplete.exit_code if all(each.missing for each in self.failed) else 1


def raise_first(ordered: Sequence[Finding]) -> None:
    """Raise the first of what was found, if anything was; what is wrong comes before what is missing."""
    if ordered:
        raise min(ordered, key=lambda each: each.missing).error
