"""Who attends to whom in packed trees: masks and paths by themselves, and block masks against dense ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers_plain_trees import MIXED, WINDOWS, packed_batch, plain_logprobs

from rlhf_pipeline.config.schema import Attention
from rlhf_pipeline.data.packing import Segment
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.models import path_attention as paths_module
from rlhf_pipeline.models.tree_model import BLOCK_MULTIPLE, TreeModel, allowed, attention_kinds

# A prompt of 2 with branches of 2 and 1, a prompt of 1 with a branch of 1, one position of padding.
TREE = torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1]])
BRANCH = torch.tensor([[0, 0, 1, 1, 2, 0, 1, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 2, 0, 1, 0]])
ALLOWED = [
    [1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0, 0],
    [1, 1, 0, 0, 1, 0, 0, 0],
    [0, 0, 0, 0, 0, 1, 0, 0],
    [0, 0, 0, 0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 1],
]
WINDOW_OF_2 = [
    [1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [0, 1, 1, 0, 0, 0, 0, 0],
    [0, 0, 1, 1, 0, 0, 0, 0],
    [0, 1, 0, 0, 1, 0, 0, 0],
    [0, 0, 0, 0, 0, 1, 0, 0],
    [0, 0, 0, 0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 1],
]
CHUNKS_OF_2 = [
    [1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [0, 0, 1, 0, 0, 0, 0, 0],
    [0, 0, 1, 1, 0, 0, 0, 0],
    [0, 0, 0, 0, 1, 0, 0, 0],
    [0, 0, 0, 0, 0, 1, 0, 0],
    [0, 0, 0, 0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 1],
]


@pytest.mark.parametrize(
    ("kind", "span", "expected"),
    [
        ("full_attention", None, ALLOWED),
        ("full_attention", 2, ALLOWED),
        ("sliding_attention", 2, WINDOW_OF_2),
        ("sliding_attention", None, ALLOWED),
        ("chunked_attention", 2, CHUNKS_OF_2),
    ],
)
def test_who_attends_to_whom(kind: str, span: int | None, expected: list[list[int]]) -> None:
    assert allowed(TREE, BRANCH, POSITIONS, kind=kind, span=span)[0].int().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_mask_is_additive_and_in_the_dtype_of_the_model(
    dtype: torch.dtype, tiny_model: Callable[..., Any], rows: list[list[Tree]]
) -> None:
    mask = TreeModel(tiny_model("llama", dtype=dtype)).mask(packed_batch(rows))
    assert mask.dtype == dtype
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}
    assert (mask == 0).any(-1).all()  # a row of nothing but blocked keys would give NaN


def test_one_mask_for_each_kind_of_layer(tiny_model: Callable[..., Any], rows: list[list[Tree]]) -> None:
    model = TreeModel(tiny_model("gemma3_text", sliding_window=3, layer_types=MIXED))
    masks = model.mask(packed_batch(rows))
    assert masks.keys() == {"full_attention", "sliding_attention"}
    assert (masks["full_attention"] == 0).sum() > (masks["sliding_attention"] == 0).sum()


@pytest.mark.parametrize(
    ("family", "config", "kinds"),
    [
        ("llama", {}, ["full_attention"]),
        ("gpt2", {}, ["full_attention"]),
        ("mistral", {"sliding_window": 4}, ["sliding_attention"]),
        ("mistral", {"sliding_window": None}, ["full_attention"]),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4}, ["full_attention"]),
        ("gemma3_text", {"layer_types": MIXED}, ["full_attention", "sliding_attention"]),
    ],
)
def test_the_kinds_of_layers(
    family: str, config: dict[str, Any], kinds: list[str], tiny_model: Callable[..., Any]
) -> None:
    assert attention_kinds(tiny_model(family, **config).config) == kinds


@pytest.mark.parametrize("short", [0, 20, 8192])
@pytest.mark.parametrize("longest_matrix", [0, 3, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_path_attention_by_itself(
    dtype: torch.dtype,
    key_heads: int,
    longest_matrix: int,
    short: int,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[list[Tree]],
    assert_close: Callable[..., None],
) -> None:
    """Against soft-max with the dense mask, written out in float64; bf16 takes matrix products up to a length. No segment is
    short, some, all."""
    monkeypatch.setattr(paths_module, "LONGEST_MATRIX", longest_matrix)
    monkeypatch.setattr(paths_module, "MANY", 1)
    monkeypatch.setattr(paths_module, "SHORT", short)
    monkeypatch.setattr(paths_module, "LONGEST_MATRIX", longest_matrix)
    batch = packed_batch(rows)
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4, 40, 8)
    query, key, value = (
        torch.randn(3, heads, 40, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (4, key_heads, key_heads)
    )
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = 0.7

    keys, values = (t.double().repeat_interleave(4 // key_heads, dim=1) for t in (key, value))
    scores = (query.double() @ keys.transpose(2, 3)) * scale
    blocked = ~allowed(batch.tree, batch.branch, batch.positions)[:, None]
    expected = scores.masked_fill(blocked, -torch.inf).softmax(-1) @ values
    expected_gradients = torch.autograd.grad(expected, (query, key, value), grad)

    actual, _ = paths_module.path_attention(None, query, key, value, None, tree_segments=batch.segments, scaling=scale)
    assert actual.shape == (3, 40, 4, 8)
    actual_gradients = torch.autograd.grad(actual, (query, key, value), grad.transpose(1, 2).to(dtype))

    rtol, share = (1e-9, 1e-12) if dtype == torch.float64 else (0.0, 0.02)
    assert_close(
        actual.transpose(1, 2).double(), expected.detach(), rtol=rtol, atol=share * float(expected.detach().abs().max())
    )
    for one, other in zip(actual_gradients, expected_gradients, strict=True):
        assert_close(one.double(), other.double(), rtol=rtol, atol=share * float(other.abs().max()))


def test_path_attention_without_a_scale_divides_by_the_root_of_the_width(assert_close: Callable[..., None]) -> None:
    query = torch.tensor([[[[2.0, 0, 0, 0]] * 2]])
    key = torch.tensor([[[[1.0, 0, 0, 0], [0.0, 0, 0, 0]]]])
    value = torch.tensor([[[[1.0], [0.0]]]])
    result, _ = paths_module.path_attention(None, query, key, value, None, tree_segments=(Segment(2),))
    # The second query scores 2 / sqrt(4) = 1 and 0: e / (e + 1).
    assert_close(result.flatten(), torch.tensor([1.0, 0.7310586]), rtol=1e-6)


# Block masks. Compiling takes 5 to 40 seconds a kind of mask; the backward pass exists on a GPU only (tests/gpu).


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config"), [("llama", {}), ("gemma3_text", WINDOWS[3][1])], ids=["llama", "gemma3_text"]
)
def test_block_masks_forward(
    family: str,
    config: dict[str, Any],
    tiny_model: Callable[..., Any],
    rows: list[list[Tree]],
    make_tree: Callable[..., Tree],
    assert_close: Callable[..., None],
) -> None:
    """Also over the edge of a block of 128, and for layers of two kinds."""
    model = TreeModel(tiny_model(family, **config))
    rows = [*rows, [make_tree(40, (30, 50, 41), rng=np.random.default_rng(0))]]
    batch = packed_batch(rows, width_multiple=BLOCK_MULTIPLE)
    with torch.no_grad():
        expected = plain_logprobs(model.inner, rows)
        model.use_attention(Attention.block)
        for fast_head in (True, False):
            model.fast_head = fast_head
            assert_close(model(batch), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "span"), [("full_attention", None), ("sliding_attention", 3), ("chunked_attention", 4)]
)
def test_the_block_mask_says_what_the_dense_mask_says(
    kind: str, span: int | None, tiny_model: Callable[..., Any], rows: list[list[Tree]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for every pair of positions, without compiling anything."""
    model = TreeModel(tiny_model("llama"))
    model.attention = Attention.block
    monkeypatch.setattr(model, "spans", lambda: {kind: span})
    batch = packed_batch(rows, width_multiple=BLOCK_MULTIPLE)
    mask = model.mask(batch)
    assert mask.BLOCK_SIZE == (BLOCK_MULTIPLE, BLOCK_MULTIPLE)
    b, q, k = torch.meshgrid(torch.arange(3), torch.arange(128), torch.arange(128), indexing="ij")
    said = mask.mask_mod(b, torch.zeros_like(b), q, k)
    assert torch.equal(said, allowed(batch.tree, batch.branch, batch.positions, kind=kind, span=span))
