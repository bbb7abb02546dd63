"""`rlhf dpo` on a problem whose answer is known: an objective comes to the distribution that theory names.

A loop with a sign wrong or without its reference comes to another one, which is tried too. KTO, SimPO, SLiC, RRHF and
ORPO have no such distribution and are not here.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from helpers_optimum import distance
from helpers_optimum_direct import (
    ANSWERS,
    LENGTHS,
    LONG,
    PROMPTS,
    RANKED,
    RUN,
    Problem,
    among,
    cpo_optimum,
    dpo_optimum,
    ipo_optimum,
    make_direct_problem,
    plackett_luce,
    preferred,
    rdpo_optimum,
)
from helpers_runs import Forks
from torch import Tensor
from torch.nn.functional import logsigmoid

REACHED, MISSED = 0.05, 0.1  # total variation
BETA, TAU, ALPHA = 1.0, 0.1, 1.0
RMSPROP = ["optim.algorithm=rmsprop", "optim.lr=3e-4", "optim.betas=[0,0.99]"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """An objective; `optimum` is of the reference's log-probs and the rewards, both [P, answers]."""

    overrides: list[str]
    optimum: Callable[[np.ndarray, np.ndarray], np.ndarray]
    answers: int = len(ANSWERS)  # the data are about the first so many


CASES = {
    "dpo": Case(overrides=["objective=dpo", f"objective.beta={BETA}"], optimum=partial(dpo_optimum, beta=BETA)),
    "dpo_rmsprop": Case(
        overrides=["objective=dpo", f"objective.beta={BETA}", *RMSPROP], optimum=partial(dpo_optimum, beta=BETA)
    ),
    "ipo": Case(overrides=["objective=ipo", f"objective.tau={TAU}"], optimum=partial(ipo_optimum, tau=TAU)),
    "plackett_luce": Case(
        overrides=[
            "objective=plackett_luce",
            f"objective.beta={BETA}",
            "data.train=rankings.jsonl",
            "batch.examples=210",
        ],
        optimum=partial(dpo_optimum, beta=BETA),
        answers=len(RANKED),
    ),
    "rdpo": Case(
        overrides=["objective=rdpo", f"objective.beta={BETA}", f"objective.alpha={ALPHA}"],
        optimum=partial(rdpo_optimum, beta=BETA, alpha=ALPHA),
    ),
    "cpo": Case(
        overrides=["objective=cpo", f"objective.beta={BETA}", "objective.likelihood=0"],
        optimum=partial(cpo_optimum, beta=BETA),
    ),
}

SLOW = ("ipo", "dpo_rmsprop", "plackett_luce", "rdpo", "cpo")


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return make_direct_problem(tmp_path_factory.mktemp("optimum"))


def distances(
    rlhf: Forks, problem: Problem, name: str, *overrides: str, of: str, ranks: int = 1
) -> tuple[float, float]:
    """Total variation to the optimum of a case: at the start, and after a run."""
    case = CASES[of]
    rlhf.run(problem.folder, *RUN, f"name={name}", *case.overrides, *overrides, ranks=ranks)
    start, end = problem.start(), problem.logprobs(problem.folder / f"runs/{name}/dpo/artifact")
    aim = case.optimum(start[:, : case.answers], problem.rewards[:, : case.answers])
    before, after = (distance(among(one[:, : case.answers]), aim) for one in (start, end))
    print(f"{name}: total variation {before:.3f} at the start, {after:.3f} at the end")
    return before, after


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_the_optimum_is_reached(rlhf: Forks, problem: Problem, name: str) -> None:
    before, after = distances(rlhf, problem, name, of=name)
    assert before > MISSED
    assert after < REACHED


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "plackett_luce"])
def test_two_processes_reach_it_as_well(rlhf: Forks, problem: Problem, name: str) -> None:
    _, after = distances(rlhf, problem, f"{name}_two", "engine=zero2", of=name, ranks=2)
    assert after < REACHED


# Each changes the loop that loads it, as the program that scores held-out answers.
FLIPPED = """
from rlhf_pipeline.functional.losses import preference
loss = preference.dpo_loss
preference.dpo_loss = lambda margins, labels, *, beta: loss(-margins, labels, beta=beta)
"""
NO_REFERENCE = """
from rlhf_pipeline.direct import objectives
responses = objectives._responses
objectives._responses = lambda *of, with_reference: responses(*of, with_reference=False)
"""
UNCHECKED = """
from rlhf_pipeline.recipes import dpo
dpo._check_start = lambda *_: None
"""
PROGRAM = """
def scores(episodes):
    return [0.0] * len(episodes)
"""
CHANGED = ["sampled.prompts=1", "sampled.max_new_tokens=2", "+rewards.none.program=change:scores"]


def changed(problem: Problem, name: str, change: str) -> Problem:
    """A copy of its folder with the program change.py."""
    folder = problem.folder.with_name(f"{problem.folder.name}_{name}")
    shutil.copytree(problem.folder, folder, ignore=shutil.ignore_patterns("runs", "logs"))
    (folder / "change.py").write_text(change + PROGRAM)
    return Problem(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"), [("nothing", ""), ("flipped", FLIPPED), ("no_reference", NO_REFERENCE + UNCHECKED)]
)
def test_a_wrong_loop_misses_it(rlhf: Forks, problem: Problem, name: str, change: str) -> None:
    _, after = distances(rlhf, changed(problem, name, change), name, *CHANGED, of="dpo")
    assert after > MISSED if change else after < REACHED


@pytest.mark.slow
def test_means_over_tokens_are_not_what_the_theory_is_about(rlhf: Forks, problem: Problem) -> None:
    _, after = distances(rlhf, problem, "means", "objective.reduction=mean", of="ipo")
    assert after > MISSED


def test_a_loop_without_its_reference_does_not_begin(rlhf: Forks, problem: Problem) -> None:
    copy = changed(problem, "checked", NO_REFERENCE)
    job = rlhf.run(copy.folder, *RUN, *CASES["dpo"].overrides, *CHANGED, code=2)
    assert "the first loss of objective=dpo is 1." in job.output and "not 0.693147" in job.output


# The theory, without the package: free policies over the answers, all preferences by their probability.


def population_loss(name: str, logprobs: Tensor, reference: Tensor, rewards: np.ndarray) -> Tensor:
    """[P, answers] -> scalar: the mean loss over all that the data could say."""
    h = logprobs - reference
    if name == "plackett_luce":
        total = torch.zeros(())
        for p in range(len(PROMPTS)):
            for some in combinations(range(len(RANKED)), LONG):
                orders = torch.tensor([*permutations(some)])
                chance = torch.tensor(np.array([plackett_luce(rewards[p, order]) for order in orders.numpy()]))
                later = (BETA * h[p, orders]).flip(1).logcumsumexp(1).flip(1)
                total = total - (chance * (BETA * h[p, orders] - later).sum(1)).sum()
        return total / 100
    chance = torch.tensor(preferred(rewards))
    margin = h[:, :, None] - h[:, None, :]
    longer = torch.tensor(LENGTHS[:, None] - LENGTHS[None, :]).double()
    losses = {
        "dpo": lambda: -logsigmoid(BETA * margin),
        "ipo": lambda: (margin - 1 / (2 * TAU)) ** 2,
        "rdpo": lambda: -logsigmoid(BETA * margin + ALPHA * longer),
        "cpo": lambda: -logsigmoid(BETA * (logprobs[:, :, None] - logprobs[:, None, :])),
    }
    return (chance * losses[name]()).mean((1, 2)).sum()


@pytest.mark.parametrize("name", [name for name in CASES if name != "dpo_rmsprop"])
def test_the_loss_has_no_gradient_there(problem: Problem, name: str) -> None:
    case = CASES[name]
    reference, rewards = problem.start()[:, : case.answers], problem.rewards[:, : case.answers]
    norms = []
    for policy in (case.optimum(reference, rewards), among(reference)):
        logits = torch.tensor(np.log(policy), requires_grad=True)
        population_loss(name, logits.log_softmax(-1), torch.tensor(reference), rewards).backward()
        assert logits.grad is not None
        norms.append(float(logits.grad.norm()))
    assert norms[0] < 1e-12
    assert norms[1] > 1e-2


def test_the_rows_have_the_wins_that_are_expected(problem: Problem) -> None:
    """Of every answer over all others, to a row."""
    rows = [json.loads(line) for line in (problem.folder / "pairs.jsonl").read_text().splitlines()]
    others = len(ANSWERS) - 1
    copies = len(rows) / (len(PROMPTS) * len(ANSWERS) * others / 2)
    for p, prompt in enumerate(PROMPTS):
        wins = Counter(row["chosen"] for row in rows if row["prompt"] == prompt)
        expected = copies * (preferred(problem.rewards)[p].sum(1) - 0.5)
        assert [wins[one] for one in ANSWERS] == pytest.approx(expected, abs=1)
