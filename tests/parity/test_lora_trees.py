"""Packed trees on adapted models: plain forwards of one path at a time, with and without the adapters, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_pipeline.config.schema import Attention, LoraConfig
from rlhf_pipeline.data.packing import pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.models.lora import adapters_off, add_adapters
from rlhf_pipeline.models.self_check import self_check
from rlhf_pipeline.models.tree_model import TreeBatch, TreeModel

pytest.importorskip("peft", reason="needs the lora extra")

CPU = torch.device("cpu")
MIXED = ["sliding_attention", "full_attention"]
# family -> what it takes beside the sizes, and the attention it can do
CASES: dict[str, tuple[dict[str, Any], list[Attention]]] = {
    "llama": ({}, [Attention.dense, Attention.paths]),
    "qwen3": ({}, [Attention.paths]),
    "gpt2": ({}, [Attention.paths]),
    "gemma3_text": ({"sliding_window": 3, "layer_types": MIXED}, [Attention.dense]),
}


@pytest.fixture
def trees(make_tree: Callable[..., Tree]) -> list[Tree]:
    rng = np.random.default_rng(3)
    shapes = [(6, (5, 3)), (9, (4, 7, 2))]
    return [make_tree(prompt, branches, rng=rng, index=i) for i, (prompt, branches) in enumerate(shapes)]


def adapted(tiny_model: Callable[..., Any], family: str, attention: Attention) -> TreeModel:
    inner = tiny_model(family, **CASES[family][0]).eval()
    add_adapters(inner, LoraConfig(rank=4, alpha=8.0), seed=0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in inner.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model = TreeModel(inner)
    model.use_attention(attention)
    return model


def path_by_path(inner: Any, trees: list[Tree]) -> Tensor:
    found = []
    for tree in trees:
        for k in range(len(tree.responses)):
            path = torch.from_numpy(tree.path(k).astype(np.int64))
            logprobs = inner(input_ids=path[None], use_cache=False).logits[0].log_softmax(-1)
            at = torch.arange(len(tree.prompt), len(path))
            found.append(logprobs[at - 1, path[at]])
    return torch.cat(found)


def gradients(inner: Any, logprobs: Tensor) -> dict[str, Tensor]:
    inner.zero_grad()
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "attention"), [(f, a) for f, (_, kinds) in CASES.items() for a in kinds])
def test_packed_trees_are_plain_forwards(
    tiny_model: Callable[..., Any],
    trees: list[Tree],
    assert_close: Callable[..., None],
    family: str,
    attention: Attention,
) -> None:
    model = adapted(tiny_model, family, attention)
    fast = model.fast_head
    assert self_check(model, CPU) < 1e-3
    assert model.attention is attention and model.fast_head is fast, "nothing had to be switched off"
    batch = TreeBatch.of(pack([trees]), CPU)
    packed, plain = model(batch), path_by_path(model.inner, trees)
    assert_close(packed, plain, rtol=0, atol=2e-5)
    found, expected = gradients(model.inner, packed), gradients(model.inner, plain)
    assert found.keys() == expected.keys() == {n for n, p in model.inner.named_parameters() if "lora_" in n}
    for name in found:
        assert_close(found[name], expected[name], rtol=0, atol=2e-4 * float(expected[name].abs().max()), what=name)


@pytest.mark.parametrize("attention", [Attention.dense, Attention.paths])
def test_without_adapters_it_is_the_reference(
    tiny_model: Callable[..., Any], trees: list[Tree], assert_close: Callable[..., None], attention: Attention
) -> None:
    model = adapted(tiny_model, "llama", attention)
    batch = TreeBatch.of(pack([trees]), CPU)
    with torch.no_grad():
        policy = model(batch)
        with adapters_off(model):
            reference = model(batch)
        assert torch.equal(model(batch), policy)
        assert_close(reference, path_by_path(tiny_model("llama").eval(), trees), rtol=0, atol=2e-5)
    assert (policy - reference).abs().max() > 0.1


def test_one_parameter_is_counted_once(tiny_model: Callable[..., Any]) -> None:
    model = adapted(tiny_model, "llama", Attention.paths)
    plain = sum(p.numel() for p in tiny_model("llama").parameters())
    assert model.num_parameters == plain + model.num_trained
    # Four of rank for each of in and out: q, k, v, o, gate, up, down in two layers.
    assert model.num_trained == 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
