"""Object stores, as a place for runs: the `client`, what its names tell of a run's `contents`, and `fetch`,
which brings a run from there. All but the payload is `staged` first, `metrics` joined from their parts, and
`judged` by the policy of whoever fetches, if there is one.
"""
