"""Shapes of models from scratch: their transformers configs, their first weights, their dropout."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_pipeline.config.schema import Architecture, ShapeConfig


def shape_config(shape: ShapeConfig) -> Any:
    """The transformers config of a shape."""
    from transformers import AutoConfig

    if shape.architecture is Architecture.gpt2:
        return AutoConfig.for_model(
            "gpt2",
            n_embd=shape.hidden,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_inner=shape.intermediate,
            vocab_size=shape.vocab_size,
            n_positions=shape.context,
            tie_word_embeddings=shape.tied,
            initializer_range=shape.init_std,
            bos_token_id=None,  # GPT-2's own ids lie outside a smaller vocabulary
            eos_token_id=None,
        )
    return AutoConfig.for_model(
        shape.architecture.value,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        initializer_range=shape.init_std,
    )


@torch.no_grad()
def initialise(inner: Any, seed: int) -> None:
    """Draw the weights from `seed` module by module, so that they are the same whatever partitions the model is in."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    torch.manual_seed(seed)
    for module in inner.modules():
        own = list(module.parameters(recurse=False))
        if is_deepspeed_zero3_enabled() and own:
            import deepspeed

            with deepspeed.zero.GatheredParameters(own, modifier_rank=0):
                inner._init_weights(module)
        else:
            inner._init_weights(module)
    inner.tie_weights()


def set_dropout(config: Any, value: float) -> None:
    """Set every dropout probability that a model's config knows."""
    for name, current in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(current, int | float):
            setattr(config, name, value)
