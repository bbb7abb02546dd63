"""Log-probabilities at a temperature: against log_softmax(logits / temperature) of one plain forward a path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_pipeline.config.schema import SamplingConfig
from rlhf_pipeline.data.packing import pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.generation.decode import generate
from rlhf_pipeline.models.self_check import self_check
from rlhf_pipeline.models.tree_model import TreeBatch, TreeModel

CPU = torch.device("cpu")
HEADS = pytest.mark.parametrize("fast_head", [True, False])


@pytest.fixture
def trees(make_tree: Callable[..., Tree]) -> list[Tree]:
    rng = np.random.default_rng(7)
    return [make_tree(n, branches, rng=rng, scored=0.7) for n, branches in [(5, (4,)), (3, (2, 6, 1)), (6, (5, 2))]]


def batch_of(trees: Sequence[Tree]) -> TreeBatch:
    return TreeBatch.of(pack([trees]), CPU)


def plain(inner: Any, trees: Sequence[Tree], temperature: float) -> Tensor:
    found = []
    for tree in trees:
        for k, scored in enumerate(tree.scored):
            path = torch.from_numpy(tree.path(k).astype(np.int64))
            logits = inner(input_ids=path[None], use_cache=False).logits[0].float()
            logprobs = torch.log_softmax(logits / temperature, -1)
            places = len(tree.prompt) + np.flatnonzero(scored)
            found += [logprobs[at - 1, path[at]] for at in places]
    return torch.stack(found)


@HEADS
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_float32(
    fast_head: bool,
    temperature: float,
    tiny_model: Callable[..., Any],
    trees: list[Tree],
    assert_close: Callable[..., None],
) -> None:
    """And the gradients of all weights."""
    model = TreeModel(tiny_model("llama"))
    model.fast_head, model.temperature = fast_head, temperature
    actual, expected = model(batch_of(trees)), plain(model.inner, trees, temperature)
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, len(expected))
    parameters = list(model.inner.parameters())
    found, wanted = (torch.autograd.grad((one * weights).sum(), parameters) for one in (actual, expected))
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-5 * max(1.0, float(other.abs().max())))


@HEADS
def test_one_changes_nothing(fast_head: bool, tiny_model: Callable[..., Any], trees: list[Tree]) -> None:
    model = TreeModel(tiny_model("llama"))
    model.fast_head = fast_head
    before = model(batch_of(trees))
    model.temperature = 0.7
    assert (model(batch_of(trees)) - before).abs().max() > 0.1
    model.temperature = 1.0
    assert torch.equal(model(batch_of(trees)), before)


@HEADS
def test_bfloat16_loses_no_more_than_without(
    fast_head: bool, tiny_model: Callable[..., Any], trees: list[Tree]
) -> None:
    """Scaling hidden states rounds once more; beside the rounding of the model itself that is not seen."""
    exact, rounded = TreeModel(tiny_model("llama")), TreeModel(tiny_model("llama", dtype=torch.bfloat16))
    exact.inner.load_state_dict({name: t.float() for name, t in rounded.inner.state_dict().items()})
    rounded.fast_head = fast_head
    errors = {}
    with torch.no_grad():
        for temperature in (1.0, 0.7):
            exact.temperature = rounded.temperature = temperature
            found = rounded(batch_of(trees))
            assert found.dtype == torch.float32
            errors[temperature] = float((found - exact(batch_of(trees))).abs().mean()) * temperature
    assert errors[0.7] < 1.3 * errors[1.0], errors


def test_bfloat16_logits_of_the_models_own_head_are_scaled_in_fp32(
    tiny_model: Callable[..., Any], trees: list[Tree]
) -> None:
    model = TreeModel(tiny_model("llama", dtype=torch.bfloat16))
    model.fast_head, model.temperature = False, 0.7
    seen: list[Tensor] = []
    model.inner.lm_head.register_forward_hook(lambda module, inputs, logits: seen.append(logits))
    batch = batch_of(trees)
    with torch.no_grad():
        found = model(batch)
    columns = batch.source.unique(return_inverse=True)[1]  # one row: the logits are of these
    logits = seen[0][0, columns].float()
    expected = torch.log_softmax(logits / 0.7, -1).gather(1, batch.target[:, None])[:, 0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_the_self_check_does_not_see_it(tiny_model: Callable[..., Any]) -> None:
    model = TreeModel(tiny_model("llama"))
    before = self_check(model, CPU)
    model.temperature, model.gives_entropy = 2.5, True
    assert self_check(model, CPU) == before
    assert model.fast_head and model.temperature == 2.5


@HEADS
def test_what_is_sampled_at_it_has_these_logprobs(
    fast_head: bool, tiny_model: Callable[..., Any], assert_close: Callable[..., None]
) -> None:
    """The sampling loop and the packed forward mean the same distribution."""
    model = TreeModel(tiny_model("llama"))
    prompts = [np.arange(5, 5 + n, dtype=np.int32) for n in (3, 9, 1, 6)]
    options = SamplingConfig(temperature=1.4, max_new_tokens=12, samples=2)
    drawn = generate(model.inner, prompts, options, end_ids=(3, 4, 90, 91, 92), pad_id=0, seed=1, ids=range(4))
    trees = [
        Tree(
            prompt=prompt,
            responses=tuple(one.tokens for one in drawn[2 * i : 2 * i + 2]),
            scored=tuple(np.ones(len(one.tokens), bool) for one in drawn[2 * i : 2 * i + 2]),
            index=i,
        )
        for i, prompt in enumerate(prompts)
    ]
    model.fast_head, model.temperature = fast_head, 1.4
    with torch.no_grad():
        found = model(batch_of(trees))
    assert_close(found, torch.from_numpy(np.concatenate([one.logprobs for one in drawn])), rtol=1e-4, atol=1e-4)
