"""File formats of the run folder: bytes in, values out, errors that name the place.

- `layout`: the names in a run folder; `files`: writing and reading them; `leftovers` of a process that was
  killed
- of a checkpoint: `manifest`, `safetensors_header`, `tensor_digests`, and `ledger` with its `budget`, with
  what is known of a `nonfinite` value, and united by `ledger_merge`
- of metrics.jsonl: `json_lines`, `metrics_line` and the `chain`
- what these are written in: `strict_json`, `records` read from it, `moments`, `der`; `byte_tokenizer`
"""
