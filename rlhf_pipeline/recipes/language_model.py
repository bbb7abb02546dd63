"""What `pretrain` and `sft` share once there are tokens: the next-token loss over packed trees."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_pipeline import runtime
from rlhf_pipeline.artifact import Kind, Parent
from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.heldout import HeldOut
from rlhf_pipeline.functional.losses.lm import negative_log_likelihood
from rlhf_pipeline.functional.terms import Term
from rlhf_pipeline.models.trained import open_trained_policy
from rlhf_pipeline.models.tree_model import TreeBatch
from rlhf_pipeline.recipes import training
from rlhf_pipeline.run import Run
from rlhf_pipeline.tracking import Tracker


def train(
    config: StageConfig,
    *,
    run: Run,
    process: runtime.Runtime,
    renderer: Renderer,
    data: dict[str, TreeDataset],
    heldout: TreeDataset,
    mix_ratio: float,
    parents: dict[str, Parent],
) -> None:
    """Train on data sets by name (the second is mixed in at `mix_ratio`) and write the artifact.

    Raises:
        SystemExit: 130 or 143 after a signal, with the state saved.
        UserError: see `fit`.
    """
    runtime.join_process_group(process, timeout_minutes=config.runtime.rank_timeout_minutes)
    names = list(data)
    policy, engine = open_trained_policy(config, renderer.tokenizer, torch.device(process.device))
    held_out = HeldOut(heldout, training.layout_of(config, policy), config.evaluation, seed=config.seed)

    def evaluate(step: int, tracker: Tracker) -> dict[str, float]:
        loss = held_out.loss(engine)
        if not math.isfinite(loss):  # the last update's work: no later step would notice, and sampling would fail
            raise UserError(f"step {step}: the held-out loss is not finite ({loss}); a lower optim.lr often helps")
        tracker.samples(step, held_out.samples(policy.inner, renderer.tokenizer, renderer.end_ids, step))
        return {"eval/loss": loss}

    task = training.Task(
        engine=engine,
        model=policy,
        kind=Kind.policy,
        tokenizer=renderer.tokenizer,
        loss=lambda logprobs, batch: loss_terms(logprobs, batch, names),
        counts=lambda micro: loss_counts(micro, names),
        evaluate=evaluate,
    )
    training.train(
        config,
        task,
        run=run,
        process=process,
        renderer=renderer,
        data=data,
        heldout=heldout,
        parents=parents,
        mix_ratio=mix_ratio,
    )


def loss_terms(logprobs: Tensor, batch: TreeBatch, names: list[str]) -> dict[str, Term]:
    """The mean negative log-likelihood over all scored tokens, and the same for each data set, to be logged."""
    terms = {"loss": Term(negative_log_likelihood(logprobs), float(len(logprobs)))}
    if len(names) > 1:
        group = batch.group[batch.sequence]  # [N]
        for i, name in enumerate(names):
            here = logprobs.detach()[group == i]
            terms[f"loss_{name}"] = Term(negative_log_likelihood(here), float(len(here)), weight=0.0)
    return terms


def loss_counts(micro: PackedTrees, names: list[str]) -> dict[str, float]:
    """The counts of `loss_terms`, before any forward pass."""
    counts = {"loss": float(len(micro.target))}
    if len(names) > 1:
        group = micro.group[micro.sequence]
        counts |= {f"loss_{name}": float((group == i).sum()) for i, name in enumerate(names)}
    return counts
