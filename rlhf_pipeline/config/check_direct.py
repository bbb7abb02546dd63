"""What a config of `rlhf dpo` must satisfy beyond its types and what all stages ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from rlhf_pipeline.config.check_scorers import scorers
from rlhf_pipeline.config.direct import (
    TRAITS,
    DirectConfig,
    PairRule,
    PairTies,
    Traits,
    Unit,
    UnlikelihoodForm,
)
from rlhf_pipeline.config.values import positive

if TYPE_CHECKING:
    from rlhf_pipeline.config.stages import DpoConfig

ABOVE_ZERO = ("beta", "tau", "delta", "desirable_weight", "undesirable_weight")
NOT_NEGATIVE = ("alpha", "gamma")
PARAMETERS = [f.name for f in fields(DirectConfig) if f.default is None]


def check_direct(config: DpoConfig) -> Iterator[str]:
    """Every problem, one line each."""
    objective, traits = config.objective, TRAITS[config.objective.name]
    if config.model.shape is not None:
        yield "model.shape: a policy is not made from scratch here; name the fine-tuned model with model.path"
    if config.batch.tokens is not None:
        yield "batch.tokens: an update is a number of prompts with their responses; set batch.examples instead"
    yield from _parameters(objective, traits)
    yield from _pairs(objective, traits)
    if objective.likelihood < 0:
        yield f"objective.likelihood={objective.likelihood}: must not be negative"
    if not traits.reference and config.reference.path is not None:
        yield f"reference.path: objective={objective.name.value} has no reference; leave it out"
    dropouts = {"model.dropout": config.model.dropout, "lora.dropout": config.lora.dropout if config.lora else 0.0}
    for key, value in dropouts.items():
        if value and traits.reference:
            yield f"{key}={value}: must stay 0: the policy with dropout would not begin as its reference"
    if config.sampled.prompts < 0:
        yield f"sampled.prompts={config.sampled.prompts}: must not be negative"
    for name in ("max_new_tokens", "temperature", "batch_tokens"):
        yield from positive(f"sampled.{name}", getattr(config.sampled, name))
    if config.rewards and not config.sampled.prompts:
        yield "rewards: score the answers to held-out prompts, and sampled.prompts=0 asks for none"
    yield from scorers(config.rewards)
    if config.judge is not None and not (config.sampled.prompts and traits.reference):
        has_none = f"objective={objective.name.value} has no reference"
        lacking = has_none if config.sampled.prompts else "sampled.prompts=0 asks for no answers"
        yield (
            f"judge: compares held-out answers with the reference's, and {lacking}; leave it out, and judge the artifact "
            "with rlhf evaluate kind=winrate"
        )


def _parameters(objective: DirectConfig, traits: Traits) -> Iterator[str]:
    takes = ", ".join(f"objective.{name}" for name in traits.takes) or "none of these"
    for name in PARAMETERS:
        value = getattr(objective, name)
        if value is None and name in traits.takes:
            yield f"objective.{name}: has no value, and objective={objective.name.value} needs one"
        if value is not None and name not in traits.takes:
            yield f"objective.{name}={value}: objective={objective.name.value} has no such parameter; it takes {takes}"
        if value is not None and name in ABOVE_ZERO:
            yield from positive(f"objective.{name}", value)
        if value is not None and name in NOT_NEGATIVE and value < 0:
            yield f"objective.{name}={value}: must not be negative"
    if objective.label_smoothing is not None and not 0 <= objective.label_smoothing < 0.5:
        yield f"objective.label_smoothing={objective.label_smoothing}: must be at least 0 and less than a half"
    if objective.form is UnlikelihoodForm.sequence and (objective.alpha or 0) > 1:
        yield (
            f"objective.alpha={objective.alpha}: must be at most 1 with form=sequence, or pushing the rejected answer down "
            "would pay more than the preferred one"
        )


def _pairs(objective: DirectConfig, traits: Traits) -> Iterator[str]:
    if traits.unit is not Unit.pairs and objective.pairs is not PairRule.all:
        yield f"objective.pairs={objective.pairs.value}: objective={objective.name.value} makes no pairs; leave it out"
    if objective.ties is PairTies.half and not traits.labels:
        able = ", ".join(name.value for name, one in TRAITS.items() if one.labels)
        yield f"objective.ties=half: objective={objective.name.value} takes no labels of 1/2; use drop, or one of {able}"
