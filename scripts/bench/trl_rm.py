"""Time TRL's `RewardTrainer` on CPU: the other half of the reward model's speed benchmark.

Run it with the benchmark's own virtual environment (`requirements.txt` beside this file), never with the package's: it
imports TRL and nothing of `rlhf_pipeline`. It trains a local classifier folder on a JSONL file of tokenised pairs
(`chosen_ids`, `rejected_ids`, which RewardTrainer takes as they are) in the order of the file, and writes one JSON object
as its last line of output.

TRL runs as it ships: what `settings` does not name keeps TRL's default. These are batches of 8 pairs padded to the longest
of their 16 sequences, one optimiser step a batch, gradient checkpointing on, AdamW fused, fp32 weights under bf16
autocast, attention by sdpa. Both sequences of a pair are computed whole.

Linux only. Left out: tokenisation, evaluation, checkpoints, reporting, several processes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from common import measured, print_result, restart_keeping_memory, train_timed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True, help="Hugging Face folder: classifier and tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="JSONL rows with chosen_ids and rejected_ids")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="bfloat16: by autocast")
    parser.add_argument("--pairs", type=int, default=8, help="in a batch; TRL's default: 8")
    parser.add_argument("--gradient-checkpointing", choices=["on", "off"], default="on", help="TRL's default: on")
    parser.add_argument("--keep-memory", action="store_true", help="glibc keeps freed memory")
    parser.add_argument("--skip", type=int, default=3, help="optimiser steps before the timing starts")
    parser.add_argument("--max-seconds", type=float, default=15.0, help="seconds timed, and the step that exceeds them")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every `RewardConfig` field that is set, apart from the output folder and the number of steps."""
    return {
        "use_cpu": True,  # without it RewardConfig refuses its own bf16 default where there is no GPU
        "bf16": arguments.dtype == "bfloat16",
        "max_length": 512,
        "per_device_train_batch_size": arguments.pairs,
        "gradient_checkpointing": arguments.gradient_checkpointing == "on",
        "train_sampling_strategy": "sequential",  # the file is shuffled, in the order of the other side
        "save_strategy": "no",
        "report_to": "none",
    }


def train(arguments: argparse.Namespace, output_dir: str) -> dict[str, float]:
    import torch
    from datasets import load_dataset
    from trl import RewardConfig, RewardTrainer

    torch.set_num_threads(arguments.threads)

    def count(inputs: dict[str, Any]) -> dict[str, int]:
        tokens = inputs["input_ids"]  # the preferred answers of the batch, then the others
        return {
            "pairs": len(tokens) // 2,
            "positions": tokens.numel(),
            "tokens": int(inputs["attention_mask"].sum()),
        }

    config = RewardConfig(output_dir=output_dir, max_steps=100_000, **settings(arguments))
    records = train_timed(
        RewardTrainer,
        count,
        skip=arguments.skip,
        max_seconds=arguments.max_seconds,
        model=str(arguments.model_dir),
        args=config,
        train_dataset=load_dataset("json", data_files=str(arguments.data), split="train"),
    )
    figures = measured(records, skip=arguments.skip)
    return figures | {"pairs_per_second": figures["used_pairs"] / figures["seconds_timed"]}


def main() -> None:
    arguments = parse_arguments()
    if arguments.keep_memory:
        restart_keeping_memory()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = str(Path(folder, "hf"))
        figures = train(arguments, folder)
    print_result({"threads": arguments.threads, **figures, "reward_config": settings(arguments)})


if __name__ == "__main__":
    main()
