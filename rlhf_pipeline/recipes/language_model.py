"""What `pretrain` and `sft` share once there are tokens: the next-token loss over packed trees, from model to artifact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline import artifact, runtime
from rlhf_pipeline.artifact import Kind, Parent
from rlhf_pipeline.config.identity import plain
from rlhf_pipeline.config.schema import Attention, Dtype
from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.data import order
from rlhf_pipeline.data.loader import Layout, TreeStream, micro_batches
from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.engine import Engine, deepspeed_json
from rlhf_pipeline.evaluation.samples import sample
from rlhf_pipeline.fit import Schedule, Step, Stopped, fit
from rlhf_pipeline.functional.losses.lm import negative_log_likelihood
from rlhf_pipeline.functional.terms import Term
from rlhf_pipeline.machine import measure_peak_flops, training_flops_per_token
from rlhf_pipeline.models.load import TORCH_DTYPES, load_policy
from rlhf_pipeline.models.self_check import self_check
from rlhf_pipeline.models.tree_model import BLOCK_MULTIPLE, TreeBatch
from rlhf_pipeline.run import Run
from rlhf_pipeline.tracking import open_tracker

SAMPLE_PROMPT = 16  # tokens of a held-out document that a sample goes on from


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
    device = torch.device(process.device)
    names, tokenizer = list(data), renderer.tokenizer

    # The model under the engine
    json = deepspeed_json(config.engine, dtype=config.model.dtype, max_grad_norm=config.optim.max_grad_norm)
    policy = load_policy(config.model, tokenizer=tokenizer, seed=config.seed, device=device, deepspeed_config=json)
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters())
    engine = Engine(policy, engine=config.engine, optim=config.optim, dtype=config.model.dtype, device=device)
    self_check(policy, device)

    # The batches
    layout = Layout(
        row_length=config.batch.row_length,
        micro_rows=config.batch.micro_rows,
        width_multiple=BLOCK_MULTIPLE if policy.attention is Attention.block else 1,
        rank=runtime.rank(),
        num_ranks=runtime.world_size(),
    )
    train_order = _order(config, data[names[0]])
    stream = TreeStream(data=list(data.values()), order=train_order, layout=layout, mix_ratio=mix_ratio)
    num_steps = min(train_order.num_steps, config.train.max_steps or train_order.num_steps)

    def batches(step: int) -> Step:
        return Step(
            micro_batches=stream.micro_batches(step),
            epoch=train_order.place(step)[0],
            ends_epoch=train_order.ends_epoch(step),
            origins=lambda: stream.origins(step),
        )

    # Held-out loss and samples
    count = min(len(heldout), config.evaluation.examples or len(heldout))
    heldout_batches = micro_batches([heldout], [(0, i) for i in range(count)], layout)
    prompts = [heldout[i].prompt for i in range(min(config.evaluation.samples, len(heldout)))]
    if max((len(prompt) for prompt in prompts), default=0) == 1:  # documents: go on from their first words
        prompts = [heldout[i].path(0)[:SAMPLE_PROMPT] for i in range(len(prompts))]

    peak = measure_peak_flops(TORCH_DTYPES[config.model.dtype]) if runtime.is_main() else 1.0
    with open_tracker(
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
    ) as tracker:
        for warning in run.warnings:
            tracker.warn(warning)
        tracker.info(_summary(run, num_steps, num_parameters, data, heldout))
        meta = _resume(run, engine, data, process.threads, config.model.dtype, tracker)

        def evaluate(step: int) -> dict[str, float]:
            loss = heldout_loss(engine, heldout_batches)
            tracker.samples(
                step,
                sample(
                    policy.inner,
                    tokenizer,
                    prompts,
                    max_new_tokens=config.evaluation.sample_tokens,
                    temperature=config.evaluation.temperature,
                    seed=config.seed + step,
                ),
            )
            return {"eval/loss": loss}

        def save_artifact(epoch: int, step: int, metrics: dict[str, float]) -> None:
            weights = engine.weights(policy.inner)
            if runtime.is_main():
                target = run.epoch_artifact(epoch)
                artifact.save(
                    target,
                    model=policy.inner,
                    weights=weights,
                    tokenizer=tokenizer,
                    manifest={
                        "kind": Kind.policy,
                        "stage": run.stage,
                        "step": step,
                        "parents": parents,
                        "template_hash": renderer.template_hash,
                        "tokenizer_hash": renderer.tokenizer_hash,
                        "special_ids": {n: getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")},
                        "vocab_size": policy.inner.config.get_text_config().vocab_size,
                        "config": run.config,
                        "data": {n: {"fingerprint": d.fingerprint, "counts": plain(d.counts)} for n, d in data.items()},
                        "metrics": metrics,
                    },
                )
                artifact.link(target, run.artifact)
                tracker.info(f"epoch {epoch}: {target}")
            runtime.barrier()

        with runtime.stopping_on_signals(process.stop):
            try:
                fit(
                    engine=engine,
                    run=run,
                    schedule=Schedule(
                        num_steps=num_steps,
                        stop_after=config.train.stop_after,
                        optim=config.optim,
                        checkpoint=config.checkpoint,
                        evaluation=config.evaluation,
                        tracking=config.tracking,
                    ),
                    batches=batches,
                    loss=lambda logprobs, batch: loss_terms(logprobs, batch, names),
                    counts=lambda micro: loss_counts(micro, names),
                    evaluate=evaluate,
                    save_artifact=save_artifact,
                    tracker=tracker,
                    stop=process.stop,
                    state_meta=meta,
                    flops_per_token=_flops_per_token(policy.inner, num_parameters, data[names[0]]),
                    peak_flops=peak,
                )
            except Stopped as stopped:
                tracker.info(f"stopped with the state saved; the same command goes on from it ({run.folder})")
                if stopped.exit_code:
                    raise SystemExit(stopped.exit_code) from None
                return
        tracker.info(f"done: {run.artifact}")
    runtime.leave_process_group()


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


@torch.no_grad()
def heldout_loss(engine: Engine, batches: list[PackedTrees]) -> float:
    """Mean negative log-likelihood of all scored tokens of this and the other ranks' micro-batches."""
    engine.train(False)
    total = {"loss": 0.0, "count": 0.0}
    for micro in batches:
        logprobs = engine(TreeBatch.of(micro, engine.device))
        total["loss"] += float(negative_log_likelihood(logprobs))
        total["count"] += len(logprobs)
    engine.train()
    total = runtime.sum_over_ranks(total)
    return total["loss"] / total["count"]


def _order(config: StageConfig, data: TreeDataset) -> order.BatchOrder:
    if config.batch.tokens is not None:
        return order.by_tokens(data.lengths, batch=config.batch.tokens, epochs=config.train.epochs, seed=config.seed)
    assert config.batch.examples is not None
    return order.by_examples(len(data), batch=config.batch.examples, epochs=config.train.epochs, seed=config.seed)


def _resume(
    run: Run, engine: Engine, data: Mapping[str, TreeDataset], threads: int, dtype: Dtype, tracker: Any
) -> dict[str, Any]:
    """Load the run's state, if there is one, and return what later states say about themselves."""
    from rlhf_pipeline import resume
    from rlhf_pipeline.errors import UserError

    meta = {
        "threads": threads,
        "dtype": dtype.value,
        "data": {name: one.fingerprint for name, one in data.items()},
        "torch": torch.__version__,
    }
    if run.state is not None:
        before = run.state.meta
        if before["data"] != meta["data"]:
            raise UserError(f"{run.folder}: the data have changed since the run began; put them back, or choose another name=...")
        layout = {**meta, "num_processes": runtime.world_size(), "zero_stage": engine.zero_stage}
        changed = [f"{k}: {before[k]} -> {layout[k]}" for k in layout if before[k] != layout[k]]
        if changed:
            tracker.warn(f"results may differ in the last bits from an undisturbed run ({'; '.join(changed)})")
        resume.load(run.state, engine)
        tracker.info(f"resumed after step {run.state.step}")
    return meta


def _summary(run: Run, num_steps: int, num_parameters: int, data: Mapping[str, TreeDataset], heldout: TreeDataset) -> str:
    sizes = ", ".join(f"{len(d):,} {name} examples ({int(d.lengths.sum()):,} tokens)" for name, d in data.items())
    return f"{run.stage}: {num_parameters:,} parameters, {sizes}, {len(heldout):,} held out, {num_steps:,} steps in {run.folder}"


def _flops_per_token(inner: Any, num_parameters: int, data: TreeDataset) -> float:
    shape = inner.config.get_text_config()
    tables = {inner.get_input_embeddings().weight, inner.get_output_embeddings().weight}
    embeddings = sum(getattr(t, "ds_numel", t.numel()) for t in tables)
    lengths = data.lengths.astype(float)
    return training_flops_per_token(
        num_parameters_without_embedding=num_parameters - embeddings,
        num_layers=shape.num_hidden_layers,
        hidden=shape.hidden_size,
        mean_context=float((lengths * (lengths + 1) / 2).sum() / lengths.sum()),
        vocab_size=shape.vocab_size,
        scored_share=float(data.targets.sum() / lengths.sum()),
    )
