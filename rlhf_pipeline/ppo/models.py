"""The models of PPO: the policy and the value model that are trained, and the frozen reference.

The reference is opened by `models.reference`, scorers by `scoring.sources`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline.config.ppo import Estimator, ValueInit
from rlhf_pipeline.config.stages import PpoConfig
from rlhf_pipeline.data.tokenizer import open_tokenizer
from rlhf_pipeline.engine import Engine, deepspeed_json
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.load import load_critic
from rlhf_pipeline.models.reference import Reference, logprobs_of, open_reference
from rlhf_pipeline.models.self_check import self_check
from rlhf_pipeline.models.trained import open_trained_policy
from rlhf_pipeline.models.tree_model import TreeBatch, TreeModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What is trained, and what it is held to."""

    policy: TreeModel
    policy_engine: Engine
    reference: Reference
    value_engine: Engine | None  # of a TreeCritic; None where the advantages need no values

    @property
    def engines(self) -> dict[str, Engine]:
        """By the names that resume states have them under."""
        value = {} if self.value_engine is None else {"value": self.value_engine}
        return {"policy": self.policy_engine, **value}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off within it, and no gradient."""
        with ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.evaluating())
            yield

    def logprobs(self, batch: TreeBatch) -> Tensor:
        """Of the policy, fp32 [N]."""
        return logprobs_of(self.policy_engine(batch))

    def values(self, batch: TreeBatch) -> Tensor:
        """fp32 [N]."""
        assert self.value_engine is not None
        values: Tensor = self.value_engine(batch)
        return values


def open_models(config: PpoConfig, tokenizer: Any, device: torch.device) -> Models:
    """Open, check and wrap them. Called by every rank.

    Raises:
        UserError: for a model that cannot be opened, or reads other tokens than the policy's.
    """
    policy, engine = _policy(config, tokenizer, device)
    return Models(
        policy=policy,
        policy_engine=engine,
        reference=open_reference(config, tokenizer, engine, temperature=config.rollout.temperature),
        value_engine=_value(config, tokenizer, device) if config.advantage.estimator is Estimator.gae else None,
    )


def _policy(config: PpoConfig, tokenizer: Any, device: torch.device) -> tuple[TreeModel, Engine]:
    policy, engine = open_trained_policy(config, tokenizer, device)
    policy.temperature = config.rollout.temperature
    policy.gives_entropy = config.policy.entropy > 0
    return policy, engine


def _value(config: PpoConfig, tokenizer: Any, device: torch.device) -> Engine:
    start = config.model
    if config.value.init is ValueInit.reward_model:
        scorer = next(one.model for one in config.rewards.values() if one.model is not None)
        assert scorer.path is not None
        _check_reads_the_same(scorer.path, tokenizer, config)
        start = dataclasses.replace(start, path=scorer.path, revision=scorer.revision)
    json = deepspeed_json(config.engine, dtype=start.dtype, max_grad_norm=config.value.optim.max_grad_norm)
    critic = load_critic(
        start, lora=config.lora, tokenizer=tokenizer, seed=config.seed, device=device, deepspeed_config=json
    )
    engine = Engine(critic, engine=config.engine, optim=config.value.optim, dtype=start.dtype, device=device)
    self_check(critic, device)
    return engine


def _check_reads_the_same(path: str, tokenizer: Any, config: PpoConfig) -> None:
    """A value model reads the policy's tokens. A reward model may know one more: the padding that it was given."""
    theirs = open_tokenizer(path, dataclasses.replace(config.tokenizer, path=None)).get_vocab()
    other = next((token for token, number in tokenizer.get_vocab().items() if theirs.get(token) != number), None)
    if other is not None:
        raise UserError(
            f"value.init=reward_model: {path} has another tokenizer than the policy ({other!r} is no token of it, or has "
            "another number), and a value model reads the policy's tokens; use value.init=policy"
        )
