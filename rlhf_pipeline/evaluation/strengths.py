"""Strengths of many systems from who beat whom: Bradley and Terry's, with 95 % intervals, and Elo ratings.

P(i beats j) = sigmoid(s_i - s_j), with the strengths' mean at 0; a tie is half a win for each. Chatbot Arena ranks models
this way (Zheng et al. 2023; Chiang et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.markup import escape

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.intervals import drawn
from rlhf_pipeline.evaluation.newton import newton
from rlhf_pipeline.evaluation.tables import table
from rlhf_pipeline.judging.pairs import Ruling

PRIOR = 0.1  # of a tie, added to each two systems that were compared: who always wins is strong, not infinitely strong
SCALE = 400 / math.log(10)  # Elo points for one unit of strength: 400 points are odds of 10 to 1
START = 1000.0  # the mean rating
K = 4.0  # points that one comparison moves at most, as in Chatbot Arena
SHUFFLES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Strength:
    """Of one system, with its 95 % interval."""

    strength: float  # in logits
    low: float
    high: float
    elo: float  # the same strength as a rating
    online_elo: float  # what playing the comparisons one after the other comes to
    win_rate: float  # over all its comparisons, a tie one half; against whomever it was compared with


@dataclass(frozen=True, slots=True, kw_only=True)
class Games:
    """N comparisons that somebody could decide."""

    first: np.ndarray  # int64 [N], number of a system
    second: np.ndarray  # int64 [N]
    value: np.ndarray  # float [N]: 1 the first won, 0.5 a tie, 0 the second won
    prompt: np.ndarray  # int64 [N]


def ranking(
    systems: Sequence[str],
    rulings: Mapping[tuple[str, str], Sequence[Ruling]],
    prompt: np.ndarray,
    *,
    seed: int = 0,
) -> dict[str, Strength]:
    """Strengths of all systems, the strongest first. Intervals are percentiles of fits to redrawn prompts.

    Args:
        rulings: of each (system, baseline), one a prompt.
        prompt: int [prompts], equal for those that ask the same; such are drawn together.

    Raises:
        UserError: where systems fall into groups that were never compared with each other, of which strengths say nothing.
    """
    games = _games(systems, rulings, prompt)
    _check_connected(systems, games)
    wins = _wins(games, len(systems))
    total = wins.sum(axis=0)
    found = bradley_terry(total[None])[0]
    redrawn = np.concatenate([_redrawn(times, wins, found) for times in drawn(len(wins), seed)])
    low, high = np.percentile(redrawn, [2.5, 97.5], axis=0)
    online = online_elo(games, len(systems), seed=seed)
    rate = total.sum(axis=1) / (total + total.T).sum(axis=1)
    return {
        systems[i]: Strength(
            strength=float(found[i]),
            low=float(low[i]),
            high=float(high[i]),
            elo=float(START + SCALE * found[i]),
            online_elo=float(online[i]),
            win_rate=float(rate[i]),
        )
        for i in np.argsort(-found, kind="stable")
    }


def bradley_terry(wins: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """The likeliest strengths, with mean 0, of S systems in each of R tournaments: float [R, S].

    Each two systems that met are taken to have tied `PRIOR` times more. Two systems, of which the first won a share w of n
    comparisons, are log(v / (1 - v)) apart with v = (w n + PRIOR / 2) / (n + PRIOR).

    Args:
        wins: float [R, S, S], how often one beat the other, a tie half for each. What meets is connected (`ranking`).
        start: float [S], strengths to begin with.
    """
    size = wins.shape[1]
    met = (wins + wins.swapaxes(1, 2)).any(axis=0)
    wins = wins + PRIOR / 2 * met
    games = wins + wins.swapaxes(1, 2)

    def slopes(place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chance = 0.5 * (1 + np.tanh(0.5 * (place[:, :, None] - place[:, None, :])))
        spread = games * chance * (1 - chance)
        hessian = -spread
        hessian[:, range(size), range(size)] += spread.sum(axis=2)
        # Only differences count: the constant direction is held by a term that is 0 where the mean is.
        return (games * chance - wins).sum(axis=2) + place.mean(axis=1, keepdims=True), hessian + 1 / size

    begin = np.zeros(size) if start is None else start
    return newton(slopes, np.repeat(begin[None], len(wins), axis=0))


def online_elo(games: Games, size: int, *, seed: int = 0) -> np.ndarray:
    """Ratings after all comparisons, one after the other, float [S]: the mean over `SHUFFLES` seeded orders of them.

    With few comparisons they have not gone far from `START`: `K` points a comparison at most.
    """
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(len(games.value)) for _ in range(SHUFFLES)])
    ratings = np.full((SHUFFLES, size), START)
    row = np.arange(SHUFFLES)
    for turn in order.T:
        first, second = games.first[turn], games.second[turn]
        expected = 1 / (1 + 10 ** ((ratings[row, second] - ratings[row, first]) / 400))
        change = K * (games.value[turn] - expected)
        ratings[row, first] += change
        ratings[row, second] -= change
    return ratings.mean(axis=0)


def show(console: Console, found: Mapping[str, Strength]) -> None:
    """Print the ranking."""
    columns = ("strength", "Elo", "online Elo", "win rate")
    made = table("Bradley-Terry strengths and their 95 % intervals", "system", columns)
    for name, one in found.items():
        figures = f"{one.strength:+.3f} [{one.low:+.3f}, {one.high:+.3f}]", f"{one.elo:.0f}", f"{one.online_elo:.0f}"
        made.add_row(escape(name), *figures, f"{one.win_rate:.3f}")
    console.print(made)


def _games(systems: Sequence[str], rulings: Mapping[tuple[str, str], Sequence[Ruling]], prompt: np.ndarray) -> Games:
    place = {name: i for i, name in enumerate(systems)}
    found = [
        (place[system], place[baseline], ruling.value, same)
        for (system, baseline), mine in rulings.items()
        for ruling, same in zip(mine, prompt.tolist(), strict=True)
        if ruling.value is not None
    ]
    first, second, value, same = zip(*found, strict=True) if found else ((), (), (), ())
    return Games(
        first=np.array(first, np.int64),
        second=np.array(second, np.int64),
        value=np.array(value, float),
        prompt=np.array(same, np.int64),
    )


def _wins(games: Games, size: int) -> np.ndarray:
    """How often each system beat each other on each prompt, float [prompts, S, S]."""
    names, prompt = np.unique(games.prompt, return_inverse=True)
    wins = np.zeros((len(names), size, size))
    np.add.at(wins, (prompt, games.first, games.second), games.value)
    np.add.at(wins, (prompt, games.second, games.first), 1 - games.value)
    return wins


def _redrawn(times: np.ndarray, wins: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Strengths of samples of the prompts, [R, S]."""
    size = wins.shape[1]
    return bradley_terry((times @ wins.reshape(len(wins), -1)).reshape(-1, size, size), found)


def _check_connected(systems: Sequence[str], games: Games) -> None:
    group = list(range(len(systems)))
    for one, other in set(zip(games.first.tolist(), games.second.tolist(), strict=True)):
        joined, gone = group[one], group[other]
        group = [joined if mine == gone else mine for mine in group]
    groups = [[systems[i] for i, mine in enumerate(group) if mine == name] for name in dict.fromkeys(group)]
    if len(groups) > 1:
        named = "; ".join(", ".join(one) for one in groups)
        raise UserError(
            f"systems: nobody has compared these groups with each other, so they have no common ranking: {named}; "
            "judge pairs across them"
        )
