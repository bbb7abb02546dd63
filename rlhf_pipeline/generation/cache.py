"""Keys and values of a batch that is decoded: in memory reserved at once, or (any family) in transformers' own cache.

In slots, prompts stand to the left and are padded on their right. Causal attention never sees what comes later, so the
prompts of unequal length need no mask; what is drawn goes into the slots behind the longest prompt, and from then on
each row hides the padding between. In transformers' own cache all rows are equally long, which is right for any family.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.tree_model import CHUNKED, FULL, SLIDING, attention_kinds

HIDDEN = torch.iinfo(torch.int64).max // 2  # as the position of a key: later than any query


@dataclass(slots=True)
class Room:
    """What all layers of a cache reserve, and the rows that a forward pass is for."""

    rows: int
    slots: int
    window: slice = field(default_factory=lambda: slice(None))


class SlotLayer(DynamicLayer):
    """Keys and values of one layer: [B, heads, slots, D], of which the first `used` slots are filled."""

    def __init__(self, room: Room) -> None:
        super().__init__()
        self.room, self.used = room, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.used + key_states.shape[-2]
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = (self._first(states, end) for states in (key_states, value_states))
            self.is_initialized = True
        assert self.keys is not None and self.values is not None
        if end > self.keys.shape[2]:
            self.room.slots = max(end, self.room.slots, 2 * self.keys.shape[2])
            self.keys, self.values = (self._moved(old, None) for old in (self.keys, self.values))
        keys, values = self.keys[self.room.window], self.values[self.room.window]
        keys[:, :, self.used : end] = key_states
        values[:, :, self.used : end] = value_states
        self.used = end
        return keys[:, :, :end], values[:, :, :end]

    def select(self, rows: Tensor, moved: Tensor) -> None:
        """Keep these rows, in this order; a row may be there several times. `moved`: places that another row comes to."""
        if not self.is_initialized:
            return
        assert self.keys is not None and self.values is not None
        if len(rows) > len(self.keys):
            self.keys, self.values = (self._moved(old, rows) for old in (self.keys, self.values))
            return
        for filled in (self.keys[:, :, : self.used], self.values[:, :, : self.used]):
            filled[moved] = filled[rows[moved]]  # in place: to copy all of them costs as much as a forward pass
        self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]

    def _first(self, states: Tensor, end: int) -> Tensor:
        _, heads, _, width = states.shape
        # Zeros, for what a mask hides is multiplied by nothing, and nothing times a nan is a nan.
        return states.new_zeros(self.room.rows, heads, max(self.room.slots, end), width)

    def _moved(self, old: Any, rows: Tensor | None) -> Tensor:
        filled = old[:, :, : self.used]
        filled = filled if rows is None else filled.index_select(0, rows)
        new = filled.new_zeros(*filled.shape[:2], self.room.slots, filled.shape[3])
        new[:, :, : self.used] = filled
        return new

    def get_seq_length(self) -> int:
        return self.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0


class SlotCache(Cache):
    """Room for `slots` tokens in each of `rows` rows; it grows where more tokens come."""

    def __init__(self, rows: int, slots: int) -> None:
        self.room = Room(rows, slots)
        make: Any = partial(SlotLayer, self.room)  # what transformers calls for each layer that it meets
        super().__init__(layer_class_to_replicate=make)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be there several times."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for layer in self._own:
            layer.select(rows, moved)

    def fill(self, rows: slice) -> None:
        """The next forward passes are for these rows, from their first slot on."""
        self.room.window = rows
        self.cut(0)

    def filled(self, used: int) -> None:
        """Forward passes are for all rows again, behind their first `used` slots."""
        self.room.window = slice(None)
        for layer in self._own:
            layer.used = used

    def cut(self, used: int) -> None:
        """Forget every token from the `used`-th on."""
        for layer in self._own:
            layer.used = min(layer.used, used)

    @property
    def _own(self) -> list[SlotLayer]:
        return cast(list[SlotLayer], self.layers)


class Family:
    """How a model is called with a cache."""

    def __init__(self, model: Any) -> None:
        """
        Raises:
            UserError: when the model keeps no cache.
        """
        self.config = model.config.get_text_config()
        self.takes = set(inspect.signature(model.forward).parameters)
        self.kinds = _kinds(self.config)
        self.slots = bool(self.kinds) and {"position_ids", "past_key_values"} <= self.takes
        self.cache_name = next((name for name in ("past_key_values", "cache_params") if name in self.takes), "")
        if not self.cache_name or model.config.is_encoder_decoder:
            raise UserError(
                f"model: {self.config.model_type} cannot be sampled from token by token; use a causal language model "
                "that transformers can cache"
            )

    @property
    def context(self) -> int | None:
        """Tokens of a prompt and its answer that the model was built for; None where that is not bounded."""
        return getattr(self.config, "max_position_embeddings", None)

    def cache(self, rows: int, slots: int) -> Any:
        return SlotCache(rows, slots) if self.slots else DynamicCache(config=self.config)

    def select(self, cache: Any, rows: Tensor) -> None:
        """Keep these rows of the cache, in this order; a row may be there several times."""
        (cache.select if self.slots else cache.reorder_cache)(rows)

    def inputs(self, tokens: Tensor, positions: Tensor, cache: Cache, mask: Any = None) -> dict[str, Any]:
        """Arguments of a forward pass over `tokens` [B, T] at `positions` [B, T], which the cache then holds as well."""
        found: dict[str, Any] = {"input_ids": tokens, self.cache_name: cache, "use_cache": True}
        if "position_ids" in self.takes:
            found["position_ids"] = positions
        if "logits_to_keep" in self.takes:
            found["logits_to_keep"] = 1
        if mask is not None:
            found["attention_mask"] = mask
        return found

    def mask(self, keys: Tensor, query: Tensor, dtype: torch.dtype) -> Any:
        """Who sees whom, for one query a row: additive [B, 1, 1, S], or one for each kind of layer.

        Args:
            keys: position of the key in every slot [B, S]; HIDDEN where there is none.
            query: position of the query [B, 1].
        """
        masks = {}
        for kind in self.kinds:
            seen = keys <= query
            span = {
                SLIDING: getattr(self.config, "sliding_window", None),
                CHUNKED: getattr(self.config, "attention_chunk_size", None),
            }.get(kind)
            if kind == SLIDING and span is not None:
                seen &= query - keys < span
            elif kind == CHUNKED and span is not None:
                seen &= query // span == keys // span
            blocked = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            masks[kind] = blocked.masked_fill_(~seen, torch.finfo(dtype).min)[:, None, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @property
    def same_mask(self) -> bool:
        """Whether a key that is seen once is seen by all later queries."""
        return self.kinds == [FULL]


def _kinds(config: Any) -> list[str]:
    """Kinds of attention layers; none for a family that needs transformers' own cache and rows of one length."""
    if getattr(config, "num_kv_shared_layers", 0):
        return []
    try:
        return attention_kinds(config)
    except UserError:
        return []
