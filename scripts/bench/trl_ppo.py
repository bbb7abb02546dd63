"""Time TRL's `PPOTrainer` on CPU: the other half of the PPO speed benchmark.

Run it with an environment of its own (`requirements-ppo.txt` beside this file), never with the package's: TRL 1.12 is the
last release that has PPO (`trl.experimental.ppo`). It trains a local policy folder against a local classifier folder, from
which the value model starts too, on a JSONL file of tokenised prompts (`input_ids`), and writes one JSON object as its
last line of output.

TRL runs as it ships: what `settings` does not name keeps TRL's default. Prompts are padded on the left to the longest of
the iteration; answers are drawn by `generate` of transformers, all at once; without a stop token every answer has its full
length. Value model and policy are one module with one optimiser, AdamW fused. `PPOTrainer` never turns gradient
checkpointing on. With one accumulation step, as here, every minibatch is an update; with more, minibatches would be
gathered into less updates than asked for.

Three dtypes, by --dtype:

    float32    what comes of `bf16=True`, TRL's default, under transformers 5: PPOTrainer makes its Accelerator without it
    autocast   `accelerate launch --mixed_precision bf16`: training passes under autocast, rollouts in fp32
    bfloat16   all models loaded in bf16, and no fp32 weights to update

Linux only. Left out: tokenisation, evaluation, checkpoints, reporting, several processes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from common import cpu_seconds, peak_memory_gb, print_result, restart_keeping_memory, seconds_since_process_start


class Enough(Exception):
    """Raised out of the training loop, which does not look at `control.should_training_stop`."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True, help="Hugging Face folder: language model and tokenizer")
    parser.add_argument("--reward-model", type=Path, required=True, help="Hugging Face folder: classifier")
    parser.add_argument("--data", type=Path, required=True, help="JSONL rows with input_ids")
    parser.add_argument("--dtype", choices=["float32", "autocast", "bfloat16"], default="float32")
    parser.add_argument("--episodes", type=int, default=64, help="in an iteration")
    parser.add_argument("--minibatch", type=int, default=16, help="episodes in an update")
    parser.add_argument("--epochs", type=int, default=4, help="over an iteration's episodes")
    parser.add_argument("--tokens", type=int, default=64, help="of every response")
    parser.add_argument("--keep-memory", action="store_true", help="glibc keeps freed memory")
    parser.add_argument("--skip", type=int, default=1, help="iterations before the timing starts")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="timed, and the iteration that exceeds them")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every `PPOConfig` field that is set, apart from the output folder."""
    return {
        "use_cpu": True,
        "per_device_train_batch_size": arguments.episodes,
        "num_mini_batches": arguments.episodes // arguments.minibatch,
        "num_ppo_epochs": arguments.epochs,
        "response_length": arguments.tokens,
        "temperature": 1.0,
        "total_episodes": 100_000 * arguments.episodes,
        "num_sample_generations": 0,
        "save_strategy": "no",
        "report_to": "none",
    }


def train(arguments: argparse.Namespace, output_dir: str) -> tuple[list[dict[str, float]], str]:
    """Running totals at the end of each iteration and what TRL logs of it; and the precision that passes run in."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(arguments.threads)
    dtype = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
    totals = {"updates": 0, "trained_tokens": 0, "positions": 0, "tokens": 0}
    records: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.logs = kwargs["logs"]

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            names = {"kl": "objective/kl", "entropy": "objective/entropy", "score": "objective/scores"}
            logged = {name: self.logs[theirs] for name, theirs in names.items()}
            times = {"time": time.perf_counter(), "start": seconds_since_process_start(), **cpu_seconds()}
            records.append({**times, **totals, **logged})
            timed = records[arguments.skip - 1 :]
            if timed and timed[-1]["time"] - timed[0]["time"] >= arguments.max_seconds:
                raise Enough

    def count(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        mask = inputs["attention_mask"]
        totals["positions"] += mask.numel()
        totals["tokens"] += int(mask.sum())
        totals["trained_tokens"] += int(mask[:, -arguments.tokens :].sum())

    def updated(optimizer: Any, args: Any, kwargs: Any) -> None:
        totals["updates"] += 1

    classifiers = [
        AutoModelForSequenceClassification.from_pretrained(arguments.reward_model, dtype=dtype) for _ in range(2)
    ]
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=output_dir, **settings(arguments)),
        processing_class=AutoTokenizer.from_pretrained(arguments.policy, padding_side="left"),
        model=AutoModelForCausalLM.from_pretrained(arguments.policy, dtype=dtype),
        ref_model=AutoModelForCausalLM.from_pretrained(arguments.policy, dtype=dtype),
        reward_model=classifiers[0].eval(),
        value_model=classifiers[1],
        train_dataset=load_dataset("json", data_files=str(arguments.data), split="train"),
        callbacks=[Clock()],
    )
    trainer.model.register_forward_pre_hook(count, with_kwargs=True)  # called by training passes alone
    trainer.optimizer.optimizer.register_step_post_hook(updated)
    try:
        trainer.train()
    except Enough:
        return records, trainer.accelerator.mixed_precision
    raise RuntimeError("TRL trained to its end")


def figures(records: list[dict[str, float]], arguments: argparse.Namespace) -> dict[str, float]:
    """Rates of the iterations after the first `--skip`, and what the first one was."""
    done = len(records) - arguments.skip
    timed = {name: records[-1][name] - records[arguments.skip - 1][name] for name in records[0]}
    cpu = timed["user"] + timed["system"]
    first = records[0]
    return {
        "episodes_per_second": done * arguments.episodes / timed["time"] if done else 0.0,
        "episodes_per_cpu_second": done * arguments.episodes / cpu if done else 0.0,
        "iterations_timed": done,
        "seconds_timed": timed["time"],
        "peak_memory_gb": peak_memory_gb(),
        "first_iteration_seconds": first["start"],
        "padding_fraction": 1 - first["tokens"] / first["positions"],
        "first_kl": first["kl"],
        "first_entropy": first["entropy"] / arguments.tokens,  # nats a token
        "first_updates": first["updates"],
        "first_trained_tokens": first["trained_tokens"],
    }


def main() -> None:
    arguments = parse_arguments()
    if arguments.keep_memory:
        restart_keeping_memory()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported
    if arguments.dtype == "autocast":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `accelerate launch` does
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = str(Path(folder, "hf"))
        records, precision = train(arguments, folder)
    how = {"threads": arguments.threads, "mixed_precision": precision, "ppo_config": settings(arguments)}
    print_result(figures(records, arguments) | how)


if __name__ == "__main__":
    main()
