"""One update on one rank. Begin at `session`, which steps; `building` makes it, with a model that `cutting`
cuts by FSDP2, and `position` puts it where a run begins or goes on.

What is seen of a step: `digests` of gradients and state, their way to the host with loss and norm
(`readback`), and when it is executed twice (`doubling`). When a number is not finite, `post_mortem` finds out
where it came from, with what is `remembered`. A compiled one needs a `compiler`.
"""
