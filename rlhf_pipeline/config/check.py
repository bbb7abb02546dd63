"""What a config must satisfy beyond its types. Every complaint names the key and says what to do; no torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from rlhf_pipeline.config.schema import Architecture, Attention, DataConfig, Dtype, ModelConfig, Offload, OptimConfig
from rlhf_pipeline.config.stages import PretrainConfig, SftConfig, StageConfig

# Keys of DeepSpeed's JSON that `engine.extra` may set; the engine owns the others (dtype, clipping, batch sizes,
# optimiser), and an unknown key would be dropped by DeepSpeed without a word.
DEEPSPEED_KEYS = {
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "sparse_gradients",
    "wall_clock_breakdown",
    "zero_optimization",
}


def check(config: StageConfig) -> list[str]:
    """Every problem of a composed config, one line each."""
    sections = (
        _model(config),
        _data(config.data),
        _optim(config.optim),
        _loop(config),
        _engine(config),
        _stage(config),
    )
    return [*_finite(config), *(problem for section in sections for problem in section)]


def _finite(section: Any, prefix: str = "") -> Iterator[str]:
    """nan and inf pass for numbers, and nan for any comparison."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            yield from _finite(value, f"{prefix}{f.name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{prefix}{f.name}={value}: must be a finite number"


def _model(config: StageConfig) -> Iterator[str]:
    model: ModelConfig = config.model
    shape = model.shape
    if (model.path is None) == (shape is None):
        yield (
            "model: set exactly one of model.path (an artifact, a folder, a hub id) and model.shape "
            "(from scratch, for example model=7m)"
        )
    yield from _between("model.dropout", model.dropout, 0, 1)
    if model.attention is Attention.block and model.dropout > 0:
        yield f"model.attention=block: has no dropout, and model.dropout={model.dropout}; use model.attention=dense"
    if shape is None:
        return
    for name in ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocab_size", "context"):
        yield from _positive(f"model.shape.{name}", getattr(shape, name))
    if shape.heads > 0 and shape.hidden % shape.heads:
        yield f"model.shape.heads={shape.heads}: must divide model.shape.hidden={shape.hidden}"
    if shape.kv_heads > 0 and shape.heads % shape.kv_heads:
        yield f"model.shape.kv_heads={shape.kv_heads}: must divide model.shape.heads={shape.heads}"
    if shape.architecture is Architecture.gpt2 and shape.kv_heads != shape.heads:
        yield "model.shape.kv_heads: gpt2 has no grouped-query attention; set it to model.shape.heads"
    if config.data.max_length > shape.context:
        yield f"data.max_length={config.data.max_length}: more than model.shape.context={shape.context}"


def _data(data: DataConfig) -> Iterator[str]:
    yield from _source("data.train", data.train)
    if data.heldout is not None:
        yield from _source("data.heldout", data.heldout)
    elif not 0 <= data.heldout_fraction < 1:
        yield f"data.heldout_fraction={data.heldout_fraction}: must be at least 0 and less than 1"
    if data.max_length < 2:
        yield f"data.max_length={data.max_length}: a prompt token and a response token need 2"
    if not 1 <= data.max_prompt_length < max(data.max_length, 2):
        yield (
            f"data.max_prompt_length={data.max_prompt_length}: must be at least 1 and less than "
            f"data.max_length={data.max_length}"
        )
    if data.max_examples is not None:
        yield from _positive("data.max_examples", data.max_examples)


def _source(key: str, value: Any) -> Iterator[str]:
    if value is None:
        yield f"{key}: has no value; add {key}=..."
        return
    paths = value if isinstance(value, list) else [value]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        yield f"{key}={value!r}: must be a path, a glob, a folder, a hub id, or a list of them"


def _optim(optim: OptimConfig) -> Iterator[str]:
    yield from _positive("optim.lr", optim.lr)
    yield from _positive("optim.eps", optim.eps)
    if len(optim.betas) != 2:
        yield f"optim.betas={optim.betas}: Adam has two"
    for i, beta in enumerate(optim.betas):
        if not 0 <= beta < 1:
            yield f"optim.betas[{i}]={beta}: must be at least 0 and less than 1"
    yield from _between("optim.final_lr_fraction", optim.final_lr_fraction, 0, 1)
    yield from _between("optim.warmup_fraction", optim.warmup_fraction, 0, 1)
    yield from _between("optim.warmup_start_fraction", optim.warmup_start_fraction, 0, 1)
    for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
        if getattr(optim, name) < 0:
            yield f"optim.{name}={getattr(optim, name)}: must not be negative"


def _loop(config: StageConfig) -> Iterator[str]:
    batch, train, evaluation = config.batch, config.train, config.evaluation
    if (batch.examples is None) == (batch.tokens is None):
        yield "batch: set exactly one of batch.examples and batch.tokens (set the other to null)"
    for key, value in {
        "batch.examples": batch.examples,
        "batch.tokens": batch.tokens,
        "batch.micro_rows": batch.micro_rows,
        "train.epochs": train.epochs,
        "train.max_steps": train.max_steps,
        "train.stop_after": train.stop_after,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "tokenizer.train_documents": config.tokenizer.train_documents,
        "evaluation.examples": evaluation.examples,
        "evaluation.sample_tokens": evaluation.sample_tokens,
        "tracking.every": config.tracking.every,
        "runtime.threads": config.runtime.threads,
        "runtime.rank_timeout_minutes": config.runtime.rank_timeout_minutes,
    }.items():
        if value is not None:
            yield from _positive(key, value)
    if batch.row_length < 2:
        yield f"batch.row_length={batch.row_length}: must be at least 2"
    for name in ("every", "samples", "temperature"):
        if getattr(evaluation, name) < 0:
            yield f"evaluation.{name}={getattr(evaluation, name)}: must not be negative"
    if not config.run_dir:
        yield "run_dir: must name a folder; leave it out for runs/<name>/<stage>"
    if not config.name or "/" in config.name or config.name.startswith("."):
        yield f"name={config.name!r}: a run's name is a folder name, without a slash and not starting with a dot"


def _engine(config: StageConfig) -> Iterator[str]:
    engine = config.engine
    if engine.zero_stage not in (0, 1, 2, 3):
        yield f"engine.zero_stage={engine.zero_stage}: must be 0, 1, 2 or 3"
    if config.model.dtype is Dtype.bfloat16 and engine.zero_stage == 0:
        yield (
            "engine.zero_stage=0: model.dtype=bfloat16 needs fp32 master weights, which DeepSpeed keeps from "
            "stage 1 on; use engine=zero1 or model.dtype=float32"
        )
    if engine.offload_optimizer is not Offload.none and engine.zero_stage < 2:
        yield f"engine.offload_optimizer: needs engine.zero_stage 2 or 3, not {engine.zero_stage}"
    if engine.offload_parameters is not Offload.none and engine.zero_stage != 3:
        yield f"engine.offload_parameters: needs engine.zero_stage=3, not {engine.zero_stage}"
    for key in sorted(engine.extra.keys() - DEEPSPEED_KEYS):
        yield f"engine.extra.{key}: not one of {', '.join(sorted(DEEPSPEED_KEYS))}"


def _stage(config: StageConfig) -> Iterator[str]:
    if isinstance(config, PretrainConfig) and config.model.path is not None and config.tokenizer.path is not None:
        yield "tokenizer.path: model.path brings its own tokenizer; leave one of them out"
    if isinstance(config, SftConfig):
        if config.model.path is None and config.model.shape is not None and config.tokenizer.path is None:
            yield "tokenizer.path: a model from scratch has no tokenizer; name one, or run rlhf pretrain first"
        if not 0 <= config.mix.ratio < 1:
            yield f"mix.ratio={config.mix.ratio}: must be at least 0 and less than 1"
        if config.mix.ratio > 0 or config.mix.train is not None:
            yield from _source("mix.train", config.mix.train)
        if config.mix.train is not None and config.mix.ratio == 0:
            yield "mix.ratio=0.0: leaves mix.train out; give the share of the examples that it is to have"


def _positive(key: str, value: float) -> Iterator[str]:
    if not value > 0:
        yield f"{key}={value}: must be more than 0"


def _between(key: str, value: float, low: float, high: float) -> Iterator[str]:
    if not low <= value <= high:
        yield f"{key}={value}: must be between {low} and {high}"
