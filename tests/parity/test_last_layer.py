"""Of the last layer only what is read is computed: that it is, and that nothing else changes by it.

That log-probabilities, rewards and gradients are those of the plain model is shown where trees are (`test_tree_model`,
`test_reward_model`): their path attention runs this way too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_pipeline.config.schema import Attention
from rlhf_pipeline.data.packing import pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.models import last_layer
from rlhf_pipeline.models.tree_model import TreeBatch, TreeModel

CPU = torch.device("cpu")


@pytest.fixture
def batch(make_tree: Callable[..., Tree]) -> TreeBatch:
    """Long prompts, short responses: 48 tokens, of which 10 states are read (a tree's responses share one)."""
    rng = np.random.default_rng(3)
    return TreeBatch.of(pack([[make_tree(20, (3, 2), rng=rng), make_tree(16, (5, 2), rng=rng)]]), CPU)


def seen_by(parts: dict[str, Any]) -> dict[str, list[int]]:
    """How many tokens each module is given, call by call."""
    found: dict[str, list[int]] = {name: [] for name in parts}
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0][..., 0].numel()))
    return found


def run(
    inner: Any, batch: TreeBatch, attention: Attention = Attention.paths
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model = TreeModel(inner)
    model.use_attention(attention)
    logprobs = model(batch)
    weights = torch.linspace(-1, 1, len(logprobs), dtype=logprobs.dtype)
    return logprobs, list(torch.autograd.grad((logprobs * weights).sum(), list(inner.parameters())))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_only_states_that_are_read_pass_through_the_last_layer(
    family: str, batch: TreeBatch, tiny_model: Callable[..., Any]
) -> None:
    assert len(batch.read) == 10 and len(torch.unique(batch.source)) == 10
    inner = tiny_model(family)
    TreeModel(inner)  # its hooks come before ours
    first, last = inner.model.layers
    seen = seen_by(
        {"first": first.mlp, "last": last.mlp, "keys": last.self_attn.k_proj, "queries": last.self_attn.q_proj}
    )
    run(inner, batch)
    assert seen == {"first": [48], "last": [10], "keys": [48], "queries": [10]}


def test_where_most_is_read_all_is_computed(
    batch: TreeBatch, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_layer, "WORTH", 0.2)  # 10 of 48 are not less
    inner = tiny_model("llama")
    TreeModel(inner)
    seen = seen_by({"last": inner.model.layers[-1].mlp})
    run(inner, batch)
    assert seen == {"last": [48]}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_gradients_stay(
    checkpointing: bool,
    batch: TreeBatch,
    tiny_model: Callable[..., Any],
    assert_close: Callable[..., None],
) -> None:
    expected, gradients = run(tiny_model("llama", dtype=torch.float64), batch, Attention.dense)
    inner = tiny_model("llama", dtype=torch.float64).train()
    if checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    found, own = run(inner, batch)
    assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(own, gradients, strict=True):
        assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_a_plain_forward_afterwards_is_whole(batch: TreeBatch, tiny_model: Callable[..., Any]) -> None:
    """The model is also used without trees: for sampling, and by the self-check."""
    inner = tiny_model("llama")
    tokens = batch.tokens[:, :7]
    before = inner(input_ids=tokens).logits
    run(inner, batch)
    assert torch.equal(inner(input_ids=tokens).logits, before)
