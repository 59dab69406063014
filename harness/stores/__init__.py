"""Object stores, as a place for runs: the `client`, what its names tell of a run's `contents`, and
`fetch`, which brings a run from there."""
