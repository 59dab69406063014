#!/usr/bin/env bash
# Train on real data, be killed, resume bit for bit, prove it. Each line is a command that you may type alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# 1. Install from the lock file: .venv trains, .venv-audit is what an auditor has, without torch.
scripts/setup.sh
scripts/setup.sh audit
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1

# 2. Everything lands in runs/speedrun, made anew. A signing key, and a look at this machine.
rm -rf runs/speedrun && mkdir -p runs/speedrun
harness keys new --out runs/speedrun/author
harness doctor configs/speedrun.yaml signing.key=runs/speedrun/author.key

# 3. Train on every GPU, or as two CPU processes. SIGKILL hits in the middle; the same command resumes.
processes=$(python -c 'import torch; print(torch.cuda.device_count() or 2)')
train="torchrun --nproc-per-node $processes -m harness train configs/speedrun.yaml signing.key=runs/speedrun/author.key"
python scripts/kill_at_step.py runs/speedrun/run --step 60 -- $train run.dir=runs/speedrun/run
$train run.dir=runs/speedrun/run

# 4. A twin that nobody interrupts: every tensor of every later checkpoint has the same bits.
$train run.dir=runs/speedrun/twin
harness diff runs/speedrun/run runs/speedrun/twin

# 5. The auditor has no torch, and the run verifies.
scripts/must_fail.sh 1 .venv-audit/bin/python -c 'import torch'
audit=".venv-audit/bin/harness verify --key runs/speedrun/author.ed25519.pub --key runs/speedrun/author.p256.pub"
$audit runs/speedrun/run

# 6. One byte of a copy is flipped: caught and located.
cp -r runs/speedrun/run runs/speedrun/forged
python scripts/flip_byte.py "$(ls runs/speedrun/forged/checkpoints/step-*/model.safetensors | tail -1)"
scripts/must_fail.sh 1 $audit runs/speedrun/forged

# 7. What came out, with the loss curve as a picture.
harness report runs/speedrun/run --out runs/speedrun/report
