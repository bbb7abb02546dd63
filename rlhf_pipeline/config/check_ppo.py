"""What a config of `rlhf ppo` must satisfy beyond its types and what all stages ask for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf_pipeline.config.check_scorers import scorers
from rlhf_pipeline.config.ppo import (
    Estimator,
    KlControl,
    KlPlace,
    MissingEnd,
    RolloutConfig,
    ValueInit,
)
from rlhf_pipeline.config.values import between, optimiser, positive, source

if TYPE_CHECKING:
    from rlhf_pipeline.config.stages import PpoConfig

IN_GROUPS = (Estimator.rloo, Estimator.grpo)  # what compares the samples of a prompt


def check_ppo(config: PpoConfig) -> Iterator[str]:
    """Every problem, one line each."""
    if config.model.shape is not None:
        yield "model.shape: a policy is not made from scratch; name the fine-tuned model with model.path"
    dropouts = {"model.dropout": config.model.dropout, "lora.dropout": config.lora.dropout if config.lora else 0.0}
    for key, value in dropouts.items():
        if value:
            yield (
                f"{key}={value}: must stay 0: an update would compare a policy with dropout to the one without that was "
                "sampled from, and the ratio would not begin at 1"
            )
    yield from _rollout(config.rollout)
    yield from _episodes(config)
    if config.rewards and not any(one.weight for one in config.rewards.values()):
        yield "rewards: every weight is 0, which is for scorers that are only logged; one must count"
    if not config.rewards:
        yield "rewards: names no scorer; add +rewards.<name>.model.path=<an artifact of rlhf rm>, or .program, or .url"
    yield from scorers(config.rewards)
    yield from _kl(config)
    yield from _advantage(config)
    yield from _ptx(config)
    yield from between("policy.clip", config.policy.clip, 0, 1)
    if not 0 <= config.ema.decay < 1:
        yield f"ema.decay={config.ema.decay}: must be at least 0 and less than 1"
    yield from positive("policy.epochs", config.policy.epochs)
    if config.policy.entropy < 0:
        yield f"policy.entropy={config.policy.entropy}: must not be negative"
    for name in ("max_kl", "max_ratio"):
        if getattr(config.health, name) is not None:
            yield from positive(f"health.{name}", getattr(config.health, name))
    if config.health.min_ended is not None:
        yield from between("health.min_ended", config.health.min_ended, 0, 1)


def _rollout(rollout: RolloutConfig) -> Iterator[str]:
    why = (
        "the KL and the ratio would be those of another distribution than the one sampled from; train with plain "
        "sampling, and filter when you generate"
    )
    for name, plain in {"top_k": 0, "top_p": 1.0, "min_new_tokens": 0}.items():
        value = getattr(rollout, name)
        if value != plain:
            yield f"rollout.{name}={value}: must stay {plain} in training: {why}"
    for name in ("episodes", "samples", "max_new_tokens", "batch_tokens"):
        yield from positive(f"rollout.{name}", getattr(rollout, name))
    if not rollout.temperature > 0:
        yield f"rollout.temperature={rollout.temperature}: must be more than 0; a greedy policy explores nothing"


def _episodes(config: PpoConfig) -> Iterator[str]:
    samples, examples = config.rollout.samples, config.batch.examples
    if config.batch.tokens is not None:
        yield "batch.tokens: an update is a number of episodes; set batch.examples instead"
    if samples > 0:
        for key, value in {"rollout.episodes": config.rollout.episodes, "batch.examples": examples}.items():
            if value is not None and value % samples:
                yield f"{key}={value}: must be a multiple of rollout.samples={samples}: a prompt's samples stay together"
    if examples is not None and examples > config.rollout.episodes:
        yield f"batch.examples={examples}: more than the rollout.episodes={config.rollout.episodes} of an iteration"


def _kl(config: PpoConfig) -> Iterator[str]:
    kl = config.kl
    if kl.beta < 0:
        yield f"kl.beta={kl.beta}: must not be negative"
    if kl.controller is KlControl.adaptive:
        yield from positive("kl.target", kl.target)
        if 5 * kl.horizon <= config.rollout.episodes:
            yield (
                f"kl.horizon={kl.horizon}: must be more than a fifth of rollout.episodes={config.rollout.episodes}; beta "
                "could become 0 at once"
            )
        yield from positive("kl.beta", kl.beta)
        if kl.place is KlPlace.loss:
            yield "kl.controller=adaptive: controls the penalty of rewards; set kl.place=reward"


def _advantage(config: PpoConfig) -> Iterator[str]:
    advantage = config.advantage
    yield from between("advantage.gamma", advantage.gamma, 0, 1)
    yield from between("advantage.lam", advantage.lam, 0, 1)
    if not 0 <= advantage.baseline_decay < 1:
        yield f"advantage.baseline_decay={advantage.baseline_decay}: must be at least 0 and less than 1"
    if advantage.score_clip is not None:
        yield from positive("advantage.score_clip", advantage.score_clip)
    if advantage.missing_end is MissingEnd.subtract and advantage.missing_end_score <= 0:
        yield f"advantage.missing_end_score={advantage.missing_end_score}: is subtracted, and must be more than 0"
    if advantage.missing_end is MissingEnd.substitute and advantage.missing_end_score > 0:
        yield (
            f"advantage.missing_end_score={advantage.missing_end_score}: would be the score of responses that are cut off, "
            "and reward them; use -1 (Huang et al. 2024), or another value that is not above 0"
        )
    if advantage.estimator in IN_GROUPS and config.rollout.samples < 2:
        yield (
            f"advantage.estimator={advantage.estimator.value}: compares the samples of a prompt, and "
            f"rollout.samples={config.rollout.samples}; draw 2 or more"
        )
    if advantage.skip_no_spread and advantage.estimator not in IN_GROUPS:
        yield (
            f"advantage.skip_no_spread=true: is for rloo and grpo; with advantage.estimator={advantage.estimator.value} a "
            "prompt teaches also where its samples all score the same"
        )
    if advantage.estimator is Estimator.gae:
        yield from optimiser("value.optim", config.value.optim)
        if config.value.clip is not None:
            yield from positive("value.clip", config.value.clip)
        if config.value.init is ValueInit.reward_model and all(one.model is None for one in config.rewards.values()):
            yield "value.init=reward_model: no scorer is a reward model; use value.init=policy"


def _ptx(config: PpoConfig) -> Iterator[str]:
    ptx = config.ptx
    if ptx.coefficient < 0:
        yield f"ptx.coefficient={ptx.coefficient}: must not be negative"
    if ptx.coefficient > 0 or ptx.train is not None:
        yield from source("ptx.train", ptx.train)
        if not 0 < ptx.examples_per_episode < math.inf:
            yield f"ptx.examples_per_episode={ptx.examples_per_episode}: must be more than 0"
    if ptx.coefficient > 0 and config.rollout.temperature != 1:
        yield (
            f"rollout.temperature={config.rollout.temperature}: must stay 1 with the pretraining mix: the policy of the "
            "loss is softmax(logits / temperature), and text is learnt at 1"
        )
    if ptx.train is not None and ptx.coefficient == 0:
        yield "ptx.coefficient=0.0: leaves ptx.train out; InstructGPT's is 27.8"
    if ptx.max_length is not None and ptx.max_length < 2:
        yield f"ptx.max_length={ptx.max_length}: must be at least 2"
