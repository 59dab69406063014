"""The log of a run, and what others know of it. Begin at `log`, whose hashes and records lie in `tiles`.

`merkle` has the proofs. A log can be replaced as a whole by whoever has its key, so its heads are kept
elsewhere (`heads`), cosigned (`witness`) and timestamped: `timestamp` checks, of which `cms` is the signed
message, `timestamp_client` asks, and `authorities` says whose certificates count.
"""
