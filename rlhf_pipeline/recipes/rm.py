"""`rlhf rm`: a reward model from rankings (InstructGPT's second stage, Ouyang et al. 2022, section 3.5, equation 1).

All answers to a prompt are one tree: its prompt is computed once, and all comparisons among its answers are one
element of the batch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline import artifact, runtime
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.ranking import Comparisons, RankingConfig, RankingLoss, Ties
from rlhf_pipeline.config.stages import RmConfig
from rlhf_pipeline.data import stage
from rlhf_pipeline.data.contents import read_contents
from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.data.progress import terminal_progress
from rlhf_pipeline.data.report import tied_share
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.data.tokenizer import with_own_pad
from rlhf_pipeline.engine import LR_SCALE, Engine, deepspeed_json
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.rankings import HeldOutRankings, Scored
from rlhf_pipeline.functional.losses.ranking import (
    centring_loss,
    initial_log_tie,
    num_correct,
    num_prompts,
    pairwise_loss,
    plackett_luce_loss,
    soft_label_loss,
)
from rlhf_pipeline.functional.terms import Term
from rlhf_pipeline.models.load import TORCH_DTYPES, load_scorer
from rlhf_pipeline.models.scalar_head import RankingModel
from rlhf_pipeline.models.self_check import self_check
from rlhf_pipeline.models.tree_model import TreeBatch
from rlhf_pipeline.recipes import training
from rlhf_pipeline.run import open_run
from rlhf_pipeline.tracking import Tracker

TIE_STEP = 0.01  # the most that log nu moves in a step; at a body's learning rate it would stay where it started


def main(config: RmConfig) -> None:
    """Run the stage.

    Raises:
        UserError: for what the user can put right.
        SystemExit: 130 or 143 after a signal, with the state saved.
    """
    process = runtime.start(config.runtime)
    run = open_run(config, "rm")

    # 1 The model to start from, and its tokenizer with the chat template
    kinds = (Kind.policy, Kind.reward_model)
    parents = {"model": artifact.parent(config.model.path, kind=kinds)} if config.model.path else {}
    renderer = stage.open_renderer(config)

    # 2 Rankings, and the demonstrations whose mean reward is to be zero
    with terminal_progress() as progress:
        data, heldout = stage.data_sets(config, renderer, progress=progress)
        demonstrations = stage.demonstrations_to_normalise(config, renderer, progress=progress)
    data["demonstrations"] = demonstrations
    if config.objective.soft_labels:
        check_scores(data["rankings"])

    # 3 The model under a scalar head
    runtime.join_process_group(process, timeout_minutes=config.runtime.rank_timeout_minutes)
    tokenizer = with_own_pad(renderer.tokenizer, renderer.end_ids)
    model, engine = _model(config, tokenizer, data["rankings"], torch.device(process.device))

    # 4 What is measured on the way, and what the artifact is normalised by
    layout = training.layout_of(config, model.scorer)
    held_out = HeldOutRankings(heldout, layout, config.evaluation, folder=run.folder)
    to_normalise = Scored(demonstrations, layout, examples=config.normalise.examples)

    def terms(output: tuple[Tensor, Tensor | None], batch: TreeBatch) -> dict[str, Term]:
        return loss_terms(output, batch, config.objective)

    def held_out_terms(output: tuple[Tensor, Tensor | None], batch: TreeBatch) -> dict[str, Term]:
        # Held-out scores may be on another scale, as the lab's are; and so runs with and without compare.
        return loss_terms(output, batch, dataclasses.replace(config.objective, soft_labels=0.0))

    def evaluate(step: int, tracker: Tracker) -> dict[str, float]:
        metrics = held_out.evaluate(engine, held_out_terms, step, tracker)
        if not math.isfinite(metrics["eval/loss"]):  # the last update's work: no later step would notice
            raise UserError(f"step {step}: the held-out rewards are not finite; a lower optim.lr often helps")
        return metrics

    def normalisation() -> dict[str, Any]:
        rewards, _ = to_normalise.rewards(engine)
        return {**shift_and_scale(rewards), "reward_log_tie": _log_tie(model, engine)}

    # 5 Train and hand over
    task = training.Task(
        engine=engine,
        model=model.scorer,
        kind=Kind.reward_model,
        tokenizer=tokenizer,
        loss=terms,
        counts=lambda micro: loss_counts(micro, config.objective),
        evaluate=evaluate,
        facts=normalisation,
    )
    training.train(
        config, task, run=run, process=process, renderer=renderer, data=data, heldout=heldout, parents=parents
    )


def loss_terms(output: tuple[Tensor, Tensor | None], batch: TreeBatch, objective: RankingConfig) -> dict[str, Term]:
    """The objective's terms, each a sum over prompts; and to be logged, accuracy and mean reward."""
    rewards, log_tie = output
    counts = _counts(batch.prompt, batch.rank, batch.score, objective)
    literal = objective.divide_by is Comparisons.literal
    if objective.loss is RankingLoss.plackett_luce:
        loss = plackett_luce_loss(rewards, batch.prompt, batch.rank)
    elif objective.soft_labels:
        loss = soft_label_loss(
            rewards, batch.prompt, batch.rank, batch.score, scale=objective.soft_labels, literal=literal
        )
    else:
        loss = pairwise_loss(
            rewards,
            batch.prompt,
            batch.rank,
            scores=batch.score,
            margin=objective.margin,
            label_smoothing=objective.label_smoothing,
            literal=literal,
            log_tie=log_tie,
        )
    terms = {"loss": Term(loss, counts["loss"])}
    if objective.centring:
        centring = centring_loss(rewards, batch.prompt, batch.rank)
        terms["centring"] = Term(centring, counts["centring"], weight=objective.centring)
    drawn = rewards.detach()
    terms["accuracy"] = Term(num_correct(drawn, batch.prompt, batch.rank), counts["accuracy"], weight=0.0)
    terms["reward"] = Term(drawn.sum(), counts["reward"], weight=0.0)
    return terms


def loss_counts(micro: PackedTrees, objective: RankingConfig) -> dict[str, float]:
    """The counts of `loss_terms`, before any forward pass."""
    prompt, rank, score = (torch.from_numpy(one) for one in (micro.prompt, micro.rank, micro.score))
    return _counts(prompt, rank, score, objective)


def _counts(prompt: Tensor, rank: Tensor, score: Tensor, objective: RankingConfig) -> dict[str, float]:
    ordered = compared = float(num_prompts(prompt, rank))
    if objective.ties is Ties.model:
        compared = float(num_prompts(prompt, rank, ties_count=True))
    elif objective.soft_labels:
        compared = float(num_prompts(prompt, rank, soft_scores=score))
    counts = {"loss": compared, "accuracy": ordered, "reward": float(len(rank))}
    return counts | ({"centring": ordered} if objective.centring else {})


def check_scores(rankings: TreeDataset) -> None:
    """Soft labels are made of scores.

    Raises:
        UserError: when no two answers to a prompt have one.
    """
    # Where there are any, the first ranking mostly has them.
    if not any(np.isfinite(rankings[i].scores).sum() > 1 for i in range(len(rankings))):
        raise UserError(
            "objective.soft_labels: no two answers to a prompt in data.train have a score, "
            "so there is nothing to make labels of; use 0"
        )


def shift_and_scale(rewards: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation of the demonstrations' rewards [R]: what consumers subtract, and divide by after.

    Raises:
        UserError: when they are not finite.
    """
    if not np.isfinite(rewards).all():
        raise UserError("the demonstrations' rewards are not finite; a lower optim.lr often helps")
    spread = float(rewards.std())
    return {"reward_shift": float(rewards.mean()), "reward_scale": spread if spread > 0 else 1.0}


def _model(
    config: RmConfig, tokenizer: Any, rankings: TreeDataset, device: torch.device
) -> tuple[RankingModel, Engine]:
    json = deepspeed_json(config.engine, dtype=config.model.dtype, max_grad_norm=config.optim.max_grad_norm)
    scorer = load_scorer(
        config.model,
        lora=config.lora,
        tokenizer=tokenizer,
        seed=config.seed,
        device=device,
        deepspeed_config=json,
    )
    log_tie = _initial_log_tie(rankings) if config.objective.ties is Ties.model else None
    model = RankingModel(scorer, log_tie=log_tie, dtype=TORCH_DTYPES[config.model.dtype])
    if model.tie is not None:
        setattr(model.tie.moved, LR_SCALE, TIE_STEP / config.optim.lr)
    engine = Engine(model, engine=config.engine, optim=config.optim, dtype=config.model.dtype, device=device)
    self_check(scorer, device)
    return model, engine


def _log_tie(model: RankingModel, engine: Engine) -> float | None:
    """As it is now. Called by every rank."""
    if model.tie is None:
        return None
    with engine.whole(list(model.tie.parameters())):
        return float(model.tie())


def _initial_log_tie(rankings: TreeDataset) -> float:
    rate = tied_share(read_contents(rankings)) or 0.0
    if not 0 < rate < 1:
        what = "no two answers to a prompt tie" if rate == 0 else "all answers to every prompt tie"
        raise UserError(f"objective.ties=model: {what} in data.train, so there is nothing to learn of it; use drop")
    return initial_log_tie(rate)
