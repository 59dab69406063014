"""Chats about real code: which kind of statement is this? A corpus class for `harness prepare`.

The user shows the first line of a Python statement out of the files of an installed wheel; the assistant says
what Python's own parser says it is: `FunctionDef`, `Assign`, `If`… The files are checked against the wheel's
RECORD, the questions are real lines, and every answer is right.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from harness.data import chat
from harness.data.corpus import WheelFiles
from harness.data.documents import Document
from harness.settings import Data

_LONGEST = 80
"""Characters of a line that is asked about."""


class Statements(WheelFiles):
    """Every statement of the .py files of ``data.packages`` whose first line is short."""

    def __init__(self, data: Data, base: Path) -> None:
        super().__init__(data.packages)

    def documents(self, name: str, content: bytes) -> Iterator[Document]:
        """A chat for each statement, in the order of the lines."""
        lines = content.decode().splitlines()
        nodes = [node for node in ast.walk(ast.parse(content)) if isinstance(node, ast.stmt)]
        for node in sorted(nodes, key=lambda each: (each.lineno, each.col_offset)):
            line = lines[node.lineno - 1].strip()
            if len(line) <= _LONGEST and not isinstance(node, ast.Expr):
                asked = {"role": "user", "content": line}
                answer = {"role": "assistant", "content": type(node).__name__}
                yield Document(f"{name}:{node.lineno}", chat.written([asked, answer]))
