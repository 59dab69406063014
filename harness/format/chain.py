"""The chain of step digests in metrics.jsonl: what each optimizer step consumed and produced.

Each step hashes the previous head and the facts of that step, in fixed-width little-endian fields::

    head' = SHA-256( head (32 bytes) | step uint64 | batch digest (16 bytes) | rng digest (16 bytes)
                     | loss float32 | gradient norm float32 )

A step without a finite gradient norm (a loss scaler skipped it) counts as 0. The floats are the raw bits of
the numbers in the line, so an auditor recomputes every head from metrics.jsonl alone and compares the last
with the one in the signed statement. Changing, dropping or reordering a line changes every later head.
"""

from __future__ import annotations

import hashlib
import struct

GENESIS = bytes(32)
"""The head before the first step."""

_RECORD = struct.Struct("<32sQ16s16sff")


def advance(head: bytes, *, step: int, batch: bytes, rng: bytes, loss: float, grad_norm: float) -> bytes:
    """The head after ``step``; digests are 16 bytes, ``loss`` and ``grad_norm`` exact float32 values."""
    return hashlib.sha256(_RECORD.pack(head, step, batch, rng, loss, grad_norm)).digest()
