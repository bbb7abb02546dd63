"""Bytes of what passes through a model: activations kept for the backward pass, logits, keys and values.

Counted per layer from transformers' code, tensor by tensor, and checked against counts of real forward passes in
tests/unit/plan. Every position of a row is taken to hold a token, and every token to be scored: the most that can be.

T tokens of a micro-batch, w bytes of an element in model.dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_pipeline.config.schema import Attention
from rlhf_pipeline.plan.shape import Shape

CHUNK_ELEMENTS = 2**22  # of functional.logprobs, which imports torch
KEEP_ELEMENTS = 2**24
PREFILL_TOKENS = 4096  # of generation.decode
LONGEST_MATRIX = 1024  # of models.path_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """How a micro-batch lies in memory, and how it goes through the model."""

    row_length: int
    rows: int
    width: int  # w
    attention: Attention  # not auto
    checkpointing: bool

    @property
    def tokens(self) -> int:
        """T."""
        return self.row_length * self.rows


def saved(shape: Shape, rows: Rows) -> float:
    """What a forward pass keeps for its backward one."""
    w, tokens = rows.width, rows.tokens
    layer = w * tokens * shape.hidden if rows.checkpointing else _layer(shape, rows)
    mask = w * rows.row_length * tokens if rows.attention is Attention.dense else 0
    last_norm = tokens * shape.hidden * (4 + w if shape.gated else w)
    return float(shape.layers * layer + last_norm + mask)


def working(shape: Shape, rows: Rows) -> float:
    """What the backward pass of a layer needs beside it: gradients, and with checkpointing the layer computed again."""
    gradients = rows.width * rows.tokens * (2 * shape.intermediate + 2 * shape.hidden)
    return gradients + (_layer(shape, rows) if rows.checkpointing else 0.0)


def _layer(shape: Shape, rows: Rows) -> float:
    """What one layer keeps."""
    w, tokens = rows.width, rows.tokens
    if shape.gated:
        # Two norms: their input in fp32, normalised, times their weight. The gate before and after its activation, what
        # it gates, the product.
        elements = 2 * _norm(shape.hidden, w) + w * 4 * shape.intermediate
        if shape.head_norms:
            elements += (shape.queries + shape.keys) * (4 + w)
    else:
        # Input and output of two norms. GPT-2's GELU is written out: its input, a tanh, two factors, the product.
        elements = w * (4 * shape.hidden + 5 * shape.intermediate)
    return tokens * elements + _attention(shape, rows)


def _norm(hidden: int, w: int) -> int:
    return hidden * (4 + 2 * w)


def _attention(shape: Shape, rows: Rows) -> float:
    """Queries, keys, values, the output; in batches of paths the probabilities, for each path a copy of the output."""
    w, tokens = rows.width, rows.tokens
    batched = rows.attention is Attention.paths and w == 2 and rows.row_length <= LONGEST_MATRIX
    shared = batched or rows.attention is Attention.block  # the others repeat keys and values for every head
    keys = shape.keys if shared else shape.queries
    elements = float(w * tokens * (2 * shape.queries + 2 * keys))
    if batched:
        elements += w * shape.heads * rows.row_length * tokens
    elif rows.attention is Attention.paths:
        elements += w * tokens * shape.queries
    else:
        elements += 4.0 * tokens * shape.heads
    return elements


def passing(shape: Shape, tokens: int, width: int) -> float:
    """The most that is there at a time in a forward pass without gradients."""
    wide = 3 * shape.intermediate if shape.gated else 4 * shape.intermediate
    return float(width * tokens * (2 * shape.hidden + max(wide, 2 * shape.queries + 2 * shape.keys)))


def logits_trained(shape: Shape, tokens: int, width: int, *, head_is_trained: bool, entropy: bool) -> float:
    """Of all T tokens, forward and backward: their states, logits kept or a chunk of them, the head's gradient in fp32."""
    chunk = _chunk(shape, tokens)
    several = 2 if tokens * shape.vocabulary > chunk else 1  # a chunk is made before the one before it is gone
    is_kept = tokens * shape.vocabulary <= KEEP_ELEMENTS
    kept = width * tokens * shape.vocabulary if is_kept else 0
    wide = 4 if width == 4 else 8  # fp32 log-probabilities, of logits that are cast for them
    forward = wide + (0 if is_kept else several * width)
    backward = several * width + (0 if is_kept else width)
    states = tokens * (2 * shape.hidden * width + 4)  # and their gradient
    gradient = (4 + width) * shape.embedding if head_is_trained else 0
    return float(states + kept + chunk * max(forward, backward) + gradient * (2 if entropy else 1))


def logits_passing(shape: Shape, tokens: int, width: int) -> float:
    """The same without gradients."""
    chunk = _chunk(shape, tokens)
    several = 2 if tokens * shape.vocabulary > chunk else 1
    return float(tokens * (shape.hidden * width + 4) + chunk * (several * width + (4 if width == 4 else 8)))


def _chunk(shape: Shape, tokens: int) -> int:
    """Elements of logits that are computed at a time."""
    return min(tokens, max(16, CHUNK_ELEMENTS // shape.vocabulary)) * shape.vocabulary


def cache(shape: Shape, tokens: int, width: int) -> float:
    """Keys and values of `tokens` slots."""
    return 2.0 * shape.layers * shape.keys * tokens * width


def drawing(shape: Shape, rows: int, width: int) -> float:
    """Logits of a row's next token: as they come, in fp32, their probabilities and those added up."""
    return float(rows * shape.vocabulary * (width + 3 * 4))
