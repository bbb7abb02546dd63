"""The typed sections that stage configs are made of. Values live in conf/; this file holds types and their meaning.

A field is part of a run's *identity* (data, model, objective, optimisation, seed) unless it is marked
`operational()`: processes, ZeRO stage, memory layout, logging, intervals, a longer run. A resumed run may
change operational fields only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum, StrEnum
from types import NoneType
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING


def operational(default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING) -> Any:
    """A field that a resumed run may change."""
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata={"operational": True})
    return dataclasses.field(default=default, metadata={"operational": True})


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Attention(StrEnum):
    auto = "auto"  # block on a GPU, paths on a CPU
    dense = "dense"  # an additive mask of the whole row; every model can do it
    paths = "paths"  # each path by itself, without a mask
    block = "block"  # flex attention with a block mask; GPU


class Architecture(StrEnum):
    llama = "llama"
    qwen3 = "qwen3"
    gpt2 = "gpt2"


class Decay(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Algorithm(StrEnum):
    adamw = "adamw"
    rmsprop = "rmsprop"  # torch's; betas[1] is its alpha, betas[0] is not used


class OnBadRow(StrEnum):
    error = "error"
    skip = "skip"


class LongPrompt(StrEnum):
    drop = "drop"
    keep_end = "keep_end"
    keep_start = "keep_start"
    error = "error"


class LongResponse(StrEnum):
    cut = "cut"
    drop = "drop"
    error = "error"


class LossOn(StrEnum):
    responses = "responses"
    all = "all"


class Wandb(StrEnum):
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Device(StrEnum):
    auto = "auto"  # cuda where there is one
    cpu = "cpu"
    cuda = "cuda"


class Offload(StrEnum):
    none = "none"
    cpu = "cpu"


class RowKind(StrEnum):
    """What rows are read as."""

    text = "text"
    demonstration = "demonstration"
    ranking = "ranking"
    feedback = "feedback"
    prompt = "prompt"


class Quantise(StrEnum):
    none = "none"
    nf4 = "nf4"  # 4-bit NormalFloat, twice quantised: QLoRA (Dettmers et al. 2023)


class EvaluationKind(StrEnum):
    gold = "gold"  # the lab's judge over answers of several systems
    rm = "rm"  # reward models, and policies as such, over answers whose order is known
    select = "select"  # the epoch of a fine-tuning whose answers a reward model likes best
    winrate = "winrate"  # how often a judge prefers one system's answers to another's
    rank = "rank"  # many systems in one order, by all such verdicts
    frontier = "frontier"  # what checkpoints gain in reward for what they move away from their reference


class Rankings(StrEnum):
    whole = "whole"  # all answers to a prompt are one example
    pairs = "pairs"  # every comparison is an example of its own, shuffled apart from the others


@dataclass(kw_only=True, slots=True)
class ShapeConfig:
    """A causal language model to build from scratch."""

    architecture: Architecture = MISSING
    hidden: int = MISSING
    layers: int = MISSING
    heads: int = MISSING
    kv_heads: int = MISSING  # fewer than heads: grouped-query attention; gpt2 has none, set it to heads
    intermediate: int = MISSING  # width of the feed-forward layer
    vocab_size: int = MISSING
    context: int = MISSING  # positions the model is built for
    tied: bool = True  # input and output embeddings are one matrix
    init_std: float = 0.02


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Exactly one of `path` (an artifact, a Hugging Face folder or a hub id) and `shape` (from scratch)."""

    path: str | None = None
    shape: ShapeConfig | None = None
    dtype: Dtype = Dtype.float32
    dropout: float = 0.0  # every dropout of the model; the recipe trains without
    revision: str | None = None  # of a hub id
    trust_remote_code: bool = False
    attention: Attention = operational(Attention.auto)
    gradient_checkpointing: bool = operational(False)


@dataclass(kw_only=True, slots=True)
class ReadyModelConfig:
    """A model that is used as it is: an artifact, a Hugging Face folder or a hub id."""

    path: str | None = None
    dtype: Dtype | None = None  # null: the one it is stored in
    revision: str | None = None  # of a hub id
    trust_remote_code: bool = False


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021) in place of the whole model's weights."""

    rank: int = 16
    alpha: float = 32.0  # the update is scaled by alpha / rank
    dropout: float = 0.0
    targets: Any = "all-linear"  # names of layers, or every linear layer but the output embedding
    quantise: Quantise = Quantise.none  # of the frozen weights
    merge: bool = True  # hand over one model; false hands over the adapters as well, beside the merged model


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """`path: null` takes the model's tokenizer; `rlhf pretrain` from scratch trains one of model.shape.vocab_size."""

    path: str | None = None
    template: str | None = None  # name under conf/templates or a file; null keeps the tokenizer's own
    train_documents: int = 50_000  # how many documents a new tokenizer is trained on


@dataclass(kw_only=True, slots=True)
class LabConfig:
    """The generated world (docs/lab.md): its seed, and how many rows each lab:<set> has."""

    seed: int = 0
    documents: int = 50_000
    demonstrations: int = 12_000
    rankings: int = 2_000
    prompts: int = 4_000
    heldout_demonstrations: int = 500
    heldout_rankings: int = 400
    heldout_gold_rankings: int = 400  # the same answers, ranked by the judge
    heldout_prompts: int = 500


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where examples come from and how long ones are treated; see docs/data-formats.md."""

    # A file, folder, glob, hub id or lab:<set>, or a list of these; {path, weight, format, split, columns} weighs one.
    train: Any = None
    heldout: Any = None  # the same; null splits heldout_fraction off train, by prompt
    heldout_fraction: float = 0.02
    format: str = "auto"
    columns: Any = None  # {our field: your column}, for rows of no known format
    templates: str | None = None  # name under conf/data_templates or a file: rows become demonstrations by Jinja
    split: str = "train"  # of a hub id
    streaming: bool = False  # of a hub id: write only the first max_examples rows to this disk
    lab: LabConfig = dataclasses.field(default_factory=LabConfig)
    max_examples: int | None = None
    max_length: int = 2048  # tokens of a prompt and its response
    max_prompt_length: int = 1024
    long_prompt: LongPrompt = LongPrompt.drop
    long_response: LongResponse = LongResponse.cut
    on_bad_row: OnBadRow = OnBadRow.error
    loss: LossOn = LossOn.responses
    rankings: Rankings = Rankings.whole
    workers: int | None = operational(None)  # processes that tokenise; null: the processor's cores
    cache_dir: str = operational("${runs}/cache")


@dataclass(kw_only=True, slots=True)
class PromptsConfig:
    """Prompts to answer; see docs/data-formats.md."""

    path: Any = None  # as data.train; - reads lines from standard input
    format: str = "auto"
    columns: Any = None
    split: str = "train"
    lab: LabConfig = dataclasses.field(default_factory=LabConfig)
    max_examples: int | None = None
    max_prompt_length: int = 1024
    long_prompt: LongPrompt = LongPrompt.drop
    on_bad_row: OnBadRow = OnBadRow.error
    cache_dir: str = operational("${runs}/cache")


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How answers are drawn, token by token, in this order: penalty, temperature, top-k, top-p, min-p."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # the k likeliest tokens; 0: all
    top_p: float = 1.0  # the likeliest tokens that have this probability together (Holtzman et al. 2020)
    min_p: float = 0.0  # tokens at least this likely relative to the likeliest (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # divides the logits of tokens already there (Keskar et al. 2019)
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    samples: int = 1  # a prompt
    batch_tokens: int = operational(32_768)  # rows times their longest possible length, in one batch


@dataclass(kw_only=True, slots=True)
class AnswersConfig:
    """Prompts with answers, to be scored; see docs/data-formats.md."""

    path: Any = None  # as data.train
    format: str = "auto"
    columns: Any = None
    split: str = "train"
    lab: LabConfig = dataclasses.field(default_factory=LabConfig)
    max_examples: int | None = None
    max_length: int = 2048  # tokens of a prompt and an answer; a longer prompt loses its beginning
    on_bad_row: OnBadRow = OnBadRow.error
    cache_dir: str = operational("${runs}/cache")


@dataclass(kw_only=True, slots=True)
class MixConfig:
    """Pretraining text mixed into fine-tuning: `ratio` of the examples of every global batch, on average."""

    train: Any = None
    format: str = "auto"
    split: str = "train"
    ratio: float = 0.0


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The optimiser and its schedule. Nothing is left to an engine's default."""

    algorithm: Algorithm = Algorithm.adamw
    lr: float = MISSING
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only
    max_grad_norm: float = 1.0  # 0 switches clipping off
    decay: Decay = Decay.cosine
    final_lr_fraction: float = 0.1  # the floor of linear and cosine decay
    warmup_steps: int = 0
    warmup_fraction: float = 0.0  # of all steps; added to warmup_steps
    warmup_start_fraction: float = 0.1  # of lr, at the first step (InstructGPT's PPO warms up from a tenth)


@dataclass(kw_only=True, slots=True)
class BatchConfig:
    """A global batch is a number of examples, or (for text) of tokens; the rest is memory layout."""

    examples: int | None = None
    tokens: int | None = None
    row_length: int = operational(2048)  # tokens of one packed row; a longer example raises it
    micro_rows: int = operational(1)  # packed rows in one forward pass


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    epochs: int = operational(1)
    max_steps: int | None = operational(None)  # ends earlier; the schedule then spans max_steps
    stop_after: int | None = operational(None)  # leave after this many steps, resumable, schedule unchanged


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """DeepSpeed, spelled out. `extra` goes into its JSON as it is; keys we own are refused there."""

    zero_stage: int = 1
    offload_optimizer: Offload = Offload.none
    offload_parameters: Offload = Offload.none
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every: int = 100  # steps between resume states
    keep: int = 2
    artifact_every_epoch: bool = True
    artifact_every: int | None = None  # steps between artifacts that are kept as artifacts/step_<n>; null: none are


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    every: int = 100  # steps between evaluations; one more at the end; 0 evaluates at the end only
    before: bool = True  # also before the first step
    examples: int | None = 512  # of the held-out set; null takes all
    samples: int = 4  # held-out prompts answered at each evaluation
    sample_tokens: int = 64
    temperature: float = 0.7  # 0 is greedy


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    wandb: Wandb = Wandb.disabled
    wandb_project: str = "rlhf_pipeline"
    wandb_entity: str | None = None
    tensorboard: bool = False
    progress: bool = True
    every: int = 1  # steps between lines of metrics.jsonl


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    device: Device = Device.auto
    threads: int | None = None  # null: the processor's cores shared among the processes of this machine
    keep_freed_memory: bool = True  # CPU: glibc keeps what torch frees, 1.2-1.8 x faster for some memory
    rank_timeout_minutes: int = 10  # how long a collective may take before the run gives up
    rendezvous_seconds: int = 50  # how long a process waits at its start for the others to be started


def choices(schema: type, key: str) -> list[str]:
    """What a dotted key of `schema` can be set to, where that is an enumeration or a yes or no; else nothing."""
    kind: Any = schema
    for name in key.split("."):
        kind = get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
        kind = next((part for part in get_args(kind) if part is not NoneType), kind)  # of X | None
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.value for member in kind]
    return ["true", "false"] if kind is bool else []
