"""What `pretrain` and `sft` share once there are tokens: the next-token loss over packed trees, from model to artifact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline import artifact, resume, runtime
from rlhf_pipeline.artifact import Kind, Parent
from rlhf_pipeline.config.identity import plain
from rlhf_pipeline.config.schema import Attention
from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.data import stage
from rlhf_pipeline.data.loader import Layout, TreeStream
from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.engine import Engine, deepspeed_json
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.heldout import HeldOut
from rlhf_pipeline.fit import Schedule, Step, Stopped, fit
from rlhf_pipeline.functional.losses.lm import negative_log_likelihood
from rlhf_pipeline.functional.terms import Term
from rlhf_pipeline.machine import measure_peak_flops, training_flops_per_token
from rlhf_pipeline.models import lora
from rlhf_pipeline.models.load import TORCH_DTYPES, load_policy
from rlhf_pipeline.models.self_check import self_check
from rlhf_pipeline.models.tree_model import BLOCK_MULTIPLE, TreeBatch, TreeModel
from rlhf_pipeline.run import Run
from rlhf_pipeline.tracking import Tracker, open_tracker


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

    # The model under the engine
    policy, engine = _model(config, renderer, torch.device(process.device))

    # The global batches, and what is held out
    layout = Layout(
        row_length=config.batch.row_length,
        micro_rows=config.batch.micro_rows,
        width_multiple=BLOCK_MULTIPLE if policy.attention is Attention.block else 1,
        rank=runtime.rank(),
        num_ranks=runtime.world_size(),
    )
    batch_order = stage.batch_order(config, data[names[0]])
    stream = TreeStream(data=list(data.values()), order=batch_order, layout=layout, mix_ratio=mix_ratio)
    num_steps = min(batch_order.num_steps, config.train.max_steps or batch_order.num_steps)
    held_out = HeldOut(heldout, layout, config.evaluation, seed=config.seed)

    # The loop
    with _tracker(config, run) as tracker, runtime.stopping_on_signals(process.stop):
        tracker.info(_summary(run, num_steps, policy, data, heldout))
        state_meta = _restore(config, run, engine, data, parents, process.threads, tracker)

        def evaluate(step: int) -> dict[str, float]:
            loss = held_out.loss(engine)
            if not math.isfinite(loss):  # the last update's work: no later step would notice, and sampling would fail
                raise UserError(f"step {step}: the held-out loss is not finite ({loss}); a lower optim.lr often helps")
            tracker.samples(step, held_out.samples(policy.inner, renderer.tokenizer, renderer.end_ids, step))
            return {"eval/loss": loss}

        def save_artifact(epoch: int, step: int, metrics: dict[str, float]) -> None:
            _hand_over(config, run, engine, policy, renderer, data, parents, epoch=epoch, step=step, metrics=metrics)
            tracker.info(f"epoch {epoch}: {run.epoch_artifact(epoch)}")

        try:
            fit(
                engine=engine,
                run=run,
                schedule=Schedule.of(config, num_steps),
                batches=lambda step: Step(
                    micro_batches=stream.micro_batches(step),
                    epoch=batch_order.place(step)[0],
                    ends_epoch=batch_order.ends_epoch(step),
                    origins=lambda: stream.origins(step),
                ),
                loss=lambda logprobs, batch: loss_terms(logprobs, batch, names),
                counts=lambda micro: loss_counts(micro, names),
                evaluate=evaluate,
                save_artifact=save_artifact,
                tracker=tracker,
                stop=process.stop,
                state_meta=state_meta,
                flops_per_token=_flops_per_token(policy, data[names[0]]),
                peak_flops=lambda: measure_peak_flops(TORCH_DTYPES[config.model.dtype]),
            )
            tracker.info(f"done: {run.artifact}")
        except Stopped as stopped:
            tracker.info(f"stopped with the state saved; the same command goes on from it ({run.folder})")
            if stopped.exit_code:
                raise SystemExit(stopped.exit_code) from None


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


def _model(config: StageConfig, renderer: Renderer, device: torch.device) -> tuple[TreeModel, Engine]:
    json = deepspeed_json(config.engine, dtype=config.model.dtype, max_grad_norm=config.optim.max_grad_norm)
    policy = load_policy(
        config.model,
        lora=config.lora,
        tokenizer=renderer.tokenizer,
        seed=config.seed,
        device=device,
        deepspeed_config=json,
    )
    engine = Engine(policy, engine=config.engine, optim=config.optim, dtype=config.model.dtype, device=device)
    self_check(policy, device)
    return policy, engine


def _tracker(config: StageConfig, run: Run) -> Tracker:
    return open_tracker(
        run_dir=run.folder,
        name=config.name,
        stage=run.stage,
        config=run.config,
        wandb=config.tracking.wandb.value,
        wandb_project=config.tracking.wandb_project,
        wandb_entity=config.tracking.wandb_entity,
        tensorboard=config.tracking.tensorboard,
        progress=config.tracking.progress,
        restored_step=run.step if run.state else None,
        is_main=runtime.is_main(),
    )


def _restore(
    config: StageConfig,
    run: Run,
    engine: Engine,
    data: Mapping[str, TreeDataset],
    parents: Mapping[str, Parent],
    threads: int,
    tracker: Tracker,
) -> dict[str, Any]:
    """Load the run's state, if there is one. Returns what later states are to say about themselves.

    Raises:
        UserError: when the data, or the model it started from, are not those that the run began with.
    """
    for warning in run.warnings:
        tracker.warn(warning)
    meta = {
        "threads": threads,
        "dtype": config.model.dtype.value,
        "data": {name: one.fingerprint for name, one in data.items()},
        "parents": {name: one.content_hash for name, one in parents.items()},
        "frozen": engine.fingerprint_frozen(),
        "torch": torch.__version__,
    }
    if run.state is not None:
        before = run.state.meta
        contents = f"contents of model.path={config.model.path}"
        for what, called in (("data", "data"), ("parents", contents), ("frozen", contents)):
            if before.get(what, "") != meta[what]:
                raise UserError(
                    f"{run.folder}: the {called} have changed since the run began; put them back, choose another "
                    f"name=..., or remove {run.folder} to begin again"
                )
        now = {**meta, "num_processes": runtime.world_size(), "zero_stage": engine.zero_stage}
        changed = [f"{key}: {before[key]} -> {value}" for key, value in now.items() if before.get(key, "") != value]
        if changed:
            tracker.warn(f"results may differ in the last bits from an undisturbed run ({'; '.join(changed)})")
        resume.load(run.state, engine)
        tracker.info(f"resumed after step {run.state.step}")
    return meta


def _hand_over(  # noqa: PLR0913 - each is part of what is handed over
    config: StageConfig,
    run: Run,
    engine: Engine,
    policy: TreeModel,
    renderer: Renderer,
    data: Mapping[str, TreeDataset],
    parents: dict[str, Parent],
    *,
    epoch: int,
    step: int,
    metrics: dict[str, float],
) -> None:
    """Write the artifact of an epoch, and make it the run's artifact. Called by every rank."""
    weights = engine.weights(policy.inner)
    with runtime.main_first():
        if not runtime.is_main():
            return
        tokenizer = renderer.tokenizer
        manifest = {
            "kind": Kind.policy,
            "stage": run.stage,
            "step": step,
            "parents": parents,
            "template_hash": renderer.template_hash,
            "tokenizer_hash": renderer.tokenizer_hash,
            "special_ids": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
            "vocab_size": policy.inner.config.get_text_config().vocab_size,
            "config": run.config,
            "data": {name: {"fingerprint": one.fingerprint, "counts": plain(one.counts)} for name, one in data.items()},
            "metrics": metrics,
        }
        adapter = None
        if config.lora is not None:
            weights, adapters = lora.merge(weights, policy.inner)
            if not config.lora.merge:
                adapter = partial(
                    lora.save_adapters,
                    inner=policy.inner,
                    adapters=adapters,
                    base=str(config.model.path),
                    revision=config.model.revision,
                )
        target = run.epoch_artifact(epoch)
        artifact.save(
            target, model=policy.inner, weights=weights, tokenizer=tokenizer, manifest=manifest, adapter=adapter
        )
        artifact.link(target, run.artifact)


def _summary(run: Run, num_steps: int, policy: TreeModel, data: Mapping[str, TreeDataset], heldout: TreeDataset) -> str:
    sizes = ", ".join(f"{len(d):,} {name} examples ({int(d.lengths.sum()):,} tokens)" for name, d in data.items())
    trained = f" ({policy.num_trained:,} trained)" if policy.num_trained < policy.num_parameters else ""
    return (
        f"{policy.num_parameters:,} parameters{trained}, {policy.attention.value} attention; {sizes}, "
        f"{len(heldout):,} held out; {num_steps:,} steps in {run.folder}"
    )


def _flops_per_token(policy: TreeModel, data: TreeDataset) -> float:
    shape = policy.inner.config.get_text_config()
    head = policy.inner.get_output_embeddings().weight
    tables = {policy.inner.get_input_embeddings().weight, head}
    sizes = {table: getattr(table, "ds_numel", table.numel()) for table in tables}
    body = policy.num_parameters - sum(sizes.values())
    trained = policy.num_trained - sum(size for table, size in sizes.items() if table.requires_grad)
    lengths = data.lengths.astype(float)
    # Of the three passes through a weight (forward, gradient of its input, its own gradient) a frozen one has two.
    return training_flops_per_token(
        num_parameters_without_embedding=(2 * body + trained) // 3,
        num_layers=shape.num_hidden_layers,
        hidden=shape.hidden_size,
        mean_context=float((lengths * (lengths + 1) / 2).sum() / lengths.sum()),
        vocab_size=shape.vocab_size,
        scored_share=float(data.targets.sum() / lengths.sum()) * (1 if head.requires_grad else 2 / 3),
    )
