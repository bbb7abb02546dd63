"""The updates of an iteration: its minibatches, and the terms of the policy's and the value model's losses.

Episodes are the first data set of a micro-batch (group 0), pretraining text the second (group 1); both lie packed in the
same rows and are one gradient (InstructGPT, equation 2).

Shapes: N scored tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline import runtime
from rlhf_pipeline.config.ppo import KlPlace
from rlhf_pipeline.config.stages import PpoConfig
from rlhf_pipeline.data.loader import Layout, micro_batches
from rlhf_pipeline.data.order import mixed_in
from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.functional import kl
from rlhf_pipeline.functional.advantages import with_spread
from rlhf_pipeline.functional.losses.policy import (
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    token_weights,
)
from rlhf_pipeline.functional.terms import Term
from rlhf_pipeline.models.reference import logprobs_of
from rlhf_pipeline.models.tree_model import TreeBatch
from rlhf_pipeline.ppo.experience import Experience, Shaped
from rlhf_pipeline.ppo.models import Models
from rlhf_pipeline.rollout import TreeList, with_numbers
from rlhf_pipeline.update import update

EPISODES, TEXT = 0, 1  # groups
SHOWN = 16  # prompts that an error names
ORDER = 2**32  # keeps the order of minibatches apart from all others that are drawn from the seed


class Learner:
    """Makes the updates of an iteration, on the policy and on the value model."""

    def __init__(self, config: PpoConfig, models: Models, text: TreeDataset | None, layout: Layout) -> None:
        self.config, self.models, self.text, self.layout = config, models, text, layout

    def learn(
        self,
        experience: Experience,
        shaped: Shaped,
        *,
        step: int,
        episodes_before: int,
        beta: float,
        rates: Mapping[str, float],
        follow: Callable[[], None] | None,
    ) -> dict[str, float]:
        """Train on an iteration's episodes. Called by every rank; returns means over the updates, the same on all.

        Args:
            episodes_before: of the iterations before, which decides the text that comes next.
            beta: of the KL where it is a term of the loss.
            rates: learning rates, of "policy" and "value".
            follow: called after each update of the policy.

        With `advantage.skip_no_spread` there may be nothing to learn from, and then no update and no figure.

        Raises:
            UserError: for a loss or gradient that is not finite.
        """
        episodes = TreeList(trees_to_learn(experience, shaped), [one.origin for one in experience.rollout.asked])
        trained_on = episodes_before * self.config.policy.epochs
        ratios: list[Tensor] = []
        made: list[dict[str, float]] = []
        for places in minibatches(to_learn_from(experience, shaped, self.config), self.config, step):
            own = [(EPISODES, int(i)) for i in places]
            count = len(own) * experience.rollout.samples
            text = self._text(trained_on, count)
            trained_on += count
            failed = partial(_not_finite, step, [episodes.origin(i) for _, i in own])

            def policy_loss(output: Any, batch: TreeBatch) -> dict[str, Term]:
                ratios.append(largest_ratio(output, batch))
                return policy_terms(output, batch, self.config, beta)

            policy = update(
                self.models.policy_engine,
                micro_batches([episodes, *([self.text] if self.text else [])], [*own, *text], self.layout),
                policy_loss,
                partial(policy_counts, config=self.config),
                learning_rate=rates["policy"],
                failed=failed,
            )
            if follow is not None:
                follow()
            found = {f"policy/{name}": value for name, value in policy.means.items()} | {
                "policy/grad_norm": policy.norm
            }
            if self.models.value_engine is not None:
                value = update(
                    self.models.value_engine,
                    micro_batches([episodes], own, self.layout),
                    partial(value_terms, config=self.config),
                    value_counts,
                    learning_rate=rates["value"],
                    failed=failed,
                )
                found |= {"value/loss": value.means["loss"], "value/grad_norm": value.norm}
            made.append(found)
        if not made:
            return {}
        largest = runtime.max_over_ranks({"ratio": float(torch.stack(ratios).max())})["ratio"]
        return {name: float(np.mean([one[name] for one in made])) for name in made[0]} | {"policy/ratio_max": largest}

    def _text(self, before: int, episodes: int) -> list[tuple[int, int]]:
        """The documents that go with `episodes`, after `before` have been trained on."""
        if self.text is None:
            return []
        share = self.config.ptx.examples_per_episode / (1 + self.config.ptx.examples_per_episode)
        chosen = mixed_in(before, before + episodes, ratio=share, size=len(self.text), seed=self.config.seed)
        return [(TEXT, int(i)) for i in chosen]


def trees_to_learn(experience: Experience, shaped: Shaped) -> list[Tree]:
    """The iteration's trees with what the losses need of every token."""
    numbers = {
        "old_logprob": experience.logprobs,
        "reference": experience.reference,
        "advantage": shaped.advantages,
    }
    if experience.values is not None and shaped.returns is not None:
        numbers |= {"old_value": experience.values, "return": shaped.returns}
    return with_numbers(experience.rollout.trees, experience.mask, numbers)


def to_learn_from(experience: Experience, shaped: Shaped, config: PpoConfig) -> np.ndarray:
    """Places of the trees that are trained on, int [n]: all, or those whose samples' scores differ."""
    if not config.advantage.skip_no_spread:
        return np.arange(len(experience.rollout.trees))
    return np.flatnonzero(with_spread(shaped.scores, experience.rollout.samples).numpy())


def minibatches(trees: np.ndarray, config: PpoConfig, step: int) -> Iterator[np.ndarray]:
    """Of these places of trees those of one update after the other, as even as can be; an epoch has its own order."""
    size = max(1, (config.batch.examples or config.rollout.episodes) // config.rollout.samples)
    for epoch in range(config.policy.epochs if len(trees) else 0):
        order = np.random.default_rng([config.seed, ORDER, step, epoch]).permutation(trees)
        yield from np.array_split(order, -(-len(trees) // size))


def policy_terms(output: Any, batch: TreeBatch, config: PpoConfig, beta: float) -> dict[str, Term]:
    """The clipped surrogate, the KL where it is a term of the loss, the entropy bonus and the pretraining mix.

    output: log-probs fp32 [N], or (log-probs, entropies) where there is a bonus.
    """
    logprobs, entropy = output if isinstance(output, tuple) else (output, None)
    own, weights, counts = _shares(batch.group, batch.sequence, config)
    mine = logprobs[own]
    old, advantage = batch.number("old_logprob")[own], batch.number("advantage")[own]
    losses = clipped_policy_loss(mine, old, advantage, clip=config.policy.clip)
    terms = {"loss": Term((weights[own] * losses).sum(), counts["loss"])}
    if config.kl.place is KlPlace.loss:
        penalty = kl.k3(mine, batch.number("reference")[own])
        terms["kl"] = Term((weights[own] * penalty).sum(), counts["loss"], weight=beta)
    if entropy is not None:
        terms["entropy"] = Term((weights[own] * entropy[own]).sum(), counts["loss"], weight=-config.policy.entropy)
    if config.ptx.coefficient:
        unlikely = -(weights[~own] * logprobs[~own]).sum()
        terms["ptx"] = Term(unlikely, counts["ptx"], weight=config.ptx.coefficient)
    with torch.no_grad():
        clipped = clip_fraction(mine, old, advantage, clip=config.policy.clip)
        terms["clip_fraction"] = Term(clipped.sum(), counts["clip_fraction"], weight=0.0)
        terms["step_kl"] = Term(kl.k3(old, mine).sum(), counts["clip_fraction"], weight=0.0)
    return terms


def policy_counts(micro: PackedTrees, config: PpoConfig) -> dict[str, float]:
    """The counts of `policy_terms`, before any forward pass."""
    group, sequence = torch.from_numpy(micro.group), torch.from_numpy(micro.sequence)
    own, _, counts = _shares(group, sequence, config)
    names = {
        "loss": True,
        "kl": config.kl.place is KlPlace.loss,
        "entropy": config.policy.entropy > 0,
        "ptx": config.ptx.coefficient > 0,
        "clip_fraction": True,
        "step_kl": True,
    }
    by_name = {"kl": counts["loss"], "entropy": counts["loss"], "step_kl": float(own.sum()), **counts}
    return {name: by_name[name] for name, there in names.items() if there}


def value_terms(values: Tensor, batch: TreeBatch, config: PpoConfig) -> dict[str, Term]:
    """The clipped value loss, a mean over tokens."""
    losses = clipped_value_loss(values, batch.number("old_value"), batch.number("return"), clip=config.value.clip)
    return {"loss": Term(losses.sum(), float(len(values)))}


def value_counts(micro: PackedTrees) -> dict[str, float]:
    """The counts of `value_terms`."""
    return {"loss": float(len(micro.target))}


@torch.no_grad()
def largest_ratio(output: Any, batch: TreeBatch) -> Tensor:
    """The largest ratio of a micro-batch's episodes, or its inverse where that is larger; 1 without any."""
    own = batch.group[batch.sequence] == EPISODES
    moved = (logprobs_of(output)[own] - batch.number("old_logprob")[own]).abs()
    return torch.cat([moved, moved.new_zeros(1)]).max().exp()


def _not_finite(step: int, origins: Sequence[str], what: str, values: list[float]) -> UserError:
    shown = ", ".join(origins[:SHOWN]) + (f" and {len(origins) - SHOWN} more" if len(origins) > SHOWN else "")
    return UserError(
        f"iteration {step + 1}: the {what} is not finite ({', '.join(map(str, values))}). The weights were not saved; the "
        f"last state on disk is from before it. Prompts of this update: {shown}. A lower optim.lr or value.optim.lr, a "
        "smaller max_grad_norm or model.dtype=float32 often helps."
    )


def _shares(group: Tensor, sequence: Tensor, config: PpoConfig) -> tuple[Tensor, Tensor, Mapping[str, float]]:
    """(which tokens are the episodes' bool [N], weights fp32 [N] of all tokens, counts of the means)."""
    own = group[sequence] == EPISODES
    weights = torch.empty(len(sequence), device=sequence.device)
    counts: dict[str, float] = {"clip_fraction": float(own.sum())}
    for name, here, mean in (("loss", own, config.policy.mean), ("ptx", ~own, config.ptx.mean)):
        weights[here], count = token_weights(sequence[here], len(group), mean=mean)
        counts[name] = float(count)
    return own, weights, counts
