"""Evaluate a verified checkpoint by the answers it gives: the last answer of each held-out chat is generated.

The prompt is what stands before that answer in the prepared corpus, token by token, so it is written with the
corpus' own template and tokenizer. These must be the checkpoint's; a base model, which has no template, is
asked with the corpus'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from harness import config
from harness.audit.folders.opening import OpenedCheckpoint
from harness.data.parts import encoder_of
from harness.data.prepared import open_prepared
from harness.data.rows import Turn, turns
from harness.data.tokenizer import Encoder
from harness.data.tokens import Counted, TokenData
from harness.errors import ConfigError, UsageError
from harness.model.gpt import GPT
from harness.settings import Data, Settings
from harness.tasks.language import shape_of
from harness.tasks.task import spread
from harness.terminal import progress
from harness.training import optimizer
from harness.training.evaluation.examples import Assessment, Suite, autocast_of, machine, with_weights
from harness.training.evaluation.generate import Decoding, answer

PROCEDURE = "last answers of held-out chats, generated"
"""Its name in statements."""


def converse(
    opened: OpenedCheckpoint, folder: Path, examples: int, decoding: Decoding, *, quiet: bool
) -> Assessment:
    """Answers of ``opened`` to at most ``examples`` held-out chats of the prepared corpus ``folder``.

    Raises `UsageError` for another tokenizer or template than the checkpoint's, `ConfigError` when the
    folder holds no chats or a prompt is too long, `VerificationFailed` for a corpus that changed,
    `DamagedCheckpoint` for weights other than those that were signed.
    """
    settings = config.parse(str(opened.statement.predicate["config"]["text"]), "the checkpoint's config")
    tokens = open_prepared(Data(kind="prepared", files=[str(folder.resolve())]), Path("/"))
    counted = _require_same(opened, tokens, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = optimizer.precision(settings.precision, device)
    model, context = decoder_of(settings, tokens.vocabulary)
    with_weights(model.to(device), opened, device)
    found = list(turns(tokens.held_out, counted.held_out, counted.end))
    if not found:
        raise ConfigError("the corpus holds no chat out that ends with an answer", where=str(folder))
    encoder = encoder_of(tokens.tokenizer_file)
    chosen = [found[int(index)] for (index,) in spread(len(found), 1, examples)]
    items = []
    with (
        torch.no_grad(),
        autocast_of(precision, device),
        progress(len(chosen), "answers", "generate", quiet=quiet) as bar,
    ):
        for number, turn in enumerate(chosen):
            if len(turn.prompt) > context:
                raise ConfigError(
                    f"a prompt has {len(turn.prompt)} tokens, the model a context of {context}",
                    where=str(folder),
                )
            prompt = torch.from_numpy(turn.prompt).to(device)
            made = answer(model, prompt, decoding, end=counted.end, context=context, number=number)
            items.append(_item(turn, made, encoder))
            bar.advance(1)
    return Assessment(
        metrics={
            name: sum(each[name] for each in items) / len(items) for name in ("exact_match", "finished")
        },
        items=tuple(items),
        settings={**machine(settings, device), "template_sha256": counted.template_sha256},
        suite=Suite("chats", "held-out", tokens.corpus),
        procedure=PROCEDURE,
        decoding=decoding.facts,
    )


def _item(turn: Turn, made: list[int], encoder: Encoder) -> dict[str, Any]:
    finished = bool(made) and made[-1] == encoder.end
    output = made[:-1] if finished else made
    return {
        "prompt": encoder.decode([each for each in turn.prompt.tolist() if each != encoder.end]),
        "answer": encoder.decode(turn.answer.tolist()),
        "output": encoder.decode(output),
        "exact_match": int(finished and output == turn.answer.tolist()),
        "finished": int(finished),
    }


def decoder_of(settings: Settings, vocabulary: int) -> tuple[GPT, int]:
    """The decoder of ``settings`` and its context. Raises `UsageError` for another task."""
    if settings.model is None or settings.data is None:
        raise UsageError(f"the task {settings.task.kind} generates no text")
    context = settings.data.sequence_length
    return GPT(shape_of(settings.model, context, vocabulary)), context


def _require_same(opened: OpenedCheckpoint, tokens: TokenData, folder: Path) -> Counted:
    if tokens.counted is None:
        raise ConfigError("the corpus has no chats", where=str(folder), remedy="prepare one with format.chat")
    stated = opened.statement.predicate["data"]
    found = {"tokenizer": tokens.tokenizer, "template": tokens.counted.template_sha256}
    for name, digest in found.items():
        signed = stated.get(f"{name}_sha256")
        if digest != signed and not (name == "template" and signed is None):
            raise UsageError(
                f"the {name} of the corpus is {str(digest)[:12]}…, the checkpoint's is {str(signed)[:12]}…",
                where=str(folder),
                remedy=f"prepare the chats with the checkpoint's {name}",
            )
    return tokens.counted
