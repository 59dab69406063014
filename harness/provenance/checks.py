"""The rules of `harness verify`, in the order in which they rest on each other, and what to do next.

- caps on sizes, plain files: nothing is opened through a link, nothing is read beyond its limit
- policy: whoever verifies has said whom to trust before a byte is read; a hand-over of a key counts only when
  both keys have signed it
- signature over raw bytes: a payload is parsed after a trusted key was found to have signed it, never before
- types and strict JSON of what is signed, and of the manifest that it names by digest; who may sign what
- the exact file set, then strict headers of safetensors
- digests: every byte of the payload; small files are parsed when theirs is right
- agreement of everything that is said more than once
- lineage, log and what lies beside the checkpoints, freshness

All failures are reported, in this order whatever was found first. What fails ends what would rest on it: the
manifest under a bad signature is not looked at. Agreement is computed before the payload is hashed, since it
needs only what is authenticated by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

Check = Literal[
    "sizes",
    "plain files",
    "key rotation",
    "statement present",
    "signature",
    "kept head",
    "export statement",
    "corpus statement",
    "statement",
    "source statement",
    "manifest present",
    "manifest",
    "policy",
    "required",
    "later statement",
    "slsa",
    "model signature",
    "file set",
    "headers",
    "payload",
    "trainer.json",
    "ledger.json",
    "corpus facts",
    "split",
    "agreement",
    "checkpoints",
    "lineage",
    "start",
    "log",
    "log files",
    "log head",
    "timestamp",
    "metrics",
    "run.yaml",
    "policy.json",
    "freshness",
]


class Remedies(NamedTuple):
    """What to do next, for findings that do not say it themselves."""

    wrong: str
    missing: str = "get the whole folder from its maker"


_AGAIN = "do not load it; get it from its maker again"
_ASK = "do not use it; ask its maker, who has signed what cannot be true together"
_KEY = "check that the key or the policy is its maker's; if it is, get the folder from its maker again"
_MAY = "have it signed by somebody whom the policy allows to, or change the policy"
_HISTORY = "get the whole run from its maker; a kept log head (--head) tells which of two histories is old"
_STAMP = "it proves no time; get the log folder from its maker again, or ask which authority made it"

REMEDIES: Mapping[Check, Remedies] = MappingProxyType(
    {
        "sizes": Remedies("get it from its maker again; nothing of this size is written by harness"),
        "plain files": Remedies("replace it by a file of its own with one name, as its maker has written it"),
        "key rotation": Remedies("ask the signer for the hand-over that both keys have signed"),
        "statement present": Remedies(_AGAIN),
        "signature": Remedies(_KEY),
        "kept head": Remedies(_KEY),
        "export statement": Remedies(_KEY),
        "corpus statement": Remedies(_KEY),
        "statement": Remedies("ask its maker; another version of harness may have written it"),
        "source statement": Remedies(_KEY),
        "manifest present": Remedies(_AGAIN),
        "manifest": Remedies(_AGAIN),
        "policy": Remedies(_MAY, _MAY),
        "required": Remedies(_MAY, "get it from whoever signs that kind, or take it out of `required`"),
        "later statement": Remedies("give its signer's key, too, if you trust them; else remove it"),
        "slsa": Remedies(_AGAIN),
        "model signature": Remedies(_AGAIN),
        "file set": Remedies("move away what MANIFEST.json does not list, get what it does from its maker"),
        "headers": Remedies(_AGAIN),
        "payload": Remedies(_AGAIN, "check the disk and the permissions, or get it from its maker again"),
        "trainer.json": Remedies("do not resume from it; get it from its maker again"),
        "ledger.json": Remedies("do not rely on it; get it from its maker again"),
        "corpus facts": Remedies("do not train on it; get the corpus from its maker again, or prepare it"),
        "split": Remedies("do not evaluate on it; get the corpus from its maker again, or prepare it"),
        "agreement": Remedies(_ASK),
        "checkpoints": Remedies(_AGAIN, "check the path, or wait for the run's first save"),
        "lineage": Remedies(_HISTORY),
        "start": Remedies("ask its maker which checkpoint it began with", "add its run folder to --with"),
        "log": Remedies(_HISTORY, _HISTORY),
        "log files": Remedies("remove it, or get the log folder from its maker again"),
        "log head": Remedies("get the newest state of the run from its maker"),
        "timestamp": Remedies(_STAMP, "have the head stamped: harness head RUN --timestamp URL"),
        "metrics": Remedies("do not draw conclusions from the file; get it from its maker again"),
        "run.yaml": Remedies("do not rely on the file; harness show CKPT tells the signed config"),
        "policy.json": Remedies(
            "do not rely on the file, and never verify with it; get it from its maker again",
            "start the run again, which writes it, or get the whole folder from its maker",
        ),
        "freshness": Remedies("get the newest state of the run from its maker"),
    }
)
"""Check → what to do next; the order is that of reports."""
PLACES: Mapping[Check, int] = MappingProxyType({check: place for place, check in enumerate(REMEDIES)})
"""Check → its place in the order."""
