"""Rollouts in one process: what is drawn, the numbers of its tokens, and how they travel with the trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_pipeline import rollout
from rlhf_pipeline.config.ppo import RolloutConfig
from rlhf_pipeline.data.loader import Layout, micro_batches
from rlhf_pipeline.data.packing import pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.prompts import Asked
from rlhf_pipeline.models.tree_model import TreeBatch, TreeModel
from rlhf_pipeline.rollout import Rollout, TreeList, episodes, per_token, roll_out, sampling_model, shares, with_numbers

CPU = torch.device("cpu")
ENDS = tuple(range(3, 97, 9))
ALONE = Layout(row_length=24, micro_rows=2, width_multiple=1, rank=0, num_ranks=1)


class Words:
    """A tokenizer to read by: token 5 is " t5"; end tokens are special ones."""

    def decode(self, tokens: np.ndarray, *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(f" t{token}" for token in tokens)


RENDERER: Any = SimpleNamespace(tokenizer=Words(), end_ids=ENDS, eos_id=ENDS[0])


def asked(lengths: Sequence[int]) -> list[Asked]:
    rng = np.random.default_rng(0)
    return [
        Asked(
            index=i, origin=f"f:{i}", messages=(), columns={"place": i}, tokens=rng.integers(0, 97, n).astype(np.int32)
        )
        for i, n in enumerate(lengths)
    ]


def rolled(model: Any, lengths: Sequence[int] = (4, 9, 1, 4), *, first: int = 0, **options: Any) -> Rollout:
    settings = RolloutConfig(**{"samples": 2, "max_new_tokens": 9, **options})
    return roll_out(model, asked(lengths), settings, renderer=RENDERER, seed=1, first=first)


@pytest.fixture
def trees(make_tree: Callable[..., Tree]) -> list[Tree]:
    """Of 1 to 4 responses; some tokens are not scored."""
    rng = np.random.default_rng(4)
    shapes = [(3, (2, 4, 1)), (1, (3,)), (5, (2, 2)), (2, (1, 6, 2, 3)), (7, (5,))]
    return [make_tree(n, k, rng=rng, index=100 + i, scored=0.7) for i, (n, k) in enumerate(shapes)]


# What is drawn


def test_a_rollout_says_what_was_drawn(tiny_model: Callable[..., Any]) -> None:
    made = rolled(tiny_model("llama"), first=50)
    assert made.samples == 2 and len(made.texts) == 8
    assert [tree.index for tree in made.trees] == [50, 51, 52, 53]
    responses = [response for tree in made.trees for response in tree.responses]
    assert made.mask.shape == made.sampled.shape == (8, max(map(len, responses)))
    assert made.lengths.tolist() == [len(response) for response in responses]
    assert made.num_tokens == sum(map(len, responses))
    assert len(set(made.lengths.tolist())) > 2 and 0 < made.finished.sum() < 8
    for row, response in enumerate(responses):
        assert made.mask[row].tolist() == [True] * len(response) + [False] * (made.mask.shape[1] - len(response))
        ended = int(response[-1]) in ENDS
        assert bool(made.finished[row]) == ended and (ended or len(response) == 9)
        assert made.texts[row] == " ".join(f"t{token}" for token in (response[:-1] if ended else response))
    for one, tree in zip(made.asked, made.trees, strict=True):
        assert tree.prompt is one.tokens
        assert all(scored.all() for scored in tree.scored)
    assert (made.sampled[made.mask] < 0).all() and not made.sampled[~made.mask].any()


def test_a_rollout_is_scored_by_its_texts(tiny_model: Callable[..., Any]) -> None:
    made = rolled(tiny_model("llama"))
    scored = episodes(made)
    assert [one.response for one in scored] == made.texts
    assert [one.finished for one in scored] == made.finished.tolist()
    assert [one.origin for one in scored] == ["f:0", "f:0", "f:1", "f:1", "f:2", "f:2", "f:3", "f:3"]
    assert [one.columns["place"] for one in scored] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_sampled_logprobs_are_those_of_the_model(
    tiny_model: Callable[..., Any], assert_close: Callable[..., None]
) -> None:
    model = TreeModel(tiny_model("llama"))
    model.temperature = 0.7
    made = rolled(model.inner, temperature=0.7)
    assert_close(per_token(model, made.trees, ALONE, CPU), made.sampled, rtol=1e-4, atol=1e-4)


def test_batches_of_sampling_do_not_matter(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    assert rolled(model).texts == rolled(model, batch_tokens=1).texts


def test_a_prompt_that_comes_again_gets_other_answers(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    once, again = rolled(model), rolled(model, first=4)
    assert not set(once.texts) & set(again.texts)
    assert rolled(model, first=4).texts == again.texts


def test_a_broken_model_is_a_users_error(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        rolled(model)


def test_the_shortest_answers(tiny_model: Callable[..., Any]) -> None:
    """One token each, some of them the end token: an empty text."""
    made = rolled(tiny_model("llama"), [3] * 20, max_new_tokens=1)
    assert made.mask.shape == (40, 1) and made.mask.all()
    assert [text == "" for text in made.texts] == made.finished.tolist() and 0 < made.finished.sum() < 40


def test_prompts_are_dealt_to_and_fro() -> None:
    # By length: 9 (at 1), 7 (at 3), 5 (at 0), 5 (at 2), 2 (at 4); ranks 0, 1, 1, 0, 0.
    assert shares([5, 9, 5, 7, 2], 2) == [[1, 2, 4], [3, 0]]
    assert shares([5], 3) == [[0], [], []]


# A whole copy under ZeRO-3


def test_no_room_for_a_copy(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = TreeModel(tiny_model("llama"))
    engine: Any = SimpleNamespace(zero_stage=3, device=CPU)
    options = RolloutConfig(batch_tokens=2**20)
    # 2 layers of 1 head of 16, keys and values in fp32: 256 bytes a token; 19 k weights
    monkeypatch.setattr(rollout, "free_memory_bytes", lambda device: 2**28)
    words = r"0\.00 GiB, and 0\.25 GiB .*batch_tokens=1048576; there are 0\.25 GiB free"
    with pytest.raises(UserError, match=words), sampling_model(engine, policy, options):
        pass


def test_the_policy_itself_where_it_is_whole(tiny_model: Callable[..., Any]) -> None:
    policy = TreeModel(tiny_model("llama"))
    engine: Any = SimpleNamespace(zero_stage=2, device=CPU)
    with sampling_model(engine, policy, RolloutConfig(batch_tokens=2**60)) as model:
        assert model is policy.inner


# Numbers of tokens


def by_hand(trees: Sequence[Tree], value: Callable[[Tree, int, int], float]) -> Tensor:
    """[R, L] with value(tree, response, token) where a token is scored."""
    rows = [(tree, k) for tree in trees for k in range(len(tree.responses))]
    found = torch.zeros(len(rows), max(len(tree.responses[k]) for tree, k in rows))
    for row, (tree, k) in enumerate(rows):
        for j in np.flatnonzero(tree.scored[k]):
            found[row, j] = value(tree, k, int(j))
    return found


LAYOUTS = [
    ALONE,
    Layout(row_length=500, micro_rows=1, width_multiple=8, rank=0, num_ranks=1),
    Layout(row_length=2, micro_rows=1, width_multiple=1, rank=0, num_ranks=1),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["rows", "one", "each"])
def test_per_token(layout: Layout, trees: list[Tree]) -> None:
    expected = by_hand(trees, lambda tree, k, j: float(tree.responses[k][j]) + 0.5)
    assert torch.equal(per_token(lambda batch: batch.target + 0.5, trees, layout, CPU), expected)
    one, two = per_token(lambda batch: (batch.target + 0.5, -batch.target), trees, layout, CPU)
    assert torch.equal(one, expected) and two.dtype == torch.float32
    assert torch.equal(two, by_hand(trees, lambda tree, k, j: -float(tree.responses[k][j])))


def test_per_token_of_each_rank_is_its_share(trees: list[Tree]) -> None:
    """Three ranks for five trees make equally many passes; what they have adds up to the whole."""
    calls = []

    def forward(batch: TreeBatch) -> Tensor:
        calls[-1] += 1
        return batch.target + 0.5

    parts = []
    for rank in range(3):
        calls.append(0)
        layout = Layout(row_length=12, micro_rows=1, width_multiple=1, rank=rank, num_ranks=3)
        parts.append(per_token(forward, trees, layout, CPU))
    assert len(set(calls)) == 1
    assert torch.equal(sum(parts), per_token(lambda batch: batch.target + 0.5, trees, ALONE, CPU))


def test_per_token_makes_no_graph(tiny_model: Callable[..., Any], trees: list[Tree]) -> None:
    assert not per_token(TreeModel(tiny_model("llama")), trees, ALONE, CPU).requires_grad


def test_numbers_travel_with_trees(trees: list[Tree]) -> None:
    """Out through with_numbers and the packing, back through per_token, under a mask of what is trained."""
    rows = sum(len(tree.responses) for tree in trees)
    values, others = torch.randn(rows, 6), torch.randn(rows, 6)
    mask = torch.rand(rows, 6) < 0.5
    made = with_numbers(trees, mask, {"old": values, "advantage": others})
    lengths = torch.tensor([len(response) for tree in trees for response in tree.responses])
    inside = mask & (torch.arange(6) < lengths[:, None])
    old, advantage = per_token(lambda batch: (batch.number("old"), batch.number("advantage")), made, ALONE, CPU)
    assert torch.equal(old, values * inside) and torch.equal(advantage, others * inside)
    assert [tree.index for tree in made] == [tree.index for tree in trees]
    assert not any(tree.numbers for tree in trees), "the trees that were given are as they were"


def test_episodes_beside_text(trees: list[Tree]) -> None:
    """Two data sets in one global batch: numbers of the first, NaN for the second."""
    rows = sum(len(tree.responses) for tree in trees)
    drawn = with_numbers(trees, torch.ones(rows, 6, dtype=torch.bool), {"old": torch.ones(rows, 6)})
    examples = [(0, i) for i in range(5)] + [(1, i) for i in range(5)]
    for packed in micro_batches([TreeList(drawn), TreeList(trees)], examples, ALONE):
        batch = TreeBatch.of(packed, CPU)
        text = batch.group[batch.sequence] == 1
        assert torch.equal(batch.number("old").isnan(), text)
        assert (batch.number("old")[~text] == 1).all()


def test_a_number_that_no_tree_has(trees: list[Tree]) -> None:
    empty = TreeBatch.of(pack([]), CPU)
    assert empty.number("old").shape == (0,) and empty.number("old").dtype == torch.float32
    batch = TreeBatch.of(pack([trees]), CPU)
    assert batch.numbers == {} and batch.number("old").shape == batch.source.shape
    assert batch.number("old").isnan().all()


def test_a_tree_list_is_a_data_set(trees: list[Tree]) -> None:
    made = TreeList(trees, [f"f:{i}" for i in range(5)])
    assert len(made) == 5 and made[2] is trees[2] and made.origin(2) == "f:2"
    assert made.lengths.tolist() == [10, 4, 9, 14, 12]
    assert TreeList(trees).origin(2) == "tree 102"
