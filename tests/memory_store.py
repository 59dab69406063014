"""An object store in memory that holds what a run has sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from run_folder import SampleRun

from harness.errors import EvidenceIncomplete
from harness.format import layout

URL = "s3://bucket/run"


class Store:
    """What a run has sent, in memory: `harness.stores.client.ObjectStore` as far as a fetch needs it."""

    url = URL

    def __init__(self, run: SampleRun) -> None:
        self.content: dict[str, bytes] = {}
        self.hooks: dict[str, Callable[[], object]] = {}
        """Called once, before a path is read."""
        self.send(run)

    def send(self, run: SampleRun) -> None:
        """Hold what the run has now."""
        paths = [path for path in run.root.rglob("*") if path.is_file()]
        self.content = {path.relative_to(run.root).as_posix(): path.read_bytes() for path in paths}
        lines = self.content.pop(layout.METRICS).splitlines(keepends=True)
        for step in run.saved:
            part = f"{layout.METRICS_PARTS}/{layout.checkpoint_name(step)}.jsonl"
            self.content[part] = b"".join(lines[step - 10 : step])

    def flip(self, path: str) -> None:
        """Change a bit of an object."""
        data = bytearray(self.content[path])
        data[len(data) // 2] ^= 1
        self.content[path] = bytes(data)

    def objects(self, prefix: str = "") -> dict[str, int]:
        return {path: len(data) for path, data in self.content.items()}

    def get(self, path: str, limit: int) -> bytes:
        self.hooks.pop(path, lambda: None)()
        if path not in self.content:
            raise EvidenceIncomplete("is not in the store", where=self.at(path))
        return self.content[path]

    def pieces(self, path: str, size: int) -> Iterator[memoryview]:
        data = self.get(path, size)
        yield from (memoryview(data[start : start + 64]) for start in range(0, size, 64))

    def at(self, path: str) -> str:
        return f"{self.url}/{path}"
