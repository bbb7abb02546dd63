"""The frozen policy that a policy in training is held to: its log-probabilities of the same tokens.

The reference is the model that the run starts from, or another one; with adapters it is the policy's own weights with
the adapters off, and takes no memory. Where its numbers are kept, if they are, is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_pipeline.config.schema import ReadyModelConfig
from rlhf_pipeline.engine import Engine
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.lora import adapters_off
from rlhf_pipeline.models.ready import check_same_words, open_policy
from rlhf_pipeline.models.tree_model import TreeModel

if TYPE_CHECKING:
    from rlhf_pipeline.config.stages import DpoConfig, PpoConfig


def logprobs_of(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Of a policy's output, which has entropies beside them where there is a bonus for those."""
    return output[0] if isinstance(output, tuple) else output


class Reference:
    """The frozen policy: its log-probabilities of a micro-batch, at the policy's temperature."""

    def __init__(self, model: TreeModel | None, policy: Engine, *, device: torch.device, offload: bool) -> None:
        """`model: None` takes the policy without its adapters."""
        self.model, self.policy = model, policy
        self.device, self.offload = device, offload
        if model is not None and offload:
            model.to("cpu")

    @contextmanager
    def ready(self) -> Iterator[Any]:
        """Within it, what gives log-probabilities fp32 [N] of a TreeBatch, without gradient."""
        with torch.no_grad():
            if self.model is None:
                with adapters_off(self.policy.module):
                    yield lambda batch: logprobs_of(self.policy(batch))
                return
            if self.offload:
                self.model.to(self.device)
            try:
                yield self.model
            finally:
                if self.offload:
                    self.model.to("cpu")


def open_reference(
    config: PpoConfig | DpoConfig, tokenizer: Any, policy: Engine, *, temperature: float = 1.0
) -> Reference:
    """Open and check it: `reference.path`, or the model that the policy starts from. Called by every rank.

    Args:
        tokenizer: the policy's.
        temperature: what logits are divided by, the policy's.

    Raises:
        UserError: for a model that cannot be opened, or reads other tokens than the policy's.
    """
    path = config.reference.path
    if path is None and config.lora is not None:
        return Reference(None, policy, device=policy.device, offload=False)
    if path is not None:
        try:
            check_same_words(tokenizer, path, config.tokenizer)
        except UserError as error:
            raise UserError(f"reference.path={path}: {error}") from error
    reference = open_policy(reference_model(config), tokenizer, policy.device, attention=config.model.attention)
    reference.temperature = temperature
    return Reference(reference, policy, device=policy.device, offload=config.reference.offload)


def reference_model(config: PpoConfig | DpoConfig) -> ReadyModelConfig:
    """Which model the reference is; with adapters and without a path its weights are those under the policy's."""
    path = config.reference.path
    return ReadyModelConfig(
        path=path or config.model.path,
        dtype=config.model.dtype,
        revision=None if path else config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )
