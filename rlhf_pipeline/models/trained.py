"""The policy that a stage trains: loaded, under its engine, and checked."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.engine import Engine, deepspeed_json
from rlhf_pipeline.models.load import load_policy
from rlhf_pipeline.models.self_check import self_check
from rlhf_pipeline.models.tree_model import TreeModel


def open_trained_policy(config: StageConfig, tokenizer: Any, device: torch.device) -> tuple[TreeModel, Engine]:
    """Called by every rank.

    Raises:
        UserError: see `load_policy` and `self_check`.
    """
    json = deepspeed_json(config.engine, dtype=config.model.dtype, max_grad_norm=config.optim.max_grad_norm)
    policy = load_policy(
        config.model, lora=config.lora, tokenizer=tokenizer, seed=config.seed, device=device, deepspeed_config=json
    )
    engine = Engine(policy, engine=config.engine, optim=config.optim, dtype=config.model.dtype, device=device)
    self_check(policy, device)
    return policy, engine
