"""Drawing: each filter against a naive reading of its paper, exact draws, and the edges of floating point."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_pipeline.config.schema import SamplingConfig
from rlhf_pipeline.generation.draw import draw, filtered, pick, uniforms

INF = math.inf
ALMOST_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


def kept(logits: list[float], **options: Any) -> list[int]:
    """Indices of tokens that may be drawn."""
    found = filtered(torch.tensor([logits]), SamplingConfig(**options))[0]
    return [i for i, value in enumerate(found.tolist()) if value > -INF]


# By hand: probabilities 0.5, 0.25, 0.125, 0.125
LOGITS = [math.log(p) for p in (0.125, 0.5, 0.125, 0.25)]


def test_filters_by_hand() -> None:
    assert kept(LOGITS) == [0, 1, 2, 3]
    assert kept(LOGITS, top_k=1) == [1]
    assert kept(LOGITS, top_k=2) == [1, 3]
    assert kept(LOGITS, top_k=3) == [0, 1, 2, 3], "as likely as the third"
    assert kept(LOGITS, top_k=9) == [0, 1, 2, 3]
    assert kept(LOGITS, top_p=0.4) == [1]
    assert kept(LOGITS, top_p=0.6) == [1, 3]
    assert kept(LOGITS, top_p=0.8) == [0, 1, 3], "of two alike the first"
    assert kept(LOGITS, top_p=1e-9) == [1]
    assert kept(LOGITS, min_p=0.49) == [1, 3]
    assert kept(LOGITS, min_p=0.51) == [1]
    assert kept(LOGITS, min_p=0.2) == [0, 1, 2, 3]
    assert kept(LOGITS, min_p=1.0) == [1]


def test_temperature_comes_before_the_filters() -> None:
    assert kept(LOGITS, temperature=2.0, min_p=0.51) == [1, 3], "square roots: 0.25 to 0.5 is 0.71"
    assert kept(LOGITS, temperature=0.5, top_p=0.7) == [1], "squares: 0.5 has 8 of 11 parts"
    # top-k before top-p: the nucleus is that of the two that are left, two thirds and one third
    assert kept(LOGITS, top_k=2, top_p=0.66) == [1]
    assert kept(LOGITS, top_p=0.66) == [1, 3]


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    seen = torch.tensor([[True, True, False, False]])
    found = filtered(torch.tensor([[3.0, -1.0, 3.0, -1.0]]), SamplingConfig(repetition_penalty=2.0), seen=seen)
    assert found.tolist() == [[1.5, -2.0, 3.0, -1.0]]
    # and before the temperature: 3 / 2 / 0.5
    cooled = SamplingConfig(repetition_penalty=2.0, temperature=0.5)
    assert filtered(torch.tensor([[3.0, -1.0, 3.0, -1.0]]), cooled, seen=seen).tolist() == [[3.0, -4.0, 6.0, -2.0]]


@pytest.mark.parametrize("seed", range(5))
def test_filters_against_a_naive_reading(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (4, 30)).astype(np.float32)
    options = SamplingConfig(temperature=0.8, top_k=12, top_p=0.9, min_p=0.03)
    found = filtered(torch.from_numpy(logits), options).numpy()
    for row, got in zip(logits.astype(np.float64), found, strict=True):
        row = row / 0.8
        order = sorted(range(30), key=lambda i: -row[i])[:12]
        p = {i: math.exp(row[i]) for i in order}
        total, mass, nucleus = sum(p.values()), 0.0, []
        for i in order:
            if mass >= 0.9:
                break
            nucleus.append(i)
            mass += p[i] / total
        expected = {i for i in nucleus if p[i] >= 0.03 * p[order[0]]}
        assert {i for i in range(30) if got[i] > -INF} == expected
        np.testing.assert_allclose([got[i] for i in expected], [row[i] for i in expected], rtol=1e-5)


def test_forbidden_tokens_are_never_drawn_nor_greedily_taken() -> None:
    logits = torch.tensor([[5.0, 4.0, 1.0]] * 1000)
    u = torch.linspace(0, ALMOST_ONE, 1000)
    for temperature in (0.0, 1.0):
        token, _ = draw(logits, u if temperature else None, SamplingConfig(temperature=temperature), forbidden=(0, 2))
        assert token.unique().tolist() == [1]
    assert draw(logits, None, SamplingConfig(temperature=0))[0].unique().tolist() == [0]


def test_the_draw_is_the_inverse_of_the_cumulative_probability() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (ALMOST_ONE, 4)):
        assert pick(probabilities, torch.tensor([u])).item() == token, u


@pytest.mark.parametrize("words", [3, 1000, 150_001])
def test_nothing_of_probability_zero_is_drawn(words: int) -> None:
    """Whatever u, and however the sum is rounded: zeros at both ends, between, and denormals."""
    rng = np.random.default_rng(words)
    for case in range(8):
        logits = rng.normal(0, 1 + 10 * case, words).astype(np.float32)
        logits[rng.random(words) < 0.7] = -INF
        logits[0] = logits[-1] = -INF
        logits[words // 2] = 1.0
        u = torch.tensor([0.0, 1e-8, 0.1, 0.5, 0.9999999, ALMOST_ONE])
        token, logprob = draw(torch.from_numpy(logits).expand(6, -1), u, SamplingConfig())
        assert np.isfinite(logits[token.numpy()]).all()
        assert torch.isfinite(logprob).all()


def test_frequencies_are_the_probabilities() -> None:
    """Evenly spaced u make every frequency exact to one in the number of draws."""
    n = 1 << 16
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    token, logprob = draw(logits.expand(n, -1), torch.arange(n) / n, SamplingConfig(temperature=0.7, top_p=0.95))
    expected = filtered(logits[None], SamplingConfig(temperature=0.7, top_p=0.95))[0].softmax(-1)
    counts = torch.bincount(token, minlength=40)
    assert (counts / n - expected).abs().max() < 2 / n
    torch.testing.assert_close(logprob, expected.log()[token], rtol=1e-5, atol=1e-6)
    assert (counts == 0).sum() > 5, "the nucleus leaves something out"


def test_chi_square_of_the_counter_based_numbers() -> None:
    """8,000 draws over ids, samples and positions from 10 tokens: chi-square below its 99.9 % point (27.9 at 9)."""
    probabilities = torch.arange(1.0, 11.0) / 55
    for seed in range(3):
        u = uniforms(seed, [i for i in range(20) for _ in range(20)], [k for _ in range(20) for k in range(20)], 20)
        counts = torch.bincount(pick(probabilities.expand(8000, -1), torch.from_numpy(u.ravel())), minlength=10)
        expected = probabilities * 8000
        assert float(((counts - expected) ** 2 / expected).sum()) < 27.9


def test_numbers_depend_on_each_of_seed_example_sample_and_position_and_on_nothing_else() -> None:
    base = uniforms(7, [3, 5, 3], [0, 0, 1], 6)
    assert base.dtype == np.float32 and (base >= 0).all() and (base < 1).all()
    assert len(np.unique(base)) == base.size
    np.testing.assert_array_equal(base[1:2], uniforms(7, [5], [0], 6))
    np.testing.assert_array_equal(base[:, :2], uniforms(7, [3, 5, 3], [0, 0, 1], 2))
    assert not np.isin(uniforms(8, [3, 5, 3], [0, 0, 1], 6), base).any()
    assert not np.isin(uniforms(7, [0, 0, 1], [3, 5, 3], 6), base).any(), "example and sample are told apart"
    assert uniforms(-1, [2**64 - 1, -(2**63)], [0, 1], 2).shape == (2, 2)


def test_numbers_are_splitmix64() -> None:
    """Against Python's integers; the first word of the generator's own published sequence for seed 0 is in it."""

    def mix(state: int) -> int:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    assert mix(0) == 0xE220A8397B1DCDAF
    expected = [(mix(mix(mix(mix(12) ^ 34) ^ 5) ^ position) >> 40) / 2**24 for position in range(4)]
    assert uniforms(12, [34], [5], 4)[0].tolist() == expected


def test_neighbouring_numbers_are_not_correlated() -> None:
    u = uniforms(0, list(range(300)), [0] * 300, 300).astype(np.float64)
    for one, other in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.012  # 3.6 standard deviations
    assert abs(u.mean() - 0.5) < 0.004


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_nan_shows_in_the_log_probability(temperature: float) -> None:
    logits = torch.tensor([[0.0, float("nan"), 1.0]])
    token, logprob = draw(logits, torch.tensor([0.5]), SamplingConfig(temperature=temperature))
    assert 0 <= token.item() < 3
    assert not torch.isfinite(logprob).any()
