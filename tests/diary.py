"""A tracker of a user's own, for tests: `diary:Diary` in the config."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Diary:
    """Appends what it is told to the file that $DIARY names."""

    def start(self, run_id: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._write({"run": run_id, "name": name, "seed": config["run"]["seed"]})

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            self._write({"step": line["step"], "loss": line["loss"]})

    def finish(self) -> None:
        self._write({"finished": True})

    def _write(self, line: Mapping[str, Any]) -> None:
        with open(os.environ["DIARY"], "a") as stream:
            stream.write(json.dumps(line) + "\n")
