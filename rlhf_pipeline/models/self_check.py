"""Compares a small packed tree with plain forwards at load, and refuses a model that computes something else.

Some models run state or position biases along the row and would silently mix examples. The error is divided by that of
a deliberately wrong mask, so that the threshold depends neither on the scale of the weights nor on the dtype: models
that are right stay below 0.02, wrong ones above 0.2 (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline.config.schema import Attention
from rlhf_pipeline.data.packing import pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.functional.logprobs import token_logprobs
from rlhf_pipeline.models.tree_model import BLOCK_MULTIPLE, TreeBatch, TreeModel

THRESHOLD = 0.05
SHORT_WINDOW = 4  # makes a window of thousands bite on a row of 46 tokens


@torch.no_grad()
def self_check(model: TreeModel, device: torch.device) -> float:
    """Check `model`, and switch off what it turns out not to support: path attention, the fast head.

    Returns the error ratio. Under ZeRO-3 every rank must call it at the same time.

    Raises:
        UserError: naming the model, when a packed tree and the plain forward disagree.
    """
    was_training = model.training
    model.eval()
    try:
        ratio = _error_ratio(model, device)
        if not ratio < THRESHOLD and model.attention is Attention.paths:
            model.use_attention(Attention.dense)  # its layers do not hand the paths on
            ratio = _error_ratio(model, device)
    finally:
        model.train(was_training)
    if not ratio < THRESHOLD:
        raise UserError(
            f"model: {model.inner.config.model_type} does not keep packed examples apart (error ratio {ratio:.2f}, "
            f"allowed {THRESHOLD}): its attention ignores the mask or depends on the place in the row; use another model"
        )
    return ratio


def _error_ratio(model: TreeModel, device: torch.device) -> float:
    trees = _trees(model.inner.config.get_text_config().vocab_size)
    packed = pack([trees], width_multiple=BLOCK_MULTIPLE if model.attention is Attention.block else 1)
    batch = TreeBatch.of(packed, device)
    with _short_window(model.inner.config):
        right = _plain(model.inner, trees, device)
        wrong = _flat(model.inner, batch)
        fast = model.fast_head
        model.fast_head = False
        slow_head = model(batch)
        if fast:
            model.fast_head = True
            head_error = float((model(batch) - slow_head).abs().mean())
            model.fast_head = head_error <= 1e-3 * float(slow_head.abs().mean())
    return float((slow_head - right).abs().mean() / (wrong - right).abs().mean())


def _trees(vocabulary: int) -> list[Tree]:
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, vocabulary, count).astype(np.int32)

    shapes = [(7, (5, 3, 9)), (12, (4, 6))]
    return [
        Tree(
            prompt=tokens(prompt),
            responses=tuple(tokens(n) for n in branches),
            scored=tuple(np.ones(n, bool) for n in branches),
            index=i,
        )
        for i, (prompt, branches) in enumerate(shapes)
    ]


def _plain(inner: Any, trees: list[Tree], device: torch.device) -> Tensor:
    """Log-probabilities of all responses by one unpacked forward each."""
    parts = []
    for tree in trees:
        for response in tree.responses:
            path = torch.from_numpy(np.concatenate([tree.prompt, response]).astype(np.int64)).to(device)
            logits = inner(input_ids=path[None], use_cache=False).logits[0]
            start = len(tree.prompt)
            parts.append(token_logprobs(logits[start - 1 : -1], path[start:]))
    return torch.cat(parts)


def _flat(inner: Any, batch: TreeBatch) -> Tensor:
    """The deliberately wrong way: one causal row, as if nothing had been packed."""
    logits = inner(input_ids=batch.tokens, use_cache=False).logits[0]
    return token_logprobs(logits[batch.source], batch.target)


@contextmanager
def _short_window(config: Any) -> Iterator[None]:
    text = config.get_text_config()
    names = [n for n in ("sliding_window", "attention_chunk_size") if getattr(text, n, None) is not None]
    before = {name: getattr(text, name) for name in names}
    try:
        for name in names:
            setattr(text, name, SHORT_WINDOW)
        yield
    finally:
        for name, value in before.items():
            setattr(text, name, value)
