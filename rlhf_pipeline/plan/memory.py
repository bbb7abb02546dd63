"""Bytes per device of a run, line by line, in each of its phases; the largest phase is what has to fit.

A phase is a moment at which memory is highest: an update of the policy, or with PPO also its rollout, the scoring, the
forward passes between them, the value model's update. Left out: what no tensor of ours holds (the CUDA context, NCCL's
buffers, workspaces of kernels, fragmentation), for which `machine.reserve` stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.config.stages import DpoConfig, PpoConfig, StageConfig
from rlhf_pipeline.plan import activations
from rlhf_pipeline.plan.activations import Rows
from rlhf_pipeline.plan.models import Models, Ready, Trained, attention_of, ema_bytes, models_of
from rlhf_pipeline.plan.states import WIDTH

WEIGHTS, GRADIENTS, OPTIMISER, AVERAGE = "weights", "gradients", "optimiser", "moving average"
BUFFERS, ACTIVATIONS, LOGITS, CACHE = "buffers", "activations", "logits", "KV cache"
LINES = (WEIGHTS, GRADIENTS, OPTIMISER, AVERAGE, BUFFERS, ACTIVATIONS, LOGITS, CACHE)
WHOLE = "whole policy"  # to sample from


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Bytes on a GPU by line; models that are not trained have lines of their own names."""

    name: str
    lines: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.lines.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a run takes."""

    models: Models
    phases: tuple[Phase, ...]
    host: dict[str, float]  # of one process in its host's memory, by line

    @property
    def peak(self) -> Phase:
        """The phase that has to fit."""
        return max(self.phases, key=lambda phase: phase.total)


def memory_of(config: StageConfig) -> Memory:
    """Bytes of one process of a run.

    Raises:
        UserError: when the shape of a model is not known.
    """
    models = models_of(config)
    kept = _kept(config, models)
    return Memory(models=models, phases=tuple(_phases(config, models, kept)), host=_host(config, models))


def rows_of(config: StageConfig) -> Rows:
    """The largest micro-batch: an example that is longer than a row raises it."""
    return Rows(
        row_length=max(config.batch.row_length, longest_example(config)),
        rows=config.batch.micro_rows,
        width=WIDTH[config.model.dtype],
        attention=attention_of(config),
        checkpointing=config.model.gradient_checkpointing,
    )


def _kept(config: StageConfig, models: Models) -> dict[str, float]:
    """On the GPU from beginning to end."""
    lines = {
        WEIGHTS: sum(one.states.weights for one in models.trained),
        GRADIENTS: sum(one.states.kept_gradients for one in models.trained),
        OPTIMISER: sum(one.states.optimiser for one in models.trained),
        AVERAGE: ema_bytes(config, models.policy)[0],
        BUFFERS: sum(one.states.kept_buffers for one in models.trained),
    }
    for one in models.rewards:
        lines[one.name] = 0.0 if one.offload else one.bytes
    if models.reference is not None:
        between = isinstance(config, DpoConfig) and config.reference.cache  # there only to fill the cache
        lines[models.reference.name] = 0.0 if models.reference.offload or between else models.reference.bytes
    return lines


def _phases(config: StageConfig, models: Models, kept: dict[str, float]) -> Iterator[Phase]:
    rows = rows_of(config)
    if isinstance(config, PpoConfig):
        yield _sampling(config, models.policy, kept, config.rollout, "rollout")
        for one in models.rewards:
            yield Phase(name="score", lines=_with(kept, one, _passing(one.shape, one.tokens, one.width, words=False)))
        yield _evaluation(models, kept, rows)
        yield _update(config, models.policy, kept, rows, entropy=config.policy.entropy > 0)
        if models.value is not None:
            yield _update(config, models.value, kept, rows)
        return
    if isinstance(config, DpoConfig):
        yield from _direct(config, models, kept, rows)
        return
    yield _update(config, models.policy, kept, rows)


def _direct(config: DpoConfig, models: Models, kept: dict[str, float], rows: Rows) -> Iterator[Phase]:
    reference, policy = models.reference, models.policy
    if reference is not None and config.reference.cache:
        passing = _passing(reference.shape, reference.tokens, reference.width)
        yield Phase(name="reference", lines=_with(kept, reference, passing))
    beside = kept
    if reference is not None and not config.reference.cache:  # its forward pass is made while the policy's is kept
        beside = {**kept, reference.name: reference.bytes}
    yield _update(config, policy, beside, rows)
    if config.sampled.prompts:
        answers = _sampling(config, policy, kept, config.sampled, "answers")
        yield Phase(name=answers.name, lines=_with(answers.lines, reference, {}) if reference else answers.lines)


def _update(config: StageConfig, model: Trained, kept: dict[str, float], rows: Rows, *, entropy: bool = False) -> Phase:
    """The largest moment of an update: at the head, in a layer, when gradients are reduced, in the optimiser's step."""
    shape, states = model.shape, model.states
    saved, working = activations.saved(shape, rows), activations.working(shape, rows)
    head_is_trained = config.lora is None
    logits = tables = 0.0
    if model.has_words:
        logits = activations.logits_trained(
            shape, rows.tokens, rows.width, head_is_trained=head_is_trained, entropy=entropy
        )
        tables = float(rows.width * shape.embedding) if head_is_trained else 0.0
    in_layers = 0.0 if states.reduces_at_end else states.reducing
    gradients, buffers = states.gradients - states.kept_gradients, states.buffers - states.kept_buffers
    moments = [
        {GRADIENTS: gradients, BUFFERS: buffers + states.fetching, ACTIVATIONS: saved, LOGITS: logits},
        {GRADIENTS: gradients, BUFFERS: buffers + in_layers, ACTIVATIONS: saved + working, LOGITS: tables},
        {GRADIENTS: gradients, BUFFERS: buffers + states.reducing},
        {GRADIENTS: states.step - states.kept_gradients},
    ]
    most = max(moments, key=lambda lines: sum(lines.values()))
    return Phase(name=f"{model.name} update", lines=_added(kept, most))


def _sampling(config: StageConfig, policy: Trained, kept: dict[str, float], options: Any, name: str) -> Phase:
    """Decoding, with the prompts' forward pass before it. At ZeRO stage 3 from a copy that has all weights."""
    shape, width = policy.shape, WIDTH[config.model.dtype]
    rows = max(1, options.batch_tokens // (1 + options.max_new_tokens))
    lines = {
        CACHE: activations.cache(shape, max(options.batch_tokens, longest(config, options)), width),
        ACTIVATIONS: activations.passing(shape, activations.PREFILL_TOKENS, width),
        LOGITS: activations.drawing(shape, rows, width),
    }
    if config.engine.zero_stage == 3:
        lines[WHOLE] = float(width * policy.parameters.elements)
    return Phase(name=name, lines=_added(kept, lines))


def longest(config: StageConfig, options: Any) -> int:
    """Tokens of the longest prompt with the longest answer: at least one row is sampled at a time."""
    return int(config.data.max_prompt_length + options.max_new_tokens)


def longest_example(config: StageConfig) -> int:
    """Tokens of a prompt with one response; several responses to a prompt may be more."""
    if isinstance(config, PpoConfig):
        return max(longest(config, config.rollout), config.ptx.max_length or 0 if config.ptx.coefficient else 0)
    return config.data.max_length


def _evaluation(models: Models, kept: dict[str, float], rows: Rows) -> Phase:
    """Log-probabilities and values of what was sampled: the largest of the models' passes, one after the other."""
    found = []
    for one in models.trained:
        lines = _passing(one.shape, rows.tokens, rows.width, words=one.has_words)
        found.append(_added(kept, {**lines, BUFFERS: one.states.gathered}))
    if models.reference is not None:
        reference = models.reference
        found.append(_with(kept, reference, _passing(reference.shape, rows.tokens, reference.width)))
    return Phase(name="evaluate", lines=max(found, key=lambda lines: sum(lines.values())))


def _passing(shape: Any, tokens: int, width: int, *, words: bool = True) -> dict[str, float]:
    logits = activations.logits_passing(shape, tokens, width) if words else 0.0
    return {ACTIVATIONS: activations.passing(shape, tokens, width), LOGITS: logits}


def _with(kept: dict[str, float], one: Ready, lines: dict[str, float]) -> dict[str, float]:
    """`lines` beside what is kept, with this model on the GPU."""
    return {**_added(kept, lines), one.name: one.bytes}


def _added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}


def _host(config: StageConfig, models: Models) -> dict[str, float]:
    lines = {f"states of the {one.name}": one.states.host + one.states.host_step for one in models.trained}
    lines[AVERAGE] = ema_bytes(config, models.policy)[1]
    parked = [*models.rewards, *([models.reference] if models.reference else [])]
    lines |= {one.name: one.bytes for one in parked if one.offload}
    return {name: size for name, size in lines.items() if size}
