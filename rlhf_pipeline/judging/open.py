"""Opens the judge that a config names. Only that judge's own imports are made."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_pipeline.config.judge import JudgeConfig, JudgeKind
from rlhf_pipeline.config.schema import TokenizerConfig
from rlhf_pipeline.judging.pairs import Judge


def open_judge(config: JudgeConfig, *, tokenizer: TokenizerConfig, device: str, tell: Callable[[str], None]) -> Judge:
    """A judge, ready to be asked.

    Args:
        tokenizer: for a reward model whose folder has none, or no chat template.
        tell: given lines for people.

    Raises:
        UserError: for what the user can put right.
    """
    name = name_of(config)
    match config.kind:
        case JudgeKind.gold:
            from rlhf_pipeline.judging.gold import GoldJudge

            return GoldJudge(name=name, tie=config.tie)
        case JudgeKind.reward_model:
            from rlhf_pipeline.judging.reward import open_reward_judge

            return open_reward_judge(config, name=name, tokenizer=tokenizer, device=device, tell=tell)
        case JudgeKind.chat:
            from rlhf_pipeline.judging.chat import open_chat_judge

            return open_chat_judge(config.chat, name=name, tell=tell)
        case JudgeKind.recorded:
            from rlhf_pipeline.judging.recorded import open_recorded_judge

            return open_recorded_judge(str(config.path), name=name)


def name_of(config: JudgeConfig) -> str:
    """Of the judge, and of the folder of its results."""
    return config.name or config.kind.value
