"""One root config a command: the sections of schema.py under the names that users type."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_pipeline.config.schema import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TokenizerConfig,
    TrackingConfig,
    TrainConfig,
    operational,
)


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """What every training command has."""

    name: str = operational("default")  # of the run; its folder is runs/name/stage
    runs: str = operational("runs")
    run_dir: str = operational("")
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
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


@dataclass(kw_only=True, slots=True)
class PretrainConfig(StageConfig):
    """`rlhf pretrain`: a tokenizer and a causal language model from text."""


@dataclass(kw_only=True, slots=True)
class SftConfig(StageConfig):
    """`rlhf sft`: supervised fine-tuning on demonstrations."""

    mix: MixConfig = field(default_factory=MixConfig)


STAGES: dict[str, type[StageConfig]] = {"pretrain": PretrainConfig, "sft": SftConfig}
