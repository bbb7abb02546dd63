"""What the offline stages share once there are a model and data: global batches, state, artifact, and the loop around.

A stage says what it trains towards (`Task`); `train` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf_pipeline import artifact, resume, runtime
from rlhf_pipeline.artifact import Kind, Parent
from rlhf_pipeline.config.identity import plain
from rlhf_pipeline.config.schema import Attention
from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.data import stage
from rlhf_pipeline.data.loader import Example, Layout, TreeStream
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.engine import Engine, Slice
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.fit import ENGINE, Schedule, Step, Stopped, fit
from rlhf_pipeline.machine import measure_peak_flops, training_flops_per_token
from rlhf_pipeline.models import lora
from rlhf_pipeline.models.load import TORCH_DTYPES
from rlhf_pipeline.models.tree_model import BLOCK_MULTIPLE, TreeModule
from rlhf_pipeline.run import Run
from rlhf_pipeline.tracking import Tracker, open_tracker
from rlhf_pipeline.update import Counts, Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a stage trains, and towards what."""

    engine: Engine
    model: TreeModule  # under the engine; its `inner` becomes the artifact
    kind: Kind
    tokenizer: Any  # of the artifact
    loss: Loss
    counts: Counts
    evaluate: Callable[[int, Tracker], dict[str, float]]
    facts: Callable[[], dict[str, Any]] = (
        dict  # more of the manifest, known when the artifact is written; by every rank
    )
    before: Callable[[Sequence[Example]], None] | None = None  # told a step's examples before its update; by every rank


def train(  # noqa: PLR0913 - each is a noun of a run, and named
    config: StageConfig,
    task: Task,
    *,
    run: Run,
    process: runtime.Runtime,
    renderer: Renderer,
    data: dict[str, TreeDataset],
    heldout: TreeDataset,
    parents: dict[str, Parent],
    mix_ratio: float = 0.0,
) -> None:
    """Train on the first of the data sets (with `mix_ratio` the second is mixed in) and write the artifact.

    Raises:
        SystemExit: 130 or 143 after a signal, with the state saved.
        UserError: see `fit`.
    """
    first = next(iter(data.values()))
    batch_order = stage.batch_order(config, first)
    layout = layout_of(config, task.model)
    stream = TreeStream(data=list(data.values()), order=batch_order, layout=layout, mix_ratio=mix_ratio)
    num_steps = min(batch_order.num_steps, config.train.max_steps or batch_order.num_steps)
    with tracker_of(config, run) as tracker, runtime.stopping_on_signals(process.stop):
        tracker.info(_summary(run, num_steps, task.model, data, heldout))
        state_meta = restore(config, run, {ENGINE: task.engine}, data, parents, process.threads, tracker)

        def save_artifact(folders: list[Path], step: int, metrics: dict[str, float]) -> None:
            hand_over(
                config,
                run,
                folders,
                engine=task.engine,
                model=task.model,
                kind=task.kind,
                tokenizer=task.tokenizer,
                renderer=renderer,
                data=data,
                parents=parents,
                step=step,
                metrics=metrics,
                facts=task.facts(),
            )
            tracker.info(f"step {step}: {folders[0]}")

        def batches(step: int) -> Step:
            if task.before is not None:
                task.before(stream.examples(step))
            return Step(
                micro_batches=stream.micro_batches(step),
                epoch=batch_order.place(step)[0],
                ends_epoch=batch_order.ends_epoch(step),
                origins=lambda: stream.origins(step),
            )

        try:
            fit(
                engine=task.engine,
                run=run,
                schedule=Schedule.of(config, num_steps),
                batches=batches,
                loss=task.loss,
                counts=task.counts,
                evaluate=lambda step: task.evaluate(step, tracker),
                save_artifact=save_artifact,
                tracker=tracker,
                stop=process.stop,
                state_meta=state_meta,
                flops_per_token=_flops_per_token(task.model, first),
                peak_flops=lambda: measure_peak_flops(TORCH_DTYPES[config.model.dtype]),
            )
            tracker.info(f"done: {run.artifact}")
        except Stopped as stopped:
            tracker.info(f"stopped with the state saved; the same command goes on from it ({run.folder})")
            if stopped.exit_code:
                raise SystemExit(stopped.exit_code) from None


def layout_of(config: StageConfig, model: TreeModule) -> Layout:
    """How micro-batches lie in memory, and this process's place among the others."""
    return Layout(
        row_length=config.batch.row_length,
        micro_rows=config.batch.micro_rows,
        width_multiple=BLOCK_MULTIPLE if model.attention is Attention.block else 1,
        rank=runtime.rank(),
        num_ranks=runtime.world_size(),
    )


def tracker_of(config: StageConfig, run: Run) -> Tracker:
    """The run's tracker, cut back to the step that it goes on from."""
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


def restore(
    config: StageConfig,
    run: Run,
    engines: Mapping[str, Engine],
    data: Mapping[str, Any],
    parents: Mapping[str, Parent],
    threads: int,
    tracker: Tracker,
    extra: Mapping[str, Sequence[Slice]] = resume.NOTHING,
) -> dict[str, Any]:
    """Load the run's state, if there is one. Returns what later states are to say about themselves.

    Args:
        engines: and `extra`: see `resume.save`.
        data: by name; of each its `fingerprint` counts.

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
        "frozen": {name: engine.fingerprint_frozen() for name, engine in engines.items()},
        "torch": torch.__version__,
    }
    if run.state is not None:
        before = run.state.meta
        known, model = before.get("parents", {}), f"contents of model.path={config.model.path}"
        others = [f"{name}={one.path}" for name, one in parents.items() if known.get(name, "") != one.content_hash]
        contents = model if any(one.startswith("model=") for one in others) else f"contents of {', '.join(others)}"
        for what, called in (("data", "data"), ("parents", contents), ("frozen", model)):
            if before.get(what, "") != meta[what]:
                raise UserError(
                    f"{run.folder}: the {called} have changed since the run began; put them back, choose another "
                    f"name=..., or remove {run.folder} to begin again"
                )
        now = {**meta, **resume.layout(engines)}
        changed = [f"{key}: {before[key]} -> {value}" for key, value in now.items() if before.get(key, "") != value]
        if changed:
            tracker.warn(f"results may differ in the last bits from an undisturbed run ({'; '.join(changed)})")
        resume.load(run.state, engines, extra)
        tracker.info(f"resumed after step {run.state.step}")
    return meta


def hand_over(  # noqa: PLR0913 - each is part of what is handed over
    config: StageConfig,
    run: Run,
    folders: Sequence[Path],
    *,
    engine: Engine,
    model: TreeModule,
    kind: Kind,
    tokenizer: Any,
    renderer: Renderer,
    data: Mapping[str, TreeDataset],
    parents: dict[str, Parent],
    step: int,
    metrics: dict[str, float],
    facts: Mapping[str, Any],
) -> None:
    """Write the model as it is as an artifact. Called by every rank.

    Args:
        folders: the first is written, and the others become the same artifact.
        model: under the engine; its `inner` becomes the artifact.
        facts: more of the manifest.
    """
    inner = model.inner
    weights = engine.weights(inner)
    with runtime.main_first():
        if not runtime.is_main():
            return
        manifest = {
            "kind": kind,
            "stage": run.stage,
            "step": step,
            "parents": parents,
            "template_hash": renderer.template_hash,
            "tokenizer_hash": renderer.tokenizer_hash,
            "special_ids": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
            "vocab_size": inner.config.get_text_config().vocab_size,
            "config": run.config,
            "data": {name: {"fingerprint": one.fingerprint, "counts": plain(one.counts)} for name, one in data.items()},
            "metrics": metrics,
            **facts,
        }
        adapter = None
        if config.lora is not None:
            weights, adapters = lora.merge(weights, inner)
            if not config.lora.merge:
                adapter = partial(
                    lora.save_adapters,
                    inner=inner,
                    adapters=adapters,
                    base=str(config.model.path),
                    revision=config.model.revision,
                )
        first, *others = folders
        artifact.save(first, model=inner, weights=weights, tokenizer=tokenizer, manifest=manifest, adapter=adapter)
        for other in others:
            artifact.link(first, other)


def _summary(run: Run, num_steps: int, model: TreeModule, data: Mapping[str, TreeDataset], heldout: TreeDataset) -> str:
    sizes = ", ".join(f"{len(d):,} {name} examples ({int(d.lengths.sum()):,} tokens)" for name, d in data.items())
    trained = f" ({model.num_trained:,} trained)" if model.num_trained < model.num_parameters else ""
    return (
        f"{model.num_parameters:,} parameters{trained}, {model.attention.value} attention; {sizes}, "
        f"{len(heldout):,} held out; {num_steps:,} steps in {run.folder}"
    )


def _flops_per_token(model: TreeModule, data: TreeDataset) -> float:
    shape = model.inner.config.get_text_config()
    head = model.inner.get_output_embeddings()  # a reward model has none
    head_weight = [] if head is None else [head.weight]
    tables = {model.inner.get_input_embeddings().weight, *head_weight}
    sizes = {table: getattr(table, "ds_numel", table.numel()) for table in tables}
    body = model.num_parameters - sum(sizes.values())
    trained = model.num_trained - sum(size for table, size in sizes.items() if table.requires_grad)
    lengths = data.lengths.astype(float)
    # Of the three passes through a weight (forward, gradient of its input, its own gradient) a frozen one has two.
    return training_flops_per_token(
        num_parameters_without_embedding=(2 * body + trained) // 3,
        num_layers=shape.num_hidden_layers,
        hidden=shape.hidden_size,
        mean_context=float((lengths * (lengths + 1) / 2).sum() / lengths.sum()),
        vocab_size=shape.vocab_size,
        scored_share=sum(
            float(data.targets.sum() / lengths.sum()) * (1 if weight.requires_grad else 2 / 3) for weight in head_weight
        ),
    )
