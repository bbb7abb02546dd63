"""Small policies, scorers and commands for the tests of `rlhf ppo`."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers_runs import Forks, make_base, metrics, relative_difference, sentence, texts, weights, write_jsonl
from helpers_scoring import make_reward_model
from pytest import approx

from rlhf_pipeline.artifact import Kind

if TYPE_CHECKING:
    from helpers_plain_ppo import Plain


def points(text: str, bonus: float) -> float:
    """A score that is far apart for texts that differ."""
    return bonus + len(text) / 8 - 0.7 * text.count("a") + 0.4 * text.count(" ")


# Also a way to be stopped at an exact place: DIE_AT=<module>:<function>:<call>:<signal>, of the first process.
PROGRAM = f"""
import importlib
import os


{inspect.getsource(points)}

def words(episodes):
    return [points(one.response, one.columns.get("bonus", 0)) for one in episodes]


def not_a_number(episodes):
    return [float("nan")] * len(episodes)


def _watch(module, name, number, signal):
    module = importlib.import_module(module)
    original, calls = getattr(module, name), []

    def counted(*arguments, **named):
        calls.append(1)
        if len(calls) == int(number):
            os.kill(os.getpid(), int(signal))
        return original(*arguments, **named)

    setattr(module, name, counted)


if os.environ.get("DIE_AT") and os.environ.get("RANK", "0") == "0":
    _watch(*os.environ["DIE_AT"].split(":"))
"""

PPO = [
    "ppo",
    "data.train=prompts.jsonl",
    "data.heldout=heldout.jsonl",
    "data.max_length=120",
    "data.max_prompt_length=60",
    "rollout.episodes=8",
    "rollout.max_new_tokens=10",
    "rollout.batch_tokens=400",
    "batch.examples=4",
    "batch.row_length=128",
    "batch.micro_rows=1",
    "optim.lr=1e-3",
    "optim.warmup_steps=0",
    "value.optim.lr=2e-3",
    "value.optim.warmup_steps=0",
    "train.max_steps=3",
    "ema.decay=0.9",
    "checkpoint.every=1",
    "evaluation.every=2",
    "evaluation.examples=6",
    "evaluation.samples=2",
    "runtime.threads=1",
    "tracking.progress=false",
]
WORDS, REWARD = "+rewards.words.program=points:words", "+rewards.rm.model.path=reward"
GROUPS = ["rollout.samples=4", "rollout.episodes=16", "batch.examples=8"]
# Every part of the algorithm is in one of them. An eps this large keeps Adam from making rounding errors into steps.
COMMON = [*PPO, "model.path=policy", "optim.eps=1e-4", "value.optim.eps=1e-4", "value.optim.max_grad_norm=1000"]
CASES: dict[str, list[str]] = {
    "gae": [
        *(*COMMON, WORDS, REWARD, "+rewards.rm.weight=0.5"),
        *("policy.epochs=2", "ema.decay=0.7"),
        *("ptx.train=text.jsonl", "ptx.coefficient=0.5", "ptx.examples_per_episode=1.5"),
        *("kl.controller=adaptive", "kl.beta=0.2", "kl.target=0.1", "kl.horizon=50"),
        *("advantage.missing_end=subtract", "advantage.missing_end_score=0.8", "advantage.score_clip=2.5"),
        *("optim.weight_decay=0.1", "optim.max_grad_norm=3", "value.clip=0.05"),
    ],
    "gae_plain": [
        *(*COMMON, REWARD, "+rewards.rm.normalised=false", "value.init=policy", "value.clip=null"),
        *("advantage.whiten=false", "advantage.gamma=0.9", "advantage.lam=0.8", "rollout.temperature=0.7"),
        *("policy.entropy=0.05", "ema.decay=0", "reference.path=other"),
    ],
    "reinforce": [
        *(*COMMON, WORDS, "rollout.samples=2", "advantage.estimator=reinforce", "advantage.gamma=0.95"),
        *("advantage.baseline_decay=0.6", "advantage.missing_end=substitute", "advantage.missing_end_score=-2"),
        *("ptx.train=text.jsonl", "ptx.coefficient=1.5", "ptx.examples_per_episode=0.3", "ptx.mean=sequences"),
    ],
    "rloo": [
        *(*COMMON, WORDS, *GROUPS, "advantage.estimator=rloo", "policy.mean=sequences", "policy.epochs=3"),
        *("ema.hand_over=false", "optim.lr=3e-3"),
    ],
    "rloo_spread": [
        *(*COMMON, WORDS, *GROUPS, "advantage.estimator=rloo", "advantage.skip_no_spread=true", "policy.epochs=2"),
        "advantage.score_clip=0.4",  # to which all samples of some prompts are clipped
    ],
    "grpo": [
        *(*COMMON, WORDS, *GROUPS, "advantage.estimator=grpo", "kl.place=loss", "kl.beta=0.1", "policy.epochs=4"),
        *("policy.mean=sequences", "policy.clip=0.06", "reference.path=other"),
    ],
}


def make_policy(folder: Path, *, seed: int = 0, ends: float = 8.0, **options: Any) -> Path:
    """`make_base` whose answers end, some sooner, some later and some not at all within ten tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_base(folder, seed=seed, **options)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= ends
    model.save_pretrained(folder)
    return folder


def make_folder(folder: Path, *, prompts: int = 24) -> Path:
    """Prompts, text, programs, a policy and a reward model on a body of its own, in a folder to run in."""
    rng = random.Random(7)
    rows = [{"prompt": f"{i} {sentence(rng, 1, 8)}?", "bonus": i % 3 / 10} for i in range(prompts + 8)]
    write_jsonl(folder / "prompts.jsonl", rows[:prompts])
    write_jsonl(folder / "heldout.jsonl", rows[prompts:])
    write_jsonl(folder / "text.jsonl", texts(40, seed=3))
    (folder / "points.py").write_text(PROGRAM)
    policy = make_policy(folder / "policy")
    make_policy(folder / "other", seed=4)
    make_reward_model(folder / "reward", policy, seed=1, kind=Kind.reward_model, shift=0.3, scale=2.0)
    return folder


def made(rlhf: Forks, folder: Path, name: str, command: Sequence[str], *overrides: str, ranks: int = 1) -> Path:
    """The run of this name; made if it is not there."""
    run = folder / f"runs/{name}/ppo"
    if not run.exists():
        rlhf.run(folder, *command, f"name={name}", *overrides, ranks=ranks)
    return run


def iterations(run: Path) -> list[dict[str, float]]:
    """What was logged of each iteration, without evaluations and timings."""
    return [line for line in metrics(run) if "policy/loss" in line]


def compare(run: Path, plain: Plain) -> None:
    """Figures of every iteration at 2e-5, weights at 1e-5, both relative."""
    for found, expected in zip(iterations(run), plain.lines, strict=True):
        assert {name: found[name] for name in expected} == approx(expected, rel=2e-5, abs=1e-5)
    config = plain.config
    expected = plain.average if config.ema.decay and config.ema.hand_over else plain.weights
    distance = relative_difference(weights(run / "artifact"), {name: one.float() for name, one in expected.items()})
    print(f"{run.parent.name}: weights {distance:.1e}")
    assert distance < 1e-5
