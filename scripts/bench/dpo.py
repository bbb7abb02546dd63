"""DPO speed, side by side with TRL's DPOTrainer: `make bench-dpo`. Prints the table of docs/benchmarks.md.

Both sides train the same random-initialised Llama, which is its own reference, on HH harmless pairs (Bai et al. 2022), at
most 512 tokens a dialogue, by DPO with beta 0.1 and AdamW, 16 pairs a step. TRL gets the tokens that our side has made, in
the order of our batches. Either side's reference is

    live      a second model that sees every batch
    cached    log-probabilities computed once before the first step; TRL calls them precomputed

First a check, in fp32, with both references: the loss of the first step must be ln 2, the tokens trained on must be
equally many, and the second step, after an update, must have the same loss on both sides.

Then runs take turns, several rounds; figures are medians. What is counted is pairs a second, by the clock on the wall, from
the end of step `--skip` on, and peak resident memory. What computing the reference once takes is a column of its own: of
TRL the time of that part, over the first pairs; of ours, over all of them, how much longer the first step takes to come
than in a run that finds them on disk. In fp32 there is one pair of runs: cached, and TRL as shipped.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    first_epoch,
    install_trl,
    llama,
    machine,
    own_tokenizer,
    parser_of,
    read_rows,
    run_ours,
    run_trl,
    take_turns,
    write_rows,
)

PAIRS = 16  # of a step
PRECOMPUTED = 128  # pairs that TRL computes the reference of and trains on
TOLERANCE = 2e-5  # of the second step's loss in fp32, relative: sums in another order, of which Adam makes steps
LR, CHECKED_LR = 1e-6, 1e-4
OURS = "rlhf dpo"
SHIPPED = "TRL as shipped"

TRL_RUNS = {
    SHIPPED: [],
    "TRL, memory kept": ["--keep-memory"],
    "TRL, memory kept, no checkpointing": ["--keep-memory", "--gradient-checkpointing", "off"],
}
TRL_REFERENCES = {"live": "live", "cached": "precomputed"}


def main() -> None:
    parser = parser_of(__doc__, seconds=10.0, sizes=["small"], work="bench-dpo")
    parser.add_argument("--skip", type=int, default=2, help="steps of each run before the timing starts")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--references", nargs="+", default=list(TRL_REFERENCES), choices=list(TRL_REFERENCES))
    parser.add_argument("--skip-check", action="store_true", help="do not compare the losses first")
    arguments = parser.parse_args()
    install_trl()
    arguments.work.mkdir(parents=True, exist_ok=True)
    prepare(arguments)
    pairs, order = write_pairs(arguments)
    if not arguments.skip_check:
        for reference in arguments.references:
            check(arguments, pairs, reference)
    runs = contestants(arguments, pairs, order)
    report(take_turns(runs, rounds=arguments.rounds, work=arguments.work, only=arguments.only), arguments)


def prepare(arguments: argparse.Namespace) -> None:
    """Write the rows, train a tokenizer on their text, and build the models."""
    import torch
    from transformers import AutoModelForCausalLM

    rows = list(read_rows(arguments.data / "hh_harmless.jsonl.gz"))
    write_rows(arguments.work / "hh.jsonl", rows)
    tokenizer = own_tokenizer([row["chosen"] for row in rows])
    for size in arguments.sizes:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(llama(size, tokenizer)).save_pretrained(arguments.work / size)
        tokenizer.save_pretrained(arguments.work / size)


def overrides(arguments: argparse.Namespace, size: str, *, dtype: str, reference: str, lr: float = LR) -> list[str]:
    """The config of our side, apart from where its runs are. The optimiser's is TRL's."""
    return [
        f"model.path={arguments.work / size}",
        f"model.dtype={dtype}",
        f"data.train={arguments.work / 'hh.jsonl'}",
        "data.format=hh",
        "data.on_bad_row=skip",
        "data.max_length=512",
        "data.max_prompt_length=384",
        "data.long_prompt=keep_end",
        f"data.cache_dir={arguments.work / 'cache'}",
        "objective=dpo",
        "objective.beta=0.1",
        f"reference.cache={'true' if reference == 'cached' else 'false'}",
        f"batch.examples={PAIRS}",
        f"optim.lr={lr}",
        "optim.betas=[0.9,0.999]",
        "optim.decay=constant",
        "optim.warmup_fraction=0",
        "sampled.prompts=0",
        "train.epochs=1000",
        "evaluation.before=false",
        "evaluation.every=0",
        "checkpoint.every=1000000",
        "checkpoint.artifact_every_epoch=false",
        f"runtime.threads={arguments.threads}",
        "tracking.progress=false",
    ]


def write_pairs(arguments: argparse.Namespace) -> tuple[Path, Any]:
    """Our side's examples as TRL reads them, in the order of our first epoch; and that order."""
    chosen = overrides(arguments, arguments.sizes[0], dtype="float32", reference="live")
    batches, order = first_epoch("dpo", chosen, arguments.work)
    path = arguments.work / "pairs.jsonl"
    write_rows(path, [tree_pair(tree) for batch in batches for tree in batch])
    return path, order


def tree_pair(tree: Any) -> dict[str, list[int]]:
    best, worst = (tree.responses[i].tolist() for i in tree.ranks.argsort())
    return {"prompt_ids": tree.prompt.tolist(), "chosen_ids": best, "rejected_ids": worst}


def check(arguments: argparse.Namespace, pairs: Path, reference: str) -> None:
    """Leave when the two sides do not do the same in their first two steps, in fp32."""
    size = arguments.sizes[0]
    chosen = overrides(arguments, size, dtype="float32", reference=reference, lr=CHECKED_LR)
    lines = run_ours("dpo", [*chosen, "train.stop_after=2"], arguments.work).lines
    rows = [json.loads(line) for line in pairs.read_text().splitlines()[:PAIRS]]
    mine = {
        "first_loss": lines[0]["train/loss"],
        "second_loss": lines[1]["train/loss"],
        "first_trained": sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows),
    }
    short = ["--dtype", "float32", "--skip", 1, "--max-seconds", 0, "--lr", CHECKED_LR]
    result = run_trl("trl_dpo.py", [*trl_options(arguments, size, pairs, reference), *short])
    theirs = {name: result[name] for name in mine}
    for side, found in {"ours": mine, "TRL": theirs}.items():
        shown = ", ".join(f"{name} {value:,.7g}" for name, value in found.items())
        print(f"two steps in fp32, {reference} reference, {side}: {shown}", flush=True)
    begins = all(abs(found["first_loss"] - math.log(2)) < 1e-5 for found in (mine, theirs))
    goes_on = abs(mine["second_loss"] - theirs["second_loss"]) < TOLERANCE * abs(theirs["second_loss"])
    if not (begins and goes_on and mine["first_trained"] == theirs["first_trained"]):
        sys.exit("the two sides do not compute the same")


def contestants(arguments: argparse.Namespace, pairs: Path, order: Any) -> dict[str, Callable[[], dict[str, float]]]:
    """Name -> a function that runs it once."""
    found: dict[str, Callable[[], dict[str, float]]] = {}
    for size in arguments.sizes:
        for dtype in arguments.dtypes:
            for reference in arguments.references if dtype == "bfloat16" else ["cached"]:
                group = f"{size} | {dtype} | {reference}"
                found[f"{group} | {OURS}"] = partial(ours, arguments, size, order, dtype=dtype, reference=reference)
                for name in TRL_RUNS if dtype == "bfloat16" else [SHIPPED]:
                    options = [*trl_options(arguments, size, pairs, reference), "--dtype", dtype, *TRL_RUNS[name]]
                    found[f"{group} | {name}"] = partial(trl, arguments, options)
    return found


def ours(arguments: argparse.Namespace, size: str, order: Any, *, dtype: str, reference: str) -> dict[str, float]:
    kept = arguments.work / "cache" / "reference"
    shutil.rmtree(kept, ignore_errors=True)
    chosen = overrides(arguments, size, dtype=dtype, reference=reference)
    run = run_ours("dpo", chosen, arguments.work, max_seconds=arguments.seconds, skip=arguments.skip)
    done = len(run.lines)
    pairs = order.size_before(done) - order.size_before(done - run.cpu_steps)
    figures = {
        "pairs_per_second": pairs / (run.wall_seconds or float("nan")),
        "pairs_per_cpu_second": pairs / (run.cpu_seconds or float("nan")),
        "peak_memory_gb": run.lines[-1]["time/peak_memory_gb"],
        "steps_timed": run.cpu_steps,
    }
    if reference == "cached":
        again = run_ours("dpo", [*chosen, "train.stop_after=1"], arguments.work)
        computed = sum(json.loads(file.read_text())["examples"] for file in kept.glob("*.json"))
        figures["reference_pairs_per_second"] = computed / (run.first_step_seconds - again.first_step_seconds)
    return figures


def trl_options(arguments: argparse.Namespace, size: str, pairs: Path, reference: str) -> list[Any]:
    options = ["--model-dir", arguments.work / size, "--data", pairs, "--pairs", PAIRS, "--threads", arguments.threads]
    computed = ["--reference", TRL_REFERENCES[reference]]
    return [*options, *computed, *(["--rows", PRECOMPUTED] if reference == "cached" else [])]


def trl(arguments: argparse.Namespace, options: list[Any]) -> dict[str, float]:
    result = run_trl("trl_dpo.py", [*options, "--skip", arguments.skip, "--max-seconds", arguments.seconds])
    figures = {
        "pairs_per_second": result["pairs_per_second"],
        "pairs_per_cpu_second": result["used_pairs"] / result["cpu_seconds"],
        **{name: result[name] for name in ("peak_memory_gb", "steps_timed", "padding_fraction")},
    }
    if result["precomputed_pairs"]:
        figures["reference_pairs_per_second"] = result["precomputed_pairs"] / result["precompute_seconds"]
    return figures


def report(results: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    """The table; then what our side's speed and memory are to TRL's, medians over the rounds."""
    print(f"\n{machine()}; {arguments.threads} threads; medians of {arguments.rounds}\n")
    names = ["size", "dtype", "reference", "run", "pairs/s", "min-max", "pairs/CPU second", "padding", "peak GB"]
    names += ["computing the reference, pairs/s", "an epoch with it, pairs/s"]
    print(f"| {' | '.join(names)} |")
    print("|---" * len(names) + "|")
    for name, rounds in results.items():
        speeds = [one["pairs_per_second"] for one in rounds]
        cpu, padding, memory = (
            statistics.median(one.get(key, 0.0) for one in rounds)
            for key in ("pairs_per_cpu_second", "padding_fraction", "peak_memory_gb")
        )
        cells = f"{statistics.median(speeds):.1f} | {min(speeds):.1f}-{max(speeds):.1f} | {cpu:.1f} | {padding:.0%}"
        computing = [one.get("reference_pairs_per_second", math.inf) for one in rounds]
        epoch = statistics.median(1 / (1 / speed + 1 / first) for speed, first in zip(speeds, computing, strict=True))
        once = f"{statistics.median(computing):.1f}" if computing[0] < math.inf else "in every step"
        print(f"| {name} | {cells} | {memory:.2f} | {once} | {epoch:.1f} |")
    print()
    for name, mine in results.items():
        group, _, run = name.rpartition(" | ")
        for other in TRL_RUNS if run == OURS else []:
            theirs = results.get(f"{group} | {other}")
            if theirs is not None:
                speed, memory = (
                    statistics.median(a[key] / b[key] for a, b in zip(mine, theirs, strict=True))
                    for key in ("pairs_per_second", "peak_memory_gb")
                )
                print(f"{name}: {speed:.2f} of the speed and {memory:.2f} of the memory of {other}")


if __name__ == "__main__":
    main()
