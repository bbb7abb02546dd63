"""How far a policy is from its reference, along answers of its own: KL divergence and entropy of whole distributions.

By the chain rule KL(policy || reference) of answers is the mean, over answers that the policy draws, of the sum over an
answer's tokens of the KL between both next-token distributions. Each of these is computed over the whole vocabulary, so
that chance is left in which beginnings were drawn, and not in which token came next: the log-ratio of the drawn tokens (k1
of `functional.kl`), Rao-Blackwellised. It has no bias where the answers are drawn from the distribution that is asked
about, at the same temperature and without filters; no answer's is negative, and its variance is far below k1's.

Shapes: N scored tokens, n of them at a time, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline.config.schema import Attention
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.tree_model import TreeBatch, TreeModel
from rlhf_pipeline.scoring.rewards import Tick, micro_batches

CHUNK_ELEMENTS = 2**22  # logits of each model at a time, 512 rows of 8,192 words


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Of the answers to one prompt, float64 [K] each: sums over an answer's tokens, in nats."""

    kl: np.ndarray
    entropy: np.ndarray  # of the policy
    tokens: np.ndarray  # int64 [K], of each answer


def next_token(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) and the entropy of p, p = softmax(logits) and q = softmax(reference), in nats.

    Logits [n, V] and [n, W] with W >= V -> [n] each, in the dtype of `logits`. To words that only q knows p gives nothing.
    """
    log_p = logits.log_softmax(-1)
    log_q = reference.log_softmax(-1)[:, : logits.shape[1]]
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)


@torch.no_grad()
def along(
    policy: TreeModel,
    reference: TreeModel,
    trees: Sequence[Tree],
    *,
    batch_tokens: int,
    temperature: float = 1.0,
    tick: Tick | None = None,
) -> list[Divergence]:
    """Along the scored tokens of each tree's answers, in the trees' order. Both models are on one device.

    Logits are held for `CHUNK_ELEMENTS` at a time, but where a model's own head does more than a product (a soft-cap, a
    bias): there those of a whole micro-batch are.

    Args:
        batch_tokens: tokens in one forward pass, unless a single tree has more.
        temperature: of both distributions, softmax(logits / temperature).
        tick: told after each pass how many answers and tokens it was for.

    Raises:
        UserError: when the policy has words that the reference does not have, or something is not finite.
    """
    _check_widths(policy, reference)
    device = next(policy.inner.parameters()).device
    found: dict[int, Divergence] = {}
    for order, packed in micro_batches(trees, batch_tokens=batch_tokens, attention=_layout(policy, reference)):
        values = _of_tokens(policy, reference, TreeBatch.of(packed, device), temperature)
        if not np.isfinite(values).all():
            raise UserError("what the models compute is not finite; the weights of one are damaged or overflow")
        answers = len(packed.last)
        kl, entropy = (np.bincount(packed.sequence, weights=one, minlength=answers) for one in values)
        tokens = np.bincount(packed.sequence, minlength=answers)
        ends = np.cumsum([len(trees[i].responses) for i in order])[:-1]
        for i, *sums in zip(order, *(np.split(one, ends) for one in (kl, entropy, tokens)), strict=True):
            found[i] = Divergence(kl=sums[0], entropy=sums[1], tokens=sums[2])
        if tick is not None:
            tick(answers, packed.num_tokens)
    return [found[i] for i in range(len(trees))]


def _of_tokens(policy: TreeModel, reference: TreeModel, batch: TreeBatch, temperature: float) -> list[np.ndarray]:
    """KL and entropy of every scored token, float64 [N] each."""
    ours, theirs = _logits(policy, batch), _logits(reference, batch)
    size = max(16, CHUNK_ELEMENTS // _words(reference))
    parts = [
        next_token(ours(some) / temperature, theirs(some) / temperature)
        for some in (slice(start, start + size) for start in range(0, len(batch.source), size))
    ]
    return [torch.cat(one).double().cpu().numpy() for one in zip(*parts, strict=True)]


def _logits(model: TreeModel, batch: TreeBatch) -> Callable[[slice], Tensor]:
    """What gives the logits of some of the scored tokens, in fp32 (fp64 of fp64 weights): [n, V]."""
    if model.fast_head and model.head is not None:
        states, weight = model.hidden(batch)[batch.source], model.head.weight
        return lambda some: _wide(states[some] @ weight.T)
    width = batch.tokens.shape[1]
    columns, place = torch.unique(batch.source % width, return_inverse=True)
    logits = model.inner(**model.inputs(batch), logits_to_keep=columns).logits  # [B, columns, V]
    return lambda some: _wide(logits[batch.source[some] // width, place[some]])


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _layout(policy: TreeModel, reference: TreeModel) -> Attention:
    """How trees are packed so that both can read them: the one with the most conditions decides."""
    forms = {policy.attention, reference.attention}
    return next(form for form in (Attention.block, Attention.dense, Attention.paths) if form in forms)


def _words(model: TreeModel) -> int:
    return int(model.inner.config.get_text_config().vocab_size)


def _check_widths(policy: TreeModel, reference: TreeModel) -> None:
    if _words(policy) > _words(reference):
        raise UserError(
            f"the policy has {_words(policy)} words and its reference {_words(reference)}: where the policy may say what "
            "the reference cannot, the KL divergence has no end; name the model that the policy was trained from"
        )
