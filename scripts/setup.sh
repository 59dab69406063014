#!/usr/bin/env bash
# Makes .venv: everything that trains, audits and tests, at the versions of requirements.lock.
# `scripts/setup.sh audit` makes .venv-audit instead: what an auditor installs, without torch.
# Needs a Python 3.11 to 3.14 (or uv) and a package index. Run again, it does nothing until something changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

half=${1:-train}
case $half in
    train) folder=.venv ;;
    audit) folder=.venv-audit ;;
    *) echo "usage: scripts/setup.sh [audit]" >&2 && exit 2 ;;
esac

say() { echo "setup: $*"; }

find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
        # A name on PATH may be a shim for a version that is not there, so it has to run.
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2> /dev/null; then
            echo "$name" && return
        fi
    done
    say "no Python 3.11 to 3.14 on PATH; install one, or uv (https://docs.astral.sh/uv), which brings its own" >&2
    return 1
}

make_folder() {
    if command -v uv > /dev/null; then
        uv venv --quiet --clear --python '>=3.11,<3.15' "$folder"
        return
    fi
    local python
    python=$(find_python)
    if ! "$python" -m venv --clear "$folder"; then
        say "$python cannot make a virtual environment; install its venv package, or uv" >&2
        return 3
    fi
}

install() {
    if command -v uv > /dev/null; then
        uv pip install --quiet --python "$folder/bin/python" "$@"
    else
        "$folder/bin/python" -m pip install --quiet --quiet --disable-pip-version-check "$@"
    fi
}

# Without an NVIDIA GPU the registry's default torch on Linux brings gigabytes of CUDA that nothing uses.
torch_build() {
    local index=https://download.pytorch.org/whl/cpu
    if [ "$(uname -s)" != Linux ] || [ -e /dev/nvidiactl ] || command -v nvidia-smi > /dev/null; then
        return
    fi
    if ! "$folder/bin/python" -c "import urllib.request as u; u.urlopen('$index/torch/', timeout=5)" 2> /dev/null; then
        return
    fi
    if command -v uv > /dev/null; then echo "--torch-backend cpu"; else echo "--extra-index-url $index"; fi
}

# What the folder was made from. The audit half is a copy of the package, so its sources count.
digest() {
    "$folder/bin/python" - "$half" << 'PYTHON'
import hashlib, pathlib, sys
paths = [pathlib.Path(name) for name in ("requirements.lock", "pyproject.toml")]
paths += sorted(pathlib.Path("harness").rglob("*.py")) if sys.argv[1] == "audit" else []
whole = hashlib.sha256(f"{sys.version}{pathlib.Path.cwd()}".encode())
for path in paths:
    whole.update(f"{path}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
print(whole.hexdigest())
PYTHON
}

if ! "$folder/bin/python" -c '' 2> /dev/null; then
    say "making $folder"
    make_folder
fi
if [ "$(cat "$folder/.stamp" 2> /dev/null)" = "$(digest)" ]; then
    say "$folder is as requirements.lock says"
    exit 0
fi
if ! command -v uv > /dev/null && ! "$folder/bin/python" -m pip --version > /dev/null 2>&1; then
    "$folder/bin/python" -m ensurepip > /dev/null
fi
if [ "$half" = train ]; then
    say "installing requirements.lock into $folder (some minutes the first time)"
    # shellcheck disable=SC2046  # no option or two words
    install $(torch_build) --requirement requirements.lock
    install --no-deps --editable .
    say "$folder has torch $("$folder/bin/python" -c 'import torch; print(torch.__version__)')"
else
    say "installing the auditing half into $folder"
    make_folder # light, and an installed copy of older sources would stay otherwise
    install --constraint requirements.lock .
fi
digest > "$folder/.stamp"
