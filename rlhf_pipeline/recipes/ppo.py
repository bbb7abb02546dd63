"""`rlhf ppo`: a policy against scorers (InstructGPT's third stage, Ouyang et al. 2022, section 3.5 and appendix C.4).

An iteration: 1 roll out, 2 score, 3 evaluate every token by policy, reference and value model, 4 shape rewards and
advantages, 5 clipped updates with the pretraining mix; then log, evaluate, save. A step of the run is an iteration. What
it draws depends on weights, seed and iteration alone, so a killed run goes on from its last state with the same numbers.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_pipeline import artifact, health, resume, runtime
from rlhf_pipeline.artifact import Kind, Parent
from rlhf_pipeline.config.ppo import RolloutConfig
from rlhf_pipeline.config.stages import PpoConfig
from rlhf_pipeline.data import prepare, stage
from rlhf_pipeline.data.loader import Layout
from rlhf_pipeline.data.order import BatchOrder
from rlhf_pipeline.data.progress import terminal_progress
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.ema import Ema
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.answering import held_out_policies
from rlhf_pipeline.evaluation.judged import Judged, open_judged
from rlhf_pipeline.evaluation.policy import HeldOutPrompts
from rlhf_pipeline.fit import Schedule, Stopped, is_handed_over, last_evaluation
from rlhf_pipeline.generation.prompt_sets import PromptSet, prompt_sets
from rlhf_pipeline.generation.prompts import Asked
from rlhf_pipeline.models.ready import context_of
from rlhf_pipeline.ppo import updates
from rlhf_pipeline.ppo.clock import Clock
from rlhf_pipeline.ppo.experience import Control, Experience, evaluate, measured, shape
from rlhf_pipeline.ppo.models import Models, open_models
from rlhf_pipeline.ppo.updates import Learner
from rlhf_pipeline.recipes import training
from rlhf_pipeline.rollout import Rollout, episodes, per_token, roll_out, sampling_model
from rlhf_pipeline.run import Run, open_run
from rlhf_pipeline.scoring import sources as scoring
from rlhf_pipeline.scoring.sources import Source
from rlhf_pipeline.tracking import Tracker

HELD_OUT = 1_000_003  # keeps the draws of held-out prompts apart from those of rollouts


def main(config: PpoConfig) -> None:
    """Run the stage.

    Raises:
        UserError: for what the user can put right.
        SystemExit: 130 or 143 after a signal, with the state saved.
    """
    process = runtime.start(config.runtime)
    run = open_run(config, "ppo")
    scoring.check_sources(config.rewards)

    # 1 What the run starts from, and the policy's tokenizer with the chat template
    parents = _parents(config)
    renderer = stage.open_renderer(config)

    # 2 Prompts, and text to mix in, tokenised before any process group exists
    with terminal_progress() as progress:
        prompts, heldout = prompt_sets(config, renderer, context=context_of(str(config.model.path)), progress=progress)
        text = (
            prepare.pretraining_of(config.ptx, config.data, renderer, progress=progress) if config.ptx.train else None
        )

    # 3 Policy, reference, value model and scorers
    runtime.join_process_group(process, timeout_minutes=config.runtime.rank_timeout_minutes)
    models = open_models(config, renderer.tokenizer, torch.device(process.device))
    sources = scoring.open_sources(config.rewards, device=process.device)
    judge = open_judged(config.judge, device=process.device, seed=config.seed, tell=partial(print, file=sys.stderr))
    scoring.check_prompts(sources, ((one.origin, one.messages) for one in [*prompts.asked, *heldout.asked]))

    # 4 Train and hand over
    order = stage.batch_order(config, prompts.data)
    loop = Loop(
        config=config,
        run=run,
        renderer=renderer,
        models=models,
        sources=sources,
        judge=judge,
        prompts=prompts,
        order=order,
        schedule=Schedule.of(config, min(order.num_steps, config.train.max_steps or order.num_steps)),
        layout=training.layout_of(config, models.policy),
        learner=Learner(config, models, text, training.layout_of(config, models.policy)),
        ema=Ema(models.policy_engine, config.ema.decay) if config.ema.decay else None,
        data={"prompts": prompts.data, **({} if text is None else {"pretraining": text})},
        parents=parents,
    )
    with training.tracker_of(config, run) as tracker, runtime.stopping_on_signals(process.stop):
        for line in (_summary(loop, heldout), *scoring.describe(sources)):
            tracker.info(line)
        data = loop.data | {"prompts": prompts}  # whose fingerprint is also of what scorers read beside the tokens
        meta = training.restore(
            config, run, models.engines, data, parents, process.threads, tracker, extra=loop.averages
        )
        control = Control(**run.state.meta["control"]) if run.state else Control(beta=config.kl.beta)
        try:
            _train(loop, control, heldout, tracker, process.stop, meta)
            tracker.info(f"done: {run.artifact}")
        except Stopped as stopped:
            tracker.info(f"stopped with the state saved; the same command goes on from it ({run.folder})")
            if stopped.exit_code:
                raise SystemExit(stopped.exit_code) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """What stays the same from one iteration to the next."""

    config: PpoConfig
    run: Run
    renderer: Renderer
    models: Models
    sources: dict[str, Source]
    judge: Judged | None
    prompts: PromptSet
    order: BatchOrder  # of prompts
    schedule: Schedule
    layout: Layout
    learner: Learner
    ema: Ema | None
    data: dict[str, TreeDataset]
    parents: dict[str, Parent]

    @property
    def averages(self) -> dict[str, Any]:
        """What resume states hold beside the engines."""
        return {} if self.ema is None else {"policy": self.ema.slices()}

    def handed_over(self) -> Any:
        """A context in which the policy has the weights that become the artifact."""
        return self.ema.in_place() if self.ema is not None and self.config.ema.hand_over else nullcontext()

    def answer(self, asked: Sequence[Asked], options: RolloutConfig, *, seed: int, first: int) -> Rollout:
        """The policy's responses to these prompts; see `rollout.roll_out`."""
        with sampling_model(self.models.policy_engine, self.models.policy, options) as model:
            return roll_out(model, asked, options, renderer=self.renderer, seed=seed, first=first)


def _iteration(loop: Loop, control: Control, step: int, *, check: bool) -> tuple[dict[str, float], list[str]]:
    """The algorithm. Returns what is to be logged, and what is wrong at its start where that is to be checked."""
    config, models = loop.config, loop.models
    clock = Clock(loop.models.policy_engine.device)

    # 1 Roll out
    asked = [loop.prompts.asked[i] for i in loop.order.indices(step)]
    rollout = loop.answer(asked, config.rollout, seed=config.seed, first=loop.order.size_before(step))
    clock.passed("rollout")

    # 2 Score
    counts: Counter[str] = Counter()
    scores = scoring.score(loop.sources, episodes(rollout), counts=counts)
    total = torch.from_numpy(scoring.total(scores, loop.sources))
    clock.passed("score")

    # 3 Evaluate every token by policy, reference and value model
    experience = evaluate(models, rollout, scores, total, loop.layout)
    clock.passed("evaluate")

    # 4 Shape rewards and advantages
    shaped = shape(experience, control, config.advantage, config.kl)
    problems = _start_problems(loop, experience, step) if check else []
    if problems:
        return {}, problems

    # 5 Clipped updates, with the pretraining mix in the same gradient
    rates = {
        "policy": loop.schedule.learning_rate(step),
        "value": replace(loop.schedule, optim=config.value.optim).learning_rate(step),
    }
    learnt = loop.learner.learn(
        experience,
        shaped,
        step=step,
        episodes_before=loop.order.size_before(step) * rollout.samples,
        beta=control.beta,
        rates=rates,
        follow=loop.ema.update if loop.ema else None,
    )
    clock.passed("update")

    metrics = measured(experience, shaped) | learnt | clock.rates(rollout)
    metrics |= {"kl/beta": control.beta, "policy/lr": rates["policy"]}
    metrics |= {f"rollout/{name.replace('/', '_')}": float(number) for name, number in counts.items()}
    if control.baseline is not None:
        metrics["rollout/baseline"] = control.baseline
    control.follow(experience, shaped, config.kl, config.advantage)
    return metrics, []


def _train(
    loop: Loop, control: Control, heldout: PromptSet, tracker: Tracker, stop: runtime.StopRequest, meta: dict[str, Any]
) -> None:
    """Iterate from the run's state to the end.

    Raises:
        Stopped: after a signal, with the state saved.
        UserError: when an iteration is not what it should be, see `health`.
    """
    gc.freeze()
    gc.enable()
    config, run, schedule = loop.config, loop.run, loop.schedule
    held_out = _held_out(loop, heldout)
    metrics = last_evaluation(run)
    done = run.step

    def evaluated(step: int) -> dict[str, float]:
        with loop.handed_over():
            found = held_out.evaluate(step, tracker)
        tracker.log(step, found)
        return found

    def save() -> None:
        tracker.sync()
        resume.save(
            run.folder,
            loop.models.engines,
            step=done,
            meta={**meta, "control": asdict(control)},
            keep=schedule.checkpoint.keep,
            extra=loop.averages,
        )

    if done == 0 and schedule.evaluation.before:
        evaluated(0)
    if done >= schedule.num_steps and not is_handed_over(run):
        epoch = loop.order.place(done - 1)[0] + 1
        _hand_over(loop, [run.epoch_artifact(epoch), run.artifact], done, metrics)  # paused there, and now cut short
    while done < schedule.num_steps:
        logged, problems = _iteration(loop, control, done, check=done == run.step)
        if problems:
            raise UserError(f"iteration {done + 1} cannot be trusted:\n" + "\n".join(f"  - {p}" for p in problems))
        done += 1
        last, epoch = done == schedule.num_steps, loop.order.place(done - 1)[0] + 1
        if done % schedule.tracking.every == 0 or last:
            tracker.log(done, logged | {"train/epoch": float(epoch)})
        tracker.progress(done, schedule.num_steps)
        ill = health.problems(logged, config.health)
        if schedule.evaluates_after(done):
            metrics = evaluated(done)
        folders = schedule.artifacts_after(run, done, epoch=epoch, ends_epoch=loop.order.ends_epoch(done - 1))
        if folders:
            _hand_over(loop, folders, done, metrics)
            tracker.info(f"iteration {done}: {folders[0]}")
        leaving = int(runtime.max_over_ranks({"stop": float(stop.exit_code)})["stop"])
        paused = bool(leaving) or done == schedule.stop_after
        if last or paused or ill or done % schedule.checkpoint.every == 0:
            save()
        if ill and not last:
            raise UserError(f"iteration {done}: stopped, with the state saved:\n" + "\n".join(f"  - {p}" for p in ill))
        if paused and not last:
            raise Stopped(leaving)


def _held_out(loop: Loop, heldout: PromptSet) -> HeldOutPrompts:
    """The policy, and the reference, on prompts that nothing is learnt from."""
    models, config = loop.models, loop.config
    policy, reference = held_out_policies(
        models.policy,
        models.policy_engine,
        lambda: models.reference,
        replace(config.rollout, samples=1),
        renderer=loop.renderer,
        layout=loop.layout,
    )
    return HeldOutPrompts(
        heldout.asked[: config.evaluation.examples],
        policy=policy,
        reference=reference,
        sources=loop.sources,
        judge=loop.judge,
        samples=config.evaluation.samples,
        seed=config.seed + HELD_OUT,
    )


def _start_problems(loop: Loop, experience: Experience, step: int) -> list[str]:
    """What must hold before the first update of a process: see `health.start_problems`."""
    config, models, rollout = loop.config, loop.models, experience.rollout
    first = next(updates.minibatches(np.arange(len(rollout.trees)), config, step))
    rows = [int(i) * rollout.samples + k for i in first for k in range(rollout.samples)]
    trees = [rollout.trees[int(i)] for i in first]
    with models.evaluating():
        found = per_token(models.logprobs, trees, loop.layout, models.policy_engine.device)
    again = experience.logprobs.clone()
    again[rows, : found.shape[1]] = torch.where(experience.mask[rows, : found.shape[1]], found.double(), 0.0)
    starts_as_reference = step == 0 and config.reference.path is None
    return health.start_problems(
        sampled=rollout.sampled,
        logprobs=experience.logprobs,
        mask=experience.mask,
        dtype=config.model.dtype,
        prompts=[one.tokens for one in rollout.asked],
        bos_id=loop.renderer.tokenizer.bos_token_id,
        end_ids=loop.renderer.end_ids,
        reference=experience.reference if starts_as_reference else None,
        again=again,
    )


def _parents(config: PpoConfig) -> dict[str, Parent]:
    """The model that the run starts from, the reference where it is another one, and the reward models."""
    assert config.model.path is not None, "the config check lets no such config pass"
    found = {"model": artifact.parent(config.model.path, kind=Kind.policy)}
    if config.reference.path is not None:
        found["reference"] = artifact.parent(config.reference.path, kind=Kind.policy)
    for name, one in config.rewards.items():
        if one.model is not None:
            found[f"rewards.{name}"] = artifact.parent(str(one.model.path), kind=Kind.reward_model)
    return found


def _hand_over(loop: Loop, folders: list[Path], step: int, metrics: dict[str, float]) -> None:
    """Write the policy of this iteration, averaged where the config says so, as an artifact in all these folders."""
    with loop.handed_over():
        training.hand_over(
            loop.config,
            loop.run,
            folders,
            engine=loop.models.policy_engine,
            model=loop.models.policy,
            kind=Kind.policy,
            tokenizer=loop.renderer.tokenizer,
            renderer=loop.renderer,
            data=loop.data,
            parents=loop.parents,
            step=step,
            metrics=metrics,
            facts={},
        )


def _summary(loop: Loop, heldout: PromptSet) -> str:
    policy, config = loop.models.policy, loop.config
    trained = f" ({policy.num_trained:,} trained)" if policy.num_trained < policy.num_parameters else ""
    return (
        f"{policy.num_parameters:,} parameters{trained}, {policy.attention.value} attention; {len(loop.prompts.asked):,} "
        f"prompts, {len(heldout.asked):,} held out; {loop.schedule.num_steps:,} iterations of {config.rollout.episodes} "
        f"episodes in {loop.run.folder}"
    )
