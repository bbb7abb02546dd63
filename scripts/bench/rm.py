"""Reward model speed, side by side with TRL's RewardTrainer: `make bench-rm`. Prints the table of docs/benchmarks.md.

Two data sets, both of real text, at most 512 tokens a dialogue:

    pairs     HH harmless (Bai et al. 2022)
    rankings  the prompts of alpaca_kwise.jsonl.gz (AlpacaEval's answers of many models) with 9 different answers, in the
              order of their judge's scores; equal scores in the order of the file, so that each has 36 comparisons

Both sides train the same random-initialised Llama classifiers from the same weights. TRL gets the tokens that our side has
made, as pairs: of a ranking all 36. Its pairs come in the order of our batches; those of rankings, after the first
prompt's, shuffled among all prompts, as its own sampler would. First a check, in fp32: both must have the same loss in
the first step. Then runs take turns, several rounds; figures are medians. What is counted is comparisons a second over
the steady steps, time to the first step left out, and peak resident memory.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    SHAPES,
    SKIP,
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

if TYPE_CHECKING:
    from rlhf_pipeline.data.order import BatchOrder

K = 9
TOLERANCE = 2e-5  # of a loss in fp32, relative: sums in another order


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A data set: the file as our side reads it, how many examples a step, and what TRL gets in the check."""

    file: str
    format: str
    per_example: int  # comparisons
    examples: tuple[int, ...]  # a step on our side; TRL's batch is 8 pairs
    checked: int  # examples in the check's only step


TASKS = {
    "pairs": Task(file="hh.jsonl", format="hh", per_example=1, examples=(8, 64), checked=8),
    "rankings": Task(file="rankings.jsonl", format="kwise_ranks", per_example=36, examples=(4,), checked=1),
}
TRL_RUNS = {
    "TRL as shipped": [],
    "TRL, memory kept": ["--keep-memory"],
    "TRL, memory kept, no checkpointing": ["--keep-memory", "--gradient-checkpointing", "off"],
}


def main() -> None:
    parser = parser_of(__doc__, seconds=15.0, sizes=list(SHAPES), work="bench-rm")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--skip-check", action="store_true", help="do not compare the losses first")
    arguments = parser.parse_args()
    install_trl()
    arguments.work.mkdir(parents=True, exist_ok=True)
    prepare(Path(arguments.data), arguments.work, arguments.sizes)
    if not arguments.skip_check:
        for task in arguments.tasks:
            check(arguments, task)
    report(take_turns(contestants(arguments), rounds=arguments.rounds, work=arguments.work, only=arguments.only))


def prepare(source: Path, work: Path, sizes: list[str]) -> None:
    """Write the rows of both data sets, train a tokenizer on their text, and build the models."""
    import torch
    from transformers import AutoModelForSequenceClassification

    pairs, rankings = (list(read_rows(source / f"{name}.jsonl.gz")) for name in ("hh_harmless", "alpaca_kwise"))
    write_rows(work / "hh.jsonl", pairs)
    write_rows(work / "rankings.jsonl", filter(None, map(strictly_ranked, rankings)))
    tokenizer = own_tokenizer(
        [row["chosen"] for row in pairs] + [text for row in rankings for text in row["responses"]]
    )
    for size in sizes:
        config = llama(size, tokenizer)
        config.num_labels = 1
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        torch.nn.init.normal_(model.score.weight, std=(config.hidden_size + 1) ** -0.5)
        model.save_pretrained(work / size)
        tokenizer.save_pretrained(work / size)


def strictly_ranked(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row with ranks 0 to K - 1, if it has K different answers."""
    scores = row["scores"]
    if len(set(row["responses"])) != K:
        return None
    best_first = sorted(range(len(scores)), key=lambda i: -scores[i])
    ranks = [best_first.index(i) for i in range(len(scores))]
    return {"prompt": row["prompt"], "responses": row["responses"], "ranks": ranks}


def overrides(arguments: argparse.Namespace, size: str, task: str, *, dtype: str, examples: int) -> list[str]:
    """The config of our side, apart from where its runs are."""
    return [
        f"model.path={arguments.work / size}",
        f"model.dtype={dtype}",
        f"data.train={arguments.work / TASKS[task].file}",
        f"data.format={TASKS[task].format}",
        "data.on_bad_row=skip",
        "data.max_length=512",
        "data.max_prompt_length=384",
        "data.long_prompt=keep_end",
        f"data.cache_dir={arguments.work / 'cache'}",
        "normalise.examples=8",
        f"batch.examples={examples}",
        "train.epochs=1000",
        "evaluation.before=false",
        "evaluation.every=0",
        "checkpoint.every=1000000",
        "checkpoint.artifact_every_epoch=false",
        f"runtime.threads={arguments.threads}",
        "tracking.progress=false",
    ]


def write_pairs(arguments: argparse.Namespace, size: str, task: str, *, examples: int) -> tuple[Path, BatchOrder]:
    """Our side's examples as TRL reads them, in the order of our first epoch; and that order."""
    chosen = overrides(arguments, size, task, dtype="float32", examples=examples)
    batches, order = first_epoch("rm", chosen, arguments.work)
    first, *others = ([tree_pairs(tree) for tree in batch] for batch in batches)
    head = [pair for pairs in first for pair in pairs]
    tail = [pair for batch in others for pairs in batch for pair in pairs]
    if TASKS[task].per_example > 1:
        random.Random(0).shuffle(tail)
    path = arguments.work / f"{task}-{examples}.jsonl"
    write_rows(path, head + tail)
    return path, order


def tree_pairs(tree: Any) -> list[dict[str, list[int]]]:
    """Every two answers of a ranking, the better first, each behind the prompt."""
    dialogues = [[*tree.prompt.tolist(), *tree.responses[i].tolist()] for i in tree.ranks.argsort()]
    return [{"chosen_ids": better, "rejected_ids": worse} for better, worse in combinations(dialogues, 2)]


def check(arguments: argparse.Namespace, task: str) -> None:
    """Leave when the two sides' losses differ in the first step, in fp32."""
    size, examples = arguments.sizes[0], TASKS[task].checked
    pairs, _ = write_pairs(arguments, size, task, examples=examples)
    chosen = overrides(arguments, size, task, dtype="float32", examples=examples)
    mine = run_ours("rm", chosen, arguments.work, max_seconds=0.0).lines[0]["train/loss"]
    number = ["--pairs", examples * TASKS[task].per_example]
    short = ["--dtype", "float32", "--skip", 1, "--max-seconds", 0]
    theirs = run_trl("trl_rm.py", ["--model-dir", arguments.work / size, "--data", pairs, *number, *short])[
        "first_loss"
    ]
    print(f"first loss in fp32, {task}: ours {mine:.7f}, TRL {theirs:.7f}", flush=True)
    if abs(mine - theirs) > TOLERANCE * abs(theirs):
        sys.exit("the two sides do not compute the same")


def contestants(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, float]]]:
    """Name -> a function that runs it once."""
    found: dict[str, Callable[[], dict[str, float]]] = {}
    for size in arguments.sizes:
        for dtype in arguments.dtypes:
            for task in arguments.tasks:
                group = f"{size} | {dtype} | {task}"
                pairs, _ = write_pairs(arguments, size, task, examples=TASKS[task].examples[0])
                for examples in TASKS[task].examples:
                    found[f"{group} | rlhf rm, {examples} {task} a step"] = partial(
                        ours, arguments, size, task, dtype=dtype, examples=examples
                    )
                for name, options in TRL_RUNS.items():
                    found[f"{group} | {name}"] = partial(
                        trl,
                        arguments,
                        size,
                        pairs,
                        ["--dtype", dtype, "--threads", arguments.threads, *options],
                        arguments.seconds,
                    )
    return found


def ours(arguments: argparse.Namespace, size: str, task: str, *, dtype: str, examples: int) -> dict[str, float]:
    chosen = overrides(arguments, size, task, dtype=dtype, examples=examples)
    run = run_ours("rm", chosen, arguments.work, max_seconds=arguments.seconds)
    _, order = write_pairs(arguments, size, task, examples=examples)
    done = len(run.lines)

    def comparisons(steps: int) -> int:
        return (order.size_before(done) - order.size_before(done - steps)) * TASKS[task].per_example

    return {
        "comparisons_per_second": comparisons(len(run.timed)) / run.seconds,
        "comparisons_per_cpu_second": comparisons(run.cpu_steps) / (run.cpu_seconds or float("nan")),
        "tokens_per_second": run.tokens / run.seconds,
        "peak_memory_gb": run.lines[-1]["time/peak_memory_gb"],
        "first_loss": run.lines[0]["train/loss"],
    }


def trl(arguments: argparse.Namespace, size: str, pairs: Path, options: list[str], seconds: float) -> dict[str, float]:
    files = ["--model-dir", arguments.work / size, "--data", pairs]
    result = run_trl("trl_rm.py", [*files, "--skip", SKIP, "--max-seconds", seconds, *options])
    names = ("tokens_per_second", "padding_fraction", "peak_memory_gb", "first_loss")
    return {
        "comparisons_per_second": result["pairs_per_second"],
        "comparisons_per_cpu_second": result["used_pairs"] / result["cpu_seconds"],
        **{name: result[name] for name in names},
    }


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    """The table; then what our side's speed is to TRL's, the median over the rounds."""
    print(f"\n{machine()}; medians of {len(next(iter(results.values())))}\n")
    print("| size | dtype | data | run | comparisons/s | min-max | tokens/s | padding | peak GB |")
    print("|---" * 9 + "|")
    groups: dict[str, dict[str, list[float]]] = {}
    for name, rounds in results.items():
        group, _, run = name.rpartition(" | ")
        speeds = [one["comparisons_per_second"] for one in rounds]
        groups.setdefault(group, {})[run] = speeds
        tokens, memory, padding = (
            statistics.median(one.get(key, 0.0) for one in rounds)
            for key in ("tokens_per_second", "peak_memory_gb", "padding_fraction")
        )
        print(
            f"| {name} | {statistics.median(speeds):,.1f} | {min(speeds):,.1f}-{max(speeds):,.1f} | {tokens:,.0f} | "
            f"{padding:.0%} | {memory:.2f} |"
        )
    print()
    for group, runs in groups.items():
        for run, speeds in runs.items():
            for other in (one for one in TRL_RUNS if one in runs and run not in TRL_RUNS):
                ratio = statistics.median(mine / its for mine, its in zip(speeds, runs[other], strict=True))
                print(f"{group}: {run}, is {ratio:.2f} of {other}")


if __name__ == "__main__":
    main()
