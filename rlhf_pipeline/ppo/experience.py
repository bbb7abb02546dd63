"""What is known of an iteration's responses, token by token, and what becomes of it: rewards, advantages, returns.

Everything is there on every rank, so that statistics over the iteration are global by themselves.

Shapes: R responses, L tokens of the longest; padded tensors [R, L], on the CPU, in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline import health
from rlhf_pipeline.config.ppo import AdvantageConfig, Estimator, KlConfig, KlControl, KlPlace
from rlhf_pipeline.data.loader import Layout
from rlhf_pipeline.functional import advantages as estimators
from rlhf_pipeline.functional import kl
from rlhf_pipeline.functional.rewards import final_scores, token_rewards
from rlhf_pipeline.ppo.models import Models
from rlhf_pipeline.rollout import Rollout, per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """An iteration's responses and what the models say of them."""

    rollout: Rollout
    scores: dict[str, np.ndarray]  # by scorer, float64 [R]
    total: Tensor  # [R], the scores weighed and added
    logprobs: Tensor  # [R, L], of the policy that drew them, as the trainer computes them
    reference: Tensor  # [R, L]
    values: Tensor | None  # [R, L]

    @property
    def mask(self) -> Tensor:
        """bool [R, L]."""
        return self.rollout.mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaped:
    """What the updates learn from."""

    scores: Tensor  # [R], after clipping and the rule for responses without an end
    advantages: Tensor  # [R, L]
    returns: Tensor | None  # [R, L], for the value model
    first_return: Tensor  # [R], expected at the first token: what reinforce's baseline follows


@dataclass(slots=True)
class Control:
    """What the loop carries from one iteration to the next, beside the models."""

    beta: float
    baseline: float | None = None  # of reinforce

    def follow(self, experience: Experience, shaped: Shaped, kl_config: KlConfig, advantage: AdvantageConfig) -> None:
        """Move them after an iteration."""
        if kl_config.controller is KlControl.adaptive:
            self.beta = kl.adaptive_beta(
                self.beta,
                kl=sequence_kl(experience),
                target=kl_config.target,
                horizon=kl_config.horizon,
                episodes=len(experience.total),
            )
        if advantage.estimator is Estimator.reinforce:
            self.baseline = estimators.running_mean(self.baseline, shaped.first_return, advantage.baseline_decay)


def evaluate(
    models: Models, rollout: Rollout, scores: dict[str, np.ndarray], total: Tensor, layout: Layout
) -> Experience:
    """Log-probs of policy and reference, and values where there are any, by the trainer's own forward passes.

    Called by every rank.
    """
    trees, device = rollout.trees, models.policy_engine.device
    with models.evaluating():
        logprobs = per_token(models.logprobs, trees, layout, device)
        values = per_token(models.values, trees, layout, device).double() if models.value_engine else None
        with models.reference.ready() as of_reference:
            reference = per_token(of_reference, trees, layout, device)
    return Experience(
        rollout=rollout,
        scores=scores,
        total=total,
        logprobs=logprobs.double(),
        reference=reference.double(),
        values=values,
    )


def shape(experience: Experience, control: Control, config: AdvantageConfig, kl_config: KlConfig) -> Shaped:
    """Scores to per-token rewards (InstructGPT, equation 2) to advantages."""
    mask, samples = experience.mask, experience.rollout.samples
    scores = final_scores(
        experience.total,
        experience.rollout.finished,
        missing_end=config.missing_end,
        missing_end_score=config.missing_end_score,
        clip=config.score_clip,
    )
    beta = control.beta if kl_config.place is KlPlace.reward else 0.0
    rewards = token_rewards(scores, kl.k1(experience.logprobs, experience.reference), mask, beta=beta)
    advantages, returns = _advantages(rewards, experience, control, config, samples)
    if config.whiten and config.estimator in (Estimator.gae, Estimator.reinforce):
        advantages = estimators.whiten(advantages, mask)
    return Shaped(
        scores=scores,
        advantages=advantages,
        returns=returns,
        first_return=estimators.rewards_to_go(rewards, mask, config.gamma)[:, 0],
    )


def measured(experience: Experience, shaped: Shaped) -> dict[str, float]:
    """The figures of an iteration before its updates, see `health.measures`."""
    return health.measures(
        logprobs=experience.logprobs,
        sampled=experience.rollout.sampled,
        reference=experience.reference,
        mask=experience.mask,
        scores=experience.scores,
        total=experience.total,
        final=shaped.scores,
        finished=experience.rollout.finished,
        samples=experience.rollout.samples,
        entropy=-experience.logprobs,  # whose mean over what was sampled is the entropy's
        values=experience.values,
        returns=shaped.returns,
    )


def sequence_kl(experience: Experience) -> float:
    """Nats a response: the mean over responses of log policy - log reference, summed over tokens."""
    per_token_kl = kl.k1(experience.logprobs, experience.reference)
    return float(torch.where(experience.mask, per_token_kl, 0.0).sum(1).mean())


def _advantages(
    rewards: Tensor, experience: Experience, control: Control, config: AdvantageConfig, samples: int
) -> tuple[Tensor, Tensor | None]:
    mask = experience.mask
    match config.estimator:
        case Estimator.gae:
            assert experience.values is not None
            return estimators.gae(rewards, experience.values, mask, gamma=config.gamma, lam=config.lam)
        case Estimator.reinforce:
            baseline = control.baseline
            if baseline is None:  # the first iteration has no other than its own mean
                baseline = float(estimators.rewards_to_go(rewards, mask, config.gamma)[:, 0].mean())
            return estimators.reinforce(rewards, mask, gamma=config.gamma, baseline=baseline), None
        case Estimator.rloo:
            return estimators.rloo(rewards, mask, samples), None
        case Estimator.grpo:
            return estimators.grpo(rewards, mask, samples), None
