"""What a run does that need not come out the same twice: settings, ledger and step digests.

- `settings` makes a run as deterministic as torch can
- `ledger` collects what was seen, as `rows`: `census` and `graph` look at operators of the `catalogue`,
  `codegen` at generated code, `kernels` at a device's
- `double` executes a micro-step twice in a `sandbox`, and compares two of its `trace` in `ulp`; `origin`
  finds where a value that is not finite comes from, `peers` sees who asks about other ranks
- `digest` and `bit_sums` digest a step; `tree` adds in one order at any world size
"""
