"""One root config a command: the sections of schema.py under the names that users type."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlhf_pipeline.config.direct import DirectConfig, DirectReferenceConfig, SampledConfig
from rlhf_pipeline.config.frontier import FrontierConfig
from rlhf_pipeline.config.judge import JudgeConfig
from rlhf_pipeline.config.machine import MachineConfig
from rlhf_pipeline.config.ppo import (
    AdvantageConfig,
    EmaConfig,
    HealthConfig,
    KlConfig,
    PolicyLossConfig,
    PtxConfig,
    ReferenceConfig,
    RolloutConfig,
    ValueConfig,
)
from rlhf_pipeline.config.ranking import NormaliseConfig, RankingConfig
from rlhf_pipeline.config.schema import (
    AnswersConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    EvaluationKind,
    LoraConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    PromptsConfig,
    ReadyModelConfig,
    RowKind,
    RuntimeConfig,
    SamplingConfig,
    TokenizerConfig,
    TrackingConfig,
    TrainConfig,
    operational,
)


@dataclass(kw_only=True, slots=True)
class CommandConfig:
    """What every command has."""

    name: str = operational("default")  # of the run; its folder is runs/name/command
    runs: str = operational("runs")
    run_dir: str = operational("")
    seed: int = 0


@dataclass(kw_only=True, slots=True)
class StageConfig(CommandConfig):
    """What every training command has."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig | None = None
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    train: TrainConfig = operational(factory=TrainConfig)
    engine: EngineConfig = operational(factory=EngineConfig)
    checkpoint: CheckpointConfig = operational(factory=CheckpointConfig)
    evaluation: EvaluationConfig = operational(factory=EvaluationConfig)
    tracking: TrackingConfig = operational(factory=TrackingConfig)
    runtime: RuntimeConfig = operational(factory=RuntimeConfig)
    machine: MachineConfig = operational(factory=MachineConfig)  # of `rlhf plan`


@dataclass(kw_only=True, slots=True)
class PretrainConfig(StageConfig):
    """`rlhf pretrain`: a tokenizer and a causal language model from text."""


@dataclass(kw_only=True, slots=True)
class SftConfig(StageConfig):
    """`rlhf sft`: supervised fine-tuning on demonstrations."""

    mix: MixConfig = field(default_factory=MixConfig)


@dataclass(kw_only=True, slots=True)
class RmConfig(StageConfig):
    """`rlhf rm`: a reward model from rankings."""

    objective: RankingConfig = field(default_factory=RankingConfig)
    normalise: NormaliseConfig = field(default_factory=NormaliseConfig)


@dataclass(kw_only=True, slots=True)
class PpoConfig(StageConfig):
    """`rlhf ppo`: a policy against scorers, with a KL penalty. `data` names prompts; `train` counts iterations as steps.

    An iteration draws `rollout.episodes` responses and makes updates of `batch.examples` of them.
    """

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    # {name: ScorerConfig}, by names of one's own. Not typed so to OmegaConf, which takes no typed mapping apart on the
    # command line; `compose` makes them what they are.
    rewards: Any = field(default_factory=dict)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    policy: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    value: ValueConfig = field(default_factory=ValueConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    judge: JudgeConfig | None = operational(None)  # compares held-out answers with the reference's
    health: HealthConfig = operational(factory=HealthConfig)


@dataclass(kw_only=True, slots=True)
class DpoConfig(StageConfig):
    """`rlhf dpo`: a policy straight from preferences, by the objective of your choice."""

    objective: DirectConfig = field(default_factory=DirectConfig)
    reference: DirectReferenceConfig = field(default_factory=DirectReferenceConfig)
    sampled: SampledConfig = operational(factory=SampledConfig)
    rewards: Any = operational(factory=dict)  # {name: ScorerConfig}: what scores the sampled answers; see PpoConfig
    judge: JudgeConfig | None = operational(None)  # compares them with the reference's


@dataclass(kw_only=True, slots=True)
class PrepConfig(CommandConfig):
    """`rlhf prep`: what a data set holds, before any training. `rlhf prep <stage>` takes that stage's config instead."""

    kind: RowKind = RowKind.demonstration
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(kw_only=True, slots=True)
class GenerateConfig(CommandConfig):
    """`rlhf generate`: answers to prompts, as JSON lines."""

    model: ReadyModelConfig = field(default_factory=ReadyModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    best_of: int = 1  # so many answers are drawn for each prompt, and the one that `rewards` score highest is written
    rewards: Any = field(default_factory=dict)  # {name: ScorerConfig}; see PpoConfig
    output: str | None = None  # null: responses.jsonl in the run's folder; - writes to standard output
    token_ids: bool = operational(False)  # each answer's tokens as well, as response_ids
    runtime: RuntimeConfig = operational(factory=RuntimeConfig)


@dataclass(kw_only=True, slots=True)
class ChatConfig(CommandConfig):
    """`rlhf chat`: talk to a model in the terminal."""

    model: ReadyModelConfig = field(default_factory=ReadyModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    system: str | None = None  # the system message, where the chat template has one
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    runtime: RuntimeConfig = operational(factory=RuntimeConfig)


@dataclass(kw_only=True, slots=True)
class ScoreConfig(CommandConfig):
    """`rlhf score`: rewards of answers, as JSON lines."""

    model: ReadyModelConfig = field(default_factory=ReadyModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: AnswersConfig = field(default_factory=AnswersConfig)
    normalised: bool = True  # by the shift and scale that the reward model's artifact holds
    output: str | None = None  # null: rewards.jsonl in the run's folder; - writes to standard output
    batch_tokens: int = operational(4096)  # in one forward pass
    runtime: RuntimeConfig = operational(factory=RuntimeConfig)


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(CommandConfig):
    """`rlhf evaluate`: models beside each other."""

    kind: EvaluationKind = EvaluationKind.gold
    # gold, winrate, rank: {name: a model, or a .jsonl file of `rlhf generate`}; rm: {name: a reward model, a policy, or
    # lab:<labeler>}; select: {name: a run of `rlhf sft`, or a model}; frontier: {name: a run of a policy, or a model}
    systems: Any = None
    data: AnswersConfig = field(default_factory=AnswersConfig)  # kind=rm: answers whose order is known
    reference: str | None = None  # rm, frontier: what policies were trained from; null: the artifact's parent
    reward: ReadyModelConfig = field(default_factory=ReadyModelConfig)  # kind=select
    judge: JudgeConfig = field(default_factory=JudgeConfig)  # winrate, rank
    baseline: str | None = None  # winrate: the system that the others are held against; null: every two are compared
    difficulty: str | None = "joint"  # winrate, rank: of prompts, for length control: joint, null, or a JSON file
    temperatures: list[float] = field(default_factory=list)  # winrate: each system at each of these as well
    rewards: Any = field(
        default_factory=dict
    )  # {name: ScorerConfig}: what else scores answers (winrate, rank, frontier)
    frontier: FrontierConfig = field(default_factory=FrontierConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch_tokens: int = operational(4096)  # scored in one forward pass
    samples: int = operational(6)  # answers of each system shown side by side
    runtime: RuntimeConfig = operational(factory=RuntimeConfig)


@dataclass(kw_only=True, slots=True)
class ReportConfig(CommandConfig):
    """`rlhf report <folder>`: one HTML page of all that lies in a folder of runs."""

    folder: str | None = None  # of runs, such as runs/demo
    output: str | None = None  # null: report.html in the folder
    title: str | None = None  # null: the folder's name
    samples: int = 300  # prompts at most, with every system's answer


STAGES: dict[str, type[CommandConfig]] = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "rm": RmConfig,
    "ppo": PpoConfig,
    "dpo": DpoConfig,
    "prep": PrepConfig,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "score": ScoreConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
}
TRAINING = [name for name, schema in STAGES.items() if issubclass(schema, StageConfig)]
