"""Turns the `data` and `mix` sections of a config into tokenised data sets, once a machine and before any process group."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from rlhf_pipeline import runtime
from rlhf_pipeline.config.ppo import PtxConfig
from rlhf_pipeline.config.ranking import NormaliseConfig
from rlhf_pipeline.config.schema import DataConfig, LongPrompt, LongResponse, LossOn, MixConfig, OnBadRow, Rankings
from rlhf_pipeline.data import hub, lab_files
from rlhf_pipeline.data.contents import overlap
from rlhf_pipeline.data.dataset import Progress, Source, build, split_heldout
from rlhf_pipeline.data.encode import Lengths
from rlhf_pipeline.data.formats import Kind
from rlhf_pipeline.data.order import Part, epoch_size
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.sources import is_on_hub
from rlhf_pipeline.data.store import Share, TreeDataset, concatenate
from rlhf_pipeline.data.workers import default_workers
from rlhf_pipeline.errors import UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of `data.train` or the like, as it was named, its rows on this disk."""

    name: str
    source: Source
    weight: float = 1.0


def train_and_heldout(
    data: DataConfig, renderer: Renderer, *, kind: Kind, seed: int, progress: Progress | None = None
) -> tuple[TreeDataset, TreeDataset]:
    """The training and the held-out trees: from sources of their own, or one set split by prompt.

    Held-out prompts that are also trained on are warned of. Held-out rankings are always whole: figures on them can be
    compared, whether each comparison is an example of its own in training or not.

    Raises:
        UserError: see `data_set`.
    """
    train = data_set(data.train, data, renderer, kind=kind, seed=seed, progress=progress)
    if data.heldout is None and kind == "ranking" and data.rankings is Rankings.pairs:
        whole = data_set(data.train, _whole(data), renderer, kind=kind, seed=seed, progress=progress)
        _, heldout = split_heldout(whole, data.heldout_fraction, seed)
        return train.select(np.flatnonzero(~np.isin(train.groups, heldout.groups))), heldout
    if data.heldout is None:
        return split_heldout(train, data.heldout_fraction, seed)
    heldout = held_out(data, renderer, kind=kind, seed=seed, progress=progress)
    found = overlap(train, heldout)
    if found.prompts and runtime.is_main():
        _log.warning("data.heldout is no test of what was learned: %s", found)
    return train, heldout


def held_out(
    data: DataConfig, renderer: Renderer, *, kind: Kind, seed: int, progress: Progress | None = None
) -> TreeDataset:
    """The trees of `data.heldout`, each of which is looked at once."""
    _refuse_weights("data.heldout", data.heldout)
    return data_set(data.heldout, _whole(data), renderer, kind=kind, seed=seed, progress=progress)


def mixed_in(mix: MixConfig, data: DataConfig, renderer: Renderer, *, progress: Progress | None = None) -> TreeDataset:
    """The pretraining text to mix in, cut into pieces as long as the longest example."""
    _refuse_weights("mix.train", mix.train)
    return data_set(mix.train, _of_its_own(data, mix), renderer, kind="text", seed=0, progress=progress)


def pretraining_of(
    ptx: PtxConfig, data: DataConfig, renderer: Renderer, *, progress: Progress | None = None
) -> TreeDataset:
    """The text of PPO's pretraining mix, cut into pieces of `ptx.max_length` tokens."""
    _refuse_weights("ptx.train", ptx.train)
    length = ptx.max_length or data.max_length
    given = dataclasses.replace(_of_its_own(data, ptx), max_length=length, max_prompt_length=1)
    return data_set(ptx.train, given, renderer, kind="text", seed=0, progress=progress)


def to_normalise(
    normalise: NormaliseConfig, data: DataConfig, renderer: Renderer, *, progress: Progress | None = None
) -> TreeDataset:
    """At most `normalise.examples` demonstrations: of `normalise.train`, or the preferred answers of `data.train`.

    As many rows of each source are read, from its start, and evenly spread examples taken where they make more. Where
    `data.train` is read again, rows that are bad or too long are left out: they have been told of before.
    """
    data = dataclasses.replace(data, loss=LossOn.responses, templates=None)
    if normalise.train is None:
        value, given = data.train, dropping(dataclasses.replace(data, on_bad_row=OnBadRow.skip))
    else:
        _refuse_weights("normalise.train", normalise.train)
        value, given = normalise.train, _of_its_own(data, normalise)
    limit = normalise.examples
    found = data_set(value, given, renderer, kind="demonstration", seed=0, limit=limit, progress=progress)
    return found.select(np.linspace(0, len(found) - 1, limit).astype(int)) if len(found) > limit else found


def dropping(data: DataConfig) -> DataConfig:
    """What is too long and would end it all is dropped, and so counted."""
    prompt, response = data.long_prompt, data.long_response
    return dataclasses.replace(
        data,
        long_prompt=LongPrompt.drop if prompt is LongPrompt.error else prompt,
        long_response=LongResponse.drop if response is LongResponse.error else response,
    )


def data_set(
    value: Any,
    data: DataConfig,
    renderer: Renderer,
    *,
    kind: Kind,
    seed: int,
    limit: int | None = None,
    progress: Progress | None = None,
) -> TreeDataset:
    """The examples of every entry of `value` (`data.train` or the like), one source after the other.

    With a `limit`, those of so many rows from the start of each, whatever its weight.

    Raises:
        UserError: see `data.dataset.build`; and for a weight that leaves nothing of its source.
    """
    found = entries(value, data, kind=kind, seed=seed, progress=progress)
    if limit is not None:
        found = [_first_rows(entry, limit) for entry in found]
    lengths = Lengths(
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        long_prompt=data.long_prompt.value,
        long_response=data.long_response.value,
    )
    cache_dir = Path(data.cache_dir)
    workers = data.workers or default_workers()
    # The ranks of a machine come one after the other: the first tokenises, the others find it done.
    with FileLock(cache_dir / ".lock"):
        built = [
            build(
                entry.source,
                renderer,
                lengths,
                cache_dir=cache_dir,
                loss=data.loss.value,
                workers=workers,
                progress=progress,
            )
            for entry in found
        ]
    for entry, one in zip(found, built, strict=True):
        if not epoch_size(Part(len(one), entry.weight), epoch=0):
            raise UserError(f"{entry.name}: of its {len(one)} examples a weight of {entry.weight} leaves none an epoch")
    shares = [
        Share(name=entry.name, weight=entry.weight, counts=one.counts) for entry, one in zip(found, built, strict=True)
    ]
    return concatenate(built, shares)


def entries(value: Any, data: DataConfig, *, kind: Kind, seed: int, progress: Progress | None = None) -> list[Entry]:
    """The sources that `value` names; what is not on this disk is written to the cache first.

    Raises:
        UserError: for what does not exist or cannot be fetched.
    """
    found = []
    for told in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        entry: dict[str, Any] = {"path": told} if isinstance(told, str) else dict(told)
        split = entry.get("split", data.split)
        named = "format" in entry or "columns" in entry
        source = Source(
            path=_local(entry["path"], split, data, progress),
            kind=kind,
            format=entry.get("format", data.format),
            columns=entry.get("columns", data.columns),
            templates=None if named else data.templates,
            seed=seed,
            split=split,
            max_examples=data.max_examples,
            on_bad_row=data.on_bad_row.value,
            rankings=data.rankings.value,
        )
        found.append(Entry(name=entry["path"], source=source, weight=entry.get("weight", 1)))
    return found


def _local(path: str, split: str, data: DataConfig, progress: Progress | None) -> str | list[str]:
    """What `sources.read_rows` is to read."""
    cache_dir = Path(data.cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / ".lock"):
        if path.startswith(lab_files.PREFIX):
            return str(lab_files.local_path(path, data.lab, cache_dir))
        if data.streaming and is_on_hub(path, split):
            assert data.max_examples is not None, "the config check lets no streaming pass without"
            return hub.first_rows(path, split=split, count=data.max_examples, cache_dir=cache_dir, progress=progress)
    return path


def _whole(data: DataConfig) -> DataConfig:
    return dataclasses.replace(data, rankings=Rankings.whole)


def _of_its_own(data: DataConfig, source: MixConfig | NormaliseConfig | PtxConfig) -> DataConfig:
    """For a source beside `data.train`, which what is said of the rows of that one does not describe."""
    return dataclasses.replace(
        data,
        format=source.format,
        split=source.split,
        columns=None,
        templates=None,
        streaming=False,
        max_examples=None,
    )


def _first_rows(entry: Entry, limit: int) -> Entry:
    rows = min(limit, entry.source.max_examples or limit)
    return dataclasses.replace(entry, source=dataclasses.replace(entry.source, max_examples=rows), weight=1.0)


def _refuse_weights(key: str, value: Any) -> None:
    for entry in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        if not isinstance(entry, str) and entry.get("weight", 1) != 1:
            raise UserError(f"{key}: the weight of {entry['path']} has no meaning here; every example counts once")
