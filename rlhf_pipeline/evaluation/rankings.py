"""A reward model on held-out rankings while it is trained: its loss, and everything of `ranking_metrics`, drawn too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from rlhf_pipeline import runtime
from rlhf_pipeline.config.schema import EvaluationConfig
from rlhf_pipeline.data.loader import Layout, Trees, micro_batches
from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.engine import Engine
from rlhf_pipeline.evaluation import ranking_plots
from rlhf_pipeline.evaluation.ranking_metrics import Judged, flat, measure
from rlhf_pipeline.files import write_json
from rlhf_pipeline.functional.terms import Term
from rlhf_pipeline.models.tree_model import TreeBatch
from rlhf_pipeline.tracking import Tracker

Terms = Callable[[tuple[torch.Tensor, torch.Tensor | None], TreeBatch], Mapping[str, Term]]
Numbers = Callable[[TreeBatch], tuple[torch.Tensor, Mapping[str, Term]]]  # [M, responses of the micro-batch]


class Scored:
    """A fixed set of trees, packed once, whose responses are given rewards. Every rank builds and calls it together."""

    def __init__(self, data: Trees, layout: Layout, *, examples: int | None) -> None:
        size = len(data) if examples is None else min(examples, len(data))
        self.batches: list[PackedTrees] = micro_batches([data], [(0, i) for i in range(size)], layout)
        trees = [data[i] for i in range(size)]
        num_responses = [len(tree.responses) for tree in trees]
        self.first = np.cumsum([0, *num_responses])  # [P + 1]: where the responses of a prompt begin
        self.prompt = np.repeat(np.arange(size), num_responses)
        self.rank = np.concatenate([tree.ranks for tree in trees])
        self.score = np.concatenate([tree.scores for tree in trees])
        self.length = np.array([len(response) for tree in trees for response in tree.responses])

    def rewards(self, engine: Engine, terms: Terms | None = None) -> tuple[np.ndarray, dict[str, float]]:
        """Rewards of all responses, float64 [R], the same on every rank; and the means of `terms` over the whole set."""

        def numbers(batch: TreeBatch) -> tuple[torch.Tensor, Mapping[str, Term]]:
            output = engine(batch)
            return output[0][None], terms(output, batch) if terms else {}

        (found,), means = self.collected(engine, numbers)
        return found, means

    def collected(self, engine: Engine, numbers: Numbers, *, each: int = 1) -> tuple[np.ndarray, dict[str, float]]:
        """So many numbers of `each` response, float64 [M, R], the same on every rank; and the means of the terms."""
        found = np.zeros((each, len(self.prompt)))
        sums: dict[str, float] = {}
        with engine.evaluating():
            for packed in self.batches:
                values, terms = numbers(TreeBatch.of(packed, engine.device))
                # Responses of a tree lie one after the other, in their own order.
                within = np.arange(len(packed.prompt)) - np.searchsorted(packed.prompt, packed.prompt)
                found[:, self.first[packed.index] + within] = values.double().cpu().numpy()
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0.0) + float(term.sum)
                    sums[f"{name}/count"] = sums.get(f"{name}/count", 0.0) + term.count
        total = runtime.sum_over_ranks(sums)
        means = {name: total[name] / (total[f"{name}/count"] or 1.0) for name in total if not name.endswith("/count")}
        return runtime.sum_array_over_ranks(found), means


class HeldOutRankings:
    """Evaluates on a fixed set of held-out rankings, into the run's folder:

    evaluation.json     the last evaluation
    reliability.png     how often the model is right against how sure it is
    rewards.png         rewards of the best answers beside those of the others
    """

    def __init__(self, data: TreeDataset, layout: Layout, config: EvaluationConfig, *, folder: Path) -> None:
        self.scored = Scored(data, layout, examples=config.examples)
        self.folder = folder

    def evaluate(self, engine: Engine, terms: Terms, step: int, tracker: Tracker) -> dict[str, float]:
        """Metrics by name for the tracker."""
        rewards, means = self.scored.rewards(engine, terms)
        judged = Judged(
            reward=rewards,
            prompt=self.scored.prompt,
            rank=self.scored.rank,
            score=self.scored.score,
            length=self.scored.length,
        )
        if not np.isfinite(rewards).all():
            return {"eval/loss": math.nan}  # that of ties alone would be 0
        metrics = measure(judged)
        if runtime.is_main():
            pictures = {"reliability": self.folder / "reliability.png", "rewards": self.folder / "rewards.png"}
            ranking_plots.reliability(metrics, pictures["reliability"])
            ranking_plots.rewards(judged, pictures["rewards"])
            write_json(
                self.folder / "evaluation.json", {"step": step, "loss": means["loss"], **dataclasses.asdict(metrics)}
            )
            tracker.images(step, {f"eval/{name}": path for name, path in pictures.items()})
        return {"eval/loss": means["loss"], **flat(metrics)}
