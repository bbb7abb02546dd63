"""Scores become rewards of tokens: by hand, against a loop, and wherever a response happens to end."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.config.ppo import MissingEnd
from rlhf_pipeline.functional.rewards import final_scores, token_rewards


def doubles(values: list[float] | list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SCORES = [3.0, -4.0, 0.5, -0.5]
ENDED = [True, True, False, False]


@pytest.mark.parametrize(
    ("missing_end", "score", "clip", "expected"),
    [
        (MissingEnd.keep, 1.0, None, [3.0, -4.0, 0.5, -0.5]),
        (MissingEnd.subtract, 0.25, None, [3.0, -4.0, 0.25, -0.75]),
        (MissingEnd.replace, -1.0, None, [3.0, -4.0, -1.0, -1.0]),
        (MissingEnd.keep, 1.0, 2.0, [2.0, -2.0, 0.5, -0.5]),
        (MissingEnd.keep, 1.0, 0.25, [0.25, -0.25, 0.25, -0.25]),
        # The rule acts on clipped scores, and what it makes of them is not clipped again.
        (MissingEnd.subtract, 1.0, 0.25, [0.25, -0.25, -0.75, -1.25]),
        (MissingEnd.replace, -9.0, 2.0, [2.0, -2.0, -9.0, -9.0]),
    ],
)
def test_final_scores(missing_end: MissingEnd, score: float, clip: float | None, expected: list[float]) -> None:
    result = final_scores(
        doubles(SCORES), torch.tensor(ENDED), missing_end=missing_end, missing_end_score=score, clip=clip
    )
    assert result.dtype == torch.float64
    assert result.tolist() == expected


@pytest.mark.parametrize("missing_end", list(MissingEnd))
def test_final_scores_keep_their_dtype_and_their_argument(missing_end: MissingEnd) -> None:
    scores = torch.tensor(SCORES)
    result = final_scores(scores, torch.tensor(ENDED), missing_end=missing_end, missing_end_score=2.0, clip=1.0)
    assert result.dtype == torch.float32
    assert scores.tolist() == SCORES


def test_token_rewards_by_hand() -> None:
    # beta 0.5; lengths 3, 1, 2, and a response without tokens
    penalty = doubles([[2.0, -4.0, 6.0], [8.0, 99.0, 99.0], [0.0, 2.0, 99.0], [99.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [False, False, False]])
    rewards = token_rewards(doubles([10.0, 20.0, 30.0, 40.0]), penalty, mask, beta=0.5)
    assert rewards.tolist() == [
        [-1.0, 2.0, -3.0 + 10.0],
        [-4.0 + 20.0, 0.0, 0.0],
        [0.0, -1.0 + 30.0, 0.0],
        [0.0, 0.0, 0.0],
    ]


def ragged(seed: int, *, rows: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """scores [R], penalty [R, L] with NaN for padding, mask: lengths 1..R in random order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randperm(rows, generator=generator) + 1
    mask = torch.arange(rows) < lengths[:, None]
    penalty = torch.randn(rows, rows, generator=generator, dtype=torch.float64).masked_fill(~mask, math.nan)
    return torch.randn(rows, generator=generator, dtype=torch.float64), penalty, mask


def test_token_rewards_against_a_loop(assert_close: Callable[..., None]) -> None:
    scores, penalty, mask = ragged(0)
    expected = [[0.0] * mask.shape[1] for _ in scores]
    for r, score in enumerate(scores.tolist()):
        length = int(mask[r].sum())
        for t in range(length):
            expected[r][t] = -0.3 * float(penalty[r, t]) + (score if t == length - 1 else 0.0)
    assert_close(token_rewards(scores, penalty, mask, beta=0.3), doubles(expected), rtol=1e-12)


def test_rewards_add_up_to_the_penalised_score(assert_close: Callable[..., None]) -> None:
    scores, penalty, mask = ragged(1)
    total = token_rewards(scores, penalty, mask, beta=0.3).sum(1)
    assert_close(total, scores - 0.3 * penalty.nan_to_num(nan=0.0).sum(1), rtol=1e-12)


def test_order_and_padding_do_not_matter() -> None:
    scores, penalty, mask = ragged(2)
    rewards = token_rewards(scores, penalty, mask, beta=0.3)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(3))
    assert torch.equal(token_rewards(scores[order], penalty[order], mask[order], beta=0.3), rewards[order])
    wider = torch.nn.functional.pad(penalty, (0, 4), value=math.inf), torch.nn.functional.pad(mask, (0, 4))
    assert torch.equal(token_rewards(scores, *wider, beta=0.3), torch.nn.functional.pad(rewards, (0, 4)))


def test_no_responses_and_no_tokens() -> None:
    assert token_rewards(torch.zeros(0), torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.bool), beta=1.0).shape == (
        0,
        5,
    )
    assert token_rewards(torch.ones(2), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), beta=1.0).shape == (
        2,
        0,
    )
