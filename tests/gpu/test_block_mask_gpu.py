"""Block masks on a GPU, forward and backward, against the plain forward of one path at a time.

The CPU has no backward pass of flex attention; its forward is checked in tests/parity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_pipeline.config.schema import Attention
from rlhf_pipeline.data.packing import pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.models.self_check import self_check
from rlhf_pipeline.models.tree_model import BLOCK_MULTIPLE, TreeBatch, TreeModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: flex attention's backward pass"),
]

MIXED = ["sliding_attention", "full_attention"]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen3", {}),
    ("mistral", {"sliding_window": 4}),
    ("gemma3_text", {"sliding_window": 3, "layer_types": MIXED}),
]
# Rows of 185 and 22 tokens: two blocks of 128, the second of them partly and in one row wholly padding.
SHAPES: list[list[tuple[int, tuple[int, ...]]]] = [[(40, (30, 50)), (3, (2, 6, 1)), (1, (20, 1, 31))], [(12, (4, 6))]]


@pytest.fixture
def rows(make_tree: Callable[..., Tree]) -> list[list[Tree]]:
    rng = np.random.default_rng(7)
    return [[make_tree(prompt, branches, rng=rng, scored=0.7) for prompt, branches in row] for row in SHAPES]


def plain_logprobs(inner: Any, rows: list[list[Tree]]) -> Tensor:
    found = []
    for tree in (tree for row in rows for tree in row):
        for k, scored in enumerate(tree.scored):
            path = torch.tensor(tree.path(k).tolist(), device="cuda")
            logprobs = torch.log_softmax(inner(input_ids=path[None], use_cache=False).logits[0].float(), -1)
            at = len(tree.prompt) + torch.from_numpy(np.flatnonzero(scored)).cuda()
            found.append(logprobs[at - 1, path[at]])
    return torch.cat(found)


def gradients(inner: Any, logprobs: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0)).cuda()
    inner.zero_grad()
    (logprobs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("fast_head", [True, False], ids=["fast-head", "own-head"])
@pytest.mark.parametrize(("family", "config"), CASES, ids=[family for family, _ in CASES])
def test_float32(
    family: str,
    config: dict[str, Any],
    fast_head: bool,
    checkpointing: bool,
    tiny_model: Callable[..., Any],
    rows: list[list[Tree]],
    assert_close: Callable[..., None],
) -> None:
    model = TreeModel(tiny_model(family, **config)).cuda()
    expected = plain_logprobs(model.inner, rows)
    expected_gradients = gradients(model.inner, expected)

    model.fast_head = fast_head
    model.use_attention(Attention.block)
    if checkpointing:
        model.inner.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    actual = model(TreeBatch.of(pack(rows, width_multiple=BLOCK_MULTIPLE), torch.device("cuda")))
    actual_gradients = gradients(model.inner, actual)

    assert_close(actual.detach(), expected.detach(), rtol=0, atol=1e-4)
    assert actual_gradients.keys() == expected_gradients.keys()
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert_close(actual_gradients[name], gradient, rtol=1e-3, atol=1e-5 * largest, what=name)


def test_an_empty_micro_batch(tiny_model: Callable[..., Any]) -> None:
    model = TreeModel(tiny_model("llama")).cuda()
    model.use_attention(Attention.block)
    logprobs = model(TreeBatch.of(pack([], width_multiple=BLOCK_MULTIPLE), torch.device("cuda")))
    logprobs.sum().backward()
    for name, parameter in model.inner.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "config"), CASES, ids=[family for family, _ in CASES])
def test_the_self_check_passes(
    family: str, config: dict[str, Any], dtype: torch.dtype, tiny_model: Callable[..., Any]
) -> None:
    model = TreeModel(tiny_model(family, dtype=dtype, **config)).cuda()
    model.use_attention(Attention.block)
    assert self_check(model, torch.device("cuda")) < (1e-3 if dtype == torch.float32 else 0.05)
    assert model.attention is Attention.block
