"""Answers to held-out prompts, for people to read beside the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_pipeline.config.schema import SamplingConfig
from rlhf_pipeline.generation.decode import generate


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    *,
    end_ids: tuple[int, ...],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[dict[str, str]]:
    """One response a prompt as {"prompt", "response"}; temperature 0 is greedy.

    Every rank calls it with the same arguments and gets the same answers: under ZeRO-3 the forward passes gather
    parameters together. The answers depend on `seed` alone, and the global random state is left as it was.

    Args:
        model: a causal language model of transformers.
        prompts: token ids, int [P_i] each.
        end_ids: tokens that end a response.
    """
    answers = generate(
        model,
        prompts,
        SamplingConfig(temperature=temperature, max_new_tokens=max_new_tokens),
        end_ids=end_ids,
        pad_id=end_ids[0],
        seed=seed,
        ids=range(len(prompts)),
    )
    return [
        {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
            "response": tokenizer.decode(answer.tokens, skip_special_tokens=True),
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
