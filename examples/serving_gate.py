"""A server that loads only what verifies: python examples/serving_gate.py MODEL POLICY

The folder is copied first, and the copy is verified and loaded: whoever can still write to MODEL can change
it after the check, but not what was checked.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import harness
from harness.errors import HarnessError


def admit(model: Path, policy: Path, private: Path) -> Path:
    """A verified copy of the checkpoint or export ``model`` in ``private``, a folder that only you can write.

    Raises `PermissionError` with every reason when it does not verify; the copy is then removed.
    """
    copy = private / model.name
    # Links are copied as links, which the verification refuses.
    shutil.copytree(model, copy, symlinks=True)
    try:
        report = harness.verify(copy, policy)
        reasons = [str(each) for each in report.findings] if report.exit_code else []
    except HarnessError as error:
        reasons = [str(error)]
    if reasons:
        shutil.rmtree(copy)
        raise PermissionError("; ".join(reasons))
    return copy


def main() -> int:
    """Admit, then load. Prints the names of the weights that would be served."""
    if len(sys.argv) != 3:
        print("usage: python examples/serving_gate.py MODEL POLICY", file=sys.stderr)
        return 2
    model, policy = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as private:
        try:
            admitted = admit(model, policy, Path(private))
        except PermissionError as error:
            print(f"not served: {error}", file=sys.stderr)
            return 1
        files = sorted(file.name for file in admitted.glob("*.safetensors"))
        print(f"serving {model}: {', '.join(files)}")  # here your server loads from `admitted`
    return 0


if __name__ == "__main__":
    sys.exit(main())
