"""Turns the `data` and `mix` sections of a config into tokenised data sets, once a machine and before any process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock

from rlhf_pipeline.config.schema import DataConfig, MixConfig
from rlhf_pipeline.data import demo
from rlhf_pipeline.data.dataset import Source, build, split_heldout
from rlhf_pipeline.data.encode import Lengths
from rlhf_pipeline.data.formats import Kind
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.store import TreeDataset


def train_and_heldout(
    data: DataConfig, renderer: Renderer, *, kind: Kind, seed: int
) -> tuple[TreeDataset, TreeDataset]:
    """The training and the held-out trees: from two sources, or one split by prompt.

    Raises:
        UserError: see `data.dataset.build`.
    """
    options: dict[str, Any] = {
        "kind": kind,
        "format": data.format,
        "split": data.split,
        "max_examples": data.max_examples,
        "on_bad_row": data.on_bad_row.value,
    }
    train = _build(Source(path=_paths(data.train, data), **options), data, renderer)
    if data.heldout is not None:
        return train, _build(Source(path=_paths(data.heldout, data), **options), data, renderer)
    return split_heldout(train, data.heldout_fraction, seed)


def mixed_in(mix: MixConfig, data: DataConfig, renderer: Renderer) -> TreeDataset:
    """The pretraining text to mix in, cut into pieces as long as the longest example."""
    source = Source(
        path=_paths(mix.train, data),
        kind="text",
        format=mix.format,
        split=mix.split,
        on_bad_row=data.on_bad_row.value,
    )
    return _build(source, data, renderer)


def _paths(source: Any, data: DataConfig) -> list[str]:
    return demo.local_paths(source, Path(data.cache_dir))


def _build(source: Source, data: DataConfig, renderer: Renderer) -> TreeDataset:
    cache_dir = Path(data.cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    lengths = Lengths(
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        long_prompt=data.long_prompt.value,
        long_response=data.long_response.value,
    )
    # The ranks of a machine come one after the other: the first tokenises, the others find it done.
    with FileLock(cache_dir / ".lock"):
        return build(source, renderer, lengths, cache_dir=cache_dir, loss=data.loss.value)
