"""The settings of a run: what may be written in a config file, with its meaning, unit and default.

One frozen model a section; the docstring under each field is its documentation, from which
``configs/README.md`` and ``harness config --schema`` are made. Reading files is `harness.config`'s work.

Each field says what a change of it means for a run that is already on disk:

- ``another-run`` (the default): the numbers of the run would change; a resume is refused.
- ``same-data``: the same samples in the same order, another reduction order.
- ``operational``: where things go and what is recorded; no bit of the run depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from harness import store_url, timestamp_url

Effect = Literal["operational", "same-data", "another-run"]

OPERATIONAL: dict[str, Any] = {"resume": "operational"}
SAME_DATA: dict[str, Any] = {"resume": "same-data"}


def _one_line(text: Any) -> Any:
    """Text that can be printed on a line; names and paths go into statements, screens and error lines."""
    if isinstance(text, str) and not text:
        raise ValueError("must not be empty")
    if isinstance(text, str) and not text.isprintable():
        raise ValueError("must be one line of printable characters")
    return text


def _written_path(value: Any) -> Any:
    """A path as written; `harness.config` has expanded a leading `~/`, nothing else is."""
    if not isinstance(value, (str, Path)):
        raise PydanticCustomError("path_type", "must be a path")
    text = str(_one_line(value if isinstance(value, str) else str(value)))
    if text.startswith("~") or "$" in text:
        raise ValueError("~ and $ are not expanded, but for a leading ~/; write the path itself")
    return value


def _keywords(options: dict[str, JsonValue]) -> dict[str, JsonValue]:
    for name in options:
        if not name.isidentifier():
            raise ValueError(f"option {name!r} is no name of an argument")
    return options


Positive = Annotated[StrictInt, Field(gt=0)]
Natural = Annotated[StrictInt, Field(ge=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Word = Annotated[StrictStr, AfterValidator(_one_line)]
WrittenPath = Annotated[Path, BeforeValidator(_written_path)]
WrittenPattern = Annotated[StrictStr, BeforeValidator(_written_path)]
Options = Annotated[dict[str, JsonValue], AfterValidator(_keywords)]


LANGUAGE_SECTIONS = ("model", "data", "tokenizer")
"""Sections that only the language task reads."""
ROLES = ("system", "user", "assistant")
"""Who may speak in a chat."""
WHEEL = "wheel"
"""The `data.kind` of installed packages' sources."""
PREPARED = "prepared"
"""`data.kind` of a folder that `harness prepare` made."""
CHATS = "chats"
"""`source.kind` of JSON lines that hold chats; a run reads them prepared."""


def require_read(section: str, kind: str, files: Sequence[str]) -> None:
    """Raise a disagreement for ``files`` of a ``kind`` that reads none: it would train on something else."""
    if kind == WHEEL and files:
        text = f"{section}.kind {WHEEL} reads no {section}.files, but {section}.packages; set {section}.kind"
        raise disagreement(f"{section}.files", text)


def disagreement(key: str, text: str) -> PydanticCustomError:
    """Values that do not fit together; the error points at ``key``."""
    return PydanticCustomError("disagreement", "{text}", {"text": text, "key": key})


class Section(BaseModel):
    """A frozen part of the config: unknown keys are errors, every field is documented."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Run(Section):
    """Which run this is."""

    dir: WrittenPath = Field(json_schema_extra=OPERATIONAL)
    """Folder of the run, relative to the working directory. Started when it holds no checkpoint,
    continued when it does."""
    name: Word | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """Name in statements, policies and trackers; the folder's name when null."""
    seed: Natural = 0
    """Seed of everything random: initial weights, data order, dropout."""
    host: StrictBool = Field(default=False, json_schema_extra=OPERATIONAL)
    """Whether statements name the host of rank 0; nothing in the run folder names a host otherwise."""


class Task(Section):
    """What is learned. A task brings the model, the samples, the loss and the evaluation."""

    kind: Word = "language"
    """`language`, `digits`, or the import path of a user's own task, `package.module:Class`."""
    options: Options = Field(default_factory=dict)
    """Keyword arguments of the task's class; `language` and `digits` list theirs in docs/tasks.md."""


class Model(Section):
    """The decoder of the language task (RoPE, RMSNorm, QK norm, SDPA)."""

    layers: Positive = 6
    """Number of blocks."""
    width: Positive = 384
    """Size of the residual stream; a multiple of twice the number of heads."""
    heads: Positive = 6
    """Query heads."""
    kv_heads: Positive | None = None
    """Key and value heads (grouped-query attention); as many as `heads` when null."""
    mlp: Literal["swiglu", "relu2"] = "swiglu"
    """Feed-forward kind: SwiGLU (arXiv 2002.05202) or squared ReLU (arXiv 2109.08668)."""
    dropout: Fraction = 0.0
    """Dropout probability after attention and feed-forward."""
    tie_embeddings: StrictBool = True
    """Whether the output projection shares the token embedding's weight."""
    rope_base: Annotated[Number, Field(gt=0)] = 10_000.0
    """Base of the rotary angles (arXiv 2104.09864)."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Model:
        if self.width % (2 * self.heads):
            raise disagreement(
                "model.width", f"model.width {self.width} is not a multiple of 2 x heads = {2 * self.heads}"
            )
        if self.heads % (self.kv_heads or self.heads):
            text = f"model.kv_heads {self.kv_heads} does not divide model.heads {self.heads}"
            raise disagreement("model.kv_heads", text)
        return self


class Data(Section):
    """Where the documents come from."""

    kind: Word = WHEEL
    """`wheel` (the .py files of installed packages, checked against the wheel's RECORD), `text`, `jsonl`,
    `parquet`, `prepared` (a folder that `harness prepare` made), `tokens` (token shards), or the import
    path of a user's own corpus."""
    packages: list[Word] = Field(default_factory=lambda: ["torch"])
    """For `wheel`: names of the installed distributions."""
    files: list[WrittenPattern] = Field(default_factory=list)
    """For the file kinds: paths or glob patterns, relative to the config file; sorted, never empty. For
    `prepared`: the one folder."""
    field: Word = "text"
    """For `jsonl` and `parquet`: the field that holds the document's text."""
    sequence_length: Positive = 256
    """Tokens of a sample."""
    validation: Fraction = 0.05
    """Share of the documents held out; a document is held out by the digest of its name and bytes."""
    limit_bytes: Positive | None = None
    """Use only this many bytes of documents, in order; all of them when null."""
    cache: WrittenPath | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """Folder of token caches, relative to the config file; `$XDG_CACHE_HOME/harness` or `~/.cache/harness`
    when null."""

    @model_validator(mode="after")
    def _files_are_read(self) -> Data:
        require_read("data", self.kind, self.files)
        return self


class Tokenizer(Section):
    """How text becomes tokens."""

    kind: Literal["bytes", "bpe"] = "bytes"
    """`bytes` (256 values and an end of document) or `bpe` (Hugging Face tokenizers)."""
    file: WrittenPath | None = None
    """For `bpe`: a tokenizer.json, relative to the config file; when null, one is trained on the training
    documents."""
    vocabulary: Positive = 4096
    """For a trained `bpe`: number of tokens."""


class Start(Section):
    """Another run's checkpoint whose weights a new run begins with; everything else begins afresh."""

    checkpoint: WrittenPath
    """The checkpoint's folder, relative to the working directory. It is verified before anything of it is
    used, and signed into every statement of this run; a resume no longer needs it."""
    key: list[WrittenPath] = Field(default_factory=list, json_schema_extra=OPERATIONAL)
    """Public keys of who may have signed it, relative to the working directory; this run's own key when
    neither they nor a policy are named."""
    policy: WrittenPath | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """A policy file instead of keys, relative to the working directory."""

    @model_validator(mode="after")
    def _one_kind_of_trust(self) -> Start:
        if self.key and self.policy is not None:
            raise disagreement("start.policy", "start.policy and start.key are both set; choose one")
        return self


class Optimizer(Section):
    """Fused AdamW (arXiv 1711.05101)."""

    lr: Annotated[Number, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    eps: Annotated[Number, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.1
    """Decoupled weight decay on tensors of two or more dimensions."""
    clip: Annotated[Number, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; no clipping when null."""
    ema: Fraction = 0.0
    """Decay of an exponential moving average of the weights; 0 keeps none."""


class Schedule(Section):
    """The learning rate as a pure function of the step."""

    kind: Literal["constant", "cosine", "wsd"] = "cosine"
    """After the warm-up: constant, a half cosine, or stable then linear decay (WSD, arXiv 2404.06395)."""
    warmup: Natural = 0
    """Steps of linear warm-up."""
    decay: Fraction = 0.2
    """For `wsd`: share of the steps spent decaying."""
    final: Annotated[Number, Field(ge=0, le=1)] = 0.1
    """Last learning rate as a share of `optimizer.lr`."""


class Train(Section):
    """How long, and in which pieces."""

    steps: Positive
    """Optimizer steps of the whole run."""
    global_batch: Positive
    """Samples of an optimizer step over all ranks."""
    micro_batch: Positive = Field(json_schema_extra=SAME_DATA)
    """Samples of one forward pass on one rank. Accumulation is derived: global / (micro x world size)."""
    world_size: Positive | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """Processes that must really run; a different number is an error. Not checked when null."""
    activation_checkpointing: StrictBool = Field(default=False, json_schema_extra=SAME_DATA)
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    data_workers: Natural = Field(default=0, json_schema_extra=OPERATIONAL)
    """Loader processes of each rank; 0 loads in the training process."""
    peer_timeout: Positive = Field(default=60, json_schema_extra=OPERATIONAL)
    """Seconds without a sign of life after which a rank counts as lost; the others then leave with 75."""
    log_every: Positive = Field(default=10, json_schema_extra=OPERATIONAL)
    """Steps between two progress lines in a log, at most one a second; metrics.jsonl has every step."""


class BestCheckpoints(Section):
    """Checkpoints with the best values of a metric."""

    metric: Word = Field(json_schema_extra=OPERATIONAL)
    """Name of an evaluation score, or `train_loss`."""
    mode: Literal["min", "max"] = Field(default="min", json_schema_extra=OPERATIONAL)
    """Which values are good."""
    count: Positive = Field(default=1, json_schema_extra=OPERATIONAL)
    """How many stay."""


class Keep(Section):
    """Which checkpoints keep their tensors; one that any key wants stays."""

    newest: Positive = Field(default=1, json_schema_extra=OPERATIONAL)
    """Number of newest ones."""
    every: Natural = Field(default=0, json_schema_extra=OPERATIONAL)
    """Those whose step is a multiple of this; 0 for none."""
    best: BestCheckpoints | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """Those with the best values of a metric."""
    pinned: list[Positive] = Field(default_factory=list, json_schema_extra=OPERATIONAL)
    """Steps that always stay."""


def _keep_rule(value: Any) -> Any:
    """A mapping as `Keep`, its faults in one line."""
    if not isinstance(value, dict):
        return value
    try:
        return Keep.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = BestCheckpoints if key.startswith("best.") else Keep
            text = f"has the unknown rule {key!r}; choose from {', '.join(known.model_fields)}"
            raise ValueError(text) from error
        raise ValueError(f"has a {key} that does not fit: {first['msg']}") from error


KeepRule = Annotated[Literal["all"] | Positive | Keep, BeforeValidator(_keep_rule)]


def _store_url(value: Any) -> Any:
    if isinstance(value, str) and store_url.parse(value) is None:
        raise ValueError(f"must be {store_url.FORM}")
    return value


def _timestamp_url(value: Any) -> Any:
    if isinstance(value, str) and not timestamp_url.is_valid(value):
        raise ValueError(f"must be {timestamp_url.FORM}")
    return value


TimestampUrl = Annotated[StrictStr, BeforeValidator(_timestamp_url)]
StoreUrl = Annotated[StrictStr, BeforeValidator(_store_url)]


class Checkpoint(Section):
    """When a checkpoint is written and which are kept."""

    every: Positive = Field(default=100, json_schema_extra=OPERATIONAL)
    """Steps between checkpoints; the last step and an interruption are always saved."""
    keep: KeepRule = Field(default="all", json_schema_extra=OPERATIONAL)
    """Which checkpoints keep their tensors: `all`, the number of newest ones, or several rules of which one
    is enough: `newest: 2` (1 when absent), `every: 1000` (steps that are multiples), `best: {metric:
    bits_per_byte, mode: min, count: 3}` (an evaluation score, or `train_loss`; mode `min` and count 1 when
    absent), `pinned: [500]` (steps). The statements of the others stay."""
    on_failure: Literal["stop", "continue"] = Field(default="stop", json_schema_extra=OPERATIONAL)
    """When a checkpoint cannot be written: `stop` the run, or `continue` to the next one, with a warning. The
    last checkpoint of a launch must be written either way."""
    deadline: Positive | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """Seconds after a stop signal at which a checkpoint that is still being written is given up, so that the
    process leaves in order before the scheduler kills it; no limit when null."""
    store: StoreUrl | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """`s3://BUCKET/PREFIX` (S3-compatible; the rest comes from the AWS_* environment variables): the run is
    kept there too, and a launch fetches from there what `run.dir` lacks. One prefix holds one run."""
    store_only: StrictBool = Field(default=False, json_schema_extra=OPERATIONAL)
    """Whether the tensors go only to `checkpoint.store`; `run.dir` keeps statements, log and metrics."""
    store_timeout: Positive = Field(default=180, json_schema_extra=OPERATIONAL)
    """Seconds for which a failing request to the store is tried again."""
    file_bytes: Positive = Field(default=512 << 20, json_schema_extra=OPERATIONAL)
    """Weights and optimizer state are split into files of about this many bytes (a larger tensor has a file
    of its own), and further so that each rank writes some, as long as that gives each 1/16 of it."""


class Evaluate(Section):
    """Evaluation on the held-out split."""

    every: Natural = Field(default=0, json_schema_extra=OPERATIONAL)
    """Steps between evaluations; 0 evaluates only at the end."""
    batches: Positive = Field(default=8, json_schema_extra=OPERATIONAL)
    """Micro-batches of an evaluation over all ranks, always the same ones."""


class Determinism(Section):
    """What is watched, and what is made deterministic."""

    mode: Literal["off", "warn", "strict"] = Field(default="warn", json_schema_extra=SAME_DATA)
    """`off` watches nothing; `warn` keeps the ledger and changes no bit; `strict` also asks torch for
    deterministic algorithms and stops at an op that has none."""
    census_every: Positive = Field(default=50, json_schema_extra=OPERATIONAL)
    """Steps between operator censuses; the first step of a launch always takes one."""
    budget: Fraction = Field(default=0.01, json_schema_extra=OPERATIONAL)
    """Share of the time of a launch that looking may cost, step digests included: as often as these leave
    room for it, micro-steps are executed twice and censuses taken; one of each comes in any case. 0 executes
    nothing twice, and takes each census."""
    step_digests: StrictBool = Field(default=True, json_schema_extra=OPERATIONAL)
    """Digest each batch and the RNG state, and chain them with loss, gradient norm and the digests below in
    metrics.jsonl."""
    gradients_every: Natural = Field(default=1, json_schema_extra=OPERATIONAL)
    """Steps between two digests of the gradients, as the optimizer gets them; 0 takes none."""
    state_every: Natural = Field(default=20, json_schema_extra=OPERATIONAL)
    """Steps between two digests of parameters, buffers and optimizer state; checkpoints always have one."""
    elastic: StrictBool = Field(default=False, json_schema_extra=SAME_DATA)
    """The same bits at any world size: random numbers follow the micro-batches of an update, not the ranks,
    and gradients are added in one fixed tree over them. Their number, `train.global_batch` over
    `train.micro_batch`, must be a power of two that the world size divides. Operators get one thread."""
    shards: Positive | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """Micro-batches of an update that `elastic` must find; it stops when they are others. Empty: any."""


class Signing(Section):
    """Who signs."""

    key: WrittenPath | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """The `NAME.key` file that `harness keys new` wrote, an OpenSSH private key, an OpenSSH `.pub` file whose
    private key ssh-agent holds, or a file with `pkcs11:` URIs of keys in a token, relative to the working
    directory; when null, $HARNESS_SIGNING_KEY, else the key of the user's config folder, made at first
    use."""
    policy: WrittenPath | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """The policy file (docs/verify.md) under which the run is made, relative to the working directory. It
    must admit what this run signs, and require nothing that the run leaves out. Statements name it by digest;
    a resume under another one is refused unless `--accept policy` is given. Null: none."""
    timestamp: TimestampUrl | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """URL of a time-stamping authority (RFC 3161), asked after each checkpoint for a timestamp of the log's
    head, beside the training. A head without an answer is said; the timestamp of the next one covers its
    records too. Null asks nobody."""
    timestamp_timeout: Positive = Field(default=10, json_schema_extra=OPERATIONAL)
    """Seconds that an answer of `signing.timestamp` may take, and that the end of a run waits for it."""


class Track(Section):
    """Where metrics go besides metrics.jsonl."""

    wandb: Literal["off", "offline", "online"] = Field(default="off", json_schema_extra=OPERATIONAL)
    """Weights & Biases; imported only when on, never a prompt."""
    project: Word = Field(default="harness", json_schema_extra=OPERATIONAL)
    """Project name for wandb."""
    trackers: list[Word] = Field(default_factory=list, json_schema_extra=OPERATIONAL)
    """Import paths of further trackers, `package.module:Class`."""


class Settings(Section):
    """A whole run."""

    run: Run
    task: Task = Task()
    model: Model | None = None
    """The language task fills in the defaults; other tasks have none."""
    data: Data | None = None
    """The language task fills in the defaults; other tasks have none."""
    tokenizer: Tokenizer | None = None
    """The language task fills in the defaults; other tasks and a prepared corpus have none."""
    start: Start | None = None
    """Null begins with random weights."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    determinism: Determinism = Determinism()
    signing: Signing = Signing()
    track: Track = Track()
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Arithmetic of the forward and backward pass; weights and optimizer state stay fp32."""
    parallel: Literal["ddp", "fsdp2"] = Field(default="ddp", json_schema_extra=SAME_DATA)
    """How ranks share the work: `ddp` keeps the whole model on each, `fsdp2` a shard of every tensor
    (PyTorch's fully_shard; modules of the classes in the model's `_no_split_modules` are gathered one at a
    time)."""
    compile: StrictBool = Field(default=False, json_schema_extra=SAME_DATA)
    """Whether the model goes through torch.compile; a CPU needs a C++ compiler and Python's headers."""

    @model_validator(mode="before")
    @classmethod
    def _fill_language(cls, values: Any) -> Any:
        """The language task needs all three sections; absent ones take their defaults."""
        if not isinstance(values, dict):
            return values
        task = values.get("task") or {}
        kind = task.get("kind", "language") if isinstance(task, dict) else getattr(task, "kind", "language")
        if kind != "language":
            return values
        data = values.get("data") or {}
        prepared = (data.get("kind") if isinstance(data, dict) else getattr(data, "kind", None)) == PREPARED
        wanted = [name for name in LANGUAGE_SECTIONS if not (prepared and name == "tokenizer")]
        return {**values, **{name: {} for name in wanted if values.get(name) is None}}

    @model_validator(mode="after")
    def _agrees(self) -> Settings:
        train, schedule = self.train, self.schedule
        if self.run_name in ("", ".."):
            raise disagreement("run.dir", f"run.dir {self.run.dir} gives the run no name; set run.name")
        for name in LANGUAGE_SECTIONS if self.task.kind != "language" else ():
            if getattr(self, name) is not None:
                text = f"task.kind {self.task.kind} takes no section {name}; it has task.options"
                raise disagreement(name, text)
        if self.data is not None and self.data.kind == PREPARED and self.tokenizer is not None:
            text = "a prepared corpus brings its tokenizer; remove the section tokenizer"
            raise disagreement("tokenizer", text)
        if train.global_batch % train.micro_batch:
            text = f"{train.global_batch} is not a multiple of train.micro_batch {train.micro_batch}"
            raise disagreement("train.global_batch", f"train.global_batch {text}")
        if (problem := self._elastic_problem()) is not None:
            raise disagreement("determinism.elastic", problem)
        if self.checkpoint.store_only and self.checkpoint.store is None:
            text = "checkpoint.store_only needs a checkpoint.store"
            raise disagreement("checkpoint.store_only", text)
        if schedule.warmup > train.steps:
            text = f"schedule.warmup {schedule.warmup} exceeds train.steps {train.steps}"
            raise disagreement("schedule.warmup", text)
        return self

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an update, of all ranks together: the logical shards of an elastic run."""
        return self.train.global_batch // self.train.micro_batch

    def _elastic_problem(self) -> str | None:
        """Why the micro-batches of an update are no shards that can be added in a tree."""
        asked, found = self.determinism.shards, self.micro_batches
        if not self.determinism.elastic:
            return None if asked is None else "determinism.shards says nothing without determinism.elastic"
        batches = (
            f"train.global_batch {self.train.global_batch} has {found} micro-batches of "
            f"{self.train.micro_batch} samples"
        )
        if found & (found - 1):
            return f"determinism.elastic needs a power of two of micro-batches; {batches}"
        if asked is not None and asked != found:
            return f"determinism.shards is {asked}, and {batches}"
        return None

    @property
    def run_name(self) -> str:
        """The name of the run, or its folder's."""
        return self.run.name or self.run.dir.name


def section_of(name: str, model: type[Section] = Settings) -> type[Section] | None:
    """The model of the section ``name`` of ``model``; None for a key that is no section."""
    field = model.model_fields.get(name)
    kinds = () if field is None else (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def field_of(key: str) -> FieldInfo:
    """The field that ``key`` belongs to: ``train.steps``, ``task.options.width``. Raises `KeyError`."""
    name, *rest = key.split(".")
    section = section_of(name)
    if section is None or not rest:
        return Settings.model_fields[name]
    return section.model_fields[rest[0]]


def effect_of(key: str) -> Effect:
    """What a change of ``key`` means for a run that is already on disk. Raises `KeyError`."""
    extra = field_of(key).json_schema_extra
    named = extra.get("resume") if isinstance(extra, dict) else None
    effects: dict[Any, Effect] = {"operational": "operational", "same-data": "same-data"}
    return effects.get(named, "another-run")
