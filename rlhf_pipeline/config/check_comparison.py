"""What `rlhf evaluate` must satisfy where systems are judged against each other, or along their checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_pipeline.config.check_frontier import check_frontier
from rlhf_pipeline.config.check_judge import check_judge
from rlhf_pipeline.config.check_scorers import scorers
from rlhf_pipeline.config.frontier import FrontierConfig
from rlhf_pipeline.config.schema import EvaluationKind
from rlhf_pipeline.config.stages import EvaluateConfig

COMPARING = (EvaluationKind.winrate, EvaluationKind.rank)


def check_comparison(config: EvaluateConfig) -> Iterator[str]:
    """Of kind=winrate, rank and frontier; nothing for the others but that they take no such settings."""
    systems = config.systems if isinstance(config.systems, dict) else {}
    if config.kind in COMPARING:
        yield from check_judge("judge", config.judge)
        if systems and len(systems) < 2:
            yield f"systems={systems}: kind={config.kind.value} compares systems; name two or more"
    if config.baseline is not None and config.kind is not EvaluationKind.winrate:
        yield f"baseline={config.baseline}: is for kind=winrate; kind={config.kind.value} has none"
    elif config.baseline is not None and systems and config.baseline not in systems:
        yield f"baseline={config.baseline}: is none of the systems, which are {', '.join(map(str, systems))}"
    if config.kind is EvaluationKind.frontier:
        yield from check_frontier(config)
    elif config.frontier != FrontierConfig():
        yield f"frontier: is for kind=frontier; kind={config.kind.value} draws none"
    if config.temperatures:
        yield from _temperatures(config)
    if config.rewards and config.kind not in (*COMPARING, EvaluationKind.frontier):
        yield f"rewards: kind={config.kind.value} takes none"
    yield from scorers(config.rewards)


def _temperatures(config: EvaluateConfig) -> Iterator[str]:
    if config.kind is not EvaluationKind.winrate or config.baseline is None:
        yield "temperatures: is for kind=winrate with a baseline, which keeps sampling.temperature"
    for one in config.temperatures:
        if one < 0:
            yield f"temperatures={config.temperatures}: must not be negative"
    if len(set(config.temperatures)) < len(config.temperatures):
        yield f"temperatures={config.temperatures}: one is there twice"
    for name, path in config.systems.items() if isinstance(config.systems, dict) else ():
        if str(path).endswith(".jsonl") and name != config.baseline:
            yield f"systems.{name}={path}: answers in a file cannot be drawn again at other temperatures; name a model"
