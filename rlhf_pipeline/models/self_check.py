"""Compares a small packed tree with plain forwards at load, and refuses a model that computes something else.

Some models run state or position biases along the row and would silently mix examples. The error is divided by that of
a deliberately wrong mask, so that the threshold does not depend on the scale of the weights. Seen over sixteen seeds and
three scales: right models up to 2e-5 in fp32 and 0.06 in bf16, wrong ones from 0.05 in fp32 and near 1 where state runs
through; families that could slip through are refused by name (tree_model.BY_PLACE).
"""

from __future__ import annotations

import math
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

THRESHOLDS = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1}
SHORT_WINDOW = 4  # makes a window of thousands bite on a row of 46 tokens


@torch.no_grad()
def self_check(model: TreeModel, device: torch.device) -> float:
    """Check `model`, and switch off what it turns out not to support: path attention, the fast head.

    Returns the error ratio. Under ZeRO-3 every rank must call it at the same time.

    Raises:
        UserError: naming the model, when a packed tree and the plain forward disagree.
    """
    was_training = model.training
    threshold = THRESHOLDS[next(model.inner.parameters()).dtype]
    family = model.inner.config.model_type
    model.eval()
    try:
        ratio = _error_ratio(model, device)
        if not ratio < threshold and model.attention is Attention.paths:
            model.use_attention(Attention.dense)  # its layers do not hand the paths on
            ratio = _error_ratio(model, device)
        model.fast_head = model.fast_head and _head_is_plain(model.inner, device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"model: {family} cannot run packed examples ({error}); use another model") from error
    finally:
        model.train(was_training)
    if math.isnan(ratio):
        raise UserError(f"model: what {family} computes is not finite; its weights are damaged")
    if not ratio < threshold:
        raise UserError(
            f"model: {family} does not keep packed examples apart (error ratio {ratio:.2g}, allowed {threshold}): its "
            "attention ignores the mask or depends on the place in the row; use another model"
        )
    return ratio


def _error_ratio(model: TreeModel, device: torch.device) -> float:
    trees = _trees(model.inner.config.get_text_config().vocab_size)
    packed = pack([trees], width_multiple=BLOCK_MULTIPLE if model.attention is Attention.block else 1)
    batch = TreeBatch.of(packed, device)
    fast, model.fast_head = model.fast_head, False
    try:
        with _short_window(model.inner.config):
            right = _plain(model.inner, trees, device)
            wrong = _flat(model.inner, batch)
            error = (model(batch) - right).abs().mean()
    finally:
        model.fast_head = fast
    return float(error / (wrong - right).abs().mean())


def _head_is_plain(inner: Any, device: torch.device) -> bool:
    """Whether the logits are the output matrix times the body's hidden states and nothing more (a soft-cap, a scale)."""
    seen: dict[str, Tensor] = {}

    def remember(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(hidden=inputs[0], logits=output)

    tokens = torch.arange(8, device=device)[None]
    handle = inner.get_output_embeddings().register_forward_hook(remember)
    try:
        logits = inner(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
    hidden = inner.base_model(input_ids=tokens, use_cache=False)[0]
    return torch.equal(seen["logits"], logits) and torch.equal(seen["hidden"], hidden)


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
    logits = inner(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits[0]
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
