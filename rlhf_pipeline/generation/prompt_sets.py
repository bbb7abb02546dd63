"""The prompts that `rlhf ppo` learns on, and others that are held out; those of held-out preferences for `rlhf dpo`.

Their tokens lie in the cache, where `rlhf prep` puts them too; messages and other columns, which scorers read, are taken
from the rows again. Which prompts make which iteration is `data.stage.batch_order`'s business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from rlhf_pipeline.config.schema import DataConfig, Rankings
from rlhf_pipeline.config.stages import DpoConfig, PpoConfig
from rlhf_pipeline.data import prepare, stage
from rlhf_pipeline.data.dataset import Progress, Source, records_of
from rlhf_pipeline.data.encode import group_of
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.records import BadRow, Feedback, Message, Opening, Prompt, Ranking, Record
from rlhf_pipeline.data.sources import read_rows
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.prompts import Asked, messages_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts. `asked[i].index` is i, and its tokens are those of `data[i].prompt`."""

    data: TreeDataset  # trees without responses
    asked: list[Asked]
    fingerprint: str  # of all tokens, messages and columns


def prompt_sets(
    config: PpoConfig, renderer: Renderer, *, context: int | None, progress: Progress | None = None
) -> tuple[PromptSet, PromptSet]:
    """(training, held-out) prompts, from sources of their own or one set split by prompt.

    A prompt falls on the side on which it fell in earlier stages with the same seed and `data.heldout_fraction`.
    Answers in the rows are left out. Every rank calls it, before any process group exists.

    Args:
        context: tokens that the policy was built for; None where that is not bounded.

    Raises:
        UserError: see `data.dataset.build`; and when the longest prompt leaves no room for `rollout.max_new_tokens`.
    """
    data, seed = config.data, config.seed
    train, heldout = prepare.train_and_heldout(data, renderer, kind="prompt", seed=seed, progress=progress)
    longest = max(int(train.lengths.max()), int(heldout.lengths.max()))
    _check_room(longest, "rollout.max_new_tokens", config.rollout.max_new_tokens, context)
    return (
        _with_messages(train, data.train, data, renderer, seed=seed),
        _with_messages(heldout, data.train if data.heldout is None else data.heldout, data, renderer, seed=seed),
    )


def heldout_prompts(config: DpoConfig, preferences: TreeDataset, *, context: int | None) -> list[Asked]:
    """The prompts of the held-out preferences, each once, at most `sampled.prompts` of them and these evenly spread.

    `asked[i].index` is i, and its tokens are those of a tree of `preferences`, so that nothing that is learnt from is
    among them. Their answers, and all else that their rows hold, are among the columns.

    Args:
        preferences: the held-out set of `data.stage.data_sets`.
        context: tokens that the policy was built for; None where that is not bounded.

    Raises:
        UserError: when the longest of them leaves no room for `sampled.max_new_tokens`, or none can be answered.
    """
    first = np.sort(np.unique(preferences.groups, return_index=True)[1])
    size = min(config.sampled.prompts, len(first))
    chosen = [int(first[i]) for i in np.linspace(0, len(first) - 1, size).astype(int)]
    wanted = {(preferences.origin(i), int(preferences.groups[i])): i for i in chosen}
    found = dict(_asked(config, preferences, wanted))
    if not found:
        raise UserError(
            f"sampled.prompts={config.sampled.prompts}: none of the held-out prompts waits for an answer; "
            "sampled.prompts=0 does without answers"
        )
    asked = [replace(found[i], index=place) for place, i in enumerate(sorted(found))]
    longest = max(len(one.tokens) for one in asked)
    _check_room(longest, "sampled.max_new_tokens", config.sampled.max_new_tokens, context)
    return asked


def _asked(
    config: DpoConfig, preferences: TreeDataset, wanted: dict[tuple[str, int], int]
) -> Iterator[tuple[int, Asked]]:
    """Those of `wanted`, by where the row comes from and the prompt's group, beside their messages and columns."""
    value = config.data.train if config.data.heldout is None else config.data.heldout
    data = replace(config.data, rankings=Rankings.whole)  # as held-out rankings always are
    kind = stage.KINDS[stage.preferences_of(config)]
    left = dict(wanted)
    for entry in prepare.entries(value, data, kind=kind, seed=config.seed):
        for origin, record, columns in _records(entry.source):
            assert isinstance(record, Ranking | Feedback)
            i = left.pop((origin, group_of(record.prompt)), None)
            if i is not None and _waits(record.prompt):
                tokens = preferences[i].prompt
                yield i, Asked(index=i, origin=origin, messages=record.prompt, columns=columns, tokens=tokens)
            if not left:
                return
    raise UserError(f"{value}: has changed while it was read; start again")


def _waits(prompt: tuple[Message, ...]) -> bool:
    """A ranking may be of ways to go on with the assistant's own message."""
    try:
        Prompt(prompt)
    except BadRow:
        return False
    return True


def _check_room(longest: int, key: str, max_new_tokens: int, context: int | None) -> None:
    if context is not None and longest + max_new_tokens > context:
        room = context - max_new_tokens
        shorten = f"lower data.max_prompt_length to {room}" if room > 0 else "lower it"
        raise UserError(
            f"{key}={max_new_tokens}: the longest prompt has {longest} tokens, and with so many more it "
            f"does not fit the model's context of {context}; {shorten}" + (", or draw fewer" if room > 0 else "")
        )


def _with_messages(found: TreeDataset, value: Any, data: DataConfig, renderer: Renderer, *, seed: int) -> PromptSet:
    """The examples of `found`, whose sources `value` names, beside their rows."""
    every = TreeDataset(
        found.blocks,
        np.arange(sum(map(len, found.blocks))),
        counts=found.counts,
        bad_rows=found.bad_rows,
        fingerprint=found.fingerprint,
    )
    numbers = np.full(len(every), -1)
    numbers[found.rows] = np.arange(len(found))
    asked: dict[int, Asked] = {}
    place = 0  # in `every`, whose examples are in the order of their rows; some rows left none
    for entry in prepare.entries(value, data, kind="prompt", seed=seed):
        for origin, record, columns in _records(entry.source):
            assert isinstance(record, Prompt | Opening)
            if place == len(every) or not _is(record, origin, every, place):
                continue
            number, place = int(numbers[place]), place + 1
            if number >= 0:
                tokens = found[number].prompt
                messages = messages_of(record, tokens, renderer)
                asked[number] = Asked(index=number, origin=origin, messages=messages, columns=columns, tokens=tokens)
    if place != len(every):
        raise UserError(f"{value}: has changed while it was read; start again")
    digest = hashlib.sha256(found.fingerprint.encode())
    in_order = [asked[number] for number in range(len(found))]
    for one in in_order:
        told = [[(m.role, m.content) for m in one.messages], one.columns]
        digest.update(json.dumps(told, sort_keys=True, default=str).encode() + b"\n")
    return PromptSet(data=found, asked=in_order, fingerprint=digest.hexdigest())


def _records(source: Source) -> Iterator[tuple[str, Record, dict[str, Any]]]:
    """(origin, record, columns but the prompt) of every record that a row of the source makes."""
    read, rows = records_of(source, islice(read_rows(source.path, split=source.split), source.max_examples))
    for row in rows:
        try:
            records = read(row)
        except BadRow:  # counted, or refused, when they were tokenised
            continue
        assert not isinstance(row.value, BadRow)
        columns = {name: value for name, value in row.value.items() if name != "prompt"}
        for record in records:
            yield row.origin, record, columns


def _is(record: Prompt | Opening, origin: str, data: TreeDataset, place: int) -> bool:
    """Whether the example was made of this record; of a row, one opening alone."""
    if data.origin(place) != origin:
        return False
    return isinstance(record, Opening) or group_of(record.messages) == int(data.groups[place])
