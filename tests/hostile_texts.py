"""Strings that try to be something else than text, in every place of a statement that has room for one.

Example::

    run_folder.build(root, signer, tweak=lambda step, facts: facts.update(poisoned(facts, SCHEMA)))

Whoever signs may be hostile: their words must not run in a browser, not command a terminal, not be markup or
syntax, and not look like a line that we say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.errors import VerificationFailed
from harness.provenance.schema import Schema, check

OWNED = "owned=1;document.title='owned'"
"""What runs where a string is taken for a script."""
FORGED = ("verified  ", "equal  every tensor", "harness: ")
"""Beginnings of lines that only we say."""
POISON = (
    "\n".join(["", *(f"{each}forged" for each in FORGED), ""])
    + f'</title></style></script></svg></code></pre><script>{OWNED}</script><img src=x onerror="{OWNED}">'
    + f'<svg/onload="{OWNED}"><a href="javascript:{OWNED}">x</a>"\' onmouseover="{OWNED}" &lt;i&gt;'
    + 'a```<img src=x>` ``<b>`` ~~~ |||"]; click n0 "javascript:alert(1)" %%{init: {}}%% end\n--> n1 '
    + "\x1b[2J\x1b]0;owned\x07\x9b31m\x08\r\u202edeifirev\u202c\u2066\u200b\ufeff\u2028\x85\x00verified"
)


def poisoned(value: Any, schema: Schema, text: str = POISON) -> Any:
    """``value`` with ``text`` in every string and every name for which ``schema`` leaves it free."""
    made = {"": value}
    whole: Schema = {"type": "object", "additionalProperties": schema}
    for holder, key in list(_places(made)):
        before = holder[key]
        if isinstance(before, str):
            _put(holder, key, text, made, whole)
        elif isinstance(before, dict) and holder is not made:
            inner = next(iter(before.values()), text)
            _put(before, text, inner, made, whole)
        elif isinstance(before, list) and not before:
            _put(holder, key, [text], made, whole)
    return made[""]


def _put(holder: Any, key: Any, new: Any, made: Any, schema: Schema) -> None:
    """Set it, unless the schema forbids that."""
    missing = object()
    before = holder.get(key, missing) if isinstance(holder, dict) else holder[key]
    holder[key] = new
    try:
        check(made, where="poison", schema=schema)
    except VerificationFailed:
        if before is missing:
            del holder[key]
        else:
            holder[key] = before


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in ``value``: what holds it, and its key; what is inside before what holds it."""
    items = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    for key, inner in items:
        yield from _places(inner)
        yield value, key
