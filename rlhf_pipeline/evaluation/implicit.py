"""Policies as reward models: log pi(y|x) - log pi_ref(y|x), the reward that a policy is optimal for.

Rafailov et al. 2023, section 5.1, up to beta, which scales it, and a term of the prompt alone: neither changes which of
two answers to a prompt has the higher reward. Log-probabilities are sums over the answer's tokens with its end token,
over packed trees: a prompt is computed once for all its answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.tree_model import TreeBatch, TreeModel
from rlhf_pipeline.scoring.rewards import Tick, micro_batches

_RELATIVE = "a policy's reward is relative to the model that it was trained from"
_NAME_IT = "name that model with reference=..."


def reference_of(path: str, given: str | None) -> str:
    """The model that a policy's reward is relative to: the given one, or the parent that its artifact names.

    Raises:
        UserError: when there is none, or it is no policy; when the parent is not there any more, or another model is in its
            place.
    """
    if given is not None:
        inside = Path(given) / "artifact"
        if _is_missing(given):
            raise UserError(f"reference={given}: there is no such folder")
        if artifact.is_artifact(inside):
            raise UserError(f"reference={given}: no model in this folder; did you mean {inside}?")
        if artifact.is_artifact(given):
            artifact.load(given, kind=Kind.policy)
        return given
    if not artifact.is_artifact(path):
        raise UserError(f"{_RELATIVE}, which only an artifact tells by itself; {_NAME_IT}")
    parents = artifact.load(path, kind=Kind.policy).parents
    parent = parents.get("reference") or parents.get("model")
    if parent is None:
        raise UserError(f"{_RELATIVE}, and this one was trained from scratch; name another model with reference=...")
    if _is_missing(parent.path) or (parent.content_hash is not None and not artifact.is_artifact(parent.path)):
        raise UserError(f"{_RELATIVE}, {parent.path}, which is not there (any more); {_NAME_IT}")
    if parent.content_hash is None:  # a plain folder or a hub id: there is nothing to compare it with
        return parent.path
    if artifact.load(parent.path, kind=Kind.policy).content_hash != parent.content_hash:
        raise UserError(f"{_RELATIVE}, {parent.path}, where another model is now; {_NAME_IT}")
    return parent.path


def _is_missing(path: str) -> bool:
    """Whether it can only be a folder of this disk, and is none."""
    return (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).is_dir()


@torch.no_grad()
def log_probabilities(
    model: TreeModel, trees: Sequence[Tree], *, batch_tokens: int, tick: Tick | None = None
) -> list[np.ndarray]:
    """Of every response the sum over its scored tokens, float64 [K] a tree, in the trees' order.

    Args:
        batch_tokens: tokens in one forward pass, unless a single tree has more.
        tick: told after each pass how many responses and tokens it was for.
    """
    device = next(model.inner.parameters()).device
    found: list[np.ndarray] = [np.zeros(0)] * len(trees)
    for order, packed in micro_batches(trees, batch_tokens=batch_tokens, attention=model.attention):
        logprobs = model(TreeBatch.of(packed, device)).double().cpu().numpy()
        sums = np.bincount(packed.sequence, weights=logprobs, minlength=len(packed.last))
        ends = np.cumsum([len(trees[i].responses) for i in order])
        for i, mine in zip(order, np.split(sums, ends[:-1]), strict=True):
            found[i] = mine
        if tick is not None:
            tick(len(sums), packed.num_tokens)
    return found
