"""The same bits at any world size. Begin at `mode`, which says what the option means.

Gradients and losses are added in one fixed tree: `tree_sums` adds up whole gradients, `sharded_sums` those of
FSDP2, `tree_norm` their norm; `whole_lanes` is an optimizer that gives an element the same bits wherever it
lies; `boundaries` add up in every run what FSDP2 adds up. What would break the bits is looked for before the
first step by `rehearsal`, with what a model must not be (`unfit`), and by `loaders` at it.
"""
