"""The same bits at any world size. Begin at `mode`, which says what the option means.

Gradients and losses are added in one fixed tree: `tree_sums` adds up whole gradients, `sharded_sums` those of
FSDP2, `tree_norm` their norm; `whole_lanes` is an optimizer that gives an element the same bits wherever it
lies. What would break it is looked for by `rehearsal` before the first step, and by `loaders` at it.
"""
