"""KL and entropy along answers: by hand, against transformers' own logits in float64, and against sampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_pipeline.config.schema import Attention, SamplingConfig
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation import divergence
from rlhf_pipeline.evaluation.divergence import Divergence, along, next_token
from rlhf_pipeline.evaluation.implicit import log_probabilities
from rlhf_pipeline.generation.decode import generate
from rlhf_pipeline.models.tree_model import TreeModel

Make = Callable[..., Any]
SHAPES = [(3, (2, 5)), (1, (4,)), (7, (1, 3, 6)), (2, (8,)), (5, (2, 2))]


@pytest.fixture
def models(tiny_model: Make) -> tuple[TreeModel, TreeModel]:
    """In fp64. A policy and a reference that is another model."""
    return tuple(TreeModel(tiny_model("llama", dtype=torch.float64, seed=seed)).eval() for seed in (0, 1))  # type: ignore[return-value]


@pytest.fixture
def trees(make_tree: Callable[..., Tree]) -> list[Tree]:
    rng = np.random.default_rng(3)
    return [make_tree(prompt, answers, rng=rng, index=i) for i, (prompt, answers) in enumerate(SHAPES)]


def plainly(policy: Any, reference: Any, trees: Sequence[Tree], temperature: float) -> list[Divergence]:
    """Of each answer one forward without packing, all logits, loops over tokens and words."""
    found = []
    for tree in trees:
        kl, entropy = [], []
        for k, answer in enumerate(tree.responses):
            path = torch.from_numpy(tree.path(k).astype(np.int64))[None]
            with torch.no_grad():
                p, q = ((model(input_ids=path, use_cache=False).logits[0] / temperature).softmax(-1).tolist()
                        for model in (policy, reference))  # fmt: skip
            places = range(len(tree.prompt) - 1, len(tree.prompt) + len(answer) - 1)
            kl.append(sum(a * math.log(a / b) for t in places for a, b in zip(p[t], q[t], strict=True)))
            entropy.append(-sum(a * math.log(a) for t in places for a in p[t]))
        lengths = np.array([len(answer) for answer in tree.responses])
        found.append(Divergence(kl=np.array(kl), entropy=np.array(entropy), tokens=lengths))
    return found


def assert_same(found: Sequence[Divergence], expected: Sequence[Divergence], *, rtol: float = 1e-9) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.kl, other.kl, rtol=rtol, atol=1e-12)
        np.testing.assert_allclose(one.entropy, other.entropy, rtol=rtol)
        assert one.tokens.tolist() == other.tokens.tolist()


def test_two_words_by_hand() -> None:
    """p = (3/4, 1/4) and q = (1/2, 1/2); then p = (1/2, 1/2) and q = (9/10, 1/10)."""
    p = torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64).log()
    q = torch.tensor([[1.0, 1.0], [9.0, 1.0]], dtype=torch.float64).log()
    kl, entropy = next_token(p, q)
    assert kl.tolist() == pytest.approx(
        [0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(5 / 9) + 0.5 * math.log(5)], rel=1e-12
    )
    assert entropy.tolist() == pytest.approx([-0.75 * math.log(0.75) - 0.25 * math.log(0.25), math.log(2)], rel=1e-12)


def test_a_word_that_only_the_reference_has() -> None:
    """q = (2/5, 2/5, 1/5): the policy never says the third, and both others are likelier by 5/4 than there."""
    kl, _ = next_token(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[2.0, 2, 1]], dtype=torch.float64).log())
    assert kl.tolist() == pytest.approx([math.log(1.25)], rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("attention", [Attention.dense, Attention.paths])
def test_packed_trees_against_plain_logits(
    models: tuple[TreeModel, TreeModel], trees: list[Tree], attention: Attention, temperature: float
) -> None:
    policy, reference = models
    expected = plainly(policy.inner, reference.inner, trees, temperature)
    policy.use_attention(attention)
    reference.use_attention(attention)
    assert_same(along(policy, reference, trees, batch_tokens=40, temperature=temperature), expected)


def test_neither_packing_nor_chunks_nor_the_head_matter(
    models: tuple[TreeModel, TreeModel], trees: list[Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plainly(models[0].inner, models[1].inner, trees, 1.0)
    for tokens, elements, fast, mixed in itertools.product((1, 25, 10_000), (1, 97 * 17, 2**22), (True, False), (0, 1)):
        monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", elements)
        models[0].fast_head = fast
        models[1].use_attention((Attention.dense, Attention.paths)[mixed])
        told: list[tuple[int, int]] = []
        tick = partial(_tell, told)
        assert_same(along(*models, trees, batch_tokens=tokens, tick=tick), expected)
        assert np.sum(told, axis=0).tolist() == [9, sum(map(len, trees))]
        assert len(told) == {1: 5, 10_000: 1}.get(tokens, len(told))


def _tell(told: list[tuple[int, int]], answers: int, tokens: int) -> None:
    told.append((answers, tokens))


def test_logits_are_held_a_chunk_at_a_time(
    models: tuple[TreeModel, TreeModel], trees: list[Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 97 * 16)
    monkeypatch.setattr(divergence, "next_token", lambda p, q: sizes.append(len(p)) or next_token(p, q))
    along(*models, trees, batch_tokens=10_000)
    assert sum(sizes) == sum(sum(answers) for _, answers in SHAPES) == 33 and max(sizes) == 16


def test_a_model_is_no_way_from_itself(models: tuple[TreeModel, TreeModel], trees: list[Tree]) -> None:
    policy, _ = models
    for one in along(policy, policy, trees, batch_tokens=30):
        assert one.kl.tolist() == [0.0] * len(one.kl)
    half = TreeModel(policy.inner.bfloat16()).eval()
    assert all((one.kl == 0).all() for one in along(half, half, trees, batch_tokens=30))


def test_only_scored_tokens_count(models: tuple[TreeModel, TreeModel], trees: list[Tree]) -> None:
    """Those of an answer's first half: as if the answer had no more."""
    halves = [
        Tree(
            prompt=tree.prompt,
            responses=tree.responses,
            scored=tuple(np.arange(len(one)) < (len(one) + 1) // 2 for one in tree.responses),
            index=tree.index,
        )
        for tree in trees
    ]
    cut = [
        Tree(
            prompt=tree.prompt,
            responses=tuple(one[: (len(one) + 1) // 2] for one in tree.responses),
            scored=tuple(one[: (len(one) + 1) // 2] | True for one in tree.scored),
            index=tree.index,
        )
        for tree in trees
    ]
    assert_same(along(*models, halves, batch_tokens=50), along(*models, cut, batch_tokens=50))


def test_the_log_ratio_of_what_is_drawn_agrees(tiny_model: Make) -> None:
    """Over 2,000 answers of up to 5 tokens that the policy draws: k1 has the same mean, and far more variance."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 23, "head_dim": 8, "intermediate_size": 16}
    policy, reference = (TreeModel(tiny_model("llama", seed=seed, **sizes)).eval() for seed in (0, 1))
    options = SamplingConfig(max_new_tokens=5, samples=500)
    prompts = [np.array(one, np.int32) for one in ([3], [4, 5], [6, 7, 8], [9, 2])]
    answers = generate(policy.inner, prompts, options, end_ids=[0, 1], pad_id=0, seed=0, ids=range(4))
    drawn = [[one.tokens for one in answers if one.id == i] for i in range(4)]
    trees = [
        Tree(prompt=prompt, responses=tuple(mine), scored=tuple(np.ones(len(one), bool) for one in mine), index=i)
        for i, (prompt, mine) in enumerate(zip(prompts, drawn, strict=True))
    ]
    ours, theirs = (log_probabilities(model, trees, batch_tokens=4096) for model in (policy, reference))
    k1 = np.concatenate([a - b for a, b in zip(ours, theirs, strict=True)])
    kl = np.concatenate([one.kl for one in along(policy, reference, trees, batch_tokens=4096)])
    gap = k1 - kl
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(len(gap))
    assert k1.mean() > 20 * gap.std() / math.sqrt(len(gap))  # what is compared is far from 0
    assert kl.min() >= 0 > k1.min() and kl.var() < k1.var() / 3


def test_a_policy_with_more_words_is_refused(models: tuple[TreeModel, TreeModel], tiny_model: Make) -> None:
    larger = TreeModel(tiny_model("llama", dtype=torch.float64, vocab_size=99)).eval()
    with pytest.raises(UserError, match="the policy has 99 words and its reference 97"):
        along(larger, models[0], [], batch_tokens=10)
    assert along(models[0], larger, [], batch_tokens=10) == []


def test_what_is_not_finite_is_refused(models: tuple[TreeModel, TreeModel], trees: list[Tree]) -> None:
    with torch.no_grad():
        models[1].inner.lm_head.weight[5] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        along(*models, trees, batch_tokens=50)
