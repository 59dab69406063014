"""Two published checklists, answered from what is on record, never by assertion.

- the machine learning reproducibility checklist, version 2.0 (Pineau et al., arXiv 2003.12206, appendix)
- the NeurIPS paper checklist, 2025 (neurips.cc/public/guides/PaperChecklist), as far as runs can answer it

Each answer is ``yes``, ``no`` or ``not recorded``, with the evidence and the section that shows it. What only
the authors of a paper can answer (theory, ethics, human subjects) is left out, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from harness.report import costs
from harness.report.document import Block, Heading, Paragraph, Table
from harness.report.runs import Run
from harness.report.study import Study

Answer = Literal["yes", "no", "not recorded"]


@dataclass(frozen=True)
class Item:
    """A question, its answer, and what the answer rests on."""

    asked: str
    answer: Answer
    evidence: str
    section: str


def items(study: Study) -> list[Item]:
    """Every item, in the order of the lists."""
    return [ask(study) for ask in _ITEMS]


def blocks(study: Study) -> Iterator[Block]:
    """The section of a report."""
    yield Heading(2, "Checklist")
    yield Paragraph(
        "Items of the reproducibility checklist 2.0 (Pineau et al.) and of the NeurIPS checklist that runs "
        "can answer, from what is on record. Theory, ethics and licences are for the authors to answer."
    )
    rows = [[each.asked, each.answer, each.evidence, each.section] for each in items(study)]
    yield Table(["item", "answer", "evidence", "section"], rows)


def _hyperparameters(study: Study) -> Item:
    known = [run for run in study.runs if run.config_text]
    return Item(
        "all hyperparameters of the reported results",
        "yes" if len(known) == len(study.runs) else "no",
        f"resolved config of {len(known)} of {len(study.runs)} runs, its digest in every statement",
        "Configs",
    )


def _selection(study: Study) -> Item:
    return Item(
        "the range of hyperparameters considered and how the best were chosen",
        "yes" if study.plans else "not recorded",
        f"{len(study.arms)} configs of a sweep that was registered before it ran"
        if study.plans
        else "runs without a sweep's register: others may have been tried",
        "Question",
    )


def _number(study: Study) -> Item:
    planned = bool(study.plans)
    return Item(
        "the exact number of training and evaluation runs",
        "yes" if planned else "not recorded",
        f"{len(study.runs)} runs, {len(study.absent)} planned ones never began, all listed"
        if planned
        else f"{len(study.runs)} runs were given to this report; whether there are others is not known",
        "Results",
    )


def _measures(study: Study) -> Item:
    names = [name for name in study.figures if name != "loss (train)"]
    return Item(
        "which measures are reported",
        "yes" if names else "no",
        f"held-out {', '.join(names)}" if names else "no evaluation was recorded",
        "Evaluation protocol",
    )


def _variation(study: Study) -> Item:
    several = any(len(arm.values(name)) > 1 for arm in study.arms for name in study.figures)
    return Item(
        "central tendency and variation; error bars and how they were computed",
        "yes" if several else "no",
        "mean, standard deviation, t and bootstrap intervals over seeds" if several else "one seed a config",
        "Uncertainty and seeds",
    )


def _runtime(study: Study) -> Item:
    known = [run for run in study.runs if costs.seconds_at_work(run) is not None]
    return Item(
        "run time or energy of each result",
        "yes" if len(known) == len(study.runs) else "no",
        f"time at work of {len(known)} of {len(study.runs)} runs; energy of "
        f"{sum(bool(run.energy) for run in study.runs)}",
        "Costs",
    )


def _infrastructure(study: Study) -> Item:
    return _told(
        study,
        "the computing infrastructure",
        lambda run: run.newest is not None and bool(run.newest["environment"].get("packages")),
        "hardware, driver and package versions in the statements",
        "Environment and code",
    )


def _dependencies(study: Study) -> Item:
    return _told(
        study,
        "the dependencies, exactly",
        lambda run: run.newest is not None and bool(run.newest["environment"].get("packages")),
        "version of every installed package in the statements",
        "Environment and code",
    )


def _code(study: Study) -> Item:
    return _told(
        study,
        "the training code, as it was",
        lambda run: (
            run.newest is not None
            and run.newest["code"].get("git_commit") is not None
            and run.newest["code"].get("dirty") is False
        ),
        "a git commit without uncommitted changes",
        "Environment and code",
    )


def _data(study: Study) -> Item:
    return _told(
        study,
        "the data, by digest, with its splits",
        lambda run: (
            run.newest is not None
            and run.newest["data"].get("corpus_sha256") is not None
            and any(name.startswith("held_out") for name in run.newest["data"].get("counts", {}))
        ),
        "corpus digest and sizes of both splits in the statements",
        "Environment and code",
    )


def _weights(study: Study) -> Item:
    return _told(
        study,
        "the trained model",
        lambda run: any(one.kind == "complete" for one in run.checkpoints),
        "a checkpoint with its weights",
        "Artefact provenance",
    )


def _authentic(study: Study) -> Item:
    good = sum(verdict is not None and verdict.kind == "good" for verdict in study.verdicts)
    judged = any(study.verdicts)
    return Item(
        "evidence that the artefacts are the ones described",
        "yes" if good == len(study.runs) else "no" if judged else "not recorded",
        f"{good} of {len(study.runs)} runs verified"
        if judged
        else "nobody has verified them: give --key or --policy",
        "Artefact provenance",
    )


def _claims(study: Study) -> Item:
    held = sum(one.verdict == "supported" for one in study.judged)
    return Item(
        "the claims match the results",
        "not recorded" if study.claims is None else "yes" if held == len(study.judged) else "no",
        "no file of claims was given"
        if study.claims is None
        else f"{held} of {len(study.judged)} claims supported",
        "Conclusion and its limits",
    )


def _limits(study: Study) -> Item:
    return Item(
        "the limits of the results",
        "yes",
        "what could differ on a rerun, and what was not looked at",
        "What could still vary",
    )


def _told(study: Study, asked: str, has: Callable[[Run], bool], evidence: str, section: str) -> Item:
    count = sum(map(has, study.runs))
    answer: Answer = "yes" if count == len(study.runs) else "no" if count else "not recorded"
    return Item(asked, answer, f"{evidence}: {count} of {len(study.runs)} runs", section)


_ITEMS: tuple[Callable[[Study], Item], ...] = (
    _hyperparameters, _selection, _number, _measures, _variation, _runtime, _infrastructure, _dependencies,
    _code, _data, _weights, _authentic, _claims, _limits,
)  # fmt: skip
