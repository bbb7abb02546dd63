"""A judge between a policy and its reference while the policy is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np

from rlhf_pipeline import runtime
from rlhf_pipeline.config.judge import JudgeConfig
from rlhf_pipeline.config.schema import TokenizerConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.intervals import cluster_means
from rlhf_pipeline.judging.open import open_judge
from rlhf_pipeline.judging.pairs import Judge, Pair, Ruling, rule

Judged = Callable[[Sequence[Pair]], dict[str, float]]  # figures by metric, the same on every rank; every rank calls it


def open_judged(config: JudgeConfig | None, *, device: str, seed: int, tell: Callable[[str], None]) -> Judged | None:
    """What the config's judge says, None where there is none. Called by every rank; the first one opens it.

    Raises:
        UserError: on every rank, when it cannot be opened.
    """
    if config is None:
        return None
    judge = None
    with runtime.main_first():
        if runtime.is_main():
            judge = open_judge(config, tokenizer=TokenizerConfig(), device=device, tell=tell)
    return judged_by(judge, seed=seed, tell=tell)


def judged_by(judge: Judge | None, *, seed: int, tell: Callable[[str], None]) -> Judged:
    """Figures on pairs of the policy's answer, as a, and the reference's.

    A judge that cannot be asked is no reason to end a training run: that is told, and there are no figures.

    Args:
        judge: on the first process; the others may have none.
    """

    def figures(pairs: Sequence[Pair]) -> dict[str, float]:
        found: dict[str, float] = {}
        with runtime.at_own_pace():
            if runtime.is_main():
                assert judge is not None
                try:
                    found = measured(rule(judge, pairs), seed=seed)
                except UserError as error:
                    tell(f"no verdicts at this evaluation: {error}")
        same: dict[str, float] = json.loads(runtime.broadcast(json.dumps(found)))
        return same

    return figures


def measured(rulings: Sequence[Ruling], *, seed: int = 0) -> dict[str, float]:
    """The win rate with its 95 % interval over prompts, and the shares of pairs that were judged otherwise when turned
    round, and that could not be judged."""
    values = np.array([one.value for one in rulings if one.value is not None])
    found = {
        "eval/judge_malformed": sum(one.value is None for one in rulings) / len(rulings),
        "eval/judge_disagreed": sum(one.value is not None and not one.agreed for one in rulings) / len(rulings),
    }
    for won in cluster_means(values, np.arange(len(values)), seed=seed):
        found |= {
            "eval/judge_win_rate": won.mean,
            "eval/judge_win_rate_low": won.low,
            "eval/judge_win_rate_high": won.high,
        }
    return found
