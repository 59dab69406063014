"""Execute steps of a run again, compare every recorded digest, and sign the verdict.

Signatures, lineage and the chain of metrics.jsonl are checked first; then the steps are executed from the
checkpoint at or before --from, with the signed config, processes, threads and variables, in processes of
their own: the run is only read. Corpus, code, tokenizer and stack must be the signed ones; --stack-differs
goes on with another stack or --processes, and equal bits are then a finding, different ones are not. The
verdict is signed into the checkpoint at the end of the segment. Exit code 0: equal. 1: outside.
4: inconclusive, or it cannot be replayed here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
from harness import environment
from harness.audit import attest, permission
from harness.audit.replay import divergence, segment, verdict
from harness.audit.replay.divergence import Divergence
from harness.audit.replay.segment import Authentic, Segment
from harness.audit.replay.verdict import Outcome as Replay
from harness.audit.replay.verdict import Place, Repeated, Replayed
from harness.commands import Outcome, reexecute, replay_floor
from harness.commands.trust import add_signing_key, add_trust, required, signer_of
from harness.errors import EvidenceIncomplete, UsageError
from harness.format import layout
from harness.format.layout import RunFolder
from harness.provenance import later
from harness.provenance.policy.rules import Policy

EXAMPLE = "harness replay runs/tiny --from 20 --to 40 --key alice.ed25519.pub alice.p256.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, which steps, what may differ, who signs, whom to trust."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--from", type=int, dest="first", metavar="STEP", help="execute what follows this step"
    )
    parser.add_argument("--to", type=int, dest="last", metavar="STEP", help="up to this step")
    parser.add_argument(
        "--random", type=int, metavar="N", help="N segments between checkpoints, drawn by --seed"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="RUN",
        help="the segment in which the record parts from that of another run, found by bisection",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --random; choose it after the run is signed")
    parser.add_argument(
        "--floor",
        action="store_true",
        help="measure how far honest executions end apart, by a dozen more, and hold the record against it",
    )
    parser.add_argument("--stack-differs", action="store_true", help="go on with another stack or world size")
    parser.add_argument("--processes", type=int, metavar="N", help="ranks (the signed number)")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="folder of the run's config (the one it was trained with)"
    )
    add_signing_key(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Choose, execute, judge, sign; the worst verdict's exit code."""
    whom = required(arguments, str(arguments.run))
    if layout.kind_of(arguments.run) != "run":
        raise UsageError("is a checkpoint folder", where=str(arguments.run), remedy="name the run folder")
    if arguments.against is not None and layout.kind_of(arguments.against) != "run":
        raise UsageError("is a checkpoint folder", where=str(arguments.against), remedy="name the run folder")
    if arguments.processes is not None and arguments.processes < 1:
        raise UsageError(f"--processes {arguments.processes} is no number of ranks", remedy="1 or more")
    if arguments.random is not None and arguments.random < 1:
        raise UsageError(f"--random {arguments.random} draws no segment", remedy="1 or more")
    if arguments.folder is not None and not arguments.folder.is_dir():
        raise UsageError(
            "no such folder", where=f"--folder {arguments.folder}", remedy="where the run's config lay"
        )
    run_folder = RunFolder(arguments.run)
    signer, _ = signer_of(arguments.signing_key, arguments.run)
    known = segment.authentic(run_folder, whom)
    parted = None if arguments.against is None else _parted(known, whom, arguments)
    chosen = _chosen(known, arguments) if parted is None else [known.around(parted.step)]
    if arguments.floor:
        for each in chosen:
            replay_floor.check(each)
    # Asked of all of them before the first is executed.
    asked = [permission.require(each.end, later.REPLAY, signer, whom) for each in chosen]
    environment.require_training()
    outcomes, texts, documents = [], [], []
    for each, policy in zip(chosen, asked, strict=True):
        outcome = _replay(each, arguments)
        facts = {name: value for name, value in environment.facts().items() if not isinstance(value, Mapping)}
        predicate = verdict.predicate(outcome, facts, harness.__version__)
        added = attest.add(each.end, later.REPLAY, predicate, signer)
        outcomes.append(outcome)
        texts.append(verdict.render(outcome, f"{added.path} ({added.reason}; policy: {policy})"))
        documents.append({**predicate, "statement": str(added.path), "policy": policy})
    code = max(verdict.EXIT[each.verdict] for each in outcomes)
    code = 1 if any(each.verdict == "outside" for each in outcomes) else code
    document: dict[str, Any] = {"run": str(arguments.run), "segments": documents}
    if arguments.random is not None:
        texts.insert(
            0,
            f"{len(chosen)} segments: {arguments.random} drawn by seed {arguments.seed}, and those "
            "whose ledger has new entries",
        )
        document["seed"] = arguments.seed
    if parted is not None:
        told = f"step {parted.step}, found with {parted.queries} comparisons of the chains"
        texts.insert(0, f"{arguments.run} parts from {arguments.against} at {told}; first in {parted.what}")
        facts = {"step": parted.step, "what": parted.what, "queries": parted.queries}
        document["against"] = {"run": str(arguments.against), **facts}
    return Outcome(document, "\n".join(texts), exit_code=code)


def _parted(known: Authentic, whom: Policy, arguments: argparse.Namespace) -> Divergence:
    """Where the record parts from that of another run, which must be authentic as well."""
    if arguments.random is not None or arguments.first is not None or arguments.last is not None:
        raise UsageError("--against RUN stands alone", remedy="leave out --from, --to and --random")
    other = segment.authentic(RunFolder(arguments.against), whom)
    made = [{segment.digested_as(each) for each in record.checkpoints} for record in (known, other)]
    if made[0] != made[1]:
        both = [", ".join(sorted(map(str, each))) for each in made]
        raise EvidenceIncomplete(
            f"the steps of one run were digested as {both[0]}, those of the other as {both[1]}",
            where=str(arguments.against),
            remedy="compare runs of one version of harness, or their checkpoints with harness diff",
        )
    parted, queries = divergence.between(known.steps, other.steps)
    if parted is None:
        count = len(known.steps.keys() & other.steps.keys())
        raise UsageError(
            f"both records are equal in the {count} steps that they share ({queries} comparisons)",
            where=str(arguments.against),
            remedy="use --from STEP --to STEP, or --random N",
        )
    return parted


def _chosen(known: Authentic, arguments: argparse.Namespace) -> list[Segment]:
    if arguments.random is not None:
        if arguments.first is not None or arguments.last is not None:
            raise UsageError("--random N stands alone", remedy="leave out --from and --to")
        return known.sampled(arguments.random, arguments.seed)
    if arguments.first is None or arguments.last is None:
        raise UsageError("which steps is not said", remedy="give --from and --to, --random or --against")
    return [known.segment(arguments.first, arguments.last)]


def _replay(chosen: Segment, arguments: argparse.Namespace) -> Replay:
    """Execute ``chosen`` again, and once more where it parts from the record."""
    signed = int(chosen.facts["launch"]["world_size"])
    ranks = arguments.processes or signed
    lines = reexecute.executed(chosen, arguments, ranks)
    launches = [each["differences"] for each in lines if each["kind"] == "launch"]
    differences: list[Mapping[str, Any]] = launches[0] if launches else []
    broken = next((each["reason"] for each in lines if each["kind"] == "nonfinite"), None)
    steps = [each for each in lines if each["kind"] == "step"]
    told = [{name: str(each[name]) for name in ("what", "before", "after")} for each in differences]
    replayed = Replayed(steps, ranks, told, broken)
    parted = divergence.compare(chosen.steps, steps, chosen.head)
    repeated = None
    if parted is not None and not differences:
        again = reexecute.executed(chosen, arguments, ranks, last=parted.step, repeat=True)
        found = next((each for each in again if each["kind"] == "repeat"), None)
        if found is not None:
            places = [Place(**each) for each in found["places"]]
            repeated = Repeated(parted.step, found["repeats"], found["tensors"], found["varying"], places)
    floor = replay_floor.measured(chosen, arguments, ranks) if arguments.floor else None
    return verdict.judge(chosen, replayed, parted, repeated, floor)
