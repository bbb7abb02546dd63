"""Held-out loss and samples of a language model while it is trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf_pipeline import runtime
from rlhf_pipeline.config.schema import EvaluationConfig
from rlhf_pipeline.data.loader import Layout, micro_batches
from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.engine import Engine
from rlhf_pipeline.evaluation.samples import sample
from rlhf_pipeline.functional.losses.lm import negative_log_likelihood
from rlhf_pipeline.models.tree_model import TreeBatch

CONTINUED_TOKENS = 16  # of a held-out document, which has no prompt: a sample goes on from its first words


class HeldOut:
    """A fixed set of held-out examples, packed once. Every rank builds and calls it together."""

    def __init__(self, data: TreeDataset, layout: Layout, config: EvaluationConfig, *, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.batches: list[PackedTrees] = micro_batches([data], [(0, i) for i in range(_size(data, config))], layout)
        self.prompts = [_prompt(data, i) for i in range(min(config.samples, len(data)))]

    def loss(self, engine: Engine) -> float:
        """Mean negative log-likelihood of the scored tokens."""
        total = {"loss": 0.0, "count": 0.0}
        with engine.evaluating():
            for micro in self.batches:
                logprobs = engine(TreeBatch.of(micro, engine.device))
                total["loss"] += float(negative_log_likelihood(logprobs))
                total["count"] += len(logprobs)
        total = runtime.sum_over_ranks(total)
        return total["loss"] / total["count"]

    def samples(self, model: Any, tokenizer: Any, end_ids: tuple[int, ...], step: int) -> list[dict[str, str]]:
        """Answers to the first held-out prompts; they depend on the weights, the seed and the step."""
        return sample(
            model,
            tokenizer,
            self.prompts,
            end_ids=end_ids,
            max_new_tokens=self.config.sample_tokens,
            temperature=self.config.temperature,
            seed=self.seed + step,
        )


def _size(data: TreeDataset, config: EvaluationConfig) -> int:
    return len(data) if config.examples is None else min(config.examples, len(data))


def _prompt(data: TreeDataset, index: int) -> np.ndarray:
    tree = data[index]
    return tree.prompt if len(tree.prompt) > 1 else tree.path(0)[:CONTINUED_TOKENS]
