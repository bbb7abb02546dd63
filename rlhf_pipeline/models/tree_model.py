"""Runs any causal language model of transformers over packed token trees.

The engine wraps this one module, whose forward returns log-probabilities: only integers go in, the attention mask is
built inside, the vocabulary is touched only where a token is scored. Masks are additive and in the model's dtype,
because a bool mask is silently wrong under eager attention.

Shapes: B rows, T tokens a row, N scored tokens, R responses, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.functional.logprobs import linear_logprobs, token_logprobs

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
BLOCK_MULTIPLE = 128  # rows of a block mask are a multiple of its blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeBatch:
    """`PackedTrees` as tensors on the model's device; see there for the meaning of each."""

    tokens: Tensor
    positions: Tensor
    tree: Tensor
    branch: Tensor
    source: Tensor
    target: Tensor
    sequence: Tensor
    last: Tensor
    group: Tensor

    @classmethod
    def of(cls, packed: PackedTrees, device: torch.device) -> TreeBatch:
        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return cls(**{name: tensor(getattr(packed, name)) for name in cls.__dataclass_fields__})


class TreeModel(nn.Module):
    """`forward(batch)` gives the log-probability of every scored token, fp32 [N]."""

    def __init__(self, inner: Any, *, block_mask: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.block_mask = block_mask
        self.kinds = attention_kinds(inner.config)
        output = inner.get_output_embeddings()
        plain = isinstance(output, nn.Linear) and output.bias is None and inner.base_model is not inner
        self.head = LogProbHead(output) if plain else None
        self.fast_head = plain  # the self-check switches it off where the model's own head does more

    def forward(self, batch: TreeBatch) -> Tensor:
        inputs: dict[str, Any] = {
            "input_ids": batch.tokens,
            "position_ids": batch.positions,
            "attention_mask": self.mask(batch),
            "use_cache": False,
        }
        if self.fast_head and self.head is not None:
            hidden = self.inner.base_model(**inputs)[0]  # [B, T, H]
            return self.head(hidden.flatten(0, 1)[batch.source], batch.target)
        # The whole row's logits would be [B, T, V]; a row at a time keeps [scored tokens of the row, V].
        width = batch.tokens.shape[1]
        rows = batch.source // width
        parts = []
        for r in range(len(batch.tokens)):
            here = rows == r
            row = {name: value[r : r + 1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
            row["attention_mask"] = self.mask(batch, row=r)
            logits = self.inner(**row, logits_to_keep=batch.source[here] % width).logits[0]
            parts.append(token_logprobs(logits, batch.target[here]))
        # Scored tokens are laid out row by row, so that the parts are in order.
        return torch.cat(parts)

    def mask(self, batch: TreeBatch, row: int | None = None) -> Any:
        """The attention mask in the form that the model takes: one for all layers, or one a layer kind."""
        rows = slice(None) if row is None else slice(row, row + 1)
        tree, branch, positions = batch.tree[rows], batch.branch[rows], batch.positions[rows]
        dtype = next(self.inner.parameters()).dtype
        make = _block_mask if self.block_mask else _additive_mask
        masks = {
            kind: make(tree, branch, positions, dtype=dtype, kind=kind, span=span)
            for kind, span in self.spans().items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def spans(self) -> dict[str, int | None]:
        """How far each kind of layer looks back, read from the config at every call: the self-check changes it."""
        config = self.inner.config.get_text_config()
        size = {SLIDING: getattr(config, "sliding_window", None), CHUNKED: getattr(config, "attention_chunk_size", None)}
        return {kind: size.get(kind) for kind in self.kinds}


class LogProbHead(nn.Module):
    """Holds the output embedding as a parameter of its own, so that ZeRO-3 gathers it around this forward."""

    def __init__(self, output: nn.Linear) -> None:
        super().__init__()
        self.weight = output.weight

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return linear_logprobs(hidden, self.weight, target)


def attention_kinds(config: Any) -> list[str]:
    """The kinds of attention layers, from the config.

    Raises:
        UserError: for layers whose state or bias runs along the row and so through other branches.
    """
    config = config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    other = [kind for kind in kinds if kind not in (FULL, SLIDING, CHUNKED)]
    if other:
        raise UserError(
            f"model: {config.model_type} has layers of kind {', '.join(other)}, which carry state along the row and "
            "would mix packed examples; use a model whose layers are attention"
        )
    if kinds:
        return kinds
    return [SLIDING] if getattr(config, "sliding_window", None) else [FULL]


def allowed(tree: Tensor, branch: Tensor, positions: Tensor, *, kind: str = FULL, span: int | None = None) -> Tensor:
    """Who attends to whom, bool [B, T, T] (query, key): causal, same tree, and the key is prompt or of the same branch.

    Positions along a path are consecutive, so a window of `span` is a bound on their difference.
    """
    width = tree.shape[1]
    order = torch.arange(width, device=tree.device)
    same_tree = tree[:, :, None] == tree[:, None, :]
    on_path = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    result = same_tree & on_path & (order[:, None] >= order[None, :])
    if kind == SLIDING and span is not None:
        result &= positions[:, :, None] - positions[:, None, :] < span
    elif kind == CHUNKED and span is not None:
        result &= positions[:, :, None] // span == positions[:, None, :] // span
    return result


def _additive_mask(
    tree: Tensor, branch: Tensor, positions: Tensor, *, dtype: torch.dtype, kind: str, span: int | None
) -> Tensor:
    """[B, 1, T, T]: 0 where a query may attend, the dtype's lowest value elsewhere."""
    blocked = ~allowed(tree, branch, positions, kind=kind, span=span)
    return torch.zeros(blocked.shape, dtype=dtype, device=tree.device).masked_fill_(
        blocked, torch.finfo(dtype).min
    )[:, None]


def _block_mask(
    tree: Tensor, branch: Tensor, positions: Tensor, *, dtype: torch.dtype, kind: str, span: int | None
) -> Any:
    """The same as a flex-attention BlockMask: blocks in which nobody attends are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ok = (tree[b, q] == tree[b, k]) & (q >= k) & ((branch[b, k] == 0) | (branch[b, q] == branch[b, k]))
        if kind == SLIDING and span is not None:
            ok = ok & (positions[b, q] - positions[b, k] < span)
        elif kind == CHUNKED and span is not None:
            ok = ok & (positions[b, q] // span == positions[b, k] // span)
        return ok

    rows, width = tree.shape
    return create_block_mask(rule, rows, None, width, width, device=str(tree.device))
