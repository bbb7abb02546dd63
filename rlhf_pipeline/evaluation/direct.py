"""A policy on held-out preferences while `rlhf dpo` trains it: its loss, and whether its implicit rewards agree.

The implicit reward of a response is beta * (log pi - log pi_ref), without the second where an objective has no
reference (Rafailov et al. 2023, section 4; Meng et al. 2024, section 2). It says how the policy orders given responses,
not what it would answer: that is `evaluation.policy`'s to say.

Shapes: R responses, U units of equal weight, N comparisons.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline import runtime
from rlhf_pipeline.config.direct import Reduction
from rlhf_pipeline.data.encode import group_of_tokens
from rlhf_pipeline.data.loader import Layout, Trees
from rlhf_pipeline.engine import Engine
from rlhf_pipeline.evaluation import intervals, ranking_metrics
from rlhf_pipeline.evaluation.intervals import ClusterMean
from rlhf_pipeline.evaluation.ranking_metrics import Judged
from rlhf_pipeline.evaluation.rankings import Scored
from rlhf_pipeline.files import write_json
from rlhf_pipeline.functional.terms import Term
from rlhf_pipeline.models.tree_model import TreeBatch

Terms = Callable[[Tensor, TreeBatch], Mapping[str, Term]]  # of log-probs, fp32 [scored tokens]
Reference = Callable[[TreeBatch], Tensor]  # log-probs, fp32 [scored tokens]

FALLEN_NATS = 10.0  # e^10: 22,000 times less likely
FALLEN_SHARE = 0.2
# Of `ranking_metrics.flat`: those that `measure` gives every prompt the same say in, or by other names.
_BY_COMPARISON = {
    f"eval/{name}" for name in ("accuracy", "accuracy_low", "accuracy_high", "reward_chosen_mean", "reward_other_mean")
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """What the policy and its reference say of the held-out responses, flat; log-probs are sums over scored tokens."""

    logprob: np.ndarray  # float64 [R]
    reference: np.ndarray | None  # float64 [R]
    tokens: np.ndarray  # float64 [R]; scored ones

    @property
    def drift(self) -> np.ndarray:
        """log pi - log pi_ref, float64 [R]; log pi where there is no reference."""
        return self.logprob if self.reference is None else self.logprob - self.reference

    def rewards(self, beta: float, reduction: Reduction) -> np.ndarray:
        """Implicit ones, float64 [R]."""
        return beta * (self.drift / self.tokens if reduction is Reduction.mean else self.drift)


class HeldOutPreferences:
    """A fixed set of held-out rankings or verdicts, packed once. Every rank builds and calls it together.

    Into the run's folder goes evaluation.json, the last evaluation: beside what is logged, as "comparisons", all that a
    reward model is measured by (`ranking_metrics`), where every comparison weighs the same.
    """

    def __init__(
        self,
        data: Trees,
        layout: Layout,
        *,
        examples: int | None,
        beta: float,
        reduction: Reduction,
        folder: Path,
    ) -> None:
        """Trees of one response each are verdicts on it.

        Args:
            data: the trees may have the reference's log-probs as `numbers`.
            examples: so many from the start; None takes all.
            beta: scales the implicit rewards; 1 for an objective without one.
            reduction: what a response's log-prob is to the objective.
        """
        self.scored = Scored(data, layout, examples=examples)
        num_responses = np.diff(self.scored.first)
        asked = np.array([group_of_tokens(data[i].prompt) for i in range(len(num_responses))], np.int64)
        self.verdicts = bool((num_responses == 1).all())
        self.asked = np.repeat(asked, num_responses)
        self.beta, self.reduction, self.folder = beta, reduction, folder

    def evaluate(self, engine: Engine, terms: Terms, reference: Reference | None, step: int) -> dict[str, float]:
        """Figures by name: the means of the objective's terms, and those of `measure`.

        The loss alone, and that NaN, where a reward is not finite: the rest would say nothing.

        Args:
            terms: given the reference's log-probs as the batch's `number("reference")`, wherever they come from.
            reference: None where the objective has none.
        """
        rated, means = self._rated(engine, terms, reference)
        rewards = rated.rewards(self.beta, self.reduction)
        if not np.isfinite(rewards).all():
            return {"eval/loss": math.nan}
        judged = Judged(
            reward=rewards,
            prompt=self.asked if self.verdicts else self.scored.prompt,
            rank=self.scored.rank,
            score=self.scored.score,
            length=rated.tokens.astype(np.int64),
        )
        comparisons = ranking_metrics.measure(judged)
        more = {name: one for name, one in ranking_metrics.flat(comparisons).items() if name not in _BY_COMPARISON}
        own = measure(judged, rated, asked=self.asked, verdicts=self.verdicts)
        found = {f"eval/{name}": mean for name, mean in means.items()} | own | more
        if runtime.is_main():
            plain = {name.removeprefix("eval/"): value for name, value in found.items()}
            write_json(
                self.folder / "evaluation.json",
                {"step": step, **plain, "comparisons": dataclasses.asdict(comparisons)},
            )
        return found

    def _rated(self, engine: Engine, terms: Terms, reference: Reference | None) -> tuple[Rated, dict[str, float]]:
        def numbers(batch: TreeBatch) -> tuple[Tensor, Mapping[str, Term]]:
            if reference is not None:
                batch = dataclasses.replace(batch, numbers={**batch.numbers, "reference": reference(batch)})
            logprobs = engine(batch)
            per_token = [
                logprobs,
                torch.ones_like(logprobs),
                *([] if reference is None else [batch.number("reference")]),
            ]
            return torch.stack([_sums(values, batch) for values in per_token]), terms(logprobs, batch)

        found, means = self.scored.collected(engine, numbers, each=2 if reference is None else 3)
        return Rated(logprob=found[0], tokens=found[1], reference=None if reference is None else found[2]), means


def measure(
    judged: Judged, rated: Rated, *, asked: np.ndarray, verdicts: bool = False, seed: int = 0
) -> dict[str, float]:
    """The figures by name, without those that cannot be computed.

    eval/accuracy            share of comparisons whose better response has the higher reward, a tie counts half; with a
                             95 % interval, _low and _high, by a seeded bootstrap over prompts
    eval/margin              by how much
    eval/reward_chosen       of the better responses; eval/reward_rejected of the worse
    eval/logprob_chosen      log pi of the best responses, summed over tokens; eval/logprob_rejected of all others
    eval/drift_chosen        log pi - log pi_ref of the same; eval/drift_rejected. Only with a reference

    Every prompt with a comparison weighs the same in the first three lines. Rankings without one are left out of all.
    Verdicts are compared where there are wanted and unwanted responses to one prompt; where no prompt has both, all
    wanted are compared with all unwanted, and the accuracy is the area under the ROC curve.

    Args:
        judged: its prompts say what may be compared: the rankings, or of verdicts the prompts.
        asked: int64 [R], equal where the prompts are; several rankings may have the same.
    """
    found = ranking_metrics.pairs(judged)
    best, compared = judged.rank == 0, np.isin(judged.prompt, found.prompt)
    if len(found.winner):
        units, first, at, counts = np.unique(found.prompt, return_index=True, return_inverse=True, return_counts=True)

        def by_unit(values: np.ndarray) -> np.ndarray:
            return np.bincount(at, weights=values, minlength=len(units)) / counts

        right = by_unit(ranking_metrics.correct(judged, found))
        accuracy = intervals.cluster_means(right, asked[found.winner[first]], seed=seed)[0]
        chosen, rejected = (float(by_unit(judged.reward[one]).mean()) for one in (found.winner, found.loser))
    elif best.any() and not best.all():  # verdicts: a ranking that is no tie has a comparison
        accuracy = area_under_curve(judged.reward, best, asked, seed=seed)
        chosen, rejected = float(judged.reward[best].mean()), float(judged.reward[~best].mean())
    else:
        accuracy = None
    figures: dict[str, float] = {}
    if accuracy is not None:
        figures |= {"accuracy": accuracy.mean, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high}
        figures |= {"margin": chosen - rejected, "reward_chosen": chosen, "reward_rejected": rejected}
    shown = {"logprob": rated.logprob} | ({} if rated.reference is None else {"drift": rated.drift})
    for what, values in shown.items():
        for side, chosen_ones in (("chosen", best), ("rejected", ~best)):
            taken = values[chosen_ones if verdicts else chosen_ones & compared]
            if len(taken):
                figures[f"{what}_{side}"] = float(taken.mean())
    return {f"eval/{name}": value for name, value in figures.items()}


def area_under_curve(reward: np.ndarray, wanted: np.ndarray, prompt: np.ndarray, *, seed: int = 0) -> ClusterMean:
    """How often a wanted response has a higher reward than an unwanted one; a tie counts half (Mann and Whitney 1947).

    The interval is that of `intervals.cluster_means`: prompts are drawn with all their responses.

    Args:
        reward: float64 [R].
        wanted: bool [R]; some are and some are not.
        prompt: int [R], equal where responses belong to the same prompt.
    """
    order = np.argsort(reward, kind="stable")
    starts = np.flatnonzero(np.diff(reward[order], prepend=np.nan))  # of equal rewards; NaN, so that 0 is one
    names, prompt = np.unique(prompt[order], return_inverse=True)
    is_wanted = wanted[order].astype(float)

    def area(times: np.ndarray) -> np.ndarray:
        """[samples, prompts] -> [samples]"""
        weights = times[:, prompt]
        good = np.add.reduceat(weights * is_wanted, starts, axis=1)
        bad = np.add.reduceat(weights * (1 - is_wanted), starts, axis=1)
        below = bad.cumsum(axis=1) - bad / 2
        return np.asarray((good * below).sum(axis=1) / (good.sum(axis=1) * bad.sum(axis=1)))

    with np.errstate(invalid="ignore"):  # a sample that lacks one kind is left out
        redrawn = np.concatenate([area(times) for times in intervals.drawn(len(names), seed)])
    low, high = np.nanpercentile(redrawn, [2.5, 97.5])
    num_wanted = int(wanted.sum())
    return ClusterMean(
        mean=float(area(np.ones((1, len(names))))[0]),
        low=float(low),
        high=float(high),
        count=num_wanted * (len(wanted) - num_wanted),
        prompts=len(names),
    )


def fallen(now: Mapping[str, float], first: Mapping[str, float]) -> str | None:
    """A sentence when preferred responses have become much less likely than at the first evaluation.

    By more than 10 nats a response, and more than a fifth of what its log-prob was. An objective that sees differences
    only is content when both log-probs fall, the rejected one faster (Pal et al. 2024; Razin et al. 2024); how far is
    harmless nobody can say in general, so this warns and does not stop.
    """
    name = "eval/logprob_chosen"
    if name not in now or name not in first:
        return None
    fall = first[name] - now[name]
    if not fall > max(FALLEN_NATS, FALLEN_SHARE * abs(first[name])):
        return None
    return (
        f"preferred responses have become less likely: {name} has fallen from {first[name]:.1f} to {now[name]:.1f} nats "
        "since the first evaluation. The loss sees only how much more the others fall, and what becomes more likely "
        "instead is in no example; objective.likelihood, a larger objective.beta or a lower optim.lr hold against it"
    )


def _sums(values: Tensor, batch: TreeBatch) -> Tensor:
    """Of each response's scored tokens, float64 [responses], on the CPU: sums there are the same every time."""
    zeros = torch.zeros(len(batch.last), dtype=torch.float64)
    return zeros.index_add_(0, batch.sequence.cpu(), values.double().cpu())
