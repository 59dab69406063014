"""The section on data: what prepared corpora were made from, what was left out, and how they were split.

Only of corpora whose statement a verification has found authentic (`harness.audit.folders.prepared.examine`).
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.provenance.corpora import CorpusStatement
from harness.report.document import Block, Heading, Paragraph, Table
from harness.report.runs import Run
from harness.report.study import Study

TITLE = "Data"


def corpus_of(study: Study, run: Run) -> CorpusStatement | None:
    """The corpus that ``run`` was trained on, if its statement was given."""
    trained_on = None if run.newest is None else run.newest["data"]["corpus_sha256"]
    return next((each for each in study.corpora if each.subject_id == trained_on), None)


def blocks(study: Study) -> Iterator[Block]:
    """The section of a report; nothing without a corpus."""
    if not study.corpora:
        return
    yield Heading(2, TITLE)
    for each in study.corpora:
        yield Heading(3, each.name)
        yield Table(["what", "value"], [list(row) for row in _rows(study, each)])
    yield Paragraph(
        "From the signed statements of the corpora, whose files and split were checked; `harness verify` "
        "also hashes every byte."
    )


def _rows(study: Study, corpus: CorpusStatement) -> Iterator[tuple[str, str]]:
    facts = corpus.predicate
    source, documents, split, tokenizer = (
        facts[name] for name in ("source", "documents", "split", "tokenizer")
    )
    runs = [run.name for run in study.runs if corpus_of(study, run) is corpus]
    yield "corpus id", f"`{corpus.subject_id[:16]}`"
    yield "trained on by", ", ".join(runs)
    hub = f", {source['hub']}" if source["hub"] else ""
    yield "raw files", f"{source['files']:,} of kind {source['kind']}{hub}, {source['bytes']:,} bytes"
    yield "snapshot", f"`{source['sha256'][:16]}`"
    yield "documents read", f"{documents['read']['documents']:,}"
    for each in documents["dropped"]:
        yield f"dropped: {each['filter']}", f"{each['count']['documents']:,}"
    yield "kept", f"{documents['kept']['documents']:,}"
    for part, words in (("train", "to train on"), ("held_out", "held out")):
        yield words, f"{split[part]['documents']:,} documents, {split[part]['tokens']:,} tokens"
    yield "in both", f"{split['in_both']:,}"
    yield "split rule", f"{split['rule']} ({split['held_out_share']})"
    yield "tokenizer", f"{tokenizer['kind']}, {tokenizer['origin']}, `{tokenizer['sha256'][:16]}`"
    if "chat" in facts:
        yield "template of chats", f"`{facts['chat']['template_sha256'][:16]}`"
    yield "licence", facts["license"] or "not recorded"
    yield "address", facts["url"] or "not recorded"
    yield "prepared", facts["created"]
