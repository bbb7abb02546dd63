"""PPO speed, side by side with TRL's PPOTrainer: `make bench-ppo`. Prints the tables of docs/benchmarks.md.

Both sides train the same random-initialised Llama policy against the same random classifier, which scores and from which
the value model starts, with a frozen reference: four models of one shape. Prompts are those of HH harmless dialogues (Bai
et al. 2022), at most 256 tokens. An iteration draws 64 answers of exactly 64 tokens at temperature 1 (end and padding
tokens are never drawn, see `build`) and makes 4 epochs of updates of 16 episodes, 16 updates. Both whiten advantages, clip
ratios and values at 0.2, and take a KL penalty of 0.05 from the rewards. We clip gradients, TRL does not. TRL's PPO left
it after version 1.12, which lives in an environment that this script makes.

First a check, in fp32, of the first iteration: on both sides the KL to the reference must be 0, the entropy that of the
same model, the tokens trained on and the updates equally many. Rewards and losses cannot be the same: the answers are
not. Then runs take turns, several rounds; figures are medians. What is counted is episodes a second, by the clock on
the wall, from the end of the first iteration on, and peak resident memory.

Last, sampling alone beside transformers' `generate` (`ppo_rollout.py`).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    HERE,
    TRL_PPO_PYTHON,
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

EPISODES = 64  # in an iteration
MINIBATCH = 16
EPOCHS = 4
TOKENS = 64  # of every response
PROMPT_TOKENS = 256  # at most
ITERATION_SECONDS = "time/iteration_seconds"
NO_KL = 1e-3  # nats a response, in fp32
SAME_ENTROPY = 0.05  # nats a token: means over other samples

TRL_RUNS = {
    "TRL as shipped": [],
    "TRL as shipped, autocast": ["--dtype", "autocast"],
    "TRL, memory kept": ["--keep-memory"],
    "TRL, memory kept, autocast": ["--keep-memory", "--dtype", "autocast"],
    "TRL, memory kept, weights in bf16": ["--keep-memory", "--dtype", "bfloat16"],
}
OUR_RUNS = {"rlhf ppo, bf16": "bfloat16", "rlhf ppo, fp32": "float32"}


def main() -> None:
    parser = parser_of(__doc__, seconds=30.0, sizes=["small"], work="bench-ppo")
    parser.add_argument("--skip", type=int, default=1, help="iterations of each run before the timing starts")
    parser.add_argument("--parts", nargs="+", default=["check", "train", "rollout"])
    arguments = parser.parse_args()
    install_trl(TRL_PPO_PYTHON, "requirements-ppo.txt")
    arguments.work.mkdir(parents=True, exist_ok=True)
    prepare(Path(arguments.data), arguments)
    if "check" in arguments.parts:
        check(arguments)
    if "train" in arguments.parts:
        runs = contestants(arguments)
        report(take_turns(runs, rounds=arguments.rounds, work=arguments.work, only=arguments.only), arguments)
    if "rollout" in arguments.parts:
        for size in arguments.sizes:
            files = ["--model", str(arguments.work / size / "policy"), "--data", str(arguments.work / "prompts.jsonl")]
            options = ["--threads", str(arguments.threads), "--rounds", str(arguments.rounds)]
            subprocess.run([sys.executable, HERE / "ppo_rollout.py", *files, *options], check=True)


def prepare(source: Path, arguments: argparse.Namespace) -> None:
    """Write dialogues and the tokens of their prompts, train a tokenizer, build the models."""
    work = arguments.work
    rows = list(read_rows(source / "hh_harmless.jsonl.gz"))
    write_rows(work / "hh.jsonl", rows)
    tokenizer = own_tokenizer([row["chosen"] for row in rows])
    for size in arguments.sizes:
        build(size, tokenizer, work)
    write_rows(work / "prompts.jsonl", [{"input_ids": tokens} for tokens in prompts(arguments)])


def build(size: str, tokenizer: Any, work: Path) -> None:
    """A policy that never draws an end or padding token, and a classifier.

    Of the policy's embeddings, which are also its output's, one channel is the same for all words, so that it is there in
    every hidden state; that of the two tokens points the other way, which makes them e^-40 times as likely as others.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = llama(size, tokenizer)
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        words = policy.get_input_embeddings().weight
        words[:, 0] = 0.1
        words[[tokenizer.eos_token_id, tokenizer.pad_token_id], 0] = -10.0
    policy.save_pretrained(work / size / "policy")
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(classifier.score.weight, std=(config.hidden_size + 1) ** -0.5)
    classifier.save_pretrained(work / size / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(work / size / name)


def overrides(arguments: argparse.Namespace, size: str, *, dtype: str) -> list[str]:
    """The config of our side, apart from where its runs are."""
    reward = arguments.work / size / "reward"
    return [
        f"model.path={arguments.work / size / 'policy'}",
        f"model.dtype={dtype}",
        f"+rewards.rm.model.path={reward}",
        f"+rewards.rm.model.dtype={dtype}",
        f"data.train={arguments.work / 'hh.jsonl'}",
        "data.format=hh",
        "data.on_bad_row=skip",
        f"data.max_prompt_length={PROMPT_TOKENS}",
        "data.long_prompt=drop",
        f"data.cache_dir={arguments.work / 'cache'}",
        f"rollout.episodes={EPISODES}",
        f"rollout.max_new_tokens={TOKENS}",
        f"batch.examples={MINIBATCH}",
        "batch.row_length=4096",  # a minibatch in one row, each path by itself
        "batch.micro_rows=1",
        f"policy.epochs={EPOCHS}",
        "kl.beta=0.05",
        "optim.lr=3e-6",
        "value.optim.lr=3e-6",
        "ema.decay=0",
        "train.epochs=100000",
        "evaluation.before=false",
        "evaluation.every=0",
        "checkpoint.every=1000000",
        "checkpoint.artifact_every_epoch=false",
        f"runtime.threads={arguments.threads}",
        "tracking.progress=false",
    ]


def prompts(arguments: argparse.Namespace) -> list[list[int]]:
    """The tokens of all prompts, as our side makes them."""
    from rlhf_pipeline.config.compose import compose
    from rlhf_pipeline.data import stage
    from rlhf_pipeline.generation.prompt_sets import prompt_sets

    chosen = overrides(arguments, arguments.sizes[0], dtype="float32")
    config: Any = compose("ppo", [f"runs={arguments.work}", *chosen])
    train, _ = prompt_sets(config, stage.open_renderer(config), context=None)
    return [one.tokens.tolist() for one in train.asked]


def check(arguments: argparse.Namespace) -> None:
    """Leave when the two sides do not do the same in their first iteration, in fp32."""
    size = arguments.sizes[0]
    mine = first_of_ours(arguments, size)
    short = ["--skip", 1, "--max-seconds", 0]
    result = run_trl("trl_ppo.py", [*trl_options(arguments, size), *short], TRL_PPO_PYTHON)
    theirs = {name: result[f"first_{name}"] for name in mine}
    for side, found in {"ours": mine, "TRL": theirs}.items():
        print(f"first iteration in fp32, {side}: " + ", ".join(f"{k} {v:,.4f}" for k, v in found.items()), flush=True)
    equal = all(mine[name] == theirs[name] for name in ("updates", "trained_tokens"))
    still = all(abs(found["kl"]) < NO_KL for found in (mine, theirs))
    if not (equal and still and abs(mine["entropy"] - theirs["entropy"]) < SAME_ENTROPY):
        sys.exit("the two sides do not do the same")


def first_of_ours(arguments: argparse.Namespace, size: str) -> dict[str, float]:
    from rlhf_pipeline import resume

    chosen = [*overrides(arguments, size, dtype="float32"), "train.stop_after=1"]
    line = run_ours("ppo", chosen, arguments.work, clock=ITERATION_SECONDS).lines[0]
    state, _ = resume.find(arguments.work / "ours" / "default" / "ppo")
    assert state is not None
    return {
        "kl": line["rollout/kl"],
        "entropy": line["rollout/entropy"],
        "updates": state.meta["updates"]["policy"],
        "trained_tokens": round(line["rollout/length"] * EPISODES) * EPOCHS,
    }


def contestants(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, float]]]:
    """Name -> a function that runs it once."""
    found: dict[str, Callable[[], dict[str, float]]] = {}
    for size in arguments.sizes:
        for name, dtype in OUR_RUNS.items():
            found[f"{size} | {name}"] = partial(ours, arguments, size, dtype)
        for name, options in TRL_RUNS.items():
            found[f"{size} | {name}"] = partial(trl, arguments, size, options)
    return found


def ours(arguments: argparse.Namespace, size: str, dtype: str) -> dict[str, float]:
    chosen = overrides(arguments, size, dtype=dtype)
    run = run_ours(
        "ppo",
        chosen,
        arguments.work,
        max_seconds=arguments.seconds,
        clock=ITERATION_SECONDS,
        skip=arguments.skip,
    )
    episodes = run.cpu_steps * EPISODES
    phases = ("rollout", "score", "evaluate", "update")
    return {
        "episodes_per_second": episodes / (run.wall_seconds or float("nan")),
        "episodes_per_cpu_second": episodes / (run.cpu_seconds or float("nan")),
        "peak_memory_gb": run.lines[-1]["time/peak_memory_gb"],
        "iterations_timed": run.cpu_steps,
        **{
            f"{phase}_seconds": statistics.median(line[f"time/{phase}_seconds"] for line in run.timed)
            for phase in phases
        },
    }


def trl_options(arguments: argparse.Namespace, size: str) -> list[Any]:
    folder = arguments.work / size
    files = ["--policy", folder / "policy", "--reward-model", folder / "reward"]
    sizes = ["--episodes", EPISODES, "--minibatch", MINIBATCH, "--epochs", EPOCHS, "--tokens", TOKENS]
    return [*files, "--data", arguments.work / "prompts.jsonl", *sizes, "--threads", arguments.threads]


def trl(arguments: argparse.Namespace, size: str, options: list[str]) -> dict[str, float]:
    timed = ["--skip", arguments.skip, "--max-seconds", arguments.seconds]
    result = run_trl("trl_ppo.py", [*trl_options(arguments, size), *timed, *options], TRL_PPO_PYTHON)
    names = ("episodes_per_second", "episodes_per_cpu_second", "peak_memory_gb", "iterations_timed", "padding_fraction")
    return {name: result[name] for name in names}


def report(results: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    """The table; then what our side's speed is to TRL's, the median over the rounds."""
    print(f"\n{machine()}; {arguments.threads} threads; medians of {len(next(iter(results.values())))}\n")
    print("| size | run | episodes/s | min-max | episodes/CPU second | peak GB |")
    print("|---" * 6 + "|")
    speeds: dict[str, list[float]] = {}
    for name, rounds in results.items():
        speeds[name] = found = [one["episodes_per_second"] for one in rounds]
        cpu, memory = (
            statistics.median(one[key] for one in rounds) for key in ("episodes_per_cpu_second", "peak_memory_gb")
        )
        spread = f"{statistics.median(found):.2f} | {min(found):.2f}-{max(found):.2f}"
        print(f"| {name} | {spread} | {cpu:.2f} | {memory:.2f} |")
    print()
    for name, mine in speeds.items():
        size, _, run = name.partition(" | ")
        for other, its in speeds.items():
            if run in OUR_RUNS and other in (f"{size} | {one}" for one in TRL_RUNS):
                ratio = statistics.median(a / b for a, b in zip(mine, its, strict=True))
                print(f"{name}, is {ratio:.2f} of {other.partition(' | ')[2]}")
    for name, rounds in results.items():
        phases = {key: statistics.median(one[key] for one in rounds) for key in rounds[0] if key.endswith("_seconds")}
        if phases:
            print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in phases.items()))


if __name__ == "__main__":
    main()
