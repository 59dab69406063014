#!/usr/bin/env bash
# Sets up and runs every check: style, types, tests. Further arguments go to pytest: scripts/test.sh -k resume
# Programs that no package index has are not installed; tests that need one are skipped and say so. On Debian:
# apt-get install softhsm2 openssl openssh-client chromium gcc golang-go
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy --strict harness
# Two processes share the cores; a test that is about threads asks for its own number of them.
export OMP_NUM_THREADS=1
exec pytest --numprocesses 2 --durations 10 "$@"
