"""`rlhf dpo`: a policy straight from preferences (Rafailov et al. 2023 and what followed), by one of many objectives.

No reward model, and no sampling in training: what PPO reaches by way of rewards, these losses aim at on the responses that
people compared. All responses to a prompt are one tree, whose prompt is computed once. The reference's log-probs are
computed once and kept on disk, or with every batch; an objective without a reference opens none.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline import artifact, runtime
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.direct import TRAITS, Unit
from rlhf_pipeline.config.ppo import RolloutConfig
from rlhf_pipeline.config.schema import Dtype
from rlhf_pipeline.config.stages import DpoConfig
from rlhf_pipeline.data import stage
from rlhf_pipeline.data.loader import Example, Layout, micro_batches
from rlhf_pipeline.data.progress import terminal_progress
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.direct.objectives import loss_counts, loss_terms, reward_scale, start_value
from rlhf_pipeline.direct.reference import NAME, Partners, identity_of, partners, referenced
from rlhf_pipeline.engine import Engine
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.answering import held_out_policies
from rlhf_pipeline.evaluation.direct import HeldOutPreferences, fallen
from rlhf_pipeline.evaluation.judged import Judged, open_judged
from rlhf_pipeline.evaluation.policy import HeldOutPrompts
from rlhf_pipeline.functional.terms import Term
from rlhf_pipeline.generation.prompt_sets import heldout_prompts
from rlhf_pipeline.models.ready import context_of
from rlhf_pipeline.models.reference import Reference, open_reference
from rlhf_pipeline.models.trained import open_trained_policy
from rlhf_pipeline.models.tree_model import TreeBatch, TreeModel
from rlhf_pipeline.recipes import training
from rlhf_pipeline.run import Run, open_run
from rlhf_pipeline.scoring import sources as scoring
from rlhf_pipeline.tracking import Tracker

HELD_OUT = 1_000_003  # keeps the draws of held-out prompts apart
AT_START = {Dtype.float32: 1e-3, Dtype.bfloat16: 0.02}  # nats a token, on average, between the policy and its reference


def main(config: DpoConfig) -> None:
    """Run the stage.

    Raises:
        UserError: for what the user can put right.
        SystemExit: 130 or 143 after a signal, with the state saved.
    """
    process = runtime.start(config.runtime)
    run = open_run(config, "dpo")
    scoring.check_sources(config.rewards)

    # 1 The model to start from, and its tokenizer with the chat template
    parents = {"model": artifact.parent(str(config.model.path), kind=Kind.policy)}
    if config.reference.path is not None:
        parents["reference"] = artifact.parent(config.reference.path, kind=Kind.policy)
    renderer = stage.open_renderer(config)

    # 2 Preferences, and the held-out prompts that are answered on the way
    with terminal_progress() as progress:
        data, heldout = stage.data_sets(config, renderer, progress=progress)
    asked = []
    if config.sampled.prompts:
        asked = heldout_prompts(config, heldout, context=context_of(str(config.model.path)))

    # 3 The policy, and its reference where the objective has one
    runtime.join_process_group(process, timeout_minutes=config.runtime.rank_timeout_minutes)
    policy, engine = open_trained_policy(config, renderer.tokenizer, torch.device(process.device))
    layout = training.layout_of(config, policy)
    frozen = Frozen(config, renderer, engine, layout)
    ((name, preferences),) = data.items()
    others = _others(config, preferences)
    (preferences, heldout, others) = frozen.known(preferences, heldout, others)
    data = {name: preferences}

    # 4 The loss; of KTO its reference point before each update
    point = ReferencePoint(config, engine, layout, frozen, others)

    def terms(logprobs: Tensor, batch: TreeBatch) -> dict[str, Term]:
        return loss_terms(logprobs, frozen.beside(batch), config.objective, point.value)

    if run.step == 0 and config.reference.path is None and frozen.needed:
        _check_start(engine, terms, frozen, data[name], layout, config)

    # 5 What is measured on the way
    sources = scoring.open_sources(config.rewards, device=process.device) if asked else {}
    judge = open_judged(config.judge, device=process.device, seed=config.seed, tell=partial(print, file=sys.stderr))
    scoring.check_prompts(sources, ((one.origin, one.messages) for one in asked))
    held_out = HeldOutPreferences(
        heldout,
        layout,
        examples=config.evaluation.examples,
        beta=reward_scale(config.objective),
        reduction=config.objective.reduction,
        folder=run.folder,
    )
    prompts = _held_out_prompts(config, policy, frozen, asked, sources, judge, renderer=renderer, layout=layout)
    first = _first_evaluation(run)

    def evaluate(step: int, tracker: Tracker) -> dict[str, float]:
        metrics = held_out.evaluate(engine, terms, frozen.numbers if frozen.needed else None, step)
        if not math.isfinite(metrics["eval/loss"]):  # the last update's work: no later step would notice
            raise UserError(f"step {step}: the held-out loss is not finite; a lower optim.lr often helps")
        if warning := fallen(metrics, first or metrics):
            tracker.warn(f"step {step}: {warning}")
        first.update(first or metrics)
        return metrics | (prompts.evaluate(step, tracker) if prompts else {})

    # 6 Train and hand over
    task = training.Task(
        engine=engine,
        model=policy,
        kind=Kind.policy,
        tokenizer=renderer.tokenizer,
        loss=terms,
        counts=lambda micro: loss_counts(micro, config.objective),
        evaluate=evaluate,
        before=point.measure if others is not None else None,
    )
    training.train(
        config, task, run=run, process=process, renderer=renderer, data=data, heldout=heldout, parents=parents
    )


class Frozen:
    """The reference: its numbers of whole data sets, or of a micro-batch. Without one, everything stays as it is."""

    def __init__(self, config: DpoConfig, renderer: Renderer, engine: Engine, layout: Layout) -> None:
        self.config, self.engine, self.layout = config, engine, layout
        self.needed = TRAITS[config.objective.name].reference
        self.opened: Callable[[], Reference] = partial(open_reference, config, renderer.tokenizer, engine)
        if not config.reference.cache:
            self.opened = cache(self.opened)  # of every batch: it stays in memory

    def known(self, *data: Any) -> tuple[Any, ...]:
        """The data sets with the reference's log-probs, where they are kept on disk; None stays None."""
        if not self.needed or not self.config.reference.cache:
            return data
        identity, opened = identity_of(self.config), cache(self.opened)  # once for all, and dropped afterwards
        with terminal_progress() as show:
            progress = (lambda done, _: show("the reference's log-probabilities", done)) if show else None
            return tuple(
                None
                if one is None
                else referenced(
                    one,
                    opened,
                    layout=self.layout,
                    identity=identity,
                    cache_dir=Path(self.config.data.cache_dir),
                    say=partial(print, file=sys.stderr),
                    progress=progress,
                )
                for one in data
            )

    def beside(self, batch: TreeBatch) -> TreeBatch:
        """The micro-batch with the reference's log-probs."""
        if self.needed and NAME not in batch.numbers:
            batch.numbers[NAME] = self.numbers(batch)
        return batch

    def numbers(self, batch: TreeBatch) -> Tensor:
        """The reference's log-probs, fp32 [N]."""
        if self.config.reference.cache or NAME in batch.numbers:
            return batch.number(NAME)
        with self.opened().ready() as forward:
            found: Tensor = forward(batch)
        return found


class ReferencePoint:
    """KTO's z0: the KL divergence from the reference, estimated from responses to other prompts over the global batch."""

    def __init__(
        self, config: DpoConfig, engine: Engine, layout: Layout, frozen: Frozen, others: Partners | None
    ) -> None:
        self.config, self.engine, self.layout, self.frozen, self.others = config, engine, layout, frozen, others
        self.value = 0.0  # as where the policy is its reference

    def measure(self, examples: Sequence[Example]) -> None:
        """Of the policy as it is, before the update with these examples. Called by every rank."""
        assert self.others is not None
        total = 0.0
        with self.engine.evaluating():
            for packed in micro_batches([self.others], examples, self.layout):
                batch = self.frozen.beside(TreeBatch.of(packed, self.engine.device))
                total += float((self.engine(batch) - batch.number(NAME)).double().sum())
        found = runtime.sum_over_ranks({"ratio": total})["ratio"]
        self.value = max(0.0, found / len(examples))


def _first_evaluation(run: Run) -> dict[str, float]:
    """The run's, where it goes on; empty before there is one."""
    file = run.folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if run.state and file.is_file() else []
    return next((found for line in lines if "eval/loss" in (found := json.loads(line))), {})


def _others(config: DpoConfig, preferences: TreeDataset) -> Partners | None:
    if TRAITS[config.objective.name].unit is not Unit.verdicts:
        return None
    return partners(preferences, seed=config.seed, max_length=config.data.max_length)


def _check_start(
    engine: Engine,
    terms: Callable[[Tensor, TreeBatch], dict[str, Term]],
    frozen: Frozen,
    data: TreeDataset,
    layout: Layout,
    config: DpoConfig,
) -> None:
    """Where the policy is its reference, both give the same log-probs, and the loss has its closed form.

    Raises:
        UserError: on every rank, when it is otherwise.
    """
    sums = {"gap": 0.0, "tokens": 0.0, "loss": 0.0, "count": 0.0}
    some = [(0, i) for i in range(min(len(data), config.batch.examples or 1))]
    with engine.evaluating():
        for packed in micro_batches([data], some, layout):
            batch = frozen.beside(TreeBatch.of(packed, engine.device))
            logprobs = engine(batch)
            loss = terms(logprobs, batch)["loss"]
            sums["gap"] += float((logprobs - batch.number(NAME)).abs().double().sum())
            sums["tokens"] += len(logprobs)
            sums["loss"] += float(loss.sum)
            sums["count"] += loss.count
    total = runtime.sum_over_ranks(sums)
    gap = total["gap"] / max(total["tokens"], 1.0)
    if not gap <= AT_START[config.model.dtype]:
        raise UserError(
            f"the policy is its reference before the first update, and yet their log-probabilities are {gap:.3g} nats a "
            "token apart: was the model changed since the reference's were computed? Remove the folder reference in "
            f"{config.data.cache_dir}, or set reference.cache=false"
        )
    expected, found = start_value(config.objective), total["loss"] / (total["count"] or 1.0)
    exact = config.model.dtype is Dtype.float32 and expected is not None and total["count"] > 0
    if exact and not math.isclose(found, expected or 0.0, rel_tol=0.02):
        raise UserError(f"the first loss of objective={config.objective.name.value} is {found:.6g}, not {expected:.6g}")


def _held_out_prompts(
    config: DpoConfig,
    policy: TreeModel,
    frozen: Frozen,
    asked: Sequence[Any],
    sources: dict[str, Any],
    judge: Judged | None,
    *,
    renderer: Renderer,
    layout: Layout,
) -> HeldOutPrompts | None:
    if not asked:
        return None
    sampled = config.sampled
    options = RolloutConfig(
        max_new_tokens=sampled.max_new_tokens, temperature=sampled.temperature, batch_tokens=sampled.batch_tokens
    )
    mine, theirs = held_out_policies(
        policy,
        frozen.engine,
        frozen.opened,
        options,
        renderer=renderer,
        layout=layout,
    )
    return HeldOutPrompts(
        asked,
        policy=mine,
        reference=theirs if frozen.needed else None,
        sources=sources,
        judge=judge,
        samples=config.evaluation.samples,
        seed=config.seed + HELD_OUT,
    )
