"""Time TRL's `DPOTrainer` on CPU: the other half of the DPO speed benchmark.

Run it with the benchmark's own virtual environment (`requirements.txt` beside this file), never with the package's: it
imports TRL and nothing of `rlhf_pipeline`. It trains a local model folder on a JSONL file of tokenised pairs (`prompt_ids`,
`chosen_ids`, `rejected_ids`, which is what DPOTrainer makes of texts) in the order of the file, and writes one JSON object
as its last line of output.

TRL runs as it ships: what `settings` does not name keeps TRL's default. These are batches of 8 pairs, as many of them
accumulated as make up a step, each padded to the longest of its 16 sequences; gradient checkpointing; AdamW fused, fp32
weights under bf16 autocast, attention by sdpa; beta 0.1. Both sequences of a pair are computed whole, the vocabulary head
at the positions of answers only. The reference is a second copy of the model in fp32 that sees every batch; or, with
--reference precomputed, its log-probabilities are computed once, in batches of 8, before the first step.

Linux only. Left out: tokenisation, evaluation, checkpoints, reporting, several processes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from common import measured, print_result, restart_keeping_memory, train_timed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model-dir", type=Path, required=True, help="Hugging Face folder: language model and tokenizer"
    )
    parser.add_argument("--data", type=Path, required=True, help="JSONL rows with prompt_ids, chosen_ids, rejected_ids")
    parser.add_argument("--rows", type=int, help="train on so many from the start of the file; default: all")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="bfloat16: by autocast")
    parser.add_argument("--reference", choices=["live", "precomputed"], default="live", help="TRL's default: live")
    parser.add_argument("--pairs", type=int, default=16, help="of an optimiser step")
    parser.add_argument("--batch", type=int, default=8, help="pairs in a forward pass; TRL's default: 8")
    parser.add_argument("--lr", type=float, default=1e-6, help="TRL's default: 1e-6")
    parser.add_argument("--gradient-checkpointing", choices=["on", "off"], default="on", help="TRL's default: on")
    parser.add_argument("--keep-memory", action="store_true", help="glibc keeps freed memory")
    parser.add_argument("--skip", type=int, default=3, help="optimiser steps before the timing starts")
    parser.add_argument("--max-seconds", type=float, default=15.0, help="seconds timed, and the step that exceeds them")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every `DPOConfig` field that is set, apart from the output folder and the number of steps."""
    accumulated, rest = divmod(arguments.pairs, arguments.batch)
    assert not rest, "a step is a whole number of batches"
    return {
        "use_cpu": True,  # without it DPOConfig refuses its own bf16 default where there is no GPU
        "bf16": arguments.dtype == "bfloat16",
        "max_length": 512,
        "per_device_train_batch_size": arguments.batch,
        "gradient_accumulation_steps": accumulated,
        "precompute_ref_log_probs": arguments.reference == "precomputed",
        "gradient_checkpointing": arguments.gradient_checkpointing == "on",
        "learning_rate": arguments.lr,
        "train_sampling_strategy": "sequential",  # the file is shuffled, in the order of the other side
        "save_strategy": "no",
        "report_to": "none",
    }


def train(arguments: argparse.Namespace, output_dir: str) -> dict[str, float]:
    import torch
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(arguments.threads)
    precomputing = {"precompute_seconds": 0.0, "precomputed_pairs": 0}

    class Tokenised(DPOTrainer):
        """Takes rows of tokens as they are, and times what is precomputed."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            found = super()._precompute_ref_logps(dataset, *args, **kwargs)
            precomputing.update(precompute_seconds=time.perf_counter() - begin, precomputed_pairs=len(dataset))
            return found

    def count(inputs: dict[str, Any]) -> dict[str, int]:
        tokens = inputs["input_ids"]  # the preferred answers of the batch, then the others
        return {
            "pairs": len(tokens) // 2,
            "positions": tokens.numel(),
            "tokens": int(inputs["attention_mask"].sum()),
            "trained": int(inputs["completion_mask"].sum()),
        }

    rows = load_dataset("json", data_files=str(arguments.data), split="train")
    records = train_timed(
        Tokenised,
        count,
        skip=arguments.skip,
        max_seconds=arguments.max_seconds,
        model=str(arguments.model_dir),
        args=DPOConfig(output_dir=output_dir, max_steps=100_000, **settings(arguments)),
        train_dataset=rows.select(range(min(arguments.rows or len(rows), len(rows)))),
    )
    figures = measured(records, skip=arguments.skip)
    return {
        **figures,
        **precomputing,
        "pairs_per_second": figures["used_pairs"] / figures["seconds_timed"],
        "first_trained": records[0]["trained"],
        "second_loss": records[1]["loss"] - records[0]["loss"],
    }


def main() -> None:
    arguments = parse_arguments()
    if arguments.keep_memory:
        restart_keeping_memory()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported
    with tempfile.TemporaryDirectory() as folder:
        # A fresh folder, so that no run finds the log-probabilities of the one before in the cache.
        os.environ["HF_HOME"] = str(Path(folder, "hf"))
        figures = train(arguments, folder)
    print_result({"threads": arguments.threads, **figures, "dpo_config": settings(arguments)})


if __name__ == "__main__":
    main()
