"""What a run folder holds beside its checkpoints, checked against what is signed.

The log: `log_folder` (nothing there that the head does not account for), `stamps` and `seen` (when something
is shown to have been there), `handover` (who is trusted because a key handed over), `kept_head` (taking the
head away). The run's own files: `own_files` (metrics.jsonl by its `chain`, run.yaml, policy.json) and
`made_under` (the policy that the run names). A job may write there meanwhile: `undisturbed` tells what it
does from faults.
"""
