"""Several runs of one config: its `members` are entered into the `register` by a `plan`, before their
`processes` run."""
