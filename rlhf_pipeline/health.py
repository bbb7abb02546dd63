"""What an iteration of PPO tells about itself, and when it is better to stop: pure functions of tensors and figures.

Every figure comes from the tensors that the losses use, so what is logged is what is trained. Updates have figures of
their own (`ppo.updates`); answers to held-out prompts are `evaluation.policy`'s.

Shapes: R responses, response k of prompt p in row p * K + k; L tokens of the longest. Padded tensors are [R, L], with
`mask` bool [R, L]; what lies outside of it never matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline.config.ppo import HealthConfig
from rlhf_pipeline.config.schema import Dtype
from rlhf_pipeline.functional import advantages, kl

LARGEST_RATIO = "policy/ratio_max"  # of the updates' figures, the one that has a threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How far log-probabilities of tokens, in nats, are apart: between two ways to compute them, or allowed to be."""

    mean: float
    largest: float

    @classmethod
    def of(cls, one: Tensor, other: Tensor, mask: Tensor) -> Gap:
        """one, other [R, L]."""
        apart = (one.double() - other.double())[mask].abs()
        return cls(mean=float(apart.mean()), largest=float(apart.max()))

    def within(self, allowed: Gap) -> bool:
        """False for NaN."""
        return self.mean <= allowed.mean and self.largest <= allowed.largest

    def __str__(self) -> str:
        return f"{self.mean:.2g} nats on average and {self.largest:.2g} at most"


# The demo's model has 2e-7 and 7e-6 in fp32, 2e-3 and 8e-2 in bf16, between sampler and trainer and between two ways to
# pack, on a CPU. A larger model has more, by the depth of its sums; a mask or a dropout that is wrong has 1e-1 and more.
TOLERANCES = {
    Dtype.float32: Gap(mean=1e-4, largest=1e-3),
    Dtype.bfloat16: Gap(mean=2e-2, largest=1.0),
}


def measures(  # noqa: PLR0913 - each is a figure's own
    *,
    logprobs: Tensor,
    sampled: Tensor,
    reference: Tensor,
    mask: Tensor,
    scores: Mapping[str, np.ndarray],
    total: Tensor,
    final: Tensor,
    finished: Tensor,
    samples: int,
    entropy: Tensor | None = None,
    values: Tensor | None = None,
    returns: Tensor | None = None,
) -> dict[str, float]:
    """The figures of an iteration before its updates, by name. One that does not exist is left out.

    Args:
        logprobs: [R, L], of the policy that drew the tokens, by the trainer.
        sampled: [R, L], the same by the sampler.
        reference: [R, L].
        scores: by scorer, [R], before weights.
        total: [R], the scores weighed and added.
        final: [R], what becomes of them by clipping and the rule for responses that did not end.
        finished: bool [R].
        samples: K.
        entropy: [R, L], in nats: exact, or an estimate whose mean is right, as -logprobs is.
        values, returns: [R, L], of the value model and what it learns from.
    """
    lengths = mask.sum(1)
    found: dict[str, float | None] = {
        "score": _mean(total),
        "score_std": float(total.double().std(correction=0)),
        "score_final": _mean(final),
        **{f"score_{name}": float(np.mean(one)) for name, one in scores.items()},
        "kl": _mean(torch.where(mask, kl.k1(logprobs, reference), 0.0).sum(1)),
    }
    for name, estimator in (("kl_k1", kl.k1), ("kl_k2", kl.k2), ("kl_k3", kl.k3)):
        found[name] = _mean(estimator(logprobs, reference)[mask])
    found |= {
        "entropy": None if entropy is None else _mean(entropy[mask]),
        "length": _mean(lengths),
        "ended": _mean(finished),
        "no_spread": advantages.no_spread(final, samples),
        "sampler_gap": Gap.of(sampled, logprobs, mask).largest,
        "score_length_correlation": _correlation(total, lengths),
    }
    if values is not None and returns is not None:
        found["explained_variance"] = advantages.explained_variance(values, returns, mask)
    return {f"rollout/{name}": value for name, value in found.items() if value is not None}


def problems(metrics: Mapping[str, float], config: HealthConfig) -> list[str]:
    """The thresholds that an iteration has crossed, a sentence each: a run that goes on is wasted.

    A figure that is NaN has crossed its threshold; one that is not among `metrics` has not.
    """
    return list(_crossed(metrics, config))


def _crossed(metrics: Mapping[str, float], config: HealthConfig) -> Iterator[str]:
    upper = {
        "max_kl": (
            "rollout/kl",
            "the policy has gone far from the reference, where scores are no guide any more (over-optimisation): read its "
            "answers, and try a higher kl.beta, a lower optim.lr, or less iterations",
        ),
        "max_ratio": (
            LARGEST_RATIO,
            "an update has changed the probability of a token too much: try a lower optim.lr, fewer policy.epochs, a "
            "larger batch.examples, or a smaller policy.clip",
        ),
    }
    lower = {
        "min_entropy": (
            "rollout/entropy",
            "the policy says nearly the same to everything, and has nothing left to try: try a lower optim.lr, a higher "
            "kl.beta, or policy.entropy above 0",
        ),
        "min_ended": (
            "rollout/ended",
            "too many responses are cut off: try a larger rollout.max_new_tokens, advantage.missing_end=subtract, or a "
            "supervised model that has learned to end",
        ),
    }
    for key, (name, advice) in upper.items():
        limit, value = getattr(config, key), metrics.get(name)
        if limit is not None and value is not None and not value <= limit:
            yield f"{name} is {value:.4g}, more than health.{key}={limit:g}: {advice}"
    for key, (name, advice) in lower.items():
        limit, value = getattr(config, key), metrics.get(name)
        if limit is not None and value is not None and not value >= limit:
            yield f"{name} is {value:.4g}, less than health.{key}={limit:g}: {advice}"


def start_problems(  # noqa: PLR0913 - each is a check's own
    *,
    sampled: Tensor,
    logprobs: Tensor,
    mask: Tensor,
    dtype: Dtype,
    prompts: Sequence[np.ndarray],
    bos_id: int | None,
    end_ids: Sequence[int],
    reference: Tensor | None = None,
    again: Tensor | None = None,
) -> list[str]:
    """What cannot be on a run's first iteration, before its first update; a sentence each.

    Args:
        sampled, logprobs: [R, L], of the same tokens by the sampler and by the trainer.
        dtype: of the policy's weights, which decides the tolerances.
        prompts: int [P] each.
        bos_id: the token that begins a conversation, if there is one.
        end_ids: tokens that end a response; where `bos_id` is one of them it may come again in a prompt.
        reference: [R, L], where the reference is the model that the run starts from.
        again: [R, L], the trainer's log-probs once more, as the first minibatch has them.
    """
    allowed = TOLERANCES[dtype]
    found = []
    gap = Gap.of(sampled, logprobs, mask)
    if not gap.within(allowed):
        found.append(
            f"the sampler and the trainer give tokens other log-probabilities, {gap} (allowed: {allowed}): they do not "
            "compute the same policy, and the ratio of every update would be wrong; another model.attention may help"
        )
    if again is not None and not (gap := Gap.of(again, logprobs, mask)).within(allowed):
        found.append(
            f"the ratio is not 1 before the first update: log-probabilities differ by {gap} (allowed: {allowed}); "
            "something in the policy is random (dropout?) or depends on what else is in a row"
        )
    if reference is not None and not (gap := Gap.of(reference, logprobs, mask)).within(allowed):
        found.append(
            f"the KL to the reference is not 0 at the start: log-probabilities differ by {gap} (allowed: {allowed}), "
            "though the reference is the model that the policy starts from"
        )
    doubled = sum(_begins_twice(prompt, bos_id, end_ids) for prompt in prompts)
    if doubled:
        found.append(
            f"{doubled} of {len(prompts)} prompts have more than one start token ({bos_id}): the chat template and the "
            "tokenizer both write one; set tokenizer.template to another"
        )
    return found


def _begins_twice(prompt: np.ndarray, bos_id: int | None, end_ids: Sequence[int]) -> bool:
    if bos_id is None:
        return False
    if bos_id in end_ids:  # one token for both, as GPT-2 has it: earlier turns end with it
        return bool((prompt[:2] == bos_id).sum() == 2)
    return bool((prompt == bos_id).sum() > 1)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _correlation(one: Tensor, other: Tensor) -> float | None:
    """Pearson's; None where either is constant."""
    a, b = one.double() - one.double().mean(), other.double() - other.double().mean()
    if one.min() == one.max() or other.min() == other.max():
        return None
    return float((a @ b) / (a.norm() * b.norm()))
