"""EleutherAI's lm-eval through its own interface: our decoder as its `TemplateLM`, its tasks and measures.

Needs ``pip install 'harness[lm-eval]'``. Written against lm-eval 0.4.13 (lm_eval/api/model.py of
github.com/EleutherAI/lm-evaluation-harness). The library decides prompts, few-shot examples, filters and
measures; here are only the log-likelihoods and the text that a verified checkpoint gives. A text longer than
the context loses its beginning, as in lm-eval's own models, and how many did is recorded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import config
from harness.audit.folders import prepared
from harness.audit.folders.opening import OpenedCheckpoint
from harness.data.corpus import files_digest
from harness.data.documents import Document
from harness.data.parts import encoder_of
from harness.data.shards import digest_of
from harness.data.tokenizer import ByteEncoder, Encoder
from harness.errors import ConfigError, EnvironmentFault, UsageError
from harness.training import optimizer
from harness.training.evaluation.answers import decoder_of
from harness.training.evaluation.examples import Assessment, Suite, autocast_of, machine, with_weights
from harness.training.evaluation.generate import Decoding, answer

_SEED = 1234
"""Of lm-eval's generators (its default), for few-shot examples and subsets."""
_KEPT = ("doc_id", "doc_hash", "prompt_hash", "target", "arguments", "resps", "filtered_resps", "filter")
"""What is kept of lm-eval's samples besides their measures."""


def procedure(tasks: Sequence[str]) -> str:
    """Its name in statements."""
    return f"lm-eval: {', '.join(tasks)}"


def suite_digest(folder: Path) -> str:
    """Hex sha256 over every file of ``folder``, which defines tasks and holds their data."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        raise ConfigError("no files", where=str(folder), remedy="name the folder of the tasks' YAML files")
    return files_digest({path.relative_to(folder).as_posix(): digest_of(path) for path in paths})


def run_tasks(
    opened: OpenedCheckpoint, tasks: Sequence[str], folder: Path, limit: int, *, quiet: bool
) -> Assessment:
    """lm-eval's ``tasks``, defined in ``folder``, on at most ``limit`` examples each.

    Raises `EnvironmentFault` without lm-eval, `ConfigError` for a task that it does not know or whose data
    lies elsewhere, `DamagedCheckpoint` for weights other than those that were signed.
    """
    library = _library()
    settings = config.parse(str(opened.statement.predicate["config"]["text"]), "the checkpoint's config")
    encoder = _encoder(opened)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = optimizer.precision(settings.precision, device)
    model, context = decoder_of(settings, encoder.vocabulary)
    with_weights(model.to(device), opened, device)
    digest = suite_digest(folder)
    manager = library.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        known = ", ".join(sorted(manager.all_tasks)) or "none"
        raise ConfigError(f"no task {unknown[0]} there", where=str(folder), remedy=f"there are: {known}")
    asked = _Model(model, encoder, context, device)
    with torch.no_grad(), autocast_of(precision, device):
        results = library.simple_evaluate(
            model=_adapted(asked, quiet),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            random_seed=_SEED,
            numpy_random_seed=_SEED,
            torch_random_seed=_SEED,
            fewshot_random_seed=_SEED,
        )
    for name, told in results["configs"].items():
        _require_inside(folder, name, told)
    if suite_digest(folder) != digest:
        raise ConfigError("changed while it was evaluated", where=str(folder), remedy="start again")
    return Assessment(
        metrics=dict(_metrics(results["results"])),
        items=tuple(_items(results["samples"])),
        settings={
            **machine(settings, device),
            "lm_eval": library.__version__,
            "shots": json.dumps({name: results["n-shot"][name] for name in sorted(results["n-shot"])}),
            "seed": _SEED,
            "truncated": asked.truncated,
        },
        suite=Suite(", ".join(tasks), "lm-eval", digest),
        procedure=procedure(tasks),
        decoding=asked.decoding,
    )


def _library() -> Any:
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise EnvironmentFault("lm-eval is not installed", remedy="pip install 'harness[lm-eval]'") from error
    return lm_eval


def _encoder(opened: OpenedCheckpoint) -> Encoder:
    """The checkpoint's own tokenizer, whose digest is signed."""
    stated = opened.statement.predicate["data"]["tokenizer_sha256"]
    if stated == ByteEncoder.digest:
        return ByteEncoder()
    path = opened.folder / prepared.TOKENIZER
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != stated:
        raise UsageError("the checkpoint has no tokenizer", where=str(opened.folder))
    return encoder_of(content)


def _require_inside(folder: Path, name: str, told: Mapping[str, Any]) -> None:
    """Data that the suite's digest does not cover would be another suite under the same name."""
    files = (told.get("dataset_kwargs") or {}).get("data_files")
    named = files.values() if isinstance(files, dict) else files if isinstance(files, list) else [files]
    paths = [path for each in named for path in (each if isinstance(each, list) else [each])]
    outside = [
        each
        for each in paths
        if not isinstance(each, str) or not Path(each).resolve().is_relative_to(folder.resolve())
    ]
    if told.get("dataset_path") not in ("json", "csv", "text", "parquet") or outside:
        raise ConfigError(
            f"the data of task {name} lies outside of its folder",
            where=str(outside[0] if outside else told.get("dataset_path")),
            remedy=f"use dataset_path: json with data_files under {folder}",
        )


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """lm-eval's ``{task: {"acc,none": value}}`` as ``task acc``; a filter other than none is named."""
    for task, measures in results.items():
        for name, value in measures.items():
            measure, _, kind = name.partition(",")
            if isinstance(value, int | float) and not measure.endswith("_stderr") and kind:
                yield f"{task} {measure}" + ("" if kind == "none" else f" ({kind})"), float(value)


def _items(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    for task, rows in samples.items():
        for row in rows:
            measures = {name: row[name] for name in row.get("metrics", ())}
            kept = {name: row[name] for name in _KEPT if name in row}
            # Through JSON once, so that what is odd in a sample fails here and not when it is read.
            yield dict(json.loads(json.dumps({"task": task, **kept, **measures}, default=str)))


class _Model:
    """What lm-eval asks of a model, in tensors."""

    def __init__(self, model: nn.Module, encoder: Encoder, context: int, device: torch.device) -> None:
        self.encoder, self.context = encoder, context
        self.truncated = 0
        self.decoding: dict[str, str | int | bool | None] = {}
        self._model, self._device = model, device

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``."""
        if not text:
            return []
        tokens: list[int] = self.encoder.encode(Document("lm-eval", text.encode()))[0].tolist()
        return tokens

    def score(self, before: Sequence[int], tokens: Sequence[int]) -> tuple[float, bool]:
        """Log-likelihood of ``tokens`` after ``before``, and whether each is the likeliest."""
        whole = [*before, *tokens]
        if len(tokens) > self.context:
            raise UsageError(f"an answer has {len(tokens)} tokens, the model a context of {self.context}")
        self.truncated += len(whole) > self.context + 1
        window = torch.tensor([whole[-(self.context + 1) :]], device=self._device)
        logits: Tensor = self._model(window[:, :-1])[0, -len(tokens) :].double()
        wanted = window[0, -len(tokens) :]
        chosen = F.log_softmax(logits, dim=-1).gather(1, wanted[:, None])
        return float(chosen.sum()), bool((logits.argmax(dim=-1) == wanted).all())

    def generate(self, text: str, wanted: Mapping[str, Any], number: int) -> str:
        """What follows ``text``, up to one of the texts ``until``; the likeliest tokens."""
        if wanted.get("do_sample") or wanted.get("temperature"):
            raise UsageError("the task draws tokens", remedy="set do_sample: false and temperature: 0 in it")
        until = wanted.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        decoding = Decoding(int(wanted.get("max_gen_toks", 256)))
        self.decoding = {**decoding.facts, "stop": json.dumps(["end of document", *stops])}
        room = max(self.context - decoding.new_tokens, 1)
        tokens = [self.encoder.end, *self.encode(text)]
        self.truncated += len(tokens) > room
        made = answer(
            self._model,
            torch.tensor(tokens[-room:], device=self._device),
            decoding,
            end=self.encoder.end,
            context=self.context,
            number=number,
            enough=lambda tokens: any(stop in self.encoder.decode(tokens) for stop in stops),
        )
        found = self.encoder.decode([each for each in made if each != self.encoder.end])
        return found[: min([len(found), *(found.find(stop) for stop in stops if stop in found)])]


def _adapted(asked: _Model, quiet: bool) -> Any:
    """``asked`` behind lm-eval's interface."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from harness.terminal import progress

    class Adapted(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
        """The decoder of a verified checkpoint."""

        @property
        def eot_token_id(self) -> int:
            return asked.encoder.end

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return asked.encode(string)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            with progress(len(requests), "requests", "lm-eval", quiet=quiet) as bar:
                return [self._scored(bar, before, tokens) for _, before, tokens in requests]

        def _scored(self, bar: Any, before: list[int], tokens: list[int]) -> tuple[float, bool]:
            bar.advance(1)
            return asked.score(before, tokens)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return [self._rolled(request.args[0]) for request in requests]

        def _rolled(self, text: str) -> float:
            windows = get_rolling_token_windows(
                token_list=asked.encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=asked.context,
                context_len=1,
            )
            pairs = map(make_disjoint_window, windows)
            return sum(asked.score(before, tokens)[0] for before, tokens in pairs)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts = [request.args for request in requests]
            return [asked.generate(text, how, number) for number, (text, how) in enumerate(texts)]

    return Adapted()
