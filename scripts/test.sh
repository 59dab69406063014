#!/usr/bin/env bash
# Sets up and runs every check: style, types, tests. Further arguments go to pytest: scripts/test.sh -k resume
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy --strict harness
exec pytest --numprocesses 2 --durations 10 "$@"
