"""What made a checkpoint, in one screen: its statement, put in order for a reader.

Pure but for ledger.json, which is read to name what could still vary. At most 40 lines of 100 columns: a
value that does not fit ends in ``…``, a list says how many more there are, and ``--json`` has all of it.
Strings come from whoever wrote the folder, so control characters are escaped.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from harness.audit import kernels
from harness.audit.folders import story as stories
from harness.audit.folders.story import Story
from harness.audit.tiers import evidence, rules
from harness.audit.tiers import text as tier_text
from harness.errors import EvidenceIncomplete, VerificationFailed, visible
from harness.format.budget import percent
from harness.format.ledger import EVIDENCE, SUSPECTED, Ledger
from harness.terminal import style
from harness.words import counted, listed

WIDTH = 100
"""Columns of the screen."""
_LABEL = 13
_NAMED_PACKAGES = ("torch", "numpy", "accelerate", "safetensors", "tokenizers", "triton", "cryptography")
_NAMED_OPERATORS = 6
_MOST_DIFFERENCES = 3
_MOST_SKIPPED = 2
_MOST_VARIATION_LINES = 6
_MOST_TIER_LINES = 4

Line = tuple[str, str]
"""Label and text."""


def document(story: Story, newest_of: str | None) -> dict[str, Any]:
    """Everything as plain JSON; ``newest_of`` is the run folder that was asked for, if it was one."""
    statement = story.statement
    return {
        "checkpoint": str(story.folder),
        "newest_of": newest_of,
        "name": statement.name,
        "kind": story.kind,
        "id": statement.subject_id,
        "verified": story.verified,
        "signers": list(story.signers),
        "key_id": story.key_id,
        "payload_hashed": False,
        "shown_at": story.shown_at,
        "could_vary": could_vary(story),
        "repeatability": repeatability(story),
        "predicate": statement.predicate,
    }


def render(story: Story, newest_of: str | None) -> str:
    """The screen."""
    trust = style(story.trust, "green" if story.verified else "yellow")
    rows = [*_identity(story, newest_of), *_how(story.statement.predicate), *_result(story)]
    return "\n".join([trust, *(_row(label, text) for label, text in rows)])


def could_vary(story: Story) -> list[str]:
    """Why training the same thing again could give other bits, as far as the evidence reaches.

    Raises `VerificationFailed` when ledger.json is not the one that a verified statement names.
    """
    return list(_variations(story, story.statement.predicate))


def repeatability(story: Story) -> dict[str, Any]:
    """How far a rerun would repeat it, as plain JSON."""
    return tier_text.document(rules.compute(evidence.of_story(story)))


def tier_to_expect(story: Story) -> list[str]:
    """The same for a person: the tier, what it rests on, and what the next one lacks."""
    told = tier_text.lines(rules.compute(evidence.of_story(story)))
    names = {"tier": "expect tier ", "next tier": "tier "}
    return [f"{names.get(label, '            ')}{text}" for label, text in told]


def _identity(story: Story, newest_of: str | None) -> Iterator[Line]:
    facts = story.statement.predicate
    where = "" if newest_of is None else f", the newest that is in {newest_of}"
    kind = "" if story.kind == "complete" else f"  {story.kind.upper()}"
    yield "checkpoint", f"{story.folder.name}{kind}{where}"
    yield "id", story.statement.subject_id
    run = facts["run"]
    yield "run", f"{run['name']}  {run['id']}  seed {run['seed']}"
    first, last = facts["steps"]["from"], facts["steps"]["to"]
    yield "step", f"{last}: updates {first + 1} to {last}, commit {facts['sequence']} of the run"
    parent = facts["parent"]
    yield (
        "parent",
        "none (genesis)" if parent == "genesis" else f"step {parent['step']}  {parent['checkpoint']}",
    )
    start = facts["start"]
    if start is not None:
        yield "began with", f"step {start['step']} of {start['name']}  {start['checkpoint']}"
    yield from _segment(facts["segment"])


def _segment(segment: Mapping[str, Any]) -> Iterator[Line]:
    source = segment["resumed_from"]
    origin = "" if source is None else f" from step {source['step']} ({source['checkpoint'][:16]}…)"
    yield "launch", f"{segment['number']}: {segment['reason']}, {segment['class']}{origin}"
    changes = [f"{item['what']}: {item['before']} → {item['after']}" for item in segment["differences"]]
    yield from _some("changed", changes, _MOST_DIFFERENCES)
    if segment["accepted"]:
        yield "accepted", ", ".join(segment["accepted"])
    skipped = [f"{item['name']}: {item['reason']}" for item in segment["skipped"]]
    yield from _some("skipped", skipped, _MOST_SKIPPED)


def _how(facts: Mapping[str, Any]) -> Iterator[Line]:
    launch, config, data, cursor = (facts[name] for name in ("launch", "config", "data", "cursor"))
    world = f"{counted(launch['world_size'], 'process', 'es')} on {counted(launch['nodes'], 'node')}"
    compiled = "compiled" if launch["compile"] else "not compiled"
    yield (
        "launched",
        f"{launch['launcher']}, {world}, {launch['parallel']}, backend {launch['backend']}, {compiled}",
    )
    yield "command", " ".join(launch["command"])
    yield "precision", launch["precision"]
    yield "config", f"sha256 {config['sha256']}"
    if facts.get("policy") is not None:
        yield "policy", f"{facts['policy']['name']}  sha256 {facts['policy']['sha256']}"
    yield from _code(facts["code"])
    counts = ", ".join(f"{number} {name}" for name, number in data["counts"].items())
    yield "data", f"{data['kind']}: {counts or 'no counts'}"
    yield "corpus", _digest(data["corpus_sha256"])
    yield "tokenizer", _digest(data["tokenizer_sha256"])
    if "template_sha256" in data:
        yield "template", _digest(data["template_sha256"])
    seen = f"{cursor['samples']} samples"
    if cursor["tokens"] != cursor["samples"]:  # else the task counts in samples, and has no tokens
        seen += f", {cursor['tokens']} tokens"
    yield "cursor", f"{seen}; next: epoch {cursor['epoch']}, position {cursor['position']}"
    yield from _environment(facts["environment"])


def _code(code: Mapping[str, Any]) -> Iterator[Line]:
    commit = "no git commit" if code["git_commit"] is None else f"commit {code['git_commit']}"
    states = {None: "", False: ", clean", True: f", dirty (diff {_short(code['diff_sha256'])})"}
    yield "code", f"harness {code['harness']}, {commit}{states[code['dirty']]}"
    task = code["task"]
    if task is not None:
        yield "task", f"{task['import_path']}  sha256 {_short(task['sha256'])}"


def _environment(facts: Mapping[str, Any]) -> Iterator[Line]:
    stack = facts.get("stack")
    stack = stack if isinstance(stack, Mapping) else {}
    packages = facts.get("packages")
    packages = packages if isinstance(packages, Mapping) else {}
    named = [f"{name} {packages[name]}" for name in _NAMED_PACKAGES if name in packages]
    python = f"{facts.get('implementation', 'Python')} {facts.get('python', 'unknown')}"
    yield (
        "environment",
        ", ".join(
            [
                python,
                *(str(facts[name]) for name in ("distribution", "system", "container") if facts.get(name)),
            ]
        ),
    )
    yield "packages", f"{', '.join(named)}; {len(packages)} recorded"
    yield "hardware", _hardware(facts, stack)


def _hardware(facts: Mapping[str, Any], stack: Mapping[str, Any]) -> str:
    if stack.get("devices"):
        versions = [
            f"{name} {stack[name]}" for name in ("driver", "cuda", "cudnn", "nccl") if stack.get(name)
        ]
        return f"GPU {stack['devices']}; {', '.join(versions)}"
    model = facts.get("cpu") or stack.get("cpu") or "unknown"
    return (
        f"CPU {model}, {facts.get('cpus_allowed', 'unknown number')} of {facts.get('cpus', 'unknown')} cores"
    )


def _result(story: Story) -> Iterator[Line]:
    facts = story.statement.predicate
    determinism, state, metrics, seen = (facts[name] for name in ("determinism", "state", "metrics", "log"))
    threads = determinism["settings"].get("threads")
    yield (
        "determinism",
        f"mode {determinism['mode']}" + (f", threads: {threads}" if threads is not None else ""),
    )
    yield "ledger", _ledger_summary(determinism["ledger"])
    yield from _over_budget(determinism["ledger"])
    room = WIDTH - _LABEL - 1
    told = rules.compute(evidence.of_story(story))
    yield from _some("tier", [text for _, text in tier_text.lines(told)], _MOST_TIER_LINES)
    variations = [line for text in could_vary(story) for line in textwrap.wrap(f"- {text}", room)]
    yield from _some("could vary", variations, _MOST_VARIATION_LINES)
    yield "state", state["sha256"]
    parameters = counted(state["parameters"], "parameter")
    yield "", f"{counted(state['tensors'], 'tensor')}, {parameters} of the model"
    values = [f"{name} {metrics[name]}" for name in ("loss", "grad_norm") if metrics[name] is not None]
    values += [f"{name} {value}" for name, value in metrics["evaluation"].items()]
    yield "metrics", (", ".join(values) or "none") + ("" if facts["outcome"] == "ok" else "  NON-FINITE")
    ledger = facts["determinism"]["ledger"]
    if ledger is not None and "nonfinite" in ledger["coverage"]:
        yield "ended", str(ledger["coverage"]["nonfinite"])
    size = "no record" if seen is None else counted(seen["size"], "record")
    yield "created", f"{facts['created']} by the signer's clock; the log had {size}"
    if story.shown_at is not None:
        yield "there", f"at {story.shown_at} at the latest, as a kept or timestamped head of the log shows"


def _ledger_summary(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "none"
    kinds = ", ".join(f"{summary[kind]} {kind}" for kind in EVIDENCE if summary.get(kind))
    kinds = f" ({kinds})" if kinds else ""
    if not summary["coverage"].get("observed", False):
        return f"not observed{kinds}"
    suspected = sum(summary[kind] for kind in SUSPECTED)
    return f"{counted(suspected, 'order-dependent operator')} seen{kinds}"


def _over_budget(summary: Mapping[str, Any] | None) -> Iterator[Line]:
    """What looking has cost, where that is more than it may: what the statement signs of it."""
    coverage = {} if summary is None else summary["coverage"]
    spent, limit, digests = (coverage.get(f"budget_{name}_ppm") for name in ("spent", "limit", "digests"))
    if spent is None or limit is None or spent <= limit:
        return
    alone = "" if digests is None else f", step digests alone {percent(digests)}"
    yield "", f"looking cost {percent(spent)} of the time{alone}; the budget is {percent(limit)}"


def _variations(story: Story, facts: Mapping[str, Any]) -> Iterator[str]:
    try:
        ledger = stories.ledger(story)
    except (VerificationFailed, EvidenceIncomplete) as error:
        if story.verified:
            raise
        yield f"ledger.json cannot be used: {error.what}"
    else:
        if ledger is None:
            yield "unknown: ledger.json is not here; the line above is all that the statement says of it"
        else:
            yield from _rows(ledger)
            yield from kernels.not_looked_at(ledger)
    if facts["determinism"]["mode"] != "strict":
        yield f"order-dependent operators may run (determinism.mode {facts['determinism']['mode']})"
    yield from tier_text.could_vary(rules.compute(evidence.of_story(story)))


def _rows(ledger: Ledger) -> Iterator[str]:
    names = sorted({row.op for row in ledger.rows if row.evidence in SUSPECTED})
    if names:
        yield f"adds in no fixed order: {listed(names, _NAMED_OPERATORS)}"


def _some(label: str, texts: list[str], most: int) -> Iterator[Line]:
    """``texts``, one a line; when they are more than ``most``, the last line says how many are left out."""
    shown = texts if len(texts) <= most else [*texts[: most - 1], f"… {len(texts) - most + 1} more: --json"]
    for number, text in enumerate(shown):
        yield "" if number else label, text


def _row(label: str, text: str) -> str:
    room = WIDTH - _LABEL - 1
    shown = visible(text)
    shown = shown if len(shown) <= room else f"{shown[: room - 1]}…"
    return f"{style(label.ljust(_LABEL), 'dim')} {shown}".rstrip()


def _digest(value: str | None) -> str:
    return "none" if value is None else f"sha256 {value}"


def _short(value: str | None) -> str:
    return "none" if value is None else f"{value[:16]}…"
