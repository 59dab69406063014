"""The file of a policy as JSON Schema (draft 2020-12), for editors; `reader` checks more.

Published as docs/schema/policy-v1.schema.json.
"""

from __future__ import annotations

from harness.provenance.schema import DIALECT, FLAG, HEX64, TEXT, Schema, closed, either

FORMAT = "harness-policy/1"
DATE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}:[0-9]{2}Z)?$"
AGE = r"^[1-9][0-9]{0,4}[dh]$"
KIND = r"^[a-z][a-z-]*$"


def _several(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


_MOMENT: Schema = {"type": "string", "pattern": DATE}
HEAD = closed(
    {"seen": _MOMENT}, origin=TEXT, size={"type": "integer", "minimum": 0, "maximum": 2**53}, root=HEX64
)
HEAD_FILE = closed({"seen": _MOMENT}, file=TEXT)
_ANY_HEAD = either(TEXT, HEAD, HEAD_FILE)
SUBJECT = closed(issuer={**TEXT, "minLength": 1}, identity={**TEXT, "minLength": 1})
SCHEMA: Schema = {
    "$schema": DIALECT,
    "$id": "urn:harness:policy/v1",
    "title": "Who may sign what: the file of `harness verify --policy`",
    **closed(
        {
            "required": _several({"type": "string", "pattern": KIND}),
            "threshold": {"type": "integer", "minimum": 1, "maximum": 2**53},
            "revoked": {
                "type": "array",
                "items": either(HEX64, closed({"from": _MOMENT, "reason": TEXT}, id=HEX64)),
            },
            "rotations": _several(TEXT),
            "sigstore": TEXT,
            "witnesses": closed(
                {"threshold": {"type": "integer", "minimum": 1, "maximum": 2**53}}, keys=_several(TEXT)
            ),
            "timestamps": closed(certificates=_several(TEXT)),
            "log_head": either(*_ANY_HEAD["anyOf"], _several(_ANY_HEAD)),
            "max_age": {"type": "string", "pattern": AGE},
        },
        format={"const": FORMAT},
        identities=_several(
            closed(
                {
                    "runs": _several(TEXT),
                    "statements": _several({"type": "string", "pattern": KIND}),
                    "valid": closed({"from": _MOMENT, "until": _MOMENT, "proven": FLAG}),
                    "keys": _several(TEXT),
                    "keyless": _several(SUBJECT),
                },
                name={**TEXT, "minLength": 1},
            )
        ),
    ),
}
