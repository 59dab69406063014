"""``python -m harness VERB``, the form that torchrun and accelerate launch."""

from __future__ import annotations

import sys

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main())
