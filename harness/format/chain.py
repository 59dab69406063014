"""The chain of step digests in metrics.jsonl: what each optimizer step consumed and produced.

Each step hashes the previous head and the facts of that step, in fixed-width little-endian fields::

    head' = SHA-256( head (32 bytes) | step uint64 | batch digest (16 bytes) | rng digest (16 bytes)
                     | loss float32 | gradient norm float32
                     | gradient digest (32 bytes) | state digest (32 bytes) )

A step without a finite gradient norm (a loss scaler skipped it) counts as 0, and a digest that was not taken
as 32 zero bytes. The floats are the raw bits of the numbers in the line, so an auditor recomputes every head
from metrics.jsonl alone and compares the last with the one in the signed statement. Changing, dropping or
reordering a line changes every later head.

- gradients: what the optimizer was given, after the reduction over the ranks and after clipping
- state: parameters, buffers, averages and the optimizer's tensors after its step
"""

from __future__ import annotations

import hashlib
import struct

DEFINITION = "step_digests"
"""What a statement's ``determinism.settings`` call the definition of the two last digests."""
GENESIS = bytes(32)
"""The head before the first step."""

_RECORD = struct.Struct("<32sQ16s16sff32s32s")
_NOT_TAKEN = bytes(32)


def advance(
    head: bytes,
    *,
    step: int,
    batch: bytes,
    rng: bytes,
    loss: float,
    grad_norm: float,
    gradients: bytes | None = None,
    state: bytes | None = None,
) -> bytes:
    """The head after ``step``; ``batch`` and ``rng`` are 16 bytes, ``gradients`` and ``state`` 32 or None,
    ``loss`` and ``grad_norm`` exact float32 values."""
    tail = (gradients or _NOT_TAKEN, state or _NOT_TAKEN)
    return hashlib.sha256(_RECORD.pack(head, step, batch, rng, loss, grad_norm, *tail)).digest()
