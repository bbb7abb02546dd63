"""The value model against transformers' own classifier: its output at the token before each scored one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rlhf_pipeline.config.schema import Attention
from rlhf_pipeline.data.packing import pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.scalar_head import TreeCritic, TreeScorer
from rlhf_pipeline.models.self_check import self_check
from rlhf_pipeline.models.tree_model import TreeBatch

CPU = torch.device("cpu")


@pytest.fixture
def classifier(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
        config = tiny_model(family).config
        config.num_labels, config.pad_token_id = 1, 0
        torch.manual_seed(0)
        inner = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa", dtype=dtype)
        torch.nn.init.normal_(inner.score.weight, std=0.3)
        return inner.eval()

    return build


@pytest.fixture
def trees(make_tree: Callable[..., Tree]) -> list[Tree]:
    rng = np.random.default_rng(3)
    shapes = [(5, (4,)), (1, (2, 6, 1)), (6, (5, 2))]
    return [make_tree(n, branches, rng=rng, scored=0.8, index=i) for i, (n, branches) in enumerate(shapes)]


def plain(inner: Any, trees: Sequence[Tree]) -> Tensor:
    """Each path so far by itself, on the right of a padded batch: the classifier reads its last token that is no pad."""
    states = []
    for tree in trees:
        for k, scored in enumerate(tree.scored):
            ends = len(tree.prompt) + np.flatnonzero(scored)
            states += [torch.from_numpy(tree.path(k)[:end].astype(np.int64)) for end in ends]
    assert all(state[-1] != 0 for state in states), "the classifier would read before it"
    ids = torch.nn.utils.rnn.pad_sequence(states, batch_first=True, padding_value=0)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(state) for state in states])[:, None]
    return inner(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, 0]


def batch_of(rows: Sequence[Sequence[Tree]]) -> TreeBatch:
    return TreeBatch.of(pack(rows, width_multiple=8), CPU)


@pytest.mark.parametrize("attention", [Attention.dense, Attention.paths])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_values(
    family: str,
    attention: Attention,
    classifier: Callable[..., Any],
    trees: list[Tree],
    assert_close: Callable[..., None],
) -> None:
    critic = TreeCritic(classifier(family))
    critic.use_attention(attention)
    batch = batch_of([trees[:1], trees[1:]])
    with torch.no_grad():
        expected = plain(critic.inner, trees)
        values = critic(batch)
    assert values.shape == batch.source.shape and values.dtype == torch.float32 and expected.std() > 0.1
    assert_close(values, expected, rtol=0, atol=1e-5)


def test_it_is_a_reward_model_read_elsewhere(classifier: Callable[..., Any], trees: list[Tree]) -> None:
    """The same head: where a token is the last of one response and stands before a token of another."""
    inner = classifier("llama")
    prompt, response = trees[0].prompt, trees[0].responses[0]
    whole, cut = (
        Tree(prompt=prompt, responses=(one,), scored=(np.ones(len(one), bool),), index=0)
        for one in (response, response[:-1])
    )
    with torch.no_grad():
        assert torch.allclose(
            TreeCritic(inner)(batch_of([[whole]]))[-1:], TreeScorer(inner)(batch_of([[cut]])), atol=1e-6
        )


def test_an_empty_micro_batch_connects_every_parameter(classifier: Callable[..., Any]) -> None:
    critic = TreeCritic(classifier("llama"))
    values = critic(batch_of([]))
    assert values.shape == (0,)
    values.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in critic.parameters())


def test_values_of_a_bfloat16_body_are_fp32(classifier: Callable[..., Any], trees: list[Tree]) -> None:
    critic = TreeCritic(classifier("llama", torch.bfloat16))
    assert self_check(critic, CPU) < 0.1
    assert critic(batch_of([trees])).dtype == torch.float32


def test_a_language_model_is_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="no bias-free linear head"):
        TreeCritic(tiny_model("llama"))
