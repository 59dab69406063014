"""The manifest of a prepared corpus as Croissant 1.0 metadata (JSON-LD), for catalogues of data sets.

Format: docs.mlcommons.org/croissant/docs/croissant-spec-1.0.html. Every file is a ``cr:FileObject`` with its
sha256; what was dropped and how the split was made is told in the description, since Croissant 1.0 has no
field for it. Written only from a corpus that verifies; every word is one of the signed statement.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.audit.folders import prepared, sealed
from harness.errors import UsageError
from harness.format import files, layout
from harness.format.manifest import Manifest
from harness.provenance.corpora import CorpusStatement
from harness.provenance.findings import Findings
from harness.provenance.policy.rules import Policy

CONFORMS_TO = "http://mlcommons.org/croissant/1.0"
_TYPES = {".json": "application/json", ".yaml": "application/yaml"}
_BINARY = "application/octet-stream"
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context that the specification prescribes."""


def export(folder: Path, target: Path, policy: Policy) -> dict[str, Any]:
    """Write the metadata of the corpus in ``folder`` to the new file ``target``, and return it.

    Raises the first failure when the corpus does not verify (payload bytes are `harness verify`'s),
    `UsageError` when ``target`` exists or would lie in a signed folder.
    """
    if target.exists():
        raise UsageError("the target exists", where=str(target), remedy="name a new file")
    layout.require_unsigned(target)
    findings = Findings()
    statement, *_ = prepared.examine(folder, policy, findings)
    findings.raise_first()
    if statement is None:
        raise UsageError(
            "no prepared corpus", where=str(folder), remedy="name a folder that harness prepare has made"
        )
    document = metadata(statement, sealed.manifest(folder, statement))
    files.write_durable(target, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
    return document


def metadata(statement: CorpusStatement, manifest: Manifest) -> dict[str, Any]:
    """The JSON-LD document of a corpus."""
    facts = statement.predicate
    document = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": statement.name,
        "description": _description(statement),
        "version": f"1.0.0+{statement.subject_id[:12]}",
        "identifier": f"sha256:{statement.subject_id}",
        "datePublished": facts["created"],
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": entry.path,
                "name": entry.path,
                "contentUrl": entry.path,
                "contentSize": f"{entry.size} B",
                "encodingFormat": _TYPES.get(Path(entry.path).suffix, _BINARY),
                "sha256": entry.sha256,
            }
            for entry in manifest.files
        ],
    }
    return document | {name: facts[name] for name in ("license", "url") if facts[name] is not None}


def _description(statement: CorpusStatement) -> str:
    facts = statement.predicate
    source, documents, split, tokenizer = (
        facts[name] for name in ("source", "documents", "split", "tokenizer")
    )
    dropped = "; ".join(f"{each['count']['documents']} {each['filter']}" for each in documents["dropped"])
    return (
        f"Tokens of {documents['kept']['documents']} of {documents['read']['documents']} documents from "
        f"{source['files']} files of kind {source['kind']} (snapshot sha256 {source['sha256']}). "
        f"Dropped: {dropped or 'none'}. Split: {split['train']['documents']} to train on, "
        f"{split['held_out']['documents']} held out, {split['in_both']} in both; {split['rule']}. "
        f"Tokenizer: {tokenizer['kind']}, {tokenizer['origin']}, sha256 {tokenizer['sha256']}. "
        f"Shards are safetensors files with the tensor `tokens`."
    )
