"""What `rlhf evaluate kind=frontier` must satisfy beyond its types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf_pipeline.config.frontier import FrontierConfig
from rlhf_pipeline.config.values import positive

if TYPE_CHECKING:
    from rlhf_pipeline.config.stages import EvaluateConfig

PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}


def check_frontier(config: EvaluateConfig) -> Iterator[str]:
    """Every problem, one line each."""
    frontier, sampling = config.frontier, config.sampling
    for name, plain in PLAIN.items():
        if getattr(sampling, name) != plain:
            yield (
                f"sampling.{name}={getattr(sampling, name)}: must stay {plain}: the KL would be along answers of another "
                "distribution than the one that it is about"
            )
    if sampling.temperature == 0:
        yield "sampling.temperature=0.0: must be more than 0: a greedy policy has no finite KL; 1 is the policy itself"
    if not config.rewards:
        yield "rewards: names no scorer; add +rewards.<name>.model.path=<an artifact of rlhf rm>, or .program, or .url"
        return
    for name, one in config.rewards.items():
        if one.weight != 1:
            yield f"rewards.{name}.weight={one.weight}: kind=frontier adds no scores up; leave it out"
    yield from _axes(frontier, list(config.rewards))


def _axes(frontier: FrontierConfig, scorers: list[str]) -> Iterator[str]:
    there = ", ".join(scorers)
    # Only the default of gold may name a scorer that is not there: in most worlds nobody knows the truth.
    for name, default in {"gold": FrontierConfig().gold, "proxy": None, "chosen_by": None}.items():
        value = getattr(frontier, name)
        if value is not None and value != default and value not in scorers:
            yield f"frontier.{name}={value}: is none of the rewards, which are {there}"
    if frontier.proxy is None and frontier.gold not in scorers:
        yield f"frontier.proxy: has no value, and none of the rewards is gold; name one of {there}"
    if frontier.proxy is not None and frontier.proxy == frontier.gold:
        yield f"frontier.proxy={frontier.proxy}: is the gold one already; name another, or none"
    for n in frontier.best_of:
        yield from positive("frontier.best_of", n)
    if len(set(frontier.best_of)) < len(frontier.best_of):
        yield f"frontier.best_of={frontier.best_of}: one is there twice"
    if frontier.chosen_by is not None and not frontier.best_of:
        yield f"frontier.chosen_by={frontier.chosen_by}: chooses among the answers of frontier.best_of, which has no N"
