"""PPO in two processes comes to the distribution that theory names, as one does: see helpers_optimum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers_optimum import RESPONSES, RUN, distance, make_problem, optimum
from helpers_runs import Forks

BETA = 1.0


def test_the_regularised_optimum_is_reached(rlhf: Forks, tmp_path: Path) -> None:
    problem = make_problem(tmp_path / "optimum")
    command = [*RUN, "advantage.estimator=gae", f"kl.beta={BETA}", "engine=zero2"]
    rlhf.run(problem.folder, *command, "name=two", ranks=2)
    start, end = problem.start(), problem.table(problem.folder / "runs/two/ppo/artifact")
    aim = optimum(start, problem.scores, BETA)
    before, after = (distance(np.exp(RESPONSES.logprobs(table)), aim) for table in (start, end))
    print(f"gae in two processes: total variation {before:.3f} at the start, {after:.3f} at the end")
    assert before > 0.2
    assert after < 0.05
