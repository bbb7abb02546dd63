"""Rewards of packed trees against the plain way: transformers' sequence classifier on a prompt with one response, alone.

In float64 rewards and every parameter's gradient are the same to 1e-9, in float32 rewards to 1e-5 on a scale of 1. What
lies beside a response in a batch, and in which order, changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers_plain_trees import compute_in_float64
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rlhf_pipeline.config.schema import Attention
from rlhf_pipeline.data.packing import pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.scalar_head import RankingModel, TreeScorer, draw_head
from rlhf_pipeline.models.self_check import self_check
from rlhf_pipeline.models.tree_model import TreeBatch

CPU = torch.device("cpu")
MIXED = ["sliding_attention", "full_attention"]


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    attention: str = "dense"  # "dense" under sdpa, "eager" (dense as well) or "paths"
    config: dict[str, Any] = field(default_factory=dict)
    position_ids: bool = False  # the plain model does not find positions behind left padding by itself

    def __str__(self) -> str:
        return f"{self.family}-{self.attention}"


CASES = [
    *[Case(family=family, attention=attention) for family in ("llama", "qwen3") for attention in ("dense", "paths")],
    *[Case(family="gpt2", attention=attention, position_ids=True) for attention in ("eager", "paths")],
    Case(family="mistral", config={"sliding_window": 4}),
    Case(family="gemma3_text", config={"sliding_window": 3, "layer_types": MIXED}),
    Case(family="gemma2", attention="eager", config={"sliding_window": 4, "layer_types": MIXED}),
    Case(family="phi", attention="paths"),
]


@pytest.fixture
def trees(make_tree: Callable[..., Tree]) -> list[Tree]:
    """Rankings of 1 to 9 responses of 1 to 6 tokens; none ends with the token 0, at which transformers would not read."""
    rng = np.random.default_rng(5)
    shapes = [(1 + 2 * (k % 4), tuple(1 + int(n) for n in rng.integers(0, 6, k))) for k in range(1, 10)]
    made = [make_tree(prompt, branches, rng=rng, index=i) for i, (prompt, branches) in enumerate(shapes)]
    for tree in made:
        for response in tree.responses:
            response[-1] = max(1, response[-1])
    return made


@pytest.fixture
def classifier(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """classifier(case, dtype) -> transformers' sequence classifier with the weights of a tiny language model."""

    def build(case: Case, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        attention = "eager" if case.attention == "eager" else "sdpa"
        config = tiny_model(case.family, attention=attention, **case.config, **changes).config
        config.num_labels, config.pad_token_id = 1, 0
        torch.manual_seed(0)
        inner = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention, dtype=dtype)
        torch.nn.init.normal_(inner.score.weight, std=0.3)
        return inner.eval()

    return build


def plain_rewards(inner: Any, trees: Sequence[Tree]) -> Tensor:
    """One forward of the classifier itself for each response."""
    paths = [tree.path(k) for tree in trees for k in range(len(tree.responses))]
    return torch.cat([inner(input_ids=torch.tensor([path.tolist()]), use_cache=False).logits[0] for path in paths])


def batch_of(rows: Sequence[Sequence[Tree]], width_multiple: int = 1) -> TreeBatch:
    return TreeBatch.of(pack(rows, width_multiple=width_multiple), CPU)


def gradients(inner: Any, rewards: Tensor) -> dict[str, Tensor]:
    """Of a fixed weighting of the rewards."""
    inner.zero_grad()
    (rewards.double() * torch.linspace(-1, 1, len(rewards), dtype=torch.float64)).sum().backward()
    return {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None}


def scorer_of(inner: Any, case: Case) -> TreeScorer:
    scorer = TreeScorer(inner)
    if case.attention == "paths":
        scorer.use_attention(Attention.paths)
    return scorer


# The same rewards


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(
    case: Case, classifier: Callable[..., Any], trees: list[Tree], assert_close: Callable[..., None]
) -> None:
    inner = classifier(case, torch.float64)
    compute_in_float64(inner)
    expected = plain_rewards(inner, trees)
    expected_gradients = gradients(inner, expected)
    actual = scorer_of(inner, case)(batch_of([trees[:4], trees[4:7], trees[7:]]))
    actual_gradients = gradients(inner, actual)

    assert actual.dtype == torch.float64 and actual.shape == (45,)
    assert expected.std() > 0.1
    assert_close(actual.detach(), expected.detach(), rtol=1e-9)
    assert actual_gradients.keys() == expected_gradients.keys()
    # Some gradients are zero but for rounding (a key's bias moves no soft-max): 1e-12 of the largest is nothing.
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert_close(actual_gradients[name], gradient, rtol=1e-9, atol=1e-12 * largest, what=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(
    case: Case, classifier: Callable[..., Any], trees: list[Tree], assert_close: Callable[..., None]
) -> None:
    """And what the check at load makes of it: a model that is right passes, in the attention that it was given."""
    inner = classifier(case)
    scorer = scorer_of(inner, case)
    before = scorer.attention
    assert self_check(scorer, CPU) < 1e-4
    assert scorer.attention is before
    with torch.no_grad():
        packed = scorer(batch_of([trees]))
        scorer.use_attention(Attention.dense)
        assert packed.dtype == torch.float32
        assert_close(packed, plain_rewards(inner, trees), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", [case for case in CASES if case.attention != "dense" or case.config], ids=str)
def test_padded_batches_of_transformers(
    case: Case, side: str, classifier: Callable[..., Any], trees: list[Tree], assert_close: Callable[..., None]
) -> None:
    """With pad_token_id a token that no response ends with. Learned positions behind left padding have to be told."""
    inner = classifier(case)
    paths = [tree.path(k) for tree in trees for k in range(len(tree.responses))]
    width = max(map(len, paths))
    ids, mask = torch.zeros(len(paths), width, dtype=torch.int64), torch.zeros(len(paths), width, dtype=torch.int64)
    for i, path in enumerate(paths):
        here = slice(0, len(path)) if side == "right" else slice(width - len(path), width)
        ids[i, here], mask[i, here] = torch.from_numpy(path.astype(np.int64)), 1
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if case.position_ids else {}
    with torch.no_grad():
        padded = inner(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits[:, 0]
        packed = scorer_of(inner, case)(batch_of([trees[:5], trees[5:]]))
    assert_close(packed, padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[6]], ids=str)
def test_what_lies_beside_a_response_does_not_matter(
    case: Case, classifier: Callable[..., Any], trees: list[Tree], assert_close: Callable[..., None]
) -> None:
    """Batch size, packing, row length, padding, neighbours, the number and the order of the responses."""
    inner = classifier(case, torch.float64)
    compute_in_float64(inner)
    scorer = scorer_of(inner, case)
    with torch.no_grad():
        alone = torch.cat([scorer(batch_of([[tree]])) for tree in trees])
        assert_close(scorer(batch_of([trees])), alone, rtol=1e-9)
        assert_close(scorer(batch_of([[tree] for tree in trees])), alone, rtol=1e-9)
        assert_close(scorer(batch_of([trees[:2], trees[2:]], width_multiple=64)), alone, rtol=1e-9)
        backwards = scorer(batch_of([[turned(tree) for tree in trees[::-1]]]))
        assert_close(backwards.flip(0), alone, rtol=1e-9)
        last = trees[-1]
        for k in (0, 3, 8):
            one = Tree(prompt=last.prompt, responses=last.responses[k : k + 1], scored=last.scored[k : k + 1], index=0)
            assert_close(scorer(batch_of([[one]])), alone[36 + k : 37 + k], rtol=1e-9)


def turned(tree: Tree) -> Tree:
    """The same answers in the opposite order."""
    return Tree(prompt=tree.prompt, responses=tree.responses[::-1], scored=tree.scored[::-1], index=tree.index)


def test_one_wrong_place_would_be_seen(classifier: Callable[..., Any], trees: list[Tree]) -> None:
    """The tests above hold for no other place than the last token."""
    inner = classifier(CASES[1])
    scorer, batch = scorer_of(inner, CASES[1]), batch_of([trees])
    with torch.no_grad():
        right, beside = scorer(batch), scorer.head(scorer.hidden(batch)[batch.last - 1])
    assert ((right - beside).abs() > 1e-3).float().mean() > 0.9


def test_bfloat16_bodies_have_fp32_rewards(classifier: Callable[..., Any], trees: list[Tree]) -> None:
    """In bfloat16 the sum over the hidden state would leave three digits: here the rewards have more than that."""
    exact = classifier(CASES[1])
    scorer = scorer_of(classifier(CASES[1], torch.bfloat16), CASES[1])
    with torch.no_grad():
        rewards, expected = scorer(batch_of([trees])), plain_rewards(exact, trees)
    assert rewards.dtype == torch.float32
    assert (rewards.to(torch.bfloat16).float() != rewards).float().mean() > 0.9
    assert (rewards - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize("attention", ["dense", "paths"])
@pytest.mark.parametrize("log_tie", [None, 0.5])
def test_an_empty_micro_batch_connects_every_parameter(
    attention: str, log_tie: float | None, classifier: Callable[..., Any]
) -> None:
    """Every rank runs as many backward passes as the others, also where it has no trees left."""
    case = Case(family="llama", attention=attention)
    model = RankingModel(scorer_of(classifier(case), case), log_tie=log_tie, dtype=torch.float32)
    rewards, tie = model(batch_of([]))
    assert rewards.shape == (0,)
    (rewards.sum() + (0 if tie is None else 0 * tie)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


# The head


def test_the_head_is_one_parameter_with_that_of_the_classifier(classifier: Callable[..., Any]) -> None:
    inner = classifier(CASES[0])
    scorer = TreeScorer(inner)
    assert scorer.head.weight is inner.score.weight
    assert scorer.num_parameters == sum(p.numel() for p in inner.parameters())


@pytest.mark.parametrize("width", [32, 512])
def test_a_new_head_is_as_wide_as_the_paper_has_it(width: int, classifier: Callable[..., Any]) -> None:
    """N(0, 1 / (h + 1)), from the seed alone, whatever was drawn before."""
    inner = classifier(CASES[0], hidden_size=width)
    drawn = []
    for seed in (0, 0, *range(1, 1 + 4096 // width)):
        torch.rand(seed)
        draw_head(inner, seed)
        drawn.append(inner.score.weight.detach().clone())
    assert drawn[0].shape == (1, width)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    every = torch.cat(drawn[1:]).flatten() * math.sqrt(width + 1)
    assert len(every) > 4096
    assert every.std() == pytest.approx(1, abs=0.05) and every.mean() == pytest.approx(0, abs=0.06)


@pytest.mark.parametrize("what", ["bias", "two labels", "another name", "none"])
def test_other_heads_are_refused(what: str, classifier: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    inner = classifier(CASES[0])
    match what:
        case "bias":
            inner.score = torch.nn.Linear(32, 1)
        case "two labels":
            inner.score = torch.nn.Linear(32, 2, bias=False)
        case "another name":
            inner.classifier = inner.score
            del inner.score
        case "none":
            inner = tiny_model("llama")
    with pytest.raises(UserError, match="llama has no bias-free linear head `score` with one output"):
        TreeScorer(inner)
