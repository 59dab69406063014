"""Flip one bit of one byte in the middle of a file, to see what notices.

python scripts/flip_byte.py FILE
"""

from __future__ import annotations

import sys
from pathlib import Path


def flip(path: Path) -> tuple[int, int, int]:
    """Flip the lowest bit of the byte in the middle of ``path``; returns offset, before, after."""
    offset = path.stat().st_size // 2
    with open(path, "r+b") as stream:
        stream.seek(offset)
        before = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([before ^ 1]))
    return offset, before, before ^ 1


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        print("usage: python scripts/flip_byte.py FILE", file=sys.stderr)
        sys.exit(2)
    where, old, new = flip(Path(sys.argv[1]))
    print(f"flipped byte {where:,} of {sys.argv[1]}: 0x{old:02x} → 0x{new:02x}")
