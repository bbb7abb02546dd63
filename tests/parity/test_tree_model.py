"""Packed trees against the plain way: one forward a path, alone and unpadded, log_softmax over all logits, gather.

In float64 log-probabilities and every parameter's gradient are the same to 1e-9; the other dtypes are held to what
they can do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers_plain_trees import MIXED, WINDOWS, Gradients, compute_in_float64, gradients, packed_batch, plain_logprobs
from torch import Tensor

from rlhf_pipeline.config.schema import Attention
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.models.tree_model import TreeModel

# Float64: everything equal


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    attention: str = "sdpa"  # "sdpa" and "eager" with a dense mask; "paths"
    fast_head: bool = True
    checkpointing: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ["" if self.fast_head else "own-head", "checkpointing" if self.checkpointing else ""]
        changes = [f"{name}={value}" for name, value in self.config.items() if name != "layer_types"]
        return "-".join(filter(None, [self.family, self.attention, *options, *changes]))


CHUNKS = {
    "attention_chunk_size": 8,
    "layer_types": ["chunked_attention", "full_attention"],
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
}
CASES = [
    *[
        Case(family=family, attention=attention, fast_head=fast)
        for family in ("llama", "qwen3", "gpt2")
        for attention in ("sdpa", "eager", "paths")
        for fast in (True, False)
    ],
    *[
        Case(family=family, attention=attention, checkpointing=True)
        for family in ("llama", "qwen3", "gpt2")
        for attention in ("sdpa", "paths")
    ],
    Case(family="llama", fast_head=False, checkpointing=True),
    *[
        Case(family=family, attention=attention, fast_head=fast, config={"tie_word_embeddings": tied})
        for family, tied in (("llama", True), ("gpt2", False))
        for attention in ("sdpa", "paths")
        for fast in (True, False)
    ],
    *[
        Case(family=family, attention=attention, fast_head=fast, config=config)
        for family, config in WINDOWS
        for attention, fast in (("sdpa", True), ("sdpa", False), ("eager", True))
    ],
    Case(family="gemma3_text", checkpointing=True, config=WINDOWS[3][1]),
    Case(family="gemma2", attention="eager", fast_head=False, config={"sliding_window": 4, "layer_types": MIXED}),
    Case(family="llama4_text", fast_head=False, config=CHUNKS),
    Case(family="phi", fast_head=False),  # its output layer has a bias
]


def prepare(tiny_model: Callable[..., Any], case: Case, dtype: torch.dtype) -> TreeModel:
    attention = "sdpa" if case.attention == "paths" else case.attention
    model = TreeModel(tiny_model(case.family, attention=attention, dtype=dtype, **case.config))
    model.fast_head = case.fast_head
    return model


def switch_on(model: TreeModel, case: Case) -> None:
    """What the plain forward is to do without."""
    if case.attention == "paths":
        model.use_attention(Attention.paths)
    if case.checkpointing:
        model.inner.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(
    case: Case, tiny_model: Callable[..., Any], rows: list[list[Tree]], assert_close: Callable[..., None]
) -> None:
    model = prepare(tiny_model, case, torch.float64)
    compute_in_float64(model.inner)
    expected = plain_logprobs(model.inner, rows)
    expected_gradients = gradients(model.inner, expected)

    switch_on(model, case)
    actual = model(packed_batch(rows))
    actual_gradients = gradients(model.inner, actual)

    assert actual.dtype == torch.float64
    assert_close(actual.detach(), expected.detach(), rtol=1e-9)
    assert actual_gradients.keys() == expected_gradients.keys()
    # Some gradients are zero but for rounding (a key's bias moves no soft-max): 1e-12 of the largest is nothing.
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert_close(actual_gradients[name], gradient, rtol=1e-9, atol=1e-12 * largest, what=name)


@pytest.mark.parametrize("case", [case for case in CASES if case.checkpointing], ids=str)
def test_checkpointing_computes_the_layers_again(
    case: Case, tiny_model: Callable[..., Any], rows: list[list[Tree]]
) -> None:
    """Or the cases above would hold without any checkpointing."""
    model = prepare(tiny_model, case, torch.float32)
    calls = []
    attention = next(m for m in model.inner.modules() if type(m).__name__.endswith("Attention"))
    attention.register_forward_hook(lambda *_: calls.append(1))
    switch_on(model, case)
    gradients(model.inner, model(packed_batch(rows)))
    assert len(calls) == 2


def test_a_tied_head_adds_both_gradients_in_one_parameter(tiny_model: Callable[..., Any]) -> None:
    model = TreeModel(tiny_model("llama", tie_word_embeddings=True))
    assert model.head is not None
    assert model.head.weight is model.inner.get_input_embeddings().weight
    assert len(list(model.parameters())) == len(list(model.inner.parameters()))


def test_paths_are_not_taken_for_masks(tiny_model: Callable[..., Any], rows: list[list[Tree]]) -> None:
    """`paths` computes no dense mask: the cases above would hold without it."""
    model = TreeModel(tiny_model("llama"))
    model.use_attention(Attention.paths)
    assert model.attention_inputs(packed_batch(rows))["attention_mask"].numel() == 1
    dense = TreeModel(tiny_model("llama"))
    assert dense.attention_inputs(packed_batch(rows))["attention_mask"].shape == (3, 1, 40, 40)


def test_back_from_paths_to_dense(tiny_model: Callable[..., Any], rows: list[list[Tree]]) -> None:
    model = TreeModel(tiny_model("llama"))
    before = model(packed_batch(rows))
    model.use_attention(Attention.paths)
    model.use_attention(Attention.dense)
    assert model.inner.config._attn_implementation == "sdpa"
    assert torch.equal(model(packed_batch(rows)), before)


@pytest.mark.parametrize("attention", ["sdpa", "paths"])
@pytest.mark.parametrize("fast_head", [True, False])
def test_how_trees_share_rows_does_not_matter(
    attention: str,
    fast_head: bool,
    tiny_model: Callable[..., Any],
    rows: list[list[Tree]],
    assert_close: Callable[..., None],
) -> None:
    case = Case(family="llama", attention=attention, fast_head=fast_head)
    model = prepare(tiny_model, case, torch.float64)
    compute_in_float64(model.inner)
    switch_on(model, case)
    trees = [tree for row in rows for tree in row]
    stacked = model(packed_batch([[tree] for tree in trees]))
    in_one_row = model(packed_batch([trees], width_multiple=1))
    assert_close(stacked, in_one_row, rtol=1e-9)
    assert_close(stacked, model(packed_batch(rows, width_multiple=64)), rtol=1e-9)


# Rows without targets


@pytest.mark.parametrize("attention", ["sdpa", "paths"])
@pytest.mark.parametrize("fast_head", [True, False])
def test_an_empty_micro_batch_connects_every_parameter(
    attention: str, fast_head: bool, tiny_model: Callable[..., Any]
) -> None:
    """Every rank runs as many backward passes as the others, also where it has no trees left."""
    case = Case(family="llama", attention=attention, fast_head=fast_head)
    model = prepare(tiny_model, case, torch.float32)
    switch_on(model, case)
    logprobs = model(packed_batch([]))
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    for name, parameter in model.inner.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("fast_head", [True, False])
def test_a_row_without_targets_among_others(
    fast_head: bool,
    tiny_model: Callable[..., Any],
    make_tree: Callable[..., Tree],
    assert_close: Callable[..., None],
) -> None:
    rng = np.random.default_rng(0)
    trees = [make_tree(4, (3, 2), rng=rng, scored=share) for share in (1.0, 0.0, 1.0)]
    model = TreeModel(tiny_model("llama"))
    model.fast_head = fast_head
    with torch.no_grad():
        assert_close(
            model(packed_batch([[tree] for tree in trees])),
            plain_logprobs(model.inner, [trees]),
            rtol=1e-5,
            atol=1e-5,
        )


# The other dtypes


FP32_CASES = [
    Case(family=family, attention=attention, fast_head=fast)
    for family, attention, fast in (
        ("llama", "sdpa", True), ("llama", "eager", False), ("llama", "paths", True),
        ("qwen3", "sdpa", False), ("qwen3", "paths", True),
        ("gpt2", "eager", True), ("gpt2", "paths", False),
    )
]  # fmt: skip


@pytest.mark.parametrize("case", FP32_CASES, ids=str)
def test_float32(
    case: Case, tiny_model: Callable[..., Any], rows: list[list[Tree]], assert_close: Callable[..., None]
) -> None:
    model = prepare(tiny_model, case, torch.float32)
    expected = plain_logprobs(model.inner, rows)
    expected_gradients = gradients(model.inner, expected)
    switch_on(model, case)
    actual = model(packed_batch(rows))
    actual_gradients = gradients(model.inner, actual)

    assert_close(actual.detach(), expected.detach(), rtol=0, atol=1e-5)
    assert actual_gradients.keys() == expected_gradients.keys()
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert_close(actual_gradients[name], gradient, rtol=1e-4, atol=1e-6 * largest, what=name)


@pytest.mark.parametrize("attention", ["sdpa", "paths"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_bfloat16_trees_are_as_exact_as_bfloat16(
    family: str, attention: str, tiny_model: Callable[..., Any], rows: list[list[Tree]]
) -> None:
    """Measured from the plain fp32 forward, the packed bf16 one is less than twice as far as the plain bf16 one.

    With these and other weights dense masks stay within 1.1 times, paths (soft-max in bf16) within 1.3, and 1.6 for
    gradients.
    """
    case = Case(family=family, attention=attention)
    plain = tiny_model(family)
    exact = plain_logprobs(plain, rows)
    exact_gradients = gradients(plain, exact)
    model = prepare(tiny_model, case, torch.bfloat16)
    model.inner.load_state_dict(plain.state_dict())
    expected = plain_logprobs(model.inner, rows)
    expected_gradients = gradients(model.inner, expected)
    switch_on(model, case)
    actual = model(packed_batch(rows))
    actual_gradients = gradients(model.inner, actual)

    def off(values: Tensor) -> float:
        return float((values.detach().float() - exact.detach()).pow(2).mean().sqrt())

    def gradients_off(values: Gradients) -> float:
        return float(sum((values[name].float() - g).pow(2).sum() for name, g in exact_gradients.items()))

    assert actual.dtype == torch.float32
    assert off(actual) < 2 * off(expected)
    assert gradients_off(actual_gradients) < 2**2 * gradients_off(expected_gradients)
