"""A gate: below some folders, everything that could be loaded as a model verifies, or is refused.

- each checkpoint, run, export and prepared corpus is verified whole, as `harness verify` does
- a file of weights that lies in none of them is refused: deleting the signatures must not open the gate
- so is one that a resume has set aside as damaged, or that a save has not finished
- a link to a folder is refused: what is behind it can change after the gate
- where there is nothing to verify, the gate cannot tell
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.audit.folders import exported, prepared
from harness.audit.run import undisturbed
from harness.audit.verification import verify
from harness.audit.verification.report import Report
from harness.errors import EvidenceIncomplete, HarnessError, UsageError, VerificationFailed
from harness.format import files, layout
from harness.format.layout import RunFolder
from harness.provenance.policy.rules import Policy

_WEIGHTS = (
    *(".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".onnx", ".h5", ".keras"),
    *(".msgpack", ".npz", ".tflite", ".joblib", ".distcp", ".pt2", ".pb", ".nemo", ".pdparams", ".dill"),
)
"""Endings of what common loaders take for weights."""

_UNSIGNED = "is weights that no verified folder holds"
_UNFINISHED = "is of a save that goes on or was cut off, not signed yet; wait, or name one checkpoint"
_LINK = "is a link to a folder; give the gate the folder itself"
_VERDICTS = {0: "admitted", 1: "refused", 4: "cannot tell"}


@dataclass(frozen=True)
class Refusal:
    """A path that is refused without a report."""

    path: Path
    what: str
    exit_code: int = 1


@dataclass(frozen=True)
class Passage:
    """What stood at the gate."""

    reports: tuple[Report, ...]
    refusals: tuple[Refusal, ...]

    @property
    def exit_code(self) -> int:
        """0 when everything may pass, 1 when something is wrong, 4 when evidence is missing."""
        codes = {each.exit_code for each in self.reports} | {each.exit_code for each in self.refusals}
        return 1 if 1 in codes else 4 if 4 in codes or not self.reports else 0

    @property
    def verdict(self) -> str:
        """``admitted``, ``refused`` or ``cannot tell``."""
        return _VERDICTS[self.exit_code]

    def document(self) -> dict[str, Any]:
        """Everything as plain JSON; ``folders`` are reports of `harness verify --json`."""
        refused = [{"path": str(each.path), "what": each.what} for each in self.refusals]
        return {
            "verdict": self.verdict,
            "folders": [each.document() for each in self.reports],
            "refused": refused,
        }


def examine(paths: Sequence[Path], policy: Policy, *, quiet: bool = True) -> Passage:
    """Verify everything below ``paths``; ``quiet`` hides the progress bar.

    Raises `UsageError` for a path that is not there, `EnvironmentFault` for a disk that cannot be read.
    """
    reports: list[Report] = []
    refusals: list[Refusal] = []
    for path in paths:
        if not path.exists():
            raise UsageError("no such file or folder", where=str(path), remedy="check the path")
        for found in _below(files.real(path) if path.is_symlink() else path):
            if isinstance(found, Refusal):
                refusals.append(found)
                continue
            try:
                reports.append(verify.verify(found, policy, quiet=quiet))
            except (UsageError, VerificationFailed, EvidenceIncomplete) as error:
                code = error.exit_code if isinstance(error, EvidenceIncomplete) else 1
                refusals.append(Refusal(found, _without_path(error), code))
    return Passage(tuple(reports), tuple(refusals))


def _below(path: Path, depth: int = 0) -> Iterator[Path | Refusal]:
    """Folders to verify, and what is refused without: ``path`` itself, or what lies in it."""
    if depth > files.NESTED:
        yield Refusal(path, f"is nested deeper than {files.NESTED} folders, so not looked into")
        return
    if not path.is_dir():
        if path.name.lower().endswith(_WEIGHTS):
            yield Refusal(path, _UNSIGNED)
        return
    kind = _kind(path)
    if kind is not None:
        yield path
        try:
            yield from _loose_in_run(path) if kind == "run" else ()
        except VerificationFailed as error:
            yield Refusal(path, error.what)
        except EvidenceIncomplete as error:
            yield Refusal(path, _without_path(error), error.exit_code)
        return
    for entry in sorted(path.iterdir()):
        if entry.is_symlink() and entry.is_dir():
            yield Refusal(entry, _LINK)
        else:
            yield from _below(entry, depth + 1)


def _loose_in_run(root: Path) -> list[Refusal]:
    """Weights in a run folder that are in no checkpoint which `harness verify` has looked into.

    Raises `EvidenceIncomplete` when a job changes the run during each reading: a folder that it renames
    meanwhile may have been seen under neither name.
    """
    run = RunFolder(root)

    def attempt() -> tuple[frozenset[Path], list[Refusal]]:
        signed = _signed(run)
        return signed, list(_loose(root, signed))

    # The names belong to what must be the same twice: that nothing was loose is good of a quiet folder only.
    return undisturbed.read(root, attempt, lambda made: {made[0], *made[1]})[1]


def _signed(run: RunFolder) -> frozenset[Path]:
    nonfinite = (entry for entry in run.aside() if entry.name.startswith(layout.NONFINITE))
    return frozenset({*run.complete(), *run.pruned(), *nonfinite})


def _loose(root: Path, signed: Set[Path]) -> Iterator[Refusal]:
    for here, folders, names in files.walk(root):
        folders[:] = sorted(name for name in folders if here / name not in signed)
        yield from (Refusal(here / name, _LINK) for name in folders if (here / name).is_symlink())
        unfinished = any(part.startswith(layout.TEMPORARY) for part in here.relative_to(root).parts)
        what, code = (_UNFINISHED, EvidenceIncomplete.exit_code) if unfinished else (_UNSIGNED, 1)
        loose = (name for name in sorted(names) if name.lower().endswith(_WEIGHTS))
        yield from (Refusal(here / name, what, code) for name in loose)


def _kind(path: Path) -> str | None:
    """What `harness verify` would take ``path`` for."""
    if exported.is_export(path) or prepared.is_corpus(path):
        return "sealed"
    try:
        return layout.kind_of(path)
    except UsageError:
        return None


def _without_path(error: HarnessError) -> str:
    return f"{error.what}; {error.remedy}" if error.remedy else error.what
