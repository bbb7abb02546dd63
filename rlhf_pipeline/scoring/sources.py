"""What scores the responses of a policy: reward models, programs and servers, each with a name and a weight.

`score` is collective: every process scores its share of an iteration and all of them get all scores. How a source
comes to its numbers is the business of `rewards` and `written`, `programs` and `served`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rlhf_pipeline import runtime, servers
from rlhf_pipeline.config.ppo import ScorerConfig
from rlhf_pipeline.config.schema import TokenizerConfig
from rlhf_pipeline.data.records import BadRow, Message
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.scoring import programs, served
from rlhf_pipeline.scoring.episodes import Episode
from rlhf_pipeline.tracking.redaction import redact_text

if TYPE_CHECKING:
    from rlhf_pipeline.scoring.rewards import RewardModel

# What a source may count while it scores: the first three of a model (see `written.trees`), the last of a server.
COUNTS = ("prompts_cut", "responses_cut", "respelled", "retries")
SHOWN = 60  # characters of a response in a message
NAMED = 10  # prompts that a message names


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One of `rewards`."""

    name: str
    weight: float
    what: str  # for people
    run: Callable[[Sequence[Episode], Counter[str]], np.ndarray]  # scores float64 [n]
    model: RewardModel | None = None  # of a reward model

    def score(self, episodes: Sequence[Episode], counts: Counter[str] | None = None) -> np.ndarray:
        """The score of each episode, float64 [n], without the weight; `counts` gets some of COUNTS.

        Raises:
            UserError: when it cannot be had or is not finite.
        """
        if not episodes:
            return np.zeros(0)
        try:
            found = self.run(episodes, Counter() if counts is None else counts)
        except UserError as error:
            raise UserError(f"rewards.{self.name}: {error}") from error
        for i in np.flatnonzero(~np.isfinite(found))[:1]:
            one = episodes[i]
            raise UserError(
                f"rewards.{self.name}: its score is {found[i]} for the prompt {one.origin} and the response "
                f"{one.response[:SHOWN]!r}{'...' if one.response[SHOWN:] else ''}; a score must be a finite number"
            )
        return found


def check_sources(scorers: Mapping[str, ScorerConfig]) -> None:
    """What can be refused before any model is loaded: programs that cannot be imported, urls that are none.

    Raises:
        UserError: with everything that is wrong.
    """
    wrong = []
    for name, config in scorers.items():
        try:
            if config.program is not None:
                programs.open_program(config.program)
            elif config.url is not None and (why := servers.complaint(config.url)):
                raise UserError(why)
        except UserError as error:
            wrong.append(f"rewards.{name}: {error}")
    if wrong:
        raise UserError("\n".join(wrong))


def open_sources(scorers: Mapping[str, ScorerConfig], *, device: str) -> dict[str, Source]:
    """Every source by its name, in their order. A model renders with its own tokenizer and template.

    Raises:
        UserError: for one that cannot be opened.
    """
    return {name: _opened(name, config, device) for name, config in scorers.items()}


def check_prompts(sources: Mapping[str, Source], prompts: Iterable[tuple[str, tuple[Message, ...]]]) -> None:
    """Refuse (origin, messages) that some reward model's template does not take, before hours have gone by. Collective.

    Raises:
        UserError: on every process, naming them.
    """
    own = list(prompts)[runtime.rank() :: runtime.world_size()]
    bad = []
    for source in sources.values():
        if source.model is None:
            continue
        from rlhf_pipeline.scoring.written import check_prompt

        for origin, messages in own:
            try:
                check_prompt(source.model.renderer, messages)
            except (BadRow, UserError) as error:
                bad.append(f"rewards.{source.name}: {origin}: the reward model cannot read the prompt: {error}")
    more = [f"and {len(bad) - NAMED} more"] if bad[NAMED:] else []
    _fail_together("\n".join([*bad[:NAMED], *more]))


def score(
    sources: Mapping[str, Source], episodes: Sequence[Episode], *, counts: Counter[str] | None = None
) -> dict[str, np.ndarray]:
    """Scores float64 [n] of all episodes by every source, without weights. Collective.

    Every process is given all episodes, scores each of its share alone and gets all scores. `counts` gets what the
    sources counted, over all processes, as "<name>/<one of COUNTS>".

    Raises:
        UserError: on every process, the first one's where several fail.
    """
    size = len(episodes)
    table = np.zeros((len(sources), size + len(COUNTS)))
    failure = ""
    with runtime.at_own_pace():  # a server may make one of them wait
        try:
            for row, source in zip(table, sources.values(), strict=True):
                own: Counter[str] = Counter()
                row[runtime.rank() : size : runtime.world_size()] = source.score(
                    episodes[runtime.rank() :: runtime.world_size()], own
                )
                row[size:] = [own[name] for name in COUNTS]
        except UserError as error:  # all processes must come to the gathering, and all of them end
            failure = str(error)
    _fail_together(failure)
    table = runtime.sum_array_over_ranks(table)
    if counts is not None:
        for name, row in zip(sources, table, strict=True):
            counts.update({f"{name}/{what}": int(n) for what, n in zip(COUNTS, row[size:], strict=True) if n})
    return {name: row[:size] for name, row in zip(sources, table, strict=True)}


def total(scores: Mapping[str, np.ndarray], sources: Mapping[str, Source]) -> np.ndarray:
    """The sum of scores times weights, float64 [n]."""
    return np.sum([source.weight * scores[name] for name, source in sources.items()], axis=0)


def describe(sources: Mapping[str, Source]) -> list[str]:
    """A line for every source."""
    return [f"reward {name}: {source.what}, weight {source.weight:g}" for name, source in sources.items()]


def _fail_together(failure: str) -> None:
    """Raise on every process if any has failed: the message of the first one that has."""
    if not runtime.sum_over_ranks({"failed": float(bool(failure))})["failed"]:
        return
    told: list[str | None] = [failure]
    if runtime.world_size() > 1:
        import torch.distributed as dist

        told = [None] * runtime.world_size()
        dist.all_gather_object(told, failure)
    raise UserError(next(one for one in told if one))


# The three kinds


def _opened(name: str, config: ScorerConfig, device: str) -> Source:
    try:
        if config.program is not None:
            return _of_program(name, config.program, config.weight)
        if config.url is not None:
            return _of_server(name, config)
        return _of_model(name, config, device)
    except UserError as error:
        raise UserError(f"rewards.{name}: {error}") from error


def _of_program(name: str, path: str, weight: float) -> Source:
    program = programs.open_program(path)

    def run(episodes: Sequence[Episode], counts: Counter[str]) -> np.ndarray:
        return programs.score(program, path, episodes)

    return Source(name=name, weight=weight, what=f"program {path}", run=run)


def _of_server(name: str, config: ScorerConfig) -> Source:
    assert config.url is not None
    if why := servers.complaint(config.url):
        raise UserError(why)
    server = served.Server(url=config.url, batch=config.batch, timeout=config.timeout, retries=config.retries)
    what = f"server {redact_text(config.url)}, {config.batch} in a request"
    return Source(name=name, weight=config.weight, what=what, run=partial(served.score, server))


def _of_model(name: str, config: ScorerConfig, device: str) -> Source:
    from rlhf_pipeline.scoring.rewards import open_scorer

    assert config.model is not None, "the config check lets no such config pass"
    model = open_scorer(config.model, TokenizerConfig(), device)
    if config.offload:
        model.scorer.to("cpu")
    scale = f"(raw - {model.shift:.4g}) / {model.scale:.4g}" if config.normalised else "raw"
    what = f"model {config.model.path}, {scale}{', on the CPU between uses' if config.offload else ''}"
    return Source(name=name, weight=config.weight, what=what, run=partial(_model_scores, model, config), model=model)


def _model_scores(
    model: RewardModel, config: ScorerConfig, episodes: Sequence[Episode], counts: Counter[str]
) -> np.ndarray:
    from rlhf_pipeline.scoring import rewards, written

    limit = config.max_length if model.context is None else min(config.max_length, model.context)
    single = written.trees(model.renderer, episodes, limit=limit, counts=counts)
    groups, joint = _joined(single, config.batch_tokens)
    if config.offload:
        model.scorer.to(model.device)
    found = rewards.score(
        model, joint, batch_tokens=config.batch_tokens, normalised=config.normalised, must_be_finite=False
    )
    if config.offload:
        model.scorer.to("cpu")
    scores = np.zeros(len(episodes))
    scores[[i for group in groups for i in group]] = np.concatenate(found)
    return scores


def _joined(single: Sequence[Tree], batch_tokens: int) -> tuple[list[list[int]], list[Tree]]:
    """The responses to one prompt as one tree, which has the prompt once, as far as it stays within `batch_tokens`."""
    groups: list[list[int]] = []
    sizes: list[int] = []
    latest: dict[bytes, int] = {}  # by prompt: the group that still grows
    for i, tree in enumerate(single):
        key, more = tree.prompt.tobytes(), len(tree.responses[0])
        place = latest.get(key)
        if place is None or sizes[place] + more > batch_tokens:
            place = latest[key] = len(groups)
            groups.append([])
            sizes.append(len(tree.prompt))
        groups[place].append(i)
        sizes[place] += more
    joint = [
        Tree(
            prompt=single[group[0]].prompt,
            responses=tuple(single[i].responses[0] for i in group),
            scored=tuple(single[i].scored[0] for i in group),
            index=single[group[0]].index,
        )
        for group in groups
    ]
    return groups, joint
