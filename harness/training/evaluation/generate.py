"""Answers of a language model, token by token: the likeliest, or drawn with a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Decoding:
    """How an answer is made. What decides its tokens besides weights and prompt."""

    new_tokens: int = 64
    """At most so many tokens, the end of document included."""
    temperature: float = 0.0
    """0 takes the likeliest token (the first of equals); else tokens are drawn from softmax(logits / it)."""
    seed: int = 0
    """Of the draws; the example's number is added, so an answer does not depend on the ones before."""

    @property
    def facts(self) -> dict[str, str | int]:
        """For the statement."""
        common: dict[str, str | int] = {"new_tokens": self.new_tokens, "stop": "end of document"}
        if not self.temperature:
            return {"method": "greedy", **common}
        return {"method": "sampled", **common, "temperature": repr(self.temperature), "seed": self.seed}


def answer(
    model: nn.Module,
    prompt: Tensor,
    decoding: Decoding,
    *,
    end: int,
    context: int,
    number: int,
    enough: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[int]:
    """The tokens that follow ``prompt`` (time,), up to and with ``end``; fewer than ``context`` in all.

    ``number``: of the example; ``enough`` says when to stop besides. The whole text is computed anew for each
    token: no cache, no other rounding.
    """
    generator = torch.Generator().manual_seed(decoding.seed + number)
    tokens = prompt[None]
    made: list[int] = []
    while len(made) < decoding.new_tokens and tokens.shape[1] <= context:
        logits = model(tokens)[0, -1].double().cpu()
        if decoding.temperature:
            chances = torch.softmax(logits / decoding.temperature, dim=0)
            token = int(torch.multinomial(chances, 1, generator=generator))
        else:
            token = int(logits.argmax())
        made.append(token)
        if token == end or enough(made):
            break
        tokens = torch.cat((tokens, torch.tensor([[token]], device=tokens.device)), dim=1)
    return made
