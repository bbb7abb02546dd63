"""A policy that is trained, and the one that it is held to, as what `evaluation.policy` compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rlhf_pipeline.config.ppo import RolloutConfig
from rlhf_pipeline.data.loader import Layout
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.engine import Engine
from rlhf_pipeline.evaluation.policy import Policy
from rlhf_pipeline.generation.prompts import Asked
from rlhf_pipeline.models.lora import adapters_off
from rlhf_pipeline.models.reference import Reference, logprobs_of
from rlhf_pipeline.models.tree_model import TreeModel
from rlhf_pipeline.rollout import Rollout, per_token, roll_out, sampling_model


def held_out_policies(
    policy: TreeModel,
    engine: Engine,
    reference: Callable[[], Reference],
    options: RolloutConfig,
    *,
    renderer: Renderer,
    layout: Layout,
) -> tuple[Policy, Policy]:
    """(the policy, its reference), as they are at each use.

    Args:
        reference: gives it whenever it is used.
    """

    def drawn(model: Any, asked: Sequence[Asked], seed: int) -> Rollout:
        return roll_out(model, asked, options, renderer=renderer, seed=seed, first=0)

    def of_policy(asked: Sequence[Asked], seed: int) -> Rollout:
        with sampling_model(engine, policy, options) as model:
            return drawn(model, asked, seed)

    def of_reference(asked: Sequence[Asked], seed: int) -> Rollout:
        frozen = reference()
        if frozen.model is not None:
            with frozen.ready():
                return drawn(frozen.model.inner, asked, seed)
        with sampling_model(engine, policy, options) as model, adapters_off(model):
            return drawn(model, asked, seed)

    def policy_logprobs(trees: list[Tree]) -> Tensor:
        with engine.evaluating():
            found: Tensor = per_token(lambda batch: logprobs_of(engine(batch)), trees, layout, engine.device)
        return found

    def reference_logprobs(trees: list[Tree]) -> Tensor:
        with engine.evaluating(), reference().ready() as forward:
            found: Tensor = per_token(forward, trees, layout, engine.device)
        return found

    return (
        Policy(answer=of_policy, logprobs=policy_logprobs),
        Policy(answer=of_reference, logprobs=reference_logprobs),
    )
