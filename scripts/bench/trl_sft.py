"""Time TRL's `SFTTrainer` on CPU: the other half of the SFT speed benchmark.

Run it with the benchmark's own virtual environment (`requirements.txt` beside this file), never with the package's:
it imports TRL and nothing of `rlhf_pipeline`. It trains a local model folder on a local JSONL file and writes one JSON
object as its last line of output: non-padding tokens a second over the steady steps, peak memory, and the seconds from
the start of the process to the end of the first optimiser step.

TRL runs as it ships. What `settings` does not name keeps TRL's default: gradient checkpointing on, AdamW fused, fp32
weights under bf16 autocast, a loss that chunks the vocabulary logits. `--gradient-checkpointing off` and
`--model-dtype bfloat16` are the two switches a TRL user would try for more speed.

Mode `cli` starts the shipped `trl sft` command with the same settings and times it from outside.

Linux only. Left out: evaluation, checkpoints, reporting, several processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import measured, print_result, restart_keeping_memory, train_timed

ROWS_PER_STEP = 8
"""Rows in an optimiser step: TRL's own default batch."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True, help="Hugging Face folder: model and tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="JSONL rows with prompt and completion, or text")
    parser.add_argument("--mode", choices=["default", "packed", "packed-memkept", "cli"], default="default")
    parser.add_argument("--loss", choices=["completion", "all"], default="completion", help="tokens scored")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="bf16: autocast, TRL's default")
    parser.add_argument("--model-dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--gradient-checkpointing", choices=["on", "off"], default="on", help="TRL's default: on")
    parser.add_argument("--packing", choices=["bfd", "wrapped"], default="wrapped", help="when packed")
    parser.add_argument("--rows", type=int, default=ROWS_PER_STEP, help=f"rows a forward; {ROWS_PER_STEP} a step")
    parser.add_argument("--max-length", type=int, default=512, help="longest row in tokens")
    parser.add_argument("--skip", type=int, default=3, help="optimiser steps before the timing starts")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps timed, at most")
    parser.add_argument("--max-seconds", type=float, default=40.0, help="seconds timed, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    if arguments.skip < 1 or arguments.steps < 1 or ROWS_PER_STEP % arguments.rows:
        parser.error(f"--skip and --steps must be at least 1, and --rows must divide {ROWS_PER_STEP}")
    return arguments


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every `SFTConfig` field that is set, apart from the output folder and the number of steps.

    `bfd` keeps documents apart, but on CPU the attention of a batch is one dense mask over all its rows end to end,
    so it is fast only with `--rows 1`. `wrapped` cuts the text into full rows and lets documents see each other; it
    is the fastest once memory is kept.
    """
    chosen: dict[str, Any] = {
        "use_cpu": True,  # without it SFTConfig refuses its own bf16 default where there is no GPU
        "bf16": arguments.dtype == "bf16",
        "max_length": arguments.max_length,
        "completion_only_loss": arguments.loss == "completion",
        "per_device_train_batch_size": arguments.rows,
        "gradient_accumulation_steps": ROWS_PER_STEP // arguments.rows,
        "gradient_checkpointing": arguments.gradient_checkpointing == "on",
        "save_strategy": "no",
        "report_to": "none",
    }
    if arguments.mode.startswith("packed"):
        chosen |= {"packing": True, "packing_strategy": arguments.packing}
    return chosen


def train(arguments: argparse.Namespace, output_dir: str) -> dict[str, float]:
    import torch
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(arguments.threads)

    def count(inputs: dict[str, Any]) -> dict[str, int]:
        positions, mask = inputs["input_ids"].numel(), inputs.get("attention_mask")
        return {
            "positions": positions,
            "tokens": positions if mask is None else int(mask.sum()),
            "scored": int((inputs["labels"][:, 1:] != -100).sum()),
        }

    config = SFTConfig(
        output_dir=output_dir,
        max_steps=arguments.skip + arguments.steps,
        model_init_kwargs={"dtype": arguments.model_dtype},
        **settings(arguments),
    )
    records = train_timed(
        SFTTrainer,
        count,
        skip=arguments.skip,
        max_seconds=arguments.max_seconds,
        model=str(arguments.model_dir),
        args=config,
        train_dataset=load_dataset("json", data_files=str(arguments.data), split="train"),
    )
    figures = measured(records, skip=arguments.skip)
    return figures | {"scored_fraction": figures["used_scored"] / figures["used_tokens"]}


def command_line(arguments: argparse.Namespace, folder: str) -> list[str]:
    """The `trl sft` command for these arguments, of the environment that runs this script."""
    data_folder = Path(folder, "data")
    data_folder.mkdir()
    (data_folder / "train.jsonl").symlink_to(arguments.data.resolve())
    command = [str(Path(sys.executable).with_name("trl")), "sft"]
    chosen = settings(arguments) | {
        "model_name_or_path": arguments.model_dir,
        "dtype": arguments.model_dtype,
        "dataset_name": data_folder,
        "output_dir": Path(folder, "output"),
        "max_steps": 1,
        "logging_steps": 1,
    }
    for name, value in chosen.items():
        command += [f"--{name}", str(value)]
    return command


def time_command_line(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Start `trl sft` for one step. It logs the loss of a step as soon as that step is complete: wait for that line."""
    command = command_line(arguments, folder)
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    lines: list[str] = []
    first_step = None
    for line in process.stdout:
        lines.append(line)
        if first_step is None and "'loss':" in line:
            first_step = time.perf_counter() - started
    if process.wait() != 0 or first_step is None:
        sys.exit("trl sft failed:\n" + "".join(lines[-30:]))
    whole_run = time.perf_counter() - started
    return {"first_step_seconds": first_step, "whole_run_seconds": whole_run, "command": command}


def main() -> None:
    arguments = parse_arguments()
    if arguments.mode == "packed-memkept":
        restart_keeping_memory()
    # Before torch is imported; `trl sft` would otherwise be launched with a single thread.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        # A fresh folder, so that no run finds the prepared dataset of the one before in the cache.
        os.environ["HF_HOME"] = str(Path(folder, "hf"))
        if arguments.mode == "cli":
            figures = time_command_line(arguments, folder)
        else:
            figures = train(arguments, folder)
    report = {
        "mode": arguments.mode,
        "loss": arguments.loss,
        "model_dtype": arguments.model_dtype,
        "threads": arguments.threads,
        **figures,
        "sft_config": settings(arguments),
    }
    print_result(report, arguments.output)


if __name__ == "__main__":
    main()
