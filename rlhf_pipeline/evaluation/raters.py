"""Whatever gives answers a number: reward models, policies by their implicit reward, the lab's judge and labelers.

One model is in memory at a time. `preferences` compares the numbers with what people preferred.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.schema import ReadyModelConfig
from rlhf_pipeline.config.stages import EvaluateConfig
from rlhf_pipeline.data.lab.judge import judge
from rlhf_pipeline.data.lab.labelers import LABELERS, Labeler
from rlhf_pipeline.data.lab_files import PREFIX
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.implicit import log_probabilities, reference_of
from rlhf_pipeline.generation.load import open_renderer
from rlhf_pipeline.generation.progress import Meter
from rlhf_pipeline.models.ready import check_same_words, context_of, open_policy
from rlhf_pipeline.scoring.answers import Answered, Unusable, settle
from rlhf_pipeline.scoring.rewards import Encoded, Tick, encode, encode_rows, open_scorer, score

GOLD = "gold"
ANYONE = "anyone"  # one of the labelers, drawn for each row, as the lab's own rankings are made
KEY = "evaluate"  # of the labelers' noise: another one than that with which they rated the lab's own rankings
_LABELERS = {labeler.name: labeler for labeler in LABELERS}

Rewards = dict[int, np.ndarray]  # float64 [K] by the row's index; rows that cannot be rated are not there


class Sort(StrEnum):
    reward_model = "reward_model"
    policy = "policy"
    lab = "lab"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rater:
    """What a system is, found out before any weights are loaded."""

    name: str
    path: str
    sort: Sort
    reference: str | None = None  # of a policy


def resolve(config: EvaluateConfig) -> list[Rater]:
    """What each system is.

    Raises:
        UserError: naming the system, for what can be refused without its weights: a labeler that the lab does not have, a
            model that is not there or has no chat template, an artifact that rates nothing, a policy without a reference.
    """
    found = []
    for name, path in config.systems.items():
        with naming(f"systems.{name}", path):
            if not path.startswith(PREFIX):
                open_renderer(ReadyModelConfig(path=path), config.tokenizer)
            sort = sort_of(path)
            reference = reference_of(path, config.reference) if sort is Sort.policy else None
        found.append(Rater(name=name, path=path, sort=sort, reference=reference))
    return found


def sort_of(path: str) -> Sort:
    """By the name, the artifact's kind or the model's architecture.

    Raises:
        UserError: for an unknown name of the lab, and for what `artifact.load` refuses.
    """
    if path.startswith(PREFIX):
        known = [GOLD, ANYONE, *_LABELERS]
        if path.removeprefix(PREFIX) not in known:
            raise UserError(f"the lab has no such labeler; there are {', '.join(PREFIX + name for name in known)}")
        return Sort.lab
    if artifact.is_artifact(path):
        kind = artifact.load(path, kind=(Kind.reward_model, Kind.policy)).kind
        return Sort.reward_model if kind is Kind.reward_model else Sort.policy
    from transformers import AutoConfig

    try:
        architectures = AutoConfig.from_pretrained(path).architectures or []
    except (OSError, ValueError):  # whoever opens the model says what is wrong with it
        architectures = []
    is_classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
    return Sort.reward_model if is_classifier else Sort.policy


class Rating:
    """Gives the same rows to one rater after another.

    A row that one of them cannot rate is not given to the next: it is compared for none. Log-probabilities are kept for
    other policies with the same reference.
    """

    def __init__(
        self, config: EvaluateConfig, rows: Sequence[Answered], *, device: str, tell: Callable[[str], None]
    ) -> None:
        self.config = config
        self.rows = rows
        self.device = device
        self.tell = tell
        self._known: dict[tuple[Any, ...], Rewards] = {}  # log-probabilities

    def by(self, rater: Rater) -> Rewards:
        """
        Raises:
            UserError: naming the system, for what the user can put right.
        """
        with naming(f"systems.{rater.name}", rater.path):
            match rater.sort:
                case Sort.lab:
                    return self._by_the_lab(rater.path.removeprefix(PREFIX))
                case Sort.reward_model:
                    return self._by_a_reward_model(rater)
                case Sort.policy:
                    return self._by_a_policy(rater)

    def _by_the_lab(self, name: str) -> Rewards:
        if name == GOLD:
            return {
                row.index: np.array(
                    [
                        judge(row.prompt, response, finished=finished).score
                        for response, finished in zip(row.responses, row.finished, strict=True)
                    ]
                )
                for row in self.rows
            }
        return {
            row.index: np.array(_labeler(name, row).scores(row.prompt, row.responses, KEY), float) for row in self.rows
        }

    def _by_a_reward_model(self, rater: Rater) -> Rewards:
        model = open_scorer(ReadyModelConfig(path=rater.path), self.config.tokenizer, self.device)
        trees = self._trees(rater, encode(model, self.rows, max_length=self.config.data.max_length))
        values = score(model, trees, batch_tokens=self.config.batch_tokens, tick=progress(rater.name, _count(trees)))
        return {tree.index: mine for tree, mine in zip(trees, values, strict=True)}

    def _by_a_policy(self, rater: Rater) -> Rewards:
        assert rater.reference is not None
        renderer = open_renderer(ReadyModelConfig(path=rater.path), self.config.tokenizer)
        if self.config.tokenizer.path is None:  # one that is named is meant for both
            with naming("reference", rater.reference):
                check_same_words(renderer.tokenizer, rater.reference, self.config.tokenizer)
        lengths = [self.config.data.max_length, context_of(rater.path), context_of(rater.reference)]
        limit = min(length for length in lengths if length is not None)
        trees = self._trees(rater, encode_rows(renderer, self.rows, limit=limit))
        same_trees = (renderer.tokenizer_hash, renderer.template_hash, limit)
        ours = self._logprobs(rater.path, renderer.tokenizer, trees, rater.name, same_trees)
        with naming("reference", rater.reference):
            theirs = self._logprobs(rater.reference, renderer.tokenizer, trees, f"{rater.name}'s reference", same_trees)
        return {tree.index: ours[tree.index] - theirs[tree.index] for tree in trees}

    def _logprobs(
        self, path: str, tokenizer: Any, trees: Sequence[Tree], name: str, same_trees: tuple[Any, ...]
    ) -> Rewards:
        """Of the answers of all rows, computed once for each model however many policies share it."""
        key = (path, *same_trees)
        if key not in self._known:
            model = open_policy(ReadyModelConfig(path=path), tokenizer, torch.device(self.device))
            tick = progress(name, _count(trees))
            values = log_probabilities(model, trees, batch_tokens=self.config.batch_tokens, tick=tick)
            self._known[key] = {tree.index: mine for tree, mine in zip(trees, values, strict=True)}
        return self._known[key]

    def _trees(self, rater: Rater, encoded: Sequence[Encoded]) -> list[Tree]:
        """Of the rows that the rater can read; they are the rows from here on.

        Tells which it cannot, or raises UserError, as data.on_bad_row says.
        """
        unreadable = [
            Unusable(index=row.index, origin=row.origin, why=one.why, row=row.row)
            for row, one in zip(self.rows, encoded, strict=True)
            if one.tree is None
        ]
        for note in settle(unreadable, self.config.data):
            self.tell(f"{rater.name}: {note}\nThey are left out for all systems.")
        self.rows = [row for row, one in zip(self.rows, encoded, strict=True) if one.tree is not None]
        trees = [one.tree for one in encoded if one.tree is not None]
        if not trees:
            raise UserError(f"none of the rows of data.path={self.config.data.path} can be rated")
        cut = sum(one.prompt_cut for one in encoded)
        if cut:
            self.tell(
                f"{rater.name}: {cut} of {len(encoded)} prompts lose their beginning, to fit "
                f"data.max_length={self.config.data.max_length} and the model's context together with their longest answer"
            )
        return trees


def _labeler(name: str, row: Answered) -> Labeler:
    """By name; `anyone` is the same one for the same prompt, wherever its row stands."""
    if name != ANYONE:
        return _LABELERS[name]
    asked = "|".join(message.content for message in row.prompt)
    return random.Random(f"{ANYONE}|{KEY}|{asked}").choice(LABELERS)


def _count(trees: Sequence[Tree]) -> int:
    return sum(len(tree.responses) for tree in trees)


def progress(name: str, count: int) -> Tick:
    """Shows on stderr how many of a rater's `count` answers are rated."""
    meter = Meter(count, shown=True)
    meter.message(f"{name}: {count} answers to rate")

    def tick(answers: int, tokens: int) -> None:
        meter.answers += answers
        meter.tick(tokens)

    return tick


@contextmanager
def naming(key: str, path: str) -> Iterator[None]:
    """Says of a user's mistake where it was made: that of another command is about its `model.path`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}={path}: {str(error).removeprefix(f'model.path={path}: ')}") from error
