"""What a config must satisfy beyond its types. Every complaint names the key and says what to do; no torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from rlhf_pipeline.config.check_comparison import check_comparison
from rlhf_pipeline.config.check_direct import check_direct
from rlhf_pipeline.config.check_judge import check_judge
from rlhf_pipeline.config.check_ppo import check_ppo
from rlhf_pipeline.config.check_scorers import scorers
from rlhf_pipeline.config.machine import check_machine
from rlhf_pipeline.config.ranking import RankingLoss, Ties
from rlhf_pipeline.config.schema import (
    AnswersConfig,
    Architecture,
    Attention,
    DataConfig,
    Dtype,
    EvaluationKind,
    LabConfig,
    ModelConfig,
    Offload,
    PromptsConfig,
    Quantise,
    SamplingConfig,
)
from rlhf_pipeline.config.stages import (
    ChatConfig,
    CommandConfig,
    DpoConfig,
    EvaluateConfig,
    GenerateConfig,
    PpoConfig,
    PrepConfig,
    PretrainConfig,
    ReportConfig,
    RmConfig,
    ScoreConfig,
    SftConfig,
    StageConfig,
)
from rlhf_pipeline.config.values import between, columns, finite, folder_name, names, optimiser, positive, source

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


def check(config: CommandConfig) -> list[str]:
    """Every problem of a composed config, one line each."""
    sections = [finite(config), _command(config)]
    match config:
        case StageConfig():
            sections += [
                _model(config),
                _lora(config),
                _data(config.data),
                optimiser("optim", config.optim),
                _loop(config),
            ]
            sections += [_engine(config), _stage(config), check_machine(config.machine)]
        case PrepConfig():
            sections += [_data(config.data)]
        case GenerateConfig():
            sections += [_prompts(config.prompts), _sampling(config.sampling), _best_of(config)]
        case ChatConfig():
            sections += [_sampling(config.sampling)]
        case ScoreConfig():
            sections += [_answers(config.data), positive("batch_tokens", config.batch_tokens)]
        case EvaluateConfig():
            sections += [_evaluate(config), positive("batch_tokens", config.batch_tokens)]
        case ReportConfig():
            sections += [_report(config)]
    if isinstance(config, GenerateConfig | ChatConfig | ScoreConfig) and not config.model.path:
        sections.append(iter(["model.path: has no value; add model.path=<an artifact, a folder or a hub id>"]))
    return [problem for section in sections for problem in section]


def _command(config: CommandConfig) -> Iterator[str]:
    if not config.run_dir:
        yield "run_dir: must name a folder; leave it out for runs/<name>/<command>"
    if not config.runs:
        yield "runs: must name a folder; leave it out for ./runs"
    yield from folder_name(f"name={config.name!r}", "a run's name", config.name)


def _model(config: StageConfig) -> Iterator[str]:
    model: ModelConfig = config.model
    shape = model.shape
    if model.path == "":
        yield "model.path='': must be an artifact, a folder or a hub id"
    if (model.path is None) == (shape is None):
        yield (
            "model: set exactly one of model.path (an artifact, a folder, a hub id) and model.shape "
            "(from scratch, for example model=7m)"
        )
    yield from between("model.dropout", model.dropout, 0, 1)
    if model.attention is Attention.block and model.dropout > 0:
        yield f"model.attention=block: has no dropout, and model.dropout={model.dropout}; use model.attention=dense"
    if shape is None:
        return
    for name in ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocab_size", "context"):
        yield from positive(f"model.shape.{name}", getattr(shape, name))
    if shape.heads > 0 and shape.hidden % shape.heads:
        yield f"model.shape.heads={shape.heads}: must divide model.shape.hidden={shape.hidden}"
    if shape.kv_heads > 0 and shape.heads % shape.kv_heads:
        yield f"model.shape.kv_heads={shape.kv_heads}: must divide model.shape.heads={shape.heads}"
    if shape.architecture is Architecture.gpt2 and shape.kv_heads != shape.heads:
        yield "model.shape.kv_heads: gpt2 has no grouped-query attention; set it to model.shape.heads"
    if config.data.max_length > shape.context:
        yield f"data.max_length={config.data.max_length}: more than model.shape.context={shape.context}"


def _data(data: DataConfig) -> Iterator[str]:
    yield from source("data.train", data.train)
    if data.heldout is not None:
        yield from source("data.heldout", data.heldout)
    elif not 0 <= data.heldout_fraction < 1:
        yield f"data.heldout_fraction={data.heldout_fraction}: must be at least 0 and less than 1"
    if data.max_length < 2:
        yield f"data.max_length={data.max_length}: a prompt token and a response token need 2"
    if not 1 <= data.max_prompt_length < max(data.max_length, 2):
        yield (
            f"data.max_prompt_length={data.max_prompt_length}: must be at least 1 and less than "
            f"data.max_length={data.max_length}"
        )
    for name in ("max_examples", "workers"):
        if getattr(data, name) is not None:
            yield from positive(f"data.{name}", getattr(data, name))
    if data.streaming and data.max_examples is None:
        yield "data.streaming: how many rows to take? Set data.max_examples"
    if data.templates is not None and (data.format != "auto" or data.columns):
        yield "data.templates: names the fields itself; leave out data.format and data.columns"
    yield from columns("data.columns", data.columns)
    yield from _lab("data.lab", data.lab)


def _prompts(prompts: PromptsConfig) -> Iterator[str]:
    if prompts.path != "-":
        yield from source("prompts.path", prompts.path)
    yield from positive("prompts.max_prompt_length", prompts.max_prompt_length)
    if prompts.max_examples is not None:
        yield from positive("prompts.max_examples", prompts.max_examples)
    yield from columns("prompts.columns", prompts.columns)
    yield from _lab("prompts.lab", prompts.lab)


def _answers(answers: AnswersConfig) -> Iterator[str]:
    if answers.path != "-":
        yield from source("data.path", answers.path)
    if answers.max_length < 2:
        yield f"data.max_length={answers.max_length}: a prompt token and an answer's token need 2"
    if answers.max_examples is not None:
        yield from positive("data.max_examples", answers.max_examples)
    yield from columns("data.columns", answers.columns)
    yield from _lab("data.lab", answers.lab)


def _sampling(sampling: SamplingConfig) -> Iterator[str]:
    for name in ("temperature", "top_k", "min_new_tokens"):
        if getattr(sampling, name) < 0:
            yield f"sampling.{name}={getattr(sampling, name)}: must not be negative"
    yield from positive("sampling.top_p", sampling.top_p)
    yield from between("sampling.top_p", sampling.top_p, 0, 1)
    yield from between("sampling.min_p", sampling.min_p, 0, 1)
    for name in ("repetition_penalty", "max_new_tokens", "samples", "batch_tokens"):
        yield from positive(f"sampling.{name}", getattr(sampling, name))
    if sampling.min_new_tokens > sampling.max_new_tokens:
        yield (
            f"sampling.min_new_tokens={sampling.min_new_tokens}: more than "
            f"sampling.max_new_tokens={sampling.max_new_tokens}"
        )
    if sampling.temperature == 0 and sampling.samples > 1:
        yield f"sampling.samples={sampling.samples}: at temperature 0 all answers to a prompt are the same"


def _best_of(config: GenerateConfig) -> Iterator[str]:
    best_of, rewards, sampling = config.best_of, config.rewards, config.sampling
    yield from positive("best_of", best_of)
    if best_of == 1 and rewards:
        yield "rewards: choose among answers, and best_of=1 draws one; set best_of to 2 or more, or leave rewards out"
    if best_of > 1 and not rewards:
        yield (
            f"best_of={best_of}: the best by what? Add +rewards.<name>.model.path=<an artifact of rlhf rm>, or .program, "
            "or .url"
        )
    if best_of > 1 and rewards and not any(one.weight for one in rewards.values()):
        yield "rewards: every weight is 0, which is for scorers that are only written down; one must count"
    if best_of > 1 and sampling.samples > 1:
        yield (
            f"best_of={best_of}: writes one answer to a prompt, and sampling.samples={sampling.samples} asks for more; "
            "leave one of them out"
        )
    if best_of > 1 and sampling.temperature == 0:
        yield f"best_of={best_of}: at temperature 0 all answers to a prompt are the same"
    yield from scorers(rewards)


def _evaluate(config: EvaluateConfig) -> Iterator[str]:
    if not names(config.systems):
        yield f"systems={config.systems}: name what to compare, as in 'systems={{base:<model>,sft:<model>}}'"
    for name in config.systems if isinstance(config.systems, dict) else []:
        yield from folder_name(f"systems.{name}", "a system's name", str(name))
    if config.kind is EvaluationKind.rm:
        yield from _answers(config.data)
    else:
        yield from _prompts(config.prompts)
        yield from _sampling(config.sampling)
    if config.kind is EvaluationKind.gold and config.sampling.samples != 1:
        yield f"sampling.samples={config.sampling.samples}: kind=gold compares one answer a prompt"
    if config.kind is EvaluationKind.select and config.reward.path is None:
        yield "reward.path: has no value; add reward.path=<a reward model>"
    yield from check_comparison(config)
    if config.samples < 0:
        yield f"samples={config.samples}: must not be negative"


def _report(config: ReportConfig) -> Iterator[str]:
    if not config.folder:
        yield "folder: has no value; say which runs to tell of, as in rlhf report runs/demo"
    if config.output == "":
        yield "output: must name a file; leave it out for report.html in the folder"
    if config.samples < 0:
        yield f"samples={config.samples}: must not be negative"


def _lab(key: str, lab: LabConfig) -> Iterator[str]:
    for f in dataclasses.fields(lab):
        if f.name != "seed":
            yield from positive(f"{key}.{f.name}", getattr(lab, f.name))


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
        "checkpoint.artifact_every": config.checkpoint.artifact_every,
        "tokenizer.train_documents": config.tokenizer.train_documents,
        "evaluation.examples": evaluation.examples,
        "evaluation.sample_tokens": evaluation.sample_tokens,
        "tracking.every": config.tracking.every,
        "runtime.threads": config.runtime.threads,
        "runtime.rank_timeout_minutes": config.runtime.rank_timeout_minutes,
        "runtime.rendezvous_seconds": config.runtime.rendezvous_seconds,
    }.items():
        if value is not None:
            yield from positive(key, value)
    if batch.row_length < 2:
        yield f"batch.row_length={batch.row_length}: must be at least 2"
    for name in ("every", "samples", "temperature"):
        if getattr(evaluation, name) < 0:
            yield f"evaluation.{name}={getattr(evaluation, name)}: must not be negative"


def _lora(config: StageConfig) -> Iterator[str]:
    lora = config.lora
    if lora is None:
        return
    yield from positive("lora.rank", lora.rank)
    yield from positive("lora.alpha", lora.alpha)
    yield from between("lora.dropout", lora.dropout, 0, 1)
    named = isinstance(lora.targets, list) and lora.targets and all(isinstance(one, str) for one in lora.targets)
    if not named and not (isinstance(lora.targets, str) and lora.targets):
        yield f"lora.targets={lora.targets!r}: must be all-linear, a name of layers, or a list of names"
    if config.model.shape is not None:
        yield "lora: adapts a trained model, and model.shape is one from scratch; use model.path, or lora=null"
    if lora.quantise is not Quantise.none and config.engine.zero_stage == 3:
        yield "lora.quantise: the engine cannot partition quantised weights; use engine.zero_stage 0, 1 or 2"


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
    zero = engine.extra.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield f"engine.extra.zero_optimization={zero}: must be a mapping, as DeepSpeed's JSON has it"


def _stage(config: StageConfig) -> Iterator[str]:
    if isinstance(config, PretrainConfig) and config.model.path is not None and config.tokenizer.path is not None:
        yield "tokenizer.path: model.path brings its own tokenizer; leave one of them out"
    from_scratch = config.model.path is None and config.model.shape is not None
    if (
        isinstance(config, SftConfig | RmConfig | PpoConfig | DpoConfig)
        and from_scratch
        and config.tokenizer.path is None
    ):
        yield "tokenizer.path: a model from scratch has no tokenizer; name one, or run rlhf pretrain first"
    if isinstance(config, RmConfig):
        yield from _ranking(config)
    if isinstance(config, PpoConfig | DpoConfig) and config.judge is not None:
        yield from check_judge("judge", config.judge)
    if isinstance(config, PpoConfig):
        yield from check_ppo(config)
    if isinstance(config, DpoConfig):
        yield from check_direct(config)
    if isinstance(config, SftConfig):
        if not 0 <= config.mix.ratio < 1:
            yield f"mix.ratio={config.mix.ratio}: must be at least 0 and less than 1"
        if config.mix.ratio > 0 or config.mix.train is not None:
            yield from source("mix.train", config.mix.train)
        if config.mix.train is not None and config.mix.ratio == 0:
            yield "mix.ratio=0.0: leaves mix.train out; give the share of the examples that it is to have"


def _ranking(config: RmConfig) -> Iterator[str]:
    objective, normalise = config.objective, config.normalise
    if objective.margin < 0:
        yield f"objective.margin={objective.margin}: must not be negative"
    if objective.soft_labels < 0:
        yield f"objective.soft_labels={objective.soft_labels}: must not be negative"
    if objective.centring < 0:
        yield f"objective.centring={objective.centring}: must not be negative"
    if not 0 <= objective.label_smoothing < 0.5:
        yield f"objective.label_smoothing={objective.label_smoothing}: must be at least 0 and less than a half"
    if objective.loss is RankingLoss.plackett_luce:
        for key, is_set in {
            "ties=model": objective.ties is Ties.model,
            f"margin={objective.margin}": objective.margin > 0,
            f"label_smoothing={objective.label_smoothing}": objective.label_smoothing > 0,
            f"soft_labels={objective.soft_labels}": objective.soft_labels > 0,
        }.items():
            if is_set:
                yield f"objective.{key}: is about pairs, and objective.loss=plackett_luce has none; use pairwise"
    elif objective.soft_labels > 0:
        soft = f"objective.soft_labels={objective.soft_labels}"
        if objective.ties is Ties.model:
            yield f"objective.ties=model: {soft} makes a tie a label of 1/2; leave one of them out"
        if objective.margin > 0:
            yield f"objective.margin={objective.margin}: {soft} uses the scores already; leave one of them out"
        if objective.label_smoothing > 0:
            smoothing = f"objective.label_smoothing={objective.label_smoothing}"
            yield f"{smoothing}: {soft} takes no label for certain already; leave one of them out"
    if config.evaluation.samples:
        yield f"evaluation.samples={config.evaluation.samples}: a reward model writes no answers; set it to 0"
    if normalise.train is not None:
        yield from source("normalise.train", normalise.train)
    yield from positive("normalise.examples", normalise.examples)
