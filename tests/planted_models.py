"""Small models, each with one planted fault: for double execution, and for scripts/bench/planted.py."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

ROWS, WIDTH = 50, 64


class Sound(nn.Module):
    """Embedding, linear, dropout, norm: the same bits every time. Memory that is left empty is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(ROWS, WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(0.1)

    def rows(self, tokens: Tensor) -> Tensor:
        """The rows of the table."""
        return nn.functional.embedding(tokens, self.table)

    def mixed(self, x: Tensor) -> Tensor:
        """What the faults change."""
        room = torch.empty_like(x)
        room[:1].copy_(x[:1])
        return x + room.view(-1)[: x[0].numel()].view_as(x[0])

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time) to (batch, time, WIDTH)."""
        return self.norm(self.drop(self.mixed(self.linear(self.rows(tokens)))))


class Indexing(Sound):
    """The gradient of indexing adds atomically on several threads."""

    def rows(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


@torch.library.custom_op("planted::restless", mutates_args=())
def restless(x: Tensor) -> Tensor:
    """``x`` with the last bit of one element flipped or not, as the operating system's noise has it."""
    made = x.clone()
    noise = int.from_bytes(os.urandom(4), "little")
    made.view(-1).view(torch.int32)[noise % made.numel()] ^= 1
    return made


restless.register_autograd(lambda context, gradient: gradient)
restless.register_fake(torch.empty_like)


class Restless(Sound):
    """An operator that draws from the operating system."""

    def mixed(self, x: Tensor) -> Tensor:
        return restless(super().mixed(x))


class Blank(Sound):
    """Reads memory that nobody has written."""

    def mixed(self, x: Tensor) -> Tensor:
        return super().mixed(x) + 1e-3 * torch.empty_like(x)


@torch.library.custom_op("planted::untagged", mutates_args=())
def untagged(x: Tensor) -> Tensor:
    """``x``, doubled by an operator that no list says anything about."""
    return x * 2


untagged.register_autograd(lambda context, gradient: gradient * 2)
untagged.register_fake(torch.empty_like)


class Untagged(Sound):
    """A custom operator, as deterministic as any."""

    def mixed(self, x: Tensor) -> Tensor:
        return untagged(super().mixed(x))


def micro_step(model: nn.Module) -> Callable[[], Tensor]:
    """Forward and backward pass on fixed tokens."""
    tokens = torch.randint(0, ROWS, (4, 128), generator=torch.Generator().manual_seed(1))
    target = torch.randn(4, 128, WIDTH, generator=torch.Generator().manual_seed(2))

    def execute() -> Tensor:
        loss = nn.functional.mse_loss(model(tokens), target)
        loss.backward()
        return loss.detach()

    return execute
