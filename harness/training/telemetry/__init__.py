"""What a launch says while it runs; nothing here decides a bit of it.

`metrics` is the truth on disk (metrics.jsonl, events/), `screen` what a person sees, `energy` and
`throughput` what a device counts and what share of its peak was used.
"""
