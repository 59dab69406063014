"""Saving and restoring everything that a step depends on, without pickle. Needs no trainer.

- saving, from `state` (what is saved) and `rng` on: `snapshot` copies off the device into `memory`, `shards`
  and `mesh` say which rank writes what, `writer` writes it to `disk` behind the loop, `publisher` makes of
  files a checkpoint, `keeping` says which stay, `stamper` gets timestamps, `mirror` copies to a store
- restoring: `candidates` finds the newest that verifies, `restore` reads it
- `average` merges checkpoints; `cut` tells what is cut among ranks
"""
