"""Each estimator of `rlhf ppo` on a problem whose optimum is known: how far the policy is from it, iteration by iteration.

    python scripts/ppo_optimum.py [--runs runs/ppo_optimum] [--figure docs/figures/ppo_optimum.png] [override ...]

Three prompts, six words, responses of at most two: 31 responses a prompt, each with a random score. The optimum is
reference exp(score / beta) / Z; that of GRPO as published is another policy (both: tests/helpers_optimum.py). The policy
after every iteration is opened by transformers, its distribution counted out, and the total variation to the optimum
printed as a table in Markdown and drawn. Runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers_optimum import (
    PROMPTS,
    RESPONSES,
    RUN,
    distance,
    make_problem,
    optimum,
    published_grpo,
)

ITERATIONS, EPISODES = 40, 384
PUBLISHED = "grpo as published"
# Samples a prompt, beta, settings. Several updates an iteration, see RUN.
RUNS = {
    "gae": (8, 1.0, ["advantage.estimator=gae"]),
    "reinforce": (8, 1.0, ["advantage.estimator=reinforce"]),
    "rloo": (8, 1.0, ["advantage.estimator=rloo"]),
    "grpo": (8, 1.0, ["advantage.estimator=grpo"]),
    PUBLISHED: (2, 0.5, ["advantage.estimator=grpo", "kl.place=loss", "policy.mean=sequences"]),
}
SHOWN = (0, 2, 5, 10, 20, 30, 40)  # iterations in the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/ppo_optimum"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/ppo_optimum.png"))
    given, overrides = parser.parse_known_args()
    transformers.utils.logging.disable_progress_bar()

    curves = {name: curve(given.runs.resolve() / name.replace(" ", "_"), name, overrides) for name in RUNS}
    print(f"\n| iterations | {' | '.join(curves)} |\n|{'---|' * (len(curves) + 1)}")
    for step in SHOWN:
        print(f"| {step} | {' | '.join(f'{found[step]:.3f}' for found in curves.values())} |")
    draw(curves, given.figure)


def curve(folder: Path, name: str, overrides: list[str]) -> list[float]:
    """The distance to the optimum before the first iteration and after each."""
    samples, beta, own = RUNS[name]
    problem = make_problem(folder, copies=EPISODES // samples // len(PROMPTS))  # an epoch is an iteration
    run = folder / "runs/default/ppo"
    if not (run / "artifact").is_dir():
        command = [*RUN, *own, f"kl.beta={beta}", f"rollout.samples={samples}", f"rollout.episodes={EPISODES}"]
        command += [f"train.epochs={ITERATIONS}", "checkpoint.artifact_every_epoch=true", *overrides]
        subprocess.run([sys.executable, "-m", "rlhf_pipeline", *command], cwd=folder, check=True)
    start = problem.start()
    if name == PUBLISHED:
        aim = np.exp(RESPONSES.logprobs(published_grpo(start, problem.scores, beta)))
    else:
        aim = optimum(start, problem.scores, beta)
    after = [problem.table(run / f"artifacts/epoch_{number}") for number in range(1, ITERATIONS + 1)]
    return [distance(np.exp(RESPONSES.logprobs(table)), aim) for table in (start, *after)]


def draw(curves: dict[str, list[float]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, found in curves.items():
        axes.plot(found, label=name, linestyle="--" if name == PUBLISHED else "-")
    axes.set(xlabel=f"iterations of {EPISODES} episodes", ylabel="total variation to the optimum")
    axes.set(ylim=(0, None), xlim=(0, ITERATIONS))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
