"""The policy that a run is made under, `signing.policy`: read, and found satisfiable, before the first step.

A run whose key it does not admit, or that does not make what it requires, is refused: its own policy would
reject its checkpoints. Every statement names it by digest, and policy.json is its copy. Nothing is verified
with that copy, nor with the file: a resume trusts its own key. Needs no torch, for plan and doctor too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from harness.audit.run import handover
from harness.errors import ConfigError, EvidenceIncomplete, UsageError, VerificationFailed
from harness.format import files, moments
from harness.format.layout import RunFolder
from harness.provenance import log_record
from harness.provenance.findings import Findings
from harness.provenance.policy import canonical, fit, oddities, reader
from harness.provenance.policy.fit import Maker
from harness.provenance.policy.oddities import Oddity
from harness.provenance.policy.rules import Policy
from harness.provenance.signing.keys import Signer, public_keys
from harness.provenance.transparency import heads, log
from harness.provenance.transparency.log import Log
from harness.settings import Settings
from harness.words import human_seconds

KEY = "signing.policy"
NEAR = timedelta(days=1)
"""How long before it a run reminds of the end of its policy."""
_DO = "extend the policy, and resume with --accept policy --reason TEXT"


@dataclass(frozen=True)
class OwnPolicy:
    """A policy file that a config names."""

    path: Path
    settings: Settings
    """The config."""
    policy: Policy
    copy: bytes
    """What policy.json holds."""
    odd: tuple[Oddity, ...]
    """What its author may not mean."""

    @property
    def reference(self) -> dict[str, str]:
        """How statements name it."""
        return {"name": self.path.name, "sha256": canonical.digest(self.copy)}

    @property
    def words(self) -> str:
        """One line of who must have signed what."""
        people = ", ".join(each.name for each in self.policy.identities)
        required = ", ".join(sorted(self.policy.required))
        digest = self.reference["sha256"][:12]
        return f"{self.path.name}  {digest}  {self.policy.threshold} of {people}; required {required}"


@dataclass(frozen=True)
class End:
    """From when on a policy does not accept what a run signs, which it does now."""

    at: str
    """As statements write it."""
    why: str

    @property
    def seconds(self) -> float:
        """Until then; negative when it is over."""
        return (datetime.fromisoformat(self.at) - datetime.now(UTC)).total_seconds()

    @property
    def state(self) -> Literal["far", "near", "over"]:
        """How near it is."""
        left = self.seconds
        return "over" if left <= 0 else "near" if left < NEAR.total_seconds() else "far"

    @property
    def words(self) -> str:
        """The moment, what it means, and what to do."""
        if self.state == "over":
            return f"{self.at}; what is saved does not verify, and no launch goes on: {self.why}; {_DO}"
        left = human_seconds(self.seconds)
        return f"{self.at}, {left} from now; what is saved after that does not verify: {self.why}; {_DO}"


def load(settings: Settings) -> OwnPolicy | None:
    """The policy that the config names; None when it names none.

    Raises `ConfigError` with file and line for what is no policy, or too large to be kept with the run;
    `UsageError` for one that cannot be found, lies in the run folder, or is another run's copy.
    """
    path = settings.signing.policy
    if path is None:
        return None
    if files.real(path).is_relative_to(files.real(settings.run.dir)):
        what = f"{KEY} lies in the run folder, which only holds a copy of it"
        raise UsageError(what, where=str(path), remedy="name the policy that its authors keep elsewhere")
    reader.require_own(path)
    policy, odd = oddities.check(path, datetime.now(UTC))
    copy = canonical.written(policy)
    if len(copy) > canonical.LIMIT:
        what = f"the policy has {len(copy)} bytes with all that it names, more than {canonical.LIMIT}"
        raise ConfigError(what, where=str(path), remedy="leave out what this run does not need")
    return OwnPolicy(path, settings, policy, copy, tuple(odd))


def planned(settings: Settings, signer: Callable[[], Signer | None]) -> tuple[OwnPolicy | None, End | None]:
    """The policy of a launch that is to come, and its end. Raises what the launch would raise when the policy
    would not accept what ``signer`` signs; it is asked only where there is a policy, and None is a key that
    is to come."""
    own = load(settings)
    by = None if own is None else signer()
    return own, None if by is None else require_satisfiable(own, by, claimed_run(settings))


def objections(
    rules: Policy, signer: Signer, settings: Settings | None, run_id: str | None = None
) -> list[str]:
    """Why what ``signer`` signs from now on could not satisfy ``rules``; ``settings``: of the run, None for
    any; ``run_id``: its id, once it has one.

    Raises `VerificationFailed` for a hand-over in the run's log that breaks a rule.
    """
    return list(fit.objections(*_asked(rules, signer, settings, run_id), moments.now()))


def _asked(
    rules: Policy, signer: Signer, settings: Settings | None, run_id: str | None
) -> tuple[Policy, Maker]:
    keys = public_keys(signer)
    if settings is None:
        return fit.of_any_run(rules), Maker(keys, "", None, True)
    stamps = settings.signing.timestamp is not None
    return handover.trust(settings.run.dir, rules).policy, Maker(keys, settings.run_name, run_id, stamps)


def claimed_run(settings: Settings) -> str | None:
    """The id that the log in the run folder claims, by nobody's signature; None without a log."""
    path = RunFolder(settings.run.dir).log / log.HEAD
    try:
        head = log.claimed(files.read_limited(path, log.NOTE_LIMIT), where=str(path))
    except (EvidenceIncomplete, VerificationFailed):
        return None
    return log_record.run_of(head.origin)


def require_satisfiable(
    own: OwnPolicy | None, signer: Signer, run_id: str | None, book: Log | None = None
) -> End | None:
    """When ``own`` will not accept any more what the run signs; None when time alone changes nothing.

    Raises `ConfigError` when it does not accept that now, `VerificationFailed` when the run's log, ``book``,
    does not continue a head that ``own`` names.
    """
    if own is None:
        return None
    found = objections(own.policy, signer, own.settings, run_id)
    if found:
        raise ConfigError(
            f"{KEY} would not accept what this run signs: {'; '.join(found)}",
            where=str(own.path),
            remedy="change the policy, signing.key or run.name, or set signing.policy=null",
        )
    if book is not None:
        findings = Findings()
        kept = [each for each in own.policy.log_heads if each.head.origin == book.head.origin]
        heads.check(book, kept, findings, str(RunFolder(own.settings.run.dir).log))
        findings.raise_first()
    end = fit.end(*_asked(own.policy, signer, own.settings, run_id), moments.now())
    return None if end is None else End(end[0], "; ".join(end[1]))


def reminder(end: End, say: Callable[[str], None]) -> Callable[[], None]:
    """Tells ``say`` once that ``end`` is near, unless it is already, and once that it is over.

    A save after that is not refused: its steps would be lost, while a policy that is extended accepts them.
    The next launch is refused.
    """
    told = end.state

    def remind() -> None:
        nonlocal told
        if (now := end.state) != told:
            told = now
            say(f"{KEY} {'ended' if now == 'over' else 'ends'} {end.words}")

    return remind
