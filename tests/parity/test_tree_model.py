"""Packed trees against the plain way: one forward a path, alone and unpadded, log_softmax over all logits, gather.

In float64 log-probabilities and every parameter's gradient are the same to 1e-9; the other dtypes are held to what
they can do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rlhf_pipeline.config.schema import Attention
from rlhf_pipeline.data.packing import Segment, pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.models import path_attention as paths_module
from rlhf_pipeline.models.tree_model import BLOCK_MULTIPLE, TreeBatch, TreeModel, allowed, attention_kinds

CPU = torch.device("cpu")
SHAPES: list[list[tuple[int, tuple[int, ...]]]] = [
    [(5, (4,)), (3, (2, 6, 1)), (6, (5, 2))],  # 34 tokens
    [(1, (3, 1, 2, 5, 2)), (7, (3, 3, 4, 2))],  # 33
    [(12, (4, 6))],  # 22, so that its row ends with much padding
]

Gradients = dict[str, Tensor]


@pytest.fixture
def rows(make_tree: Callable[..., Tree]) -> list[list[Tree]]:
    """Trees of 1..5 branches in rows of unequal length; about a third of the response tokens are no targets."""
    rng = np.random.default_rng(7)
    return [[make_tree(prompt, branches, rng=rng, scored=0.7) for prompt, branches in row] for row in SHAPES]


# The plain way


def plain_logprobs(inner: Any, rows: Sequence[Sequence[Tree]]) -> Tensor:
    """Log-probabilities of the scored tokens, by row, tree, response and place in it."""
    found = []
    for tree in (tree for row in rows for tree in row):
        for response, scored in zip(tree.responses, tree.scored, strict=True):
            path = torch.tensor([*tree.prompt.tolist(), *response.tolist()])
            logits = inner(input_ids=path[None], use_cache=False).logits[0]
            logprobs = torch.log_softmax(logits.float() if logits.dtype == torch.bfloat16 else logits, dim=-1)
            for j in range(len(response)):
                if scored[j]:
                    at = len(tree.prompt) + j
                    found.append(logprobs[at - 1, path[at]])
    return torch.stack(found)


def gradients(inner: Any, logprobs: Tensor) -> Gradients:
    """Of a fixed random weighting of the log-probabilities."""
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inner.zero_grad()
    (logprobs.double() * weights).sum().backward()
    return {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None}


def packed_batch(rows: Sequence[Sequence[Tree]], width_multiple: int = 8) -> TreeBatch:
    return TreeBatch.of(pack(rows, width_multiple=width_multiple), CPU)


class KeepFloat64(TorchFunctionMode):
    """transformers' norms and soft-maxes compute in float32 even in a float64 model; within this they do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = [torch.float64 if value is torch.float32 else value for value in args]
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def compute_in_float64(inner: Any) -> None:
    """Only in modules of transformers, so that what this project does is seen as it is."""

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with KeepFloat64():
                return forward(*args, **kwargs)

        return call

    for module in inner.base_model.modules():
        if type(module).__name__.endswith(("Norm", "Attention", "Router", "MoE")):
            module.forward = wrapped(module.forward)


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


MIXED = ["sliding_attention", "full_attention"]
WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 4}),
    ("mistral", {"sliding_window": 20}),  # longer than any path, shorter than a row
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED}),
    ("gemma3_text", {"sliding_window": 3, "layer_types": MIXED}),
]
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


# Masks and paths by themselves

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
