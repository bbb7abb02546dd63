"""Length-controlled win rates (Dubois et al. 2024, AlpacaEval 2): what a win rate were if both answers had the same length.

A judge's preference for system m over baseline b on prompt x is modelled as

    P(m beats b | x) = sigmoid(theta_m - theta_b + phi_m tanh((len_m - len_b) / std) + (psi_m - psi_b) gamma_x)

where std is the standard deviation of the difference over the prompts and gamma_x how hard x is, the same for all systems.
The rate is the mean over prompts of that probability without its length term. It is 1/2 for a system against itself, and
one less the other way round. The lengths take part in the effect of quality, though: a better answer is longer at times,
and what that wins is taken away as well.

What differs from AlpacaEval's code:

- A small ridge, the same everywhere, stands for its L1 penalty, whose strength cross-validation chooses, and there are no
  made-up "gamed" baselines (weight 0.2), which exist for its own prompts only.
- AlpacaEval has a table of gamma for its own 805 prompts, from many other models. Here gamma is fitted as that table was
  (psi = 1 for all systems), on the other systems' comparisons with the same baseline: in its own the system would find its
  own noise again. Or it is given. With neither it is 0 and the term is gone, which changes little.
- Intervals: AlpacaEval has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from rlhf_pipeline.evaluation.intervals import drawn
from rlhf_pipeline.evaluation.newton import newton

RIDGE = (
    0.01  # times half the square of each parameter: a system that always wins has a finite theta; else it hardly shows
)
DIFFICULTY_RIDGE = 1.0  # of gamma, which few comparisons tell of: a normal prior of width 1
FEWEST = 10  # prompts
LEAST_SPREAD = 0.05  # standard deviation of the length term; with less of it the ridge would decide, not the verdicts
LENGTH = 1  # column of the features
TURNS = 100
CLOSE = 1e-4  # in logits


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthControlled:
    """A length-controlled win rate and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The verdicts on one system and its baseline. Prompts without a verdict are left out of the fit."""

    value: np.ndarray  # float [N]: 1 the system won, 0.5 a tie, 0 it lost, NaN nobody can say
    longer: np.ndarray  # float [N]: its length less the baseline's, in characters or whatever else


def length_controlled(
    compared: Compared,
    *,
    difficulty: np.ndarray | None = None,
    prompt: np.ndarray | None = None,
    seed: int = 0,
) -> LengthControlled | None:
    """The length-controlled win rate, with percentiles of fits to redrawn prompts; difficulties and std stay as they are.

    None with fewer than `FEWEST` prompts, and where the lengths differ by the same on nearly all prompts.

    Args:
        difficulty: gamma, float [N]; None: 0 for all.
        prompt: int [N], equal where a prompt is there twice; such are drawn together.
    """
    judged = ~np.isnan(compared.value)
    value, length = compared.value[judged], _length_term(compared.longer[judged])
    if length is None:
        return None
    gamma = np.zeros(len(value)) if difficulty is None else difficulty[judged]
    same = np.arange(len(value)) if prompt is None else np.unique(prompt[judged], return_inverse=True)[1]
    # Without a spread gamma would only be theta once more.
    columns = [np.ones(len(value)), length, *([gamma] if np.ptp(gamma) > 0 else [])]
    features = np.stack(columns, axis=1)

    fitted = _fit(features, value, np.ones((1, len(value))), np.zeros((1, features.shape[1])))
    redrawn = []
    for times in drawn(int(same.max()) + 1, seed):
        weight = times[:, same]
        start = np.repeat(fitted, len(weight), axis=0)
        redrawn.append(_rate(_fit(features, value, weight, start), features, weight))
    low, high = np.percentile(np.concatenate(redrawn), [2.5, 97.5])
    mean = _rate(fitted, features, np.ones((1, len(value))))[0]
    return LengthControlled(mean=float(mean), low=float(low), high=float(high))


def joint_difficulty(compared: Sequence[Compared]) -> list[np.ndarray | None]:
    """gamma for each of several systems that were held against one baseline on the same prompts, float [N] each.

    It is large where the baseline is easy to beat. Each system's is fitted to the verdicts on all others, with a theta and a
    phi for each of them; with a single system there are no others, and with too few verdicts or lengths no fit: None.
    """
    return [_difficulty([other for other in compared if other is not mine]) for mine in compared]


def _difficulty(compared: Sequence[Compared]) -> np.ndarray | None:
    """The gamma, with mean 0, with which theta_m + phi_m length + gamma_x fits the verdicts best."""
    known = [(one.value, term) for one in compared if (term := _length_term_of(one)) is not None]
    if not known:
        return None
    weight = np.stack([~np.isnan(value) for value, _ in known]).astype(float)
    value = np.nan_to_num(np.stack([value for value, _ in known]))
    length = np.stack([term for _, term in known])
    ability, gamma = np.zeros((len(known), 2)), np.zeros(value.shape[1])
    # The likelihood is concave in both together, so that turns lead to its one maximum.
    for _ in range(TURNS):
        before = gamma
        ability = newton(partial(_ability_slopes, length, value, weight, gamma), ability)
        gamma = newton(partial(_gamma_slopes, length, value, weight, ability), gamma[:, None])[:, 0]
        gamma = gamma - gamma.mean()
        if np.abs(gamma - before).max() < CLOSE:
            break
    return gamma


def _length_term_of(compared: Compared) -> np.ndarray | None:
    """The length term of all prompts, [N], 0 where there is no verdict."""
    judged = ~np.isnan(compared.value)
    found = _length_term(compared.longer[judged])
    if found is None:
        return None
    term = np.zeros(len(judged))
    term[judged] = found
    return term


def _length_term(longer: np.ndarray) -> np.ndarray | None:
    """tanh of differences in length over their standard deviation; None where there is nothing to learn from it."""
    if len(longer) < FEWEST or not (deviation := longer.std(ddof=1)) > 0:
        return None
    term = np.tanh(longer / deviation)
    return term if term.std() >= LEAST_SPREAD else None


def _rate(parameters: np.ndarray, features: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Of each of R fits [R, P], the weighted mean probability over prompts without the length term, float [R]."""
    equal = features.copy()
    equal[:, LENGTH] = 0
    return (weight * _sigmoid(parameters @ equal.T)).sum(axis=1) / weight.sum(axis=1)


def _fit(features: np.ndarray, value: np.ndarray, weight: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The parameters of R logistic regressions of `value` [N] on features [N, P] that differ in their weights [R, N]."""
    size = features.shape[1]
    squares = (features[:, :, None] * features[:, None, :]).reshape(len(features), size * size)

    def slopes(place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chance = _sigmoid(place @ features.T)
        gradient = (weight * (chance - value)) @ features + RIDGE * place
        hessian = ((weight * chance * (1 - chance)) @ squares).reshape(-1, size, size) + RIDGE * np.eye(size)
        return gradient, hessian

    return newton(slopes, start)


def _ability_slopes(
    length: np.ndarray, value: np.ndarray, weight: np.ndarray, gamma: np.ndarray, ability: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """In (theta, phi) of each of M systems, [M, 2]; length, value and weight are [M, N], gamma [N]."""
    features = np.stack([np.ones_like(length), length], axis=2)
    chance = _sigmoid(np.einsum("mnp,mp->mn", features, ability) + gamma)
    gradient = np.einsum("mn,mnp->mp", weight * (chance - value), features) + RIDGE * ability
    hessian = np.einsum("mn,mnp,mnq->mpq", weight * chance * (1 - chance), features, features)
    return gradient, hessian + RIDGE * np.eye(2)


def _gamma_slopes(
    length: np.ndarray, value: np.ndarray, weight: np.ndarray, ability: np.ndarray, gamma: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """In the gamma of each prompt, [N, 1]."""
    chance = _sigmoid(ability[:, :1] + ability[:, 1:] * length + gamma[:, 0])
    gradient = (weight * (chance - value)).sum(axis=0)[:, None] + DIFFICULTY_RIDGE * gamma
    hessian = (weight * chance * (1 - chance)).sum(axis=0)[:, None, None] + DIFFICULTY_RIDGE
    return gradient, hessian


def _sigmoid(x: np.ndarray) -> np.ndarray:
    half: np.ndarray = 0.5 * (1 + np.tanh(0.5 * x))  # overflows nowhere
    return half
