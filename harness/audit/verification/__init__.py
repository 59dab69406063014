"""`harness verify` and `harness gate`. Begin at `verify`, which calls the rest in the order of the checks.

`many` examines checkpoints in several processes, `incremental` skips what a kept head covers, `model_only` is
what P-256 keys alone can tell, `ancestors` reads the runs that a run began with. What a verification found is
`verify.Report`: `text` tells it to a person, `report_schema` describes its JSON. `gate` verifies whatever
could be loaded as a model below some folders.
"""
