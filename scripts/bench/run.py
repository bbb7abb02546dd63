"""SFT speed, side by side with TRL's SFTTrainer in one go: `make bench-sft`. Prints the tables of docs/benchmarks.md.

Both train the same random-initialised Llama shapes on the chosen side of HH harmless dialogues (Bai et al. 2022), at most
512 tokens, in bf16, on two threads. Runs take turns, several rounds; figures are medians. What is counted is
non-padding training tokens a second over the steady steps, peak resident memory, and the time from the start of the
process to the end of the first optimiser step. TRL lives in an environment of its own, which this script makes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, SHAPES, SKIP, install_trl, llama, machine, own_tokenizer, run_ours, run_trl

STEPS = {"small": 25, "medium": 9}  # timed and not, at 24 examples a step; twice as many at 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("RLHF_TEST_DATA")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(default, "hh_harmless.jsonl.gz") if default else None,
        required=default is None,
        help="HH dialogues: JSONL with `chosen` and `rejected` (default: the file in $RLHF_TEST_DATA)",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="timed on TRL's side, each run")
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--losses", nargs="+", default=["completion", "all"], choices=["completion", "all"])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench")
    arguments = parser.parse_args()
    install_trl()
    arguments.work.mkdir(parents=True, exist_ok=True)
    prepare(arguments.data, arguments.work, arguments.sizes)
    results: dict[str, list[dict[str, Any]]] = {}
    for number in range(arguments.rounds):
        for name, measure in contestants(arguments).items():
            figures = measure()
            results.setdefault(name, []).append(figures)
            shown = ", ".join(f"{key} {value:,.2f}" for key, value in figures.items())
            print(f"round {number + 1}  {name}: {shown}", flush=True)
            (arguments.work / "results.json").write_text(json.dumps(results, indent=1))
    report(results)


def prepare(source: Path, work: Path, sizes: list[str]) -> None:
    """Write prompt/completion rows, train a tokenizer on them, and build the models."""
    from transformers import AutoModelForCausalLM

    opener = gzip.open if source.suffix == ".gz" else open
    with opener(source, "rt", encoding="utf-8") as file:
        dialogues = [json.loads(line)["chosen"] for line in file]
    cut = [dialogue.rindex("\n\nAssistant:") + len("\n\nAssistant:") for dialogue in dialogues]
    rows = [{"prompt": d[:at], "completion": d[at:]} for d, at in zip(dialogues, cut, strict=True) if d[at:].strip()]
    (work / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = own_tokenizer(dialogues)
    for size in sizes:
        AutoModelForCausalLM.from_config(llama(size, tokenizer)).save_pretrained(work / size)
        tokenizer.save_pretrained(work / size)


def contestants(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, float]]]:
    """Name -> a function that runs it once."""
    found: dict[str, Callable[[], dict[str, float]]] = {}
    for size in arguments.sizes:
        for loss in arguments.losses if size == "small" else arguments.losses[:1]:
            common = ["--loss", loss]
            kept = [*common, "--mode", "packed-memkept"]
            trl_options = {
                "TRL default, 8 examples a step": common,
                "TRL packed (bfd), 8 rows a step": [*common, "--mode", "packed", "--packing", "bfd", "--rows", "1"],
                "TRL packed, memory kept": kept,
                "TRL packed, memory kept, no checkpointing": [*kept, "--gradient-checkpointing", "off"],
            }
            for examples in (8, 24):
                name = f"{size} | {loss} | rlhf sft, {examples} examples a step"
                found[name] = partial(ours, arguments, size, loss, examples)
            for name, options in trl_options.items():
                found[f"{size} | {loss} | {name}"] = partial(trl, arguments, size, options)
    found["start | | rlhf sft"] = partial(ours, arguments, arguments.sizes[0], "completion", 8, 1)
    found["start | | trl sft"] = partial(trl, arguments, arguments.sizes[0], ["--mode", "cli"])
    return found


def trl(arguments: argparse.Namespace, size: str, options: list[str]) -> dict[str, float]:
    work = arguments.work
    files = ["--model-dir", work / size, "--data", work / "hh.jsonl"]
    result = run_trl("trl_sft.py", [*files, "--skip", SKIP, "--max-seconds", arguments.seconds, *options])
    names = ("tokens_per_second", "peak_memory_gb", "first_step_seconds")
    return {name: float(result[name]) for name in names if name in result}


def ours(
    arguments: argparse.Namespace, size: str, loss: str, examples: int, steps: int | None = None
) -> dict[str, float]:
    num_steps = steps or STEPS[size] * (2 if examples == 8 else 1)
    overrides = [
        f"model.path={arguments.work / size}",
        "model.dtype=bfloat16",
        f"data.train={arguments.data}",
        "data.format=hh",
        "data.on_bad_row=skip",
        "data.max_length=512",
        "data.max_prompt_length=511",
        "data.long_prompt=keep_end",
        f"data.loss={'responses' if loss == 'completion' else 'all'}",
        f"batch.examples={examples}",
        "train.epochs=10",
        f"train.max_steps={num_steps}",
        "evaluation.before=false",
        "evaluation.every=0",
        "evaluation.samples=0",
        "runtime.threads=2",
        "tracking.progress=false",
    ]
    run = run_ours("sft", overrides, arguments.work)
    figures = {"first_step_seconds": run.first_step_seconds}
    if steps is None:
        figures |= {"tokens_per_second": run.tokens / run.seconds}
        figures |= {"peak_memory_gb": run.lines[-1]["time/peak_memory_gb"]}
    return figures


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    print(f"\n{machine()}; medians of {len(next(iter(results.values())))}\n")
    print("| size | scored | run | tokens/s | min-max | peak GB | to first step, s |")
    print("|---|---|---|---|---|---|---|")
    for name, rounds in results.items():
        size, loss, run = (part.strip() for part in name.split("|"))
        speeds = [r["tokens_per_second"] for r in rounds if "tokens_per_second" in r]
        memory = [r["peak_memory_gb"] for r in rounds if "peak_memory_gb" in r]
        first = [r["first_step_seconds"] for r in rounds if "first_step_seconds" in r]
        speed = f"{statistics.median(speeds):,.0f} | {min(speeds):,.0f}-{max(speeds):,.0f}" if speeds else " | "
        peak = f"{statistics.median(memory):.2f}" if memory else ""
        print(f"| {size} | {loss} | {run} | {speed} | {peak} | {statistics.median(first):.1f} |")


if __name__ == "__main__":
    main()
