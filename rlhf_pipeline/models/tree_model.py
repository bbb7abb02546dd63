"""Runs any causal model of transformers over packed token trees.

The engine wraps one module: only integers go in, the attention mask is built inside. `TreeModel` returns
log-probabilities, and touches the vocabulary only where a token is scored; `scalar_head` has the one that returns
rewards. Masks are additive and in the model's dtype, because a bool mask is silently wrong under eager attention.

Shapes: B rows, T tokens a row, N scored tokens, R responses, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_pipeline.config.schema import Attention
from rlhf_pipeline.data.packing import PackedTrees, Segment
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.functional.logprobs import linear_entropy, linear_logprobs, token_entropy, token_logprobs
from rlhf_pipeline.models import path_attention
from rlhf_pipeline.models.last_layer import LastLayer

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
BY_PLACE = ("mpt", "gpt_neo", "bloom")  # position biases or windows by place in the row; silently wrong when packed
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
    prompt: Tensor
    rank: Tensor
    score: Tensor
    segments: tuple[Segment, ...]
    read: Tensor  # int64, `source` sorted and without repetition: the states that a policy reads
    numbers: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, packed: PackedTrees, device: torch.device) -> TreeBatch:
        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(one) for name, one in value.items()}
            return torch.from_numpy(value).to(device, non_blocking=True) if isinstance(value, np.ndarray) else value

        given = {name: getattr(packed, name) for name in cls.__dataclass_fields__ if name != "read"}
        return cls(**{name: moved(value) for name, value in given.items()}, read=moved(np.unique(packed.source)))

    def number(self, name: str) -> Tensor:
        """`numbers[name]`, fp32 [N]; all NaN where no tree of the micro-batch has it, empty where there are no trees."""
        if name in self.numbers:
            return self.numbers[name]
        return torch.full(self.source.shape, torch.nan, dtype=torch.float32, device=self.source.device)


class TreeModule(nn.Module):
    """What all wrappers share: the transformers model `inner` and the form of attention it is run in."""

    reads_last = (
        False  # of the last hidden states, those of each response's last token, and not those before scored ones
    )

    def __init__(self, inner: Any) -> None:
        """Starts with a dense mask, which needs nothing of the model; `use_attention` takes a faster form."""
        super().__init__()
        self.inner = inner
        self.attention = Attention.dense
        self.kinds = attention_kinds(inner.config)
        self.last_layer = LastLayer(inner.base_model)

    def hidden(self, batch: TreeBatch) -> Tensor:
        """Last hidden states [B * T, H]; what `reads_last` does not name may hold anything."""
        return self.inner.base_model(**self.inputs(batch))[0].flatten(0, 1)

    def inputs(self, batch: TreeBatch) -> dict[str, Any]:
        """What the transformers model is called with."""
        return {
            "input_ids": batch.tokens,
            "position_ids": batch.positions,
            "use_cache": False,
            **self.attention_inputs(batch),
        }

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, also where this process holds a partition of each, or holds them quantised."""
        return sum(_numel(p) for p in self.parameters())

    @property
    def num_trained(self) -> int:
        """Those among them that are trained: with adapters, the adapters."""
        return sum(_numel(p) for p in self.parameters() if p.requires_grad)

    def use_attention(self, attention: Attention) -> None:
        """Switch to `dense`, `paths` or `block`; whether the model can do it is the self-check's to say."""
        implementations = {Attention.paths: path_attention.NAME, Attention.block: "flex_attention"}
        self.attention = attention
        if attention in implementations:
            path_attention.register()
            self.inner.set_attn_implementation(implementations[attention])
        elif self.inner.config._attn_implementation in implementations.values():
            self.inner.set_attn_implementation("sdpa")

    def attention_inputs(self, batch: TreeBatch) -> dict[str, Any]:
        """What tells the model who attends to whom."""
        if self.attention is Attention.paths:
            # transformers passes a mask of four dimensions on as it is; path_attention does not look at it.
            unused = torch.zeros(1, 1, 1, 1, device=batch.tokens.device)
            return {
                "attention_mask": unused,
                "tree_segments": batch.segments,
                "read_states": batch.last if self.reads_last else batch.read,
            }
        return {"attention_mask": self.mask(batch)}

    def mask(self, batch: TreeBatch) -> Any:
        """The attention mask in the form that the model takes: one for all layers, or one a layer kind."""
        dtype = next(self.inner.parameters()).dtype
        make = _block_mask if self.attention is Attention.block else _additive_mask
        masks = {
            kind: make(batch.tree, batch.branch, batch.positions, dtype=dtype, kind=kind, span=span)
            for kind, span in self.spans().items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def spans(self) -> dict[str, int | None]:
        """How far each kind of layer looks back, read from the config at every call: the self-check changes it."""
        config = self.inner.config.get_text_config()
        size = {
            SLIDING: getattr(config, "sliding_window", None),
            CHUNKED: getattr(config, "attention_chunk_size", None),
        }
        return {kind: size.get(kind) for kind in self.kinds}


class TreeModel(TreeModule):
    """`forward(batch)` gives the log-probability of every scored token, fp32 [N].

    It is that of softmax(logits / `temperature`): what is sampled at a temperature is trained at it. With
    `gives_entropy` it gives the distribution's entropy in nats, fp32 [N], beside it.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        output = inner.get_output_embeddings()
        plain = isinstance(output, nn.Linear) and output.bias is None and inner.base_model is not inner
        self.head = LogProbHead(output) if plain else None
        self.fast_head = plain  # the self-check switches it off where the model's own head does more
        self.temperature = 1.0
        self.gives_entropy = False

    def forward(self, batch: TreeBatch) -> Tensor | tuple[Tensor, Tensor]:
        if self.fast_head and self.head is not None:
            # Scaled before the product: the same logits, for fewer numbers than the words have.
            states = self._cooled(self.hidden(batch)[batch.source])
            return self.head(states, batch.target, self.gives_entropy)
        # Logits of the union of all rows' scored columns: the model's own head takes one index for all rows.
        width = batch.tokens.shape[1]
        columns, place = torch.unique(batch.source % width, return_inverse=True)
        logits = self.inner(**self.inputs(batch), logits_to_keep=columns).logits  # [B, columns, V]
        scored = logits[batch.source // width, place]
        wide = self._cooled(scored if scored.dtype == torch.float64 else scored.float())
        logprobs = token_logprobs(wide, batch.target)
        return (logprobs, token_entropy(wide)) if self.gives_entropy else logprobs

    def _cooled(self, states: Tensor) -> Tensor:
        return states if self.temperature == 1 else states / self.temperature


class LogProbHead(nn.Module):
    """Holds the output embedding as a parameter of its own, so that ZeRO-3 gathers it around this forward."""

    def __init__(self, output: nn.Linear) -> None:
        super().__init__()
        self.weight = output.weight

    def forward(self, hidden: Tensor, target: Tensor, gives_entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        logprobs = linear_logprobs(hidden, self.weight, target)
        return (logprobs, linear_entropy(hidden, self.weight)) if gives_entropy else logprobs


def _numel(parameter: Any) -> int:
    quantised = getattr(parameter, "quant_state", None)  # several elements in a byte; it knows the shape they had
    return int(quantised.shape.numel() if quantised is not None else getattr(parameter, "ds_numel", parameter.numel()))


def attention_kinds(config: Any) -> list[str]:
    """The kinds of attention layers, from the config.

    Raises:
        UserError: for layers whose state or bias runs along the row and so through other branches.
    """
    config = config.get_text_config()
    if config.model_type in BY_PLACE or getattr(config, "alibi", False):
        raise UserError(
            f"model: {config.model_type} takes a token's place in the row for its position, which is another one where "
            "examples are packed; use a model with rotary or learned positions"
        )
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
    return torch.zeros(blocked.shape, dtype=dtype, device=tree.device).masked_fill_(blocked, torch.finfo(dtype).min)[
        :, None
    ]


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
