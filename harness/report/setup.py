"""What was trained, on what, and how: once for what all runs share, then for what they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness.report import costs, facts
from harness.report.arms import alike, listed
from harness.report.document import Block, Heading, Table
from harness.report.runs import Run
from harness.report.study import Study

_SECTIONS = ("task", "model", "data", "optimizer", "schedule", "evaluate")
"""Of the config, a line each; all of it is in the section Configs."""
_NOTHING = {"—", "null", "[]"}
"""How settings are shown that are not set."""


def blocks(study: Study) -> Iterator[Block]:
    """What is the same for all runs, what is not, and the settings that differ."""
    yield from _setups(study)
    yield from _settings(study)


def _setups(study: Study) -> Iterator[Block]:
    """What was trained, on what, and how: first what is the same for all runs, then what is not."""
    made = [_setup(run) for run in study.runs]
    same = [row for row in made[0] if all(row in rows for rows in made)]
    own = alike(
        ([row for row in rows if row not in same], run.name)
        for run, rows in zip(study.runs, made, strict=True)
    )
    for rows, names in ([(same, [run.name for run in study.runs])] if same else []) + own:
        if rows:
            yield from [Heading(3, listed(names))] if study.several else []
            yield Table(["what", "value"], rows)


def _setup(run: Run) -> list[list[str]]:
    """What was trained, on what, and how; without the seed."""
    table = facts.settings(run.config_text, str(run.root))
    parameters = processes = "not recorded"
    began = ""
    if run.newest is not None:
        parameters = f"{run.newest['state']['parameters']:,}"
        processes = f"{run.newest['launch']['world_size']} ({run.newest['launch']['parallel']})"
        start = run.newest["start"]
        began = "random weights" if start is None else f"step {start['step']:,} of {start['name']}"
    rows = [[name, _said(table, name)] for name in _SECTIONS]
    rows.insert(2, ["parameters", parameters])
    rows += [
        [
            "updates",
            f"{_shown(table, 'train.steps')} of {_shown(table, 'train.global_batch')} samples"
            if table
            else "not recorded",
        ],
        ["precision", f"{_shown(table, 'precision')}, compile {_shown(table, 'compile')}" if table else ""],
        ["processes", processes],
        ["device", costs.device(run)],
        ["began with", began],
    ]
    return [[name, value] for name, value in rows if value]


def _said(table: Mapping[str, Any], section: str) -> str:
    """The settings of a section that are set, in one line; packages are those of wheels alone."""
    hidden = {"data.packages"} if table.get("data.kind") != "wheel" else set()
    return ", ".join(
        f"{key.removeprefix(f'{section}.').replace('_', ' ')} {facts.shown(value)}"
        for key, value in table.items()
        if key.startswith(f"{section}.") and key not in hidden and facts.shown(value) not in (*_NOTHING, "{}")
    )


def _shown(table: Mapping[str, Any], key: str) -> str:
    return facts.shown(table.get(key, "—"))


def _settings(study: Study) -> Iterator[Block]:
    """What differs between configs, a column each; which seeds they had is in the results."""
    arms = study.arms
    differing = facts.differing_settings([arm.runs[0] for arm in arms])
    # With several seeds in an arm, the seed of its first run says nothing.
    hidden = set() if len(arms) == len(study.runs) else {"run.seed"}
    # A section that one config lacks has keys that say nothing in the other.
    said = {key: values for key, values in differing if set(values) - _NOTHING}
    rows = [[f"`{key}`", *values] for key, values in said.items() if key not in hidden]
    if rows:
        names = [listed([run.name for run in arm.runs]) for arm in arms]
        yield Heading(3, "Settings that differ")
        yield Table(["key", *names], rows)
