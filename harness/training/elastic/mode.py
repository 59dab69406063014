"""What ``determinism.elastic`` says of a run: the same bits at any world size.

An update has K logical shards, its micro-batches; a rank computes K / W neighbouring ones. Every shard draws
its random numbers from generators that are seeded by (seed, shard, step), so a rank draws nothing of its own,
and gradients and losses are added in one fixed tree. A run that is not elastic imports this module of the
package only.
"""

from __future__ import annotations

import torch

from harness.settings import Settings

SHAPE = "binary, neighbours first"
"""The tree, in the words of the statement."""
REHEARSAL = "elastic_rehearsal"
"""The statement's name for the digest of the gradients of shards 0 and 1 at the first weights."""
_THREADS = 1


def pin_threads(settings: Settings) -> list[str]:
    """Give torch's operators one thread in an elastic run; returns what was changed, in words.

    Launchers give ranks other numbers of threads than a bare process has, and sums are cut by threads.
    """
    before = torch.get_num_threads()
    if not settings.determinism.elastic or before == _THREADS:
        return []
    torch.set_num_threads(_THREADS)
    return [f"threads = {_THREADS} (was {before})"]


def recorded(settings: Settings) -> dict[str, str | int]:
    """What the statement's ``determinism.settings`` say of it; nothing when the run is not elastic."""
    if not settings.determinism.elastic:
        return {}
    return {"elastic_shards": settings.micro_batches, "elastic_tree": SHAPE}


def in_words(settings: Settings) -> str:
    """At which world sizes the bits are the same."""
    count = settings.micro_batches
    sizes = [str(1 << power) for power in range(count.bit_length())]
    return f"{count} shards added in a fixed tree: the same bits on {', '.join(sizes)} ranks"
