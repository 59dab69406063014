#!/usr/bin/env bash
# Runs a command that has to fail: scripts/must_fail.sh EXIT_CODE COMMAND…
# Succeeds when the command leaves with exactly that code.
set -uo pipefail
expected=$1 && shift
"$@"
code=$?
if [ "$code" -ne "$expected" ]; then
    echo "must_fail: expected exit code $expected, got $code: $*" >&2
    exit 1
fi
echo "as it must, this failed (exit code $code): $*"
