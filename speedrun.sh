#!/usr/bin/env bash
# From raw files to a chat model and its report, every stage signed. Each line is a command that you may type alone.
# Kill it anywhere and start it again: it goes on where it was. rm -rf runs/speedrun begins anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# 1. Install from the lock file: .venv trains, .venv-audit is what an auditor has, without torch.
scripts/setup.sh
scripts/setup.sh audit
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1

# 2. Preflight: a signing key, and a look at this machine.
run=runs/speedrun && mkdir -p $run
test -e $run/author.p256.pub || { rm -f $run/author.* && harness keys new --out $run/author; }
export HARNESS_SIGNING_KEY=$run/author.key
keys=(--key $run/author.ed25519.pub $run/author.p256.pub)
harness doctor

# 3. Dataset and tokenizer: sources of installed packages, filtered, split, cut into shards.
harness prepare recipes/corpus.yaml out=$run/corpus

# 4. Base model, on the GPUs or as two CPU processes. SIGKILL hits at step 130; the same command resumes.
gpus=$(python -c 'import torch; print(next((n for n in (8, 4, 2, 1) if n <= torch.cuda.device_count()), 0))')
train=(torchrun --nproc-per-node "$((gpus > 0 ? gpus : 2))" -m harness train)
python scripts/kill_at_step.py $run/base --step 130 -- "${train[@]}" configs/speedrun.yaml
"${train[@]}" configs/speedrun.yaml
harness evaluate $run/base --once --folder configs "${keys[@]}"

# 5. A twin that nobody interrupts: every tensor of every later checkpoint has the same bits.
"${train[@]}" configs/speedrun.yaml run.dir=$run/twin
harness diff $run/base $run/twin

# 6. Chats from another package, a child run that starts from the verified base, and the answers of both models.
harness prepare recipes/chats.yaml out=$run/chats tokenizer.file=../$run/corpus/tokenizer.json
"${train[@]}" configs/speedrun-chat.yaml
harness evaluate $run/base $run/chat --chats $run/chats --new-tokens 16 "${keys[@]}"

# 7. The auditor has no torch, and all of it verifies. One bit of a copy is flipped: caught and located.
scripts/must_fail.sh 1 .venv-audit/bin/python -c 'import torch'
for stage in corpus chats base; do .venv-audit/bin/harness verify $run/$stage "${keys[@]}"; done
.venv-audit/bin/harness verify $run/chat --with $run/base "${keys[@]}"
rm -rf $run/forged && cp -r $run/base $run/forged
python scripts/flip_byte.py $run/forged/checkpoints/step-00000300/model.safetensors
scripts/must_fail.sh 1 .venv-audit/bin/harness verify $run/forged "${keys[@]}"

# 8. What came out of it, and what it came from.
harness report $run/base $run/chat --out $run/report --with $run/corpus $run/chats "${keys[@]}"
harness lineage $run/chat --with $run/base $run/corpus $run/chats --format html "${keys[@]}" > $run/lineage.html
