"""Answers to held-out prompts, for people to read beside the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


@torch.no_grad()
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
    if not prompts:
        return []
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, np.int64))
        mask[i, longest - len(prompt) :] = 1
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention == "flex_attention":  # compiled for packed rows; one token at a time is what sdpa is for
        model.set_attn_implementation("sdpa")
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            answers = model.generate(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=list(end_ids),
                **sampling,
            )
    finally:
        model.train(was_training)
        if attention == "flex_attention":
            model.set_attn_implementation(attention)
    return [
        {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
            "response": tokenizer.decode(answer[longest:], skip_special_tokens=True),
        }
        for prompt, answer in zip(prompts, answers.cpu(), strict=True)
    ]
