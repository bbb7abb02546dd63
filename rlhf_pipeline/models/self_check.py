"""Compares a small packed tree with plain forwards at load, and refuses a model that computes something else.

Of a language model the log-probabilities are compared, of a reward model the hidden states that its head could read.

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
from rlhf_pipeline.models.tree_model import BLOCK_MULTIPLE, TreeBatch, TreeModel, TreeModule

THRESHOLDS = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1}
SHORT_WINDOW = 4  # makes a window of thousands bite on a row of 46 tokens


@torch.no_grad()
def self_check(model: TreeModule, device: torch.device) -> float:
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
        if isinstance(model, TreeModel):
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


def _error_ratio(model: TreeModule, device: torch.device) -> float:
    trees = _trees(model.inner.config.get_text_config().vocab_size)
    packed = pack([trees], width_multiple=BLOCK_MULTIPLE if model.attention is Attention.block else 1)
    batch = TreeBatch.of(packed, device)
    with _short_window(model.inner.config):
        right = _plain(model, trees, device)
        inputs = {"input_ids": batch.tokens, "position_ids": batch.positions}
        wrong = _values(model, inputs, _read(model, batch), batch.target)
        error = (_packed(model, batch) - right).abs().mean()
    return float(error / (wrong - right).abs().mean())


def _packed(model: TreeModule, batch: TreeBatch) -> Tensor:
    """What is to be checked: the log-probabilities by the model's own head, or the hidden states."""
    if not isinstance(model, TreeModel):
        return model.hidden(batch)[_read(model, batch)]
    before = model.fast_head, model.temperature, model.gives_entropy
    model.fast_head, model.temperature, model.gives_entropy = False, 1.0, False
    try:
        return model(batch)
    finally:
        model.fast_head, model.temperature, model.gives_entropy = before


def _read(model: TreeModule, batch: TreeBatch) -> Tensor:
    """Flat positions whose hidden states are compared."""
    return batch.last if model.reads_last else batch.source


def _head_is_plain(inner: Any, device: torch.device) -> bool:
    """Whether the logits are the output matrix times the body's hidden states and nothing more (a soft-cap, a scale)."""
    seen: dict[str, Tensor] = {}

    def remember(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(hidden=inputs[0], logits=output)

    tokens = torch.arange(8, device=device)[None] % inner.config.get_text_config().vocab_size
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


def _plain(model: TreeModule, trees: list[Tree], device: torch.device) -> Tensor:
    """The same by one unpacked forward for each response."""
    parts = []
    for tree in trees:
        for k in range(len(tree.responses)):
            path = torch.from_numpy(tree.path(k).astype(np.int64)).to(device)
            first, end = (len(path) - 1, len(path)) if model.reads_last else (len(tree.prompt) - 1, len(path) - 1)
            source = torch.arange(first, end, device=device)
            target = path[(source + 1) % len(path)]
            parts.append(_values(model, {"input_ids": path[None]}, source, target))
    return torch.cat(parts)


def _values(model: TreeModule, inputs: dict[str, Any], source: Tensor, target: Tensor) -> Tensor:
    """By transformers alone. With a whole row for inputs this is the deliberately wrong way: as if nothing were packed."""
    if isinstance(model, TreeModel):
        return token_logprobs(model.inner(**inputs, use_cache=False).logits.flatten(0, 1)[source], target)
    return model.inner.base_model(**inputs, use_cache=False)[0].flatten(0, 1)[source]


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
