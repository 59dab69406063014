"""Three checklists, answered from what is on record, never by assertion.

- the five questions that decide whether a result can be made again (docs/method.md)
- the machine learning reproducibility checklist, version 2.0 (Pineau et al., arXiv 2003.12206, appendix)
- the NeurIPS paper checklist, 2025 (neurips.cc/public/guides/PaperChecklist), as far as runs can answer it

Each answer is ``yes``, ``no`` or ``not recorded``, with the evidence and the section that shows it. What only
the authors of a paper can answer (theory, ethics, human subjects) is left out, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from harness.report import costs, data, measured
from harness.report.document import Block, Heading, Link, Paragraph, Table
from harness.report.runs import Run
from harness.report.study import Study, failed
from harness.words import counted

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
    return [ask(study) for ask in (*_MINIMAL, *_ITEMS)]


def blocks(study: Study) -> Iterator[Block]:
    """The section of a report."""
    yield Heading(2, "Checklist")
    yield Heading(3, "What it takes to make a result again")
    yield _table(study, _MINIMAL)
    yield Heading(3, "Reproducibility checklist 2.0 and NeurIPS checklist")
    yield Paragraph(
        "Items of the reproducibility checklist 2.0 (Pineau et al.) and of the NeurIPS checklist that runs "
        "can answer, from what is on record. Theory, ethics and other licences are for the authors to answer."
    )
    yield _table(study, _ITEMS)


def _table(study: Study, asked: Sequence[Ask]) -> Table:
    found = [ask(study) for ask in asked]
    rows = [[each.asked, each.answer, each.evidence, Link(each.section)] for each in found]
    return Table(["item", "answer", "evidence", "section"], rows)


def _which_data(study: Study) -> Item:
    return _told(
        study,
        "which data?",
        lambda run: run.newest is not None and run.newest["data"].get("corpus_sha256") is not None,
        "digest of the corpus in the statements",
        "Environment and code",
    )


def _which_environment(study: Study) -> Item:
    return replace(_infrastructure(study), asked="which environment?")


def _which_code(study: Study) -> Item:
    return replace(_code(study), asked="which code?")


def _which_settings(study: Study) -> Item:
    return _told(
        study,
        "which settings and seed?",
        lambda run: run.newest is not None and bool(run.newest["config"]["text"]),
        "resolved config and seed in the statements",
        "Configs",
    )


def _which_outputs(study: Study) -> Item:
    return _told(
        study,
        "which outputs?",
        lambda run: run.newest is not None and run.newest["metrics"]["chain"] is not None,
        "digest of the state and chain over the metrics in the statements",
        "Artefact provenance",
    )


def _hyperparameters(study: Study) -> Item:
    return replace(_which_settings(study), asked="all hyperparameters of the reported results")


def _selection(study: Study) -> Item:
    told = "runs without a sweep's register: others may have been tried"
    if study.planned:
        later = sum(bool(plan.finished) for plan in study.plans)
        changed = f", changed {later} times after members had finished" if later else ""
        told = (
            f"{len(study.arms)} configs, all reported, of a sweep that was registered before it "
            f"ran{changed}; no signature covers its register"
        )
    return Item(
        "the range of hyperparameters considered and how the best were chosen",
        "yes" if study.planned else "not recorded",
        told,
        "Question" if study.plans or study.claims else "Setup",
    )


def _number(study: Study) -> Item:
    return Item(
        "the exact number of training and evaluation runs",
        "yes" if study.planned else "not recorded",
        f"{len(study.runs)} runs, {len(study.absent)} planned ones never began, {len(study.evaluations)} "
        "signed evaluations: all listed"
        if study.planned
        else f"{counted(len(study.runs), 'run')} given to this report; whether there are others is not known",
        "Results",
    )


def _measures(study: Study) -> Item:
    names = [measure.label for measure in study.measures if measure.metric != measured.TRAINING]
    return Item(
        "which measures are reported",
        "yes" if names else "no",
        ", ".join(names) if names else "no evaluation was recorded",
        "Evaluation protocol",
    )


def _variation(study: Study) -> Item:
    several = any(len(measure.side(arm).values) > 1 for arm in study.arms for measure in study.measures)
    return Item(
        "central tendency and variation; error bars and how they were computed",
        "yes" if several else "no",
        "mean, standard deviation, t and bootstrap intervals over seeds" if several else "one seed a config",
        "Uncertainty and seeds",
    )


def _runtime(study: Study) -> Item:
    known = [run for run in study.runs if costs.seconds_at_work(run) is not None]
    counting = sum(bool(run.energy) for run in study.runs)
    return Item(
        "run time or energy of each result",
        "yes" if len(known) == len(study.runs) else "no",
        f"time at work of {len(known)} of {len(study.runs)} runs; energy "
        + (f"of {counting}" if counting else "not recorded"),
        "Costs",
    )


def _infrastructure(study: Study) -> Item:
    return _told(
        study,
        "the computing infrastructure",
        _knows_packages,
        "hardware, driver and package versions in the statements",
        "Environment and code",
    )


def _dependencies(study: Study) -> Item:
    return _told(
        study,
        "the dependencies, exactly",
        _knows_packages,
        "version of every installed package in the statements",
        "Environment and code",
    )


def _knows_packages(run: Run) -> bool:
    return run.newest is not None and bool(run.newest["environment"].get("packages"))


def _code(study: Study) -> Item:
    told = [run.newest["code"] for run in _standing(study) if run.newest is not None]
    named = [code for code in told if code.get("git_commit") is not None]
    clean = sum(code.get("dirty") is False for code in named)
    return Item(
        "the training code, as it was",
        "yes" if clean == len(study.runs) else "no" if named else "not recorded",
        f"a git commit: {len(named)} of {len(study.runs)} runs; without uncommitted changes: {clean}",
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


def _preprocessing(study: Study) -> Item:
    return _told(
        study,
        "what data were left out, and the preprocessing",
        lambda run: (
            run.newest is not None
            and (run.newest["data"].get("kind") != "prepared" or data.corpus_of(study, run) is not None)
        ),
        "files, split and limit in the config, or the statement of the prepared corpus (`--with`)",
        data.TITLE if study.corpora else "Configs",
    )


def _licence(study: Study) -> Item:
    return _told(
        study,
        "the licence of the data",
        lambda run: (corpus := data.corpus_of(study, run)) is not None and bool(corpus.predicate["license"]),
        "named in the statement of the prepared corpus (`--with`)",
        data.TITLE if study.corpora else "Configs",
    )


def _protocol(study: Study) -> Item:
    return _told(
        study,
        "how the measures were taken",
        lambda run: run.newest is not None and bool(run.evaluation_names or run.evaluated),
        "interval, batches and held-out counts in config and statements, or a signed evaluation's procedure",
        "Evaluation protocol",
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
        "Results" if study.claims is None else "Conclusion and its limits",
    )


def _limits(study: Study) -> Item:
    return _told(
        study,
        "the limits of the results",
        lambda run: run.newest is not None,
        "what could differ on a rerun, by statements, ledger and replays",
        "What could still vary",
    )


def _told(study: Study, asked: str, has: Callable[[Run], bool], evidence: str, section: str) -> Item:
    count = sum(map(has, _standing(study)))
    answer: Answer = "yes" if count == len(study.runs) else "no" if count else "not recorded"
    doubt = "" if any(study.verdicts) else ", as nobody has verified"
    return Item(asked, answer, f"{evidence}: {count} of {len(study.runs)} runs{doubt}", section)


def _standing(study: Study) -> list[Run]:
    """The runs whose verification, if there was one, has not failed: what the others say is no evidence."""
    return [run for run, verdict in zip(study.runs, study.verdicts, strict=True) if not failed(verdict)]


Ask = Callable[[Study], Item]

_MINIMAL: tuple[Ask, ...] = (_which_code, _which_data, _which_environment, _which_settings, _which_outputs)
_ITEMS: tuple[Ask, ...] = (
    _hyperparameters, _selection, _number, _measures, _protocol, _variation, _runtime, _infrastructure,
    _dependencies, _code, _data, _preprocessing, _licence, _weights, _authentic, _claims, _limits,
)  # fmt: skip
