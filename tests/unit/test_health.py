"""Figures of an iteration against numbers computed by hand, thresholds, and what must hold at a run's start."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_pipeline.config.ppo import HealthConfig
from rlhf_pipeline.config.schema import Dtype
from rlhf_pipeline.health import LARGEST_RATIO, measures, problems, start_problems

NAN = math.nan
# Two prompts with two samples each; lengths 2, 1, 3, 2. Outside the mask there is rubbish.
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
LOGPROBS = torch.tensor([[-1.0, -2.0, NAN], [-0.5, NAN, 7.0], [-1.0, -1.0, -1.0], [-3.0, -1.0, 9.0]])
REFERENCE = torch.tensor([[-1.5, -2.0, 1.0], [-0.5, NAN, 7.0], [-2.0, -1.0, -0.5], [-3.0, -1.0, NAN]])
# d = log p - log q: [0.5, 0], [0], [1, 0, -0.5], [0, 0]; sums 0.5, 0, 0.5, 0.
GIVEN: dict[str, Any] = {
    "logprobs": LOGPROBS,
    "sampled": LOGPROBS + torch.tensor([[0.0, -0.25, 9.0], [0, 0, 0], [0, 0, 0.125], [0, 0, 0]]),
    "reference": REFERENCE,
    "mask": MASK,
    "scores": {"rm": np.array([1.0, 1.0, 2.0, 4.0]), "short": np.array([0.0, 0.0, -1.0, 0.0])},
    "total": torch.tensor([1.0, 1.0, 1.0, 4.0], dtype=torch.float64),
    "final": torch.tensor([1.0, 1.0, 1.0, 3.0], dtype=torch.float64),
    "finished": torch.tensor([True, True, False, True]),
    "samples": 2,
}


def test_the_figures_of_an_iteration() -> None:
    entropy = torch.tensor([[1.0, 2.0, NAN], [1.0, 0, 0], [1.0, 1.0, 1.0], [2.0, 3.0, 50.0]])
    found = measures(**GIVEN, entropy=entropy)
    k3 = (math.exp(-0.5) - 1 + 0.5 + math.exp(-1) - 1 + 1 + math.exp(0.5) - 1 - 0.5) / 8
    lengths = np.array([2.0, 1, 3, 2])
    expected = {
        "score": 1.75,
        "score_std": math.sqrt((3 * 0.75**2 + 2.25**2) / 4),
        "score_final": 1.5,
        "score_rm": 2.0,
        "score_short": -0.25,
        "kl": 0.25,
        "kl_k1": 1 / 8,
        "kl_k2": (0.25 + 1 + 0.25) / 2 / 8,
        "kl_k3": k3,
        "entropy": 12 / 8,
        "length": 2.0,
        "ended": 0.75,
        "no_spread": 0.5,
        "sampler_gap": 0.25,
        "score_length_correlation": float(np.corrcoef([1, 1, 1, 4], lengths)[0, 1]),
    }
    assert found == {f"rollout/{name}": pytest.approx(value, rel=1e-6) for name, value in expected.items()}
    assert all(type(value) is float for value in found.values())


def test_a_correlation_with_length_has_its_sign() -> None:
    total = torch.tensor([5.0, 9.0, 1.0, 5.0], dtype=torch.float64)  # the shorter, the better
    assert measures(**GIVEN | {"total": total})["rollout/score_length_correlation"] == pytest.approx(-1)


def test_figures_that_do_not_exist_are_left_out() -> None:
    same = torch.ones(4, dtype=torch.float64)
    found = measures(**GIVEN | {"samples": 1, "total": same})
    absent = {"entropy", "no_spread", "score_length_correlation", "explained_variance"}
    assert not found.keys() & {f"rollout/{name}" for name in absent}
    returns = torch.tensor([[1.0, 2.0, NAN], [3.0, 0, 0], [1.0, 1.0, 1.0], [2.0, 2.0, 0]])
    values = returns + torch.tensor([[0.5, -0.5, 1.0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    whole = measures(**GIVEN, values=values, returns=returns)
    counted = np.array([1, 2, 3, 1, 1, 1, 2, 2.0])
    error = np.array([-0.5, 0.5, 0, 0, 0, 0, 0, 0])
    assert whole["rollout/explained_variance"] == pytest.approx(1 - error.var() / counted.var())


HEALTHY = {"rollout/kl": 5.0, "rollout/entropy": 1.0, LARGEST_RATIO: 1.5, "rollout/ended": 0.9}
LIMITS = HealthConfig(max_kl=10.0, min_entropy=0.5, max_ratio=2.0, min_ended=0.5)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("rollout/kl", "max_kl", 10.5),
        ("rollout/entropy", "min_entropy", 0.4),
        (LARGEST_RATIO, "max_ratio", 2.25),
        ("rollout/ended", "min_ended", 0.25),
        ("rollout/kl", "max_kl", NAN),
        ("rollout/entropy", "min_entropy", NAN),
    ],
)
def test_a_crossed_threshold_is_told_with_its_figures(name: str, key: str, value: float) -> None:
    assert problems(HEALTHY, LIMITS) == []
    (told,) = problems(HEALTHY | {name: value}, LIMITS)
    assert f"{name} is {value:.4g}, " in told and f"health.{key}={getattr(LIMITS, key):g}: " in told and "try" in told
    assert problems(HEALTHY | {name: value}, HealthConfig()) == []  # no threshold, no complaint


def test_thresholds_themselves_are_allowed_and_all_that_are_crossed_are_told() -> None:
    at = {"rollout/kl": 10.0, "rollout/entropy": 0.5, LARGEST_RATIO: 2.0, "rollout/ended": 0.5}
    assert problems(at, LIMITS) == []
    assert problems({}, LIMITS) == []
    over = {"rollout/kl": 11.0, "rollout/entropy": 0.1, LARGEST_RATIO: 3.0, "rollout/ended": 0.1}
    assert len(problems(over, LIMITS)) == 4


BOS, EOS = 1, 2
START: dict[str, Any] = {
    "sampled": LOGPROBS,
    "logprobs": LOGPROBS,
    "mask": MASK,
    "dtype": Dtype.float32,
    "prompts": [np.array([BOS, 5, 6]), np.array([BOS, 7])],
    "bos_id": BOS,
    "end_ids": (EOS,),
    "reference": LOGPROBS,
    "again": LOGPROBS,
}


def off(by: float, row: int = 2, column: int = 2) -> torch.Tensor:
    moved = LOGPROBS.clone()
    moved[row, column] += by
    return moved


def test_a_sound_start_has_no_problems() -> None:
    assert start_problems(**START) == []
    assert start_problems(**START | {"reference": None, "again": None}) == []
    for name in ("sampled", "reference", "again"):
        assert start_problems(**START | {name: off(5e-4)}) == []
        assert start_problems(**START | {name: off(0.1), "dtype": Dtype.bfloat16}) == []
        assert start_problems(**START | {name: off(100.0, 0, 2)}) == []  # outside the mask


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sampled", "the sampler and the trainer"),
        ("reference", "the KL to the reference"),
        ("again", "the ratio is not 1"),
    ],
)
@pytest.mark.parametrize(("dtype", "by"), [(Dtype.float32, 2e-3), (Dtype.bfloat16, 1.5), (Dtype.float32, NAN)])
def test_log_probabilities_that_differ(name: str, told: str, dtype: Dtype, by: float) -> None:
    (problem,) = start_problems(**START | {name: off(by), "dtype": dtype})
    assert told in problem


def test_a_small_difference_everywhere_is_one_too() -> None:
    """Of bf16 a single token may be off by much; not all of them."""
    everywhere = LOGPROBS + 0.05
    assert len(start_problems(**START | {"sampled": everywhere, "dtype": Dtype.bfloat16})) == 1


def test_a_start_token_comes_once() -> None:
    doubled = [np.array([BOS, BOS, 5]), np.array([BOS, 5, BOS, 7]), np.array([BOS, 5])]
    (problem,) = start_problems(**START | {"prompts": doubled})
    assert "2 of 3 prompts have more than one start token (1)" in problem
    # One token for both, as GPT-2 has it: earlier turns end with it.
    (problem,) = start_problems(**START | {"prompts": doubled, "end_ids": (BOS,)})
    assert "1 of 3 prompts" in problem
    assert start_problems(**START | {"prompts": doubled, "bos_id": None}) == []
