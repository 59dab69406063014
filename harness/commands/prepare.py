"""Prepare a corpus: raw files, filters, tokenizer, token shards, and a signed manifest of all of it.

CONFIG is a recipe (docs/corpora.md), not the config of a run; key=value overrides come last. The work is done
by several processes; a start that was killed goes on where it was, and ends with the same bytes. A run reads
the folder with data.kind=prepared and data.files=[FOLDER], and `harness verify FOLDER` checks it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import environment
from harness.commands import Outcome
from harness.provenance.signing import keys
from harness.words import human_bytes

EXAMPLE = "harness prepare recipes/corpus.yaml out=runs/corpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe and its overrides."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the recipe")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for example validation=0.1"
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Prepare the corpus and say what became of the documents."""
    environment.require_training()
    from harness.data import preparation, recipe

    wanted = recipe.load(arguments.config, arguments.overrides)
    path, reason = keys.signing_key_path(wanted.signing.key, wanted.out)
    made = preparation.prepare(wanted, arguments.config.parent, keys.load_signer(path), quiet=arguments.json)
    document: dict[str, Any] = {
        "corpus": made.corpus,
        "folder": str(made.folder),
        "resumed": {"steps": made.steps, "were_there": made.reused},
        **made.predicate,
    }
    signed = f"signed with {path} ({reason})" if made.steps else "was there; nothing to do"
    return Outcome(document, "\n".join(_lines(made, signed)))


def _lines(made: Any, signed: str) -> Iterator[str]:
    facts = made.predicate
    documents, split, tokenizer = facts["documents"], facts["split"], facts["tokenizer"]
    yield f"{made.folder}  corpus {made.corpus}"
    yield f"  source     {facts['source']['files']:,} files of kind {facts['source']['kind']}, snapshot " + (
        f"{facts['source']['sha256'][:12]}"
    )
    yield f"  documents  {_count(documents['read'])} read, {_count(documents['kept'])} kept"
    for each in documents["dropped"]:
        yield f"  dropped    {_count(each['count'])}: {each['filter']}"
    for name in ("train", "held_out"):
        part = split[name]
        yield f"  {name:<9}  {_count(part)}, {part['tokens']:,} tokens in {part['shards']} shards"
    yield f"  in both    {split['in_both']} documents ({split['rule']})"
    origin = f"{tokenizer['origin']}, {tokenizer['vocabulary']:,} tokens"
    yield f"  tokenizer  {tokenizer['kind']}, {origin}, {tokenizer['sha256'][:12]}"
    if made.reused:
        yield f"  went on    {made.reused} of {made.steps} steps were there"
    yield f"  {signed}"


def _count(count: Any) -> str:
    return f"{count['documents']:,} documents ({human_bytes(count['bytes'])})"
