"""Names in a run folder, as docs/architecture.md draws it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.errors import UsageError
from harness.format import files

RUN_CONFIG = "run.yaml"
METRICS = "metrics.jsonl"
POLICY = "policy.json"
"""A copy of the policy that the run is made under; nobody trusts it, and statements name it by its digest."""
EVENTS = "events"
CHECKPOINTS = "checkpoints"
LOG = "log"
CORPUS = "corpus.json"
"""The files of the corpus and their digests, to name what changed."""
EVALUATIONS = "evaluations"
"""Results of single examples, one file an evaluation; their digests are in test-result statements."""
TRACKING = "tracking.json"
"""The last step that trackers were given."""
METRICS_PARTS = "metrics"
"""In a store: folder of the lines of metrics.jsonl that each checkpoint has added."""

MANIFEST = "MANIFEST.json"
MODEL_SIGNATURE = "model.sig"
PROVENANCE = "provenance"
CHECKPOINT_BUNDLE = "provenance/checkpoint.sigstore.json"
SLSA_BUNDLE = "provenance/slsa.sigstore.json"
EXPORT_BUNDLE = "provenance/export.sigstore.json"
SOURCE_BUNDLE = "provenance/source.sigstore.json"
"""In an exported folder: its own statement, and that of the checkpoint that it was made of."""


def source_bundle(number: int) -> str:
    """In a merged folder: the statement of its source ``number``, from 0."""
    return SOURCE_BUNDLE if number == 0 else f"{PROVENANCE}/source-{number + 1}.sigstore.json"


def source_countersignature(number: int, name: str) -> str:
    """In an exported folder: what is ``name``, like ``countersignature-0``, beside source ``number``."""
    return source_bundle(number).replace(".", f"-{name}.", 1)


CORPUS_BUNDLE = "provenance/corpus.sigstore.json"
"""In a prepared corpus: its statement."""
CHAT_TEMPLATE = "chat_template.jinja"
"""In a prepared corpus of chats, a checkpoint and an export, under the name that `transformers` looks for."""
TRAINER = "trainer.json"
LEDGER = "ledger.json"

FolderKind = Literal["complete", "pruned", "nonfinite", "damaged", "elsewhere"]
"""What the name of a checkpoint folder says of it."""
PRUNED = "pruned-"
"""Prefix of a checkpoint whose payload was removed by checkpoint.keep; manifest and signatures stay."""
DAMAGED = "damaged-"
"""Prefix of a checkpoint that a resume has set aside because it did not verify."""
NONFINITE = "nonfinite-"
"""Prefix of the signed last state of a run whose loss or gradients became NaN or infinite; never a parent."""
TEMPORARY = ".tmp-"
"""Prefix of a save or a fetch that was cut off: readers ignore it, the next writer removes it."""
FETCHED = f"{TEMPORARY}fetch"
"""In a run folder: what a fetch has brought and not put in place yet, as a run folder of its own."""

_CHECKPOINT_NAME = re.compile(r"step-(\d{8,})")
_NONFINITE_NAME = re.compile(rf"{NONFINITE}(step-\d{{8,}})(?:-([1-9]\d*))?")


def checkpoint_name(step: int) -> str:
    """``step-00000500`` for 500."""
    return f"step-{step:08d}"


def parse_checkpoint_name(name: str) -> int | None:
    """The step of a name that `checkpoint_name` gives; None for any other name."""
    match = _CHECKPOINT_NAME.fullmatch(name)
    if match is None:
        return None
    step = int(match[1])
    return step if checkpoint_name(step) == name else None


def step_of(name: str) -> int:
    """The same, for order: 0 for any other name."""
    return parse_checkpoint_name(name) or 0


def parse_nonfinite_name(name: str) -> tuple[int, int] | None:
    """Step and number, from 1, of a state that was kept before a NaN or an infinity; None for other names."""
    match = _NONFINITE_NAME.fullmatch(name)
    step = None if match is None else parse_checkpoint_name(match[1])
    return None if match is None or step is None else (step, int(match[2] or 1))


def name_of(folder: Path) -> str:
    """The name of ``folder``, also of ``.`` and ``..``; of a link, its own."""
    return folder.name if folder.name not in ("", "..") else files.real(folder).name


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of one run lie."""

    root: Path

    @property
    def run_config(self) -> Path:
        """The resolved config."""
        return self.root / RUN_CONFIG

    @property
    def policy(self) -> Path:
        """The copy of the policy that the run is made under."""
        return self.root / POLICY

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.root / METRICS

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.root / CHECKPOINTS

    @property
    def log(self) -> Path:
        """The folder of the transparency log."""
        return self.root / LOG

    def events(self, rank: int) -> Path:
        """The events file of ``rank``."""
        return self.root / EVENTS / f"rank-{rank:05d}.jsonl"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint folder of ``step``."""
        return self.checkpoints / checkpoint_name(step)

    def complete(self) -> list[Path]:
        """Checkpoint folders under their own name, by step."""
        return self._named("")

    def pruned(self) -> list[Path]:
        """Checkpoints without payload, by step."""
        return self._named(PRUNED)

    def aside(self) -> list[Path]:
        """Everything else under checkpoints/: damaged, non-finite and cut-off ones, by name."""
        entries = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return sorted(
            entry for entry in entries if parse_checkpoint_name(entry.name.removeprefix(PRUNED)) is None
        )

    def nonfinite(self) -> list[tuple[int, Path]]:
        """Steps and folders of the states that were kept before a NaN or an infinity, by step and age."""
        found = []
        for entry in self.checkpoints.iterdir() if self.checkpoints.is_dir() else ():
            read = parse_nonfinite_name(entry.name)
            if read is not None:
                found.append((*read, entry))
        return [(step, entry) for step, _, entry in sorted(found)]

    def free_aside(self, name: str) -> Path:
        """Where the folder ``name`` goes when it is set aside: ``damaged-NAME-1``, or the next number."""
        number = 1
        while (target := self.checkpoints / f"{DAMAGED}{name}-{number}").exists():
            number += 1
        return target

    def _named(self, prefix: str) -> list[Path]:
        found = []
        for entry in self.checkpoints.iterdir() if self.checkpoints.is_dir() else ():
            step = parse_checkpoint_name(entry.name.removeprefix(prefix))
            if step is not None and entry.name.startswith(prefix):
                found.append((step, entry))
        return [entry for _, entry in sorted(found)]


def kind_of_name(name: str) -> tuple[FolderKind, str | None]:
    """What a folder's name claims, and the signed name that belongs to it (None: any)."""
    if parse_checkpoint_name(name) is not None:
        return "complete", name
    inner = name.removeprefix(PRUNED)
    if inner != name and parse_checkpoint_name(inner) is not None:
        return "pruned", inner
    nonfinite = parse_nonfinite_name(name)
    if nonfinite is not None:
        return "nonfinite", checkpoint_name(nonfinite[0])
    return ("damaged", None) if name.startswith(DAMAGED) else ("elsewhere", None)


def run_of(path: Path) -> RunFolder | None:
    """The run folder that ``path`` is, or lies in as a checkpoint."""
    path = files.real(path)
    if path.parent.name == CHECKPOINTS:
        return RunFolder(path.parent.parent)
    return RunFolder(path) if (path / CHECKPOINTS).is_dir() else None


def kind_of(path: Path) -> Literal["run", "checkpoint"]:
    """Whether ``path`` is a run folder or a checkpoint folder. Raises `UsageError` when it is neither."""
    if (path / MANIFEST).is_file() or (path / PROVENANCE).is_dir() or _looks_like_checkpoint(path):
        return "checkpoint"
    if (path / CHECKPOINTS).is_dir():
        return "run"
    what = "is neither a run folder nor a checkpoint folder" if path.exists() else "no such folder"
    raise UsageError(
        what, where=str(path), remedy=f"a run folder has {CHECKPOINTS}/, a checkpoint {MANIFEST}"
    )


def require_unsigned(target: Path) -> None:
    """Raise `UsageError` when the new ``target`` would lie in a folder whose files are signed, or among the
    checkpoints of a run: neither would verify any longer."""
    for folder in files.real(target).parents:
        sealed = (folder / MANIFEST).is_file() and (folder / PROVENANCE).is_dir()
        if sealed or (folder.name == CHECKPOINTS and (folder.parent / LOG).is_dir()):
            what = f"would lie in {folder}, which holds what is signed and nothing else"
            raise UsageError(what, where=str(target), remedy="name a place elsewhere")


def require_outside(trust: Iterable[Path], judged: Path) -> None:
    """Raise `UsageError` for a key or a policy, ``trust``, that lies in the folder that it is to judge, or in
    the run of that: whoever made those could have put it there."""
    folder = files.real(judged)
    root = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder
    for path in trust:
        if files.real(path).is_relative_to(root):
            raise UsageError(
                "whom to trust would come from the folder that is checked",
                where=str(path),
                remedy="use your own copy, from somewhere else",
            )


def _looks_like_checkpoint(path: Path) -> bool:
    name = path.name
    for prefix in (PRUNED, NONFINITE):
        name = name.removeprefix(prefix)
    return path.is_dir() and parse_checkpoint_name(name) is not None
