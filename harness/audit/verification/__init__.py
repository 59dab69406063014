"""`harness verify` and `harness gate`. Begin at `verify`, which finds out what a folder is.

`whole_run` is a run, in the order of the checks: `many` examines its checkpoints in several processes,
`incremental` skips what a kept head covers, `ancestors` reads the runs that it began with. `one_folder` is a
checkpoint, an export or a corpus by itself, `model_only` what P-256 keys alone can tell of any. What was
found is a `report`: `text` tells it to a person, `report_schema` describes its JSON. `gate` verifies whatever
could be loaded as a model below some folders.
"""
