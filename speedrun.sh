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
harness doctor configs/speedrun.yaml run.dir=runs/speedrun/run signing.key=runs/speedrun/author.key

# 3. Train on the GPUs, or as two CPU processes. SIGKILL hits at step 130; the same command resumes.
gpus=$(python -c 'import torch; print(next((n for n in (8, 4, 2, 1) if n <= torch.cuda.device_count()), 0))')
launch=(torchrun --nproc-per-node "$((gpus > 0 ? gpus : 2))" -m harness train configs/speedrun.yaml)
train=("${launch[@]}" signing.key=runs/speedrun/author.key)
python scripts/kill_at_step.py runs/speedrun/run --step 130 -- "${train[@]}" run.dir=runs/speedrun/run
"${train[@]}" run.dir=runs/speedrun/run

# 4. A twin that nobody interrupts: every tensor of every later checkpoint has the same bits.
"${train[@]}" run.dir=runs/speedrun/twin
harness diff runs/speedrun/run runs/speedrun/twin

# 5. The auditor has no torch, and the run verifies.
scripts/must_fail.sh 1 .venv-audit/bin/python -c 'import torch'
keys=(--key runs/speedrun/author.ed25519.pub runs/speedrun/author.p256.pub)
.venv-audit/bin/harness verify runs/speedrun/run "${keys[@]}"

# 6. One bit of a copy is flipped: caught and located.
cp -r runs/speedrun/run runs/speedrun/forged
python scripts/flip_byte.py runs/speedrun/forged/checkpoints/step-00000300/model.safetensors
scripts/must_fail.sh 1 .venv-audit/bin/harness verify runs/speedrun/forged "${keys[@]}"

# 7. What came out, with the loss curve as a picture.
harness report runs/speedrun/run --out runs/speedrun/report "${keys[@]}"
