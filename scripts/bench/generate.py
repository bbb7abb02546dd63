"""Sampling speed beside `model.generate` of transformers, in one process: prints the table of docs/generation.md.

Both answer the same 64 prompts of 20 to 300 random tokens with the same random-initialised model (conf/model/7m.yaml, 6.8
million parameters), sampling at temperature 1. First no answer ends before its last token, so that both draw equally
many; then end tokens end answers after half of that on average, which is where rows that leave the batch count. What is
counted is tokens of answers a second, up to and with an answer's end token. `generate` gets the prompts in batches of
the same size, left-padded. They take turns, several rounds; figures are medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

PROMPTS = 64
VOCABULARY = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--samples", type=int, default=4, help="answers a prompt in the last rows of the table")
    parser.add_argument(
        "--leave", type=float, nargs="+", help="only: shares of a batch that must have finished to leave it"
    )
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    import torch

    print(f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}\n")
    if arguments.leave:
        print("| model | new tokens |" + "".join(f" {share:g} |" for share in arguments.leave))
        print("|---" * (2 + len(arguments.leave)) + "|")
        for dtype in arguments.dtypes:
            model = build(dtype)
            for count in arguments.tokens:
                speeds = compare_leaving(model, count, arguments.leave, rounds=arguments.rounds)
                cells = "".join(f" {speed:,.0f} |" for speed in speeds)
                print(f"| 6.8 M {dtype} | {count} |{cells}", flush=True)
        return
    print("| model | new tokens | answers end | answers a prompt | transformers | ours | ratio |\n" + "|---" * 7 + "|")
    for dtype in arguments.dtypes:
        model = build(dtype)
        for count in arguments.tokens:
            for ends, samples in ((False, 1), (True, 1), (False, arguments.samples)):
                theirs, ours = compare(model, count, ends=ends, samples=samples, rounds=arguments.rounds)
                print(
                    f"| 6.8 M {dtype} | {count} | {'by chance' if ends else 'never'} | {samples} | "
                    f"{theirs:,.0f} | {ours:,.0f} | {ours / theirs:.2f} |",
                    flush=True,
                )


def prepare_process(threads: int) -> None:
    """As the recipes do it, for both."""
    from rlhf_pipeline.machine import keep_freed_memory, pin_threads

    keep_freed_memory()
    pin_threads(threads)
    import torch

    torch.set_flush_denormal(True)


def build(dtype: str) -> Any:
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoModelForCausalLM

    from rlhf_pipeline.config import config_dir
    from rlhf_pipeline.config.schema import Architecture, ShapeConfig
    from rlhf_pipeline.models.shapes import shape_config

    shape: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "model" / "7m.yaml"))
    config = shape_config(
        ShapeConfig(**{**shape["shape"], "architecture": Architecture(shape["shape"]["architecture"])})
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=getattr(torch, dtype)).eval()


def compare(model: Any, count: int, *, ends: bool, samples: int, rounds: int) -> tuple[float, float]:
    """Tokens a second of (transformers, ours), medians."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in rng.integers(20, 301, PROMPTS)]
    # Weights are random, so every token is about equally likely: this many ends give answers of count / 2 on average.
    end_ids = list(range(round(2 * VOCABULARY / count))) if ends else [VOCABULARY - 1]
    runs: list[Callable[[int], int]] = [
        lambda seed: with_transformers(model, prompts, end_ids, count, ends=ends, samples=samples, seed=seed),
        lambda seed: with_ours(model, prompts, end_ids, count, ends=ends, samples=samples, seed=seed),
    ]
    speeds: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for run, found in zip(runs, speeds, strict=True):
            start = time.perf_counter()
            tokens = run(number)
            if number:  # the first is for warming up
                found.append(tokens / (time.perf_counter() - start))
    return statistics.median(speeds[0]), statistics.median(speeds[1])


def compare_leaving(model: Any, count: int, shares: list[float], *, rounds: int) -> list[float]:
    """Tokens a second of our loop where finished rows leave once they are such a share of their batch, medians."""
    from rlhf_pipeline.generation import decode

    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in rng.integers(20, 301, PROMPTS)]
    end_ids = list(range(round(2 * VOCABULARY / count)))
    speeds: dict[float, list[float]] = {share: [] for share in shares}
    for number in range(rounds + 1):
        for share, found in speeds.items():
            decode.LEAVE = share
            start = time.perf_counter()
            tokens = with_ours(model, prompts, end_ids, count, ends=True, samples=1, seed=number)
            if number:
                found.append(tokens / (time.perf_counter() - start))
    return [statistics.median(found) for found in speeds.values()]


def with_transformers(
    model: Any, prompts: list[np.ndarray], end_ids: list[int], count: int, *, ends: bool, samples: int, seed: int
) -> int:
    """Tokens of the answers of `model.generate`."""
    import torch

    torch.manual_seed(seed)
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    answers = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=count,
        min_new_tokens=None if ends else count,
        do_sample=True,
        num_return_sequences=samples,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        eos_token_id=end_ids,
        pad_token_id=0,
    )[:, longest:]
    is_end = torch.isin(answers, torch.tensor(end_ids))
    after = is_end.cumsum(1) - is_end.long() > 0  # behind the first end
    return int((~after).sum())


def with_ours(
    model: Any, prompts: list[np.ndarray], end_ids: list[int], count: int, *, ends: bool, samples: int, seed: int
) -> int:
    """Tokens of the answers of our loop."""
    from rlhf_pipeline.config.schema import SamplingConfig
    from rlhf_pipeline.generation.decode import generate

    options = SamplingConfig(
        max_new_tokens=count, min_new_tokens=0 if ends else count, samples=samples, batch_tokens=10**9
    )
    ids = range(len(prompts))
    answers = generate(model, prompts, options, end_ids=end_ids, pad_id=0, seed=seed, ids=ids)
    return sum(len(one.tokens) for one in answers)


if __name__ == "__main__":
    main()
