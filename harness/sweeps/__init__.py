"""Several runs of one config: seeds and variants, planned, run, and written down."""
