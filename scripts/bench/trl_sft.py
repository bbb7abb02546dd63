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
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROWS_PER_STEP = 8
"""Rows in an optimiser step: TRL's own default batch."""

KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
"""Makes glibc keep freed memory instead of handing it back to the kernel at every step."""


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


def seconds_since_process_start() -> float:
    """Seconds since the kernel started this process, to 10 ms; an `exec` does not set it back."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def peak_memory_gb() -> float:
    """Peak resident memory, 1e9 bytes. Not `ru_maxrss`: the process that started this one can leave its own there."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in status if line.startswith("VmHWM:"))


def cpu_seconds() -> dict[str, float]:
    """CPU seconds used so far by this process (`user`, `system`) and by the whole machine (`machine`)."""
    own = os.times()
    user, nice, system, _, _, irq, softirq, steal = (
        int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    machine = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return {"user": own.user, "system": own.system, "machine": machine}


def train(arguments: argparse.Namespace, output_dir: str) -> list[dict[str, float]]:
    """Train until enough is timed; return running totals at the end of each optimiser step."""
    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(arguments.threads)
    totals = {"positions": 0, "tokens": 0, "scored": 0}
    records: list[dict[str, float]] = []

    class CountingTrainer(SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            # Counted where a batch is trained on, not in the collator: the loader is one batch ahead.
            positions, mask = inputs["input_ids"].numel(), inputs.get("attention_mask")
            totals["positions"] += positions
            totals["tokens"] += positions if mask is None else int(mask.sum())
            totals["scored"] += int((inputs["labels"][:, 1:] != -100).sum())
            return super().training_step(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            records.append(
                {"time": time.perf_counter(), "start": seconds_since_process_start(), **totals, **cpu_seconds()}
            )
            timed = records[arguments.skip - 1 :]
            if len(timed) > 1 and timed[-1]["time"] - timed[0]["time"] >= arguments.max_seconds:
                control.should_training_stop = True

    config = SFTConfig(
        output_dir=output_dir,
        max_steps=arguments.skip + arguments.steps,
        model_init_kwargs={"dtype": arguments.model_dtype},
        **settings(arguments),
    )
    dataset = load_dataset("json", data_files=str(arguments.data), split="train")
    CountingTrainer(model=str(arguments.model_dir), args=config, train_dataset=dataset, callbacks=[Clock()]).train()
    return records


def measured(records: list[dict[str, float]], *, skip: int) -> dict[str, float]:
    """The figures of the steps after the first `skip`."""
    used = {name: records[-1][name] - records[skip - 1][name] for name in records[0]}
    seconds, steps = used["time"], len(records) - skip
    return {
        "tokens_per_second": used["tokens"] / seconds,
        "steps_timed": steps,
        "seconds_timed": seconds,
        "tokens_per_step": used["tokens"] / steps,
        "padding_fraction": 1 - used["tokens"] / used["positions"],
        "scored_fraction": used["scored"] / used["tokens"],
        "system_cpu_fraction": used["system"] / (used["user"] + used["system"]),
        "other_cpus_busy": max(0.0, used["machine"] - used["user"] - used["system"]) / seconds,
        "peak_memory_gb": peak_memory_gb(),
        "first_step_seconds": records[0]["start"],
    }


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
    if arguments.mode == "packed-memkept" and any(os.environ.get(name) != KEEP_MEMORY[name] for name in KEEP_MEMORY):
        # glibc reads these when a process starts, so start again.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    # Before torch is imported; `trl sft` would otherwise be launched with a single thread.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        # A fresh folder, so that no run finds the prepared dataset of the one before in the cache.
        os.environ["HF_HOME"] = str(Path(folder, "hf"))
        if arguments.mode == "cli":
            figures = time_command_line(arguments, folder)
        else:
            figures = measured(train(arguments, folder), skip=arguments.skip)
    report = {
        "mode": arguments.mode,
        "loss": arguments.loss,
        "model_dtype": arguments.model_dtype,
        "threads": arguments.threads,
        **figures,
        "sft_config": settings(arguments),
        "versions": {name: version(name) for name in ("trl", "transformers", "accelerate", "datasets", "torch")},
    }
    line = json.dumps(report)
    if arguments.output is not None:
        arguments.output.write_text(line + "\n")
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
