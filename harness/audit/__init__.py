"""Views and verdicts on folders that a run has left: signed files in, findings and words out. No torch.

Each package uses only those before it:

- `run`: what a run holds beside its checkpoints: log, timestamps, hand-overs, metrics, config and policy
- `folders`: one signed folder (a checkpoint, an export, a corpus), examined; begin at `folders.opening`
- `replay`: which steps a replay executes again, what it came to, and the noise floor that it is held against
- `tiers`: which tier of repeatability the evidence supports
- `verification`: everything, checked and told; begin at `verification.verify`
- `diff`, `lineage`, `exports`: runs compared, the graph of what came from what, folders for other tools

Beside them `attest` adds a statement, `permission` asks a policy before that, `show` tells what made a
checkpoint, `kernels` reads the ledger and `rerun` says how to make a checkpoint again. What is signed, and
the rules, are in `harness.provenance`: bytes in, findings out. Here files are opened.
"""
