"""PPO in two processes comes to the distribution that theory names, as one does: see helpers_optimum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_optimum import RESPONSES, RUN, distance, make_problem, optimum
from helpers_runs import Forks

BETA = 1.0


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["advantage.estimator=gae"], marks=pytest.mark.slow),
        pytest.param(["advantage.estimator=reinforce"], marks=pytest.mark.slow),
        pytest.param(["advantage.estimator=rloo"], marks=pytest.mark.slow),
        pytest.param(
            ["advantage.estimator=grpo", "rollout.samples=16", "rollout.episodes=768"], marks=pytest.mark.slow
        ),
    ],
    ids=lambda overrides: overrides[0].partition("=")[2],
)
def test_the_regularised_optimum_is_reached(rlhf: Forks, tmp_path: Path, overrides: list[str]) -> None:
    problem = make_problem(tmp_path / "optimum")
    rlhf.run(problem.folder, *RUN, *overrides, f"kl.beta={BETA}", "engine=zero2", "name=two", ranks=2)
    start, end = problem.start(), problem.table(problem.folder / "runs/two/ppo/artifact")
    aim = optimum(start, problem.scores, BETA)
    before, after = (distance(np.exp(RESPONSES.logprobs(table)), aim) for table in (start, end))
    print(f"{overrides[0]}, two processes: total variation {before:.3f} at the start, {after:.3f} at the end")
    assert before > 0.2
    assert after < 0.05
