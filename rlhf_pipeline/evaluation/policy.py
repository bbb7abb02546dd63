"""What a policy is worth on held-out prompts while it is trained: scores, KL, and how often it beats the reference.

One answer to each prompt, at the temperature of the rollouts and with the same random numbers at every evaluation, so that
two evaluations differ by what was learned in between. How answers and log-probabilities are computed comes in from
outside; results are the same on every rank. What has no reference has no KL, what nothing scores has no score, and
where no judge is named there are no verdicts.

Shapes: R responses, one to each prompt; L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.evaluation.diversity import distinct
from rlhf_pipeline.evaluation.intervals import cluster_means
from rlhf_pipeline.evaluation.judged import Judged
from rlhf_pipeline.functional import kl
from rlhf_pipeline.generation.prompts import Asked
from rlhf_pipeline.judging.pairs import Answer as Given
from rlhf_pipeline.judging.pairs import Pair
from rlhf_pipeline.rollout import Rollout, episodes
from rlhf_pipeline.scoring import sources as scoring
from rlhf_pipeline.scoring.sources import Source
from rlhf_pipeline.tracking import Tracker

Answer = Callable[[Sequence[Asked], int], Rollout]  # one response a prompt, by a seed
LogProbs = Callable[[list[Tree]], Tensor]  # of every response token, [R, L]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How one answers and rates answers. Every rank calls both, with the same arguments."""

    answer: Answer
    logprobs: LogProbs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    rollout: Rollout
    scores: dict[str, np.ndarray]  # by scorer, float64 [R]
    total: np.ndarray | None  # float64 [R], weighed and added; None where nothing scores


class HeldOutPrompts:
    """A fixed set of held-out prompts. The reference answers them once, at the first evaluation."""

    def __init__(
        self,
        asked: Sequence[Asked],
        *,
        policy: Policy,
        reference: Policy | None,
        sources: Mapping[str, Source],
        judge: Judged | None = None,
        samples: int,
        seed: int,
    ) -> None:
        """Args:
        asked: at least one.
        reference: None for an objective without one.
        sources: what scores the answers; may be empty.
        judge: compares them with the reference's.
        samples: so many answers, from the start, are shown to people.
        """
        self.asked = list(asked)
        self.policy = policy
        self.reference = reference
        self.sources = sources
        self.judge = judge
        self.samples = samples
        self.seed = seed
        self._reference: _Scored | None = None

    def evaluate(self, step: int, tracker: Tracker) -> dict[str, float]:
        """Figures of the policy as it is; the first `samples` answers go to the tracker. Called by every rank.

        Raises:
            UserError: on every rank, when answers cannot be drawn or scored.
        """
        if self._reference is None and self.reference is not None:
            self._reference = self._answered(self.reference)
        mine, theirs = self._answered(self.policy), self._reference
        logprobs = reference = None
        if self.reference is not None:
            logprobs = self.policy.logprobs(mine.rollout.trees)
            reference = self.reference.logprobs(mine.rollout.trees)
        tracker.samples(step, self._shown(mine, theirs))
        verdicts = {} if self.judge is None or theirs is None else self.judge(self._pairs(mine, theirs))
        return (
            verdicts
            | distinctness(mine.rollout.texts)
            | measure(
                mine.scores,
                mine.total,
                None if theirs is None else theirs.total,
                logprobs=logprobs,
                reference=reference,
                mask=mine.rollout.mask,
                finished=mine.rollout.finished,
                seed=self.seed,
            )
        )

    def _answered(self, who: Policy) -> _Scored:
        rollout = who.answer(self.asked, self.seed)
        if not self.sources:
            return _Scored(rollout=rollout, scores={}, total=None)
        scores = scoring.score(self.sources, episodes(rollout))
        return _Scored(rollout=rollout, scores=scores, total=scoring.total(scores, self.sources))

    def _pairs(self, mine: _Scored, theirs: _Scored) -> list[Pair]:
        given = [
            [
                Given(text=text, finished=bool(ended))
                for text, ended in zip(one.rollout.texts, one.rollout.finished, strict=True)
            ]
            for one in (mine, theirs)
        ]
        return [
            Pair(prompt=asked.messages, a=a, b=b, origin=asked.origin)
            for asked, a, b in zip(self.asked, *given, strict=True)
        ]

    def _shown(self, mine: _Scored, theirs: _Scored | None) -> list[dict[str, str]]:
        rows = []
        for i in range(min(self.samples, len(self.asked))):
            row = {"prompt": _text(self.asked[i])}
            for name, score, one in (("response", "score", mine), ("reference", "reference_score", theirs)):
                if one is not None:
                    row[name] = one.rollout.texts[i]
                if one is not None and one.total is not None:
                    row[score] = f"{one.total[i]:.4g}"
            rows.append(row)
        return rows


def measure(
    scores: Mapping[str, np.ndarray],
    total: np.ndarray | None,
    reference_total: np.ndarray | None,
    *,
    logprobs: Tensor | None,
    reference: Tensor | None,
    mask: Tensor,
    finished: Tensor,
    seed: int = 0,
) -> dict[str, float]:
    """The figures by name, without those that something is missing for.

    The win rate has a 95 % interval by a seeded bootstrap over prompts; a tie counts half.

    Args:
        scores: by scorer, [R], before weights.
        total, reference_total: [R], of the policy's and the reference's answers to the same prompts.
        logprobs, reference: [R, L], of the policy's answers by both.
        mask: bool [R, L].
        finished: bool [R].
    """
    found: dict[str, float] = {}
    if total is not None:
        found["eval/score"] = float(total.mean())
        found |= {f"eval/score_{name}": float(one.mean()) for name, one in scores.items()}
    if logprobs is not None and reference is not None:
        divergence = torch.where(mask, kl.k1(logprobs.double(), reference.double()), 0.0).sum(1)
        found["eval/kl"] = float(divergence.mean())
    if total is not None and reference_total is not None:
        wins = np.where(total == reference_total, 0.5, total > reference_total)
        (won,) = cluster_means(wins, np.arange(len(wins)), seed=seed)
        found |= {"eval/win_rate": won.mean, "eval/win_rate_low": won.low, "eval/win_rate_high": won.high}
    return found | {
        "eval/length": float(mask.sum(1).double().mean()),
        "eval/ended": float(finished.double().mean()),
    }


def distinctness(texts: Sequence[str]) -> dict[str, float]:
    """Shares of different words, word pairs and triples in the answers (see `diversity.distinct`): a policy that falls to
    saying one thing shows here first. Those that no answer is long enough for are left out."""
    found = {f"eval/distinct_{size}": distinct(texts, size) for size in (1, 2, 3)}
    return {name: share for name, share in found.items() if share is not None}


def _text(asked: Asked) -> str:
    """The one message of a prompt, or all with their roles."""
    if len(asked.messages) == 1:
        return asked.messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in asked.messages)
