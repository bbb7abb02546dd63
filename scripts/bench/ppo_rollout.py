"""Our rollout beside `model.generate` of transformers, in one process, on one batch: part of `make bench-ppo`.

Both answer the same 64 real prompts (`ppo.py` writes them) with the same model, 64 tokens each, at temperature 1; the model
never draws an end token. `generate` gets them left-padded, as TRL does it, but hands out no scores. Ours is `roll_out`
whole: what is drawn, log-probabilities, decoded texts, tensors. They take turns, several rounds; figures are medians.

The bound beside them is that of the matrix products with the weights alone, at the rate of this machine's fastest square
ones (`machine.measure_peak_flops`): 2 FLOPs a weight for every prompt token but the vocabulary's, and for every drawn
token. Attention, norms, the draw itself and products of few rows keep everyone from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

EPISODES = 64
TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder: language model and tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="JSONL rows with input_ids")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    from rlhf_pipeline.machine import keep_freed_memory, pin_threads

    keep_freed_memory()  # as the recipes do it, for both
    pin_threads(arguments.threads)
    import torch

    torch.set_flush_denormal(True)
    rows = arguments.data.read_text().splitlines()[:EPISODES]
    prompts = [np.array(json.loads(row)["input_ids"], np.int32) for row in rows]
    print("| dtype | transformers, tokens/s | ours, tokens/s | ratio | bound, tokens/s | of it: transformers | ours |")
    print("|---" * 7 + "|")
    for dtype in arguments.dtypes:
        theirs, mine, bound = compare(arguments.model, dtype, prompts, rounds=arguments.rounds)
        cells = f"{theirs:,.0f} | {mine:,.0f} | {mine / theirs:.2f} | {bound:,.0f}"
        print(f"| {dtype} | {cells} | {theirs / bound:.0%} | {mine / bound:.0%} |", flush=True)


def compare(folder: Path, dtype: str, prompts: list[np.ndarray], *, rounds: int) -> tuple[float, float, float]:
    """Tokens of answers a second: (transformers, ours), medians, and what weights alone allow."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_pipeline.config.schema import Attention
    from rlhf_pipeline.data.prompts import Renderer
    from rlhf_pipeline.machine import measure_peak_flops
    from rlhf_pipeline.models.tree_model import TreeModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, same = (AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval() for _ in range(2))
    policy = TreeModel(same)
    policy.use_attention(Attention.paths)  # as `rlhf ppo` has it on a CPU
    renderer = Renderer(tokenizer)
    embedding = model.get_input_embeddings().weight.numel()
    inner = sum(p.numel() for p in model.parameters()) - embedding  # tied
    flops = 2 * inner * (sum(map(len, prompts)) + EPISODES * (TOKENS - 1)) + 2 * embedding * EPISODES * TOKENS
    bound = EPISODES * TOKENS * max(measure_peak_flops(getattr(torch, dtype)) for _ in range(5)) / flops
    runs: list[Callable[[int], int]] = [
        partial(with_transformers, model, prompts, tokenizer.pad_token_id),
        partial(with_ours, policy, prompts, renderer),
    ]
    speeds: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for run, found in zip(runs, speeds, strict=True):
            start = time.perf_counter()
            tokens = run(number)
            assert tokens == EPISODES * TOKENS, "an answer has ended early"
            if number:  # the first is for warming up
                found.append(tokens / (time.perf_counter() - start))
    return statistics.median(speeds[0]), statistics.median(speeds[1]), bound


def with_transformers(model: Any, prompts: list[np.ndarray], pad_id: int, seed: int) -> int:
    """Tokens of the answers of `model.generate`."""
    import torch

    torch.manual_seed(seed)
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": pad_id}
    answers = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=TOKENS, **options)
    return int(answers[:, longest:].numel())


def with_ours(policy: Any, prompts: list[np.ndarray], renderer: Any, seed: int) -> int:
    """Tokens of the answers of our rollout."""
    from rlhf_pipeline.config.ppo import RolloutConfig
    from rlhf_pipeline.generation.prompts import Asked
    from rlhf_pipeline.rollout import roll_out

    options = RolloutConfig(episodes=EPISODES, max_new_tokens=TOKENS)
    asked = [Asked(index=i, origin="", messages=(), columns={}, tokens=one) for i, one in enumerate(prompts)]
    return roll_out(policy.inner, asked, options, renderer=renderer, seed=seed, first=0).num_tokens


if __name__ == "__main__":
    main()
