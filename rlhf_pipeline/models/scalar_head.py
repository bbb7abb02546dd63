"""A scalar for every response of packed token trees (the reward model), or for every token (the value model).

`inner` is one of transformers' sequence classifiers with one label: a causal body and a bias-free linear head `score`,
read at each response's last token, or before each scored one; these places come with the batch and are not searched for.

Shapes: N scored tokens, R responses, H hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.tree_model import TreeBatch, TreeModule


class TreeScalar(TreeModule):
    """A body under a scalar head; where it is read is what tells the two below apart."""

    def __init__(self, inner: Any) -> None:
        """
        Raises:
            UserError: see `head_of`.
        """
        super().__init__(inner)
        self.head: ScalarHead = ScalarHead(head_of(inner))


class TreeScorer(TreeScalar):
    """`forward(batch)` gives the reward of every response, fp32 [R] (fp64 for fp64 weights), not normalised."""

    reads_last = True

    def forward(self, batch: TreeBatch) -> Tensor:
        return self.head(self.hidden(batch)[batch.last])


class TreeCritic(TreeScalar):
    """`forward(batch)` gives the value of the state that each scored token was chosen in, fp32 [N] (fp64 for fp64 weights).

    It is read at the token before, of the first one at the prompt's end.
    """

    def forward(self, batch: TreeBatch) -> Tensor:
        return self.head(self.hidden(batch)[batch.source])


def head_of(inner: Any) -> nn.Linear:
    """The head of a sequence classifier.

    Raises:
        UserError: when it is something other than a bias-free linear layer with one output.
    """
    head = getattr(inner, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise UserError(
            f"model: the classifier of {inner.config.model_type} has no bias-free linear head `score` with one output; "
            "use a model of another family"
        )
    return head


class ScalarHead(nn.Module):
    """Holds the head's weight as a parameter of its own, so that ZeRO-3 gathers it around this forward."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight  # [1, H]

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] -> [n]. In fp32: bfloat16 would round rewards to three digits, and their differences to fewer."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return hidden.to(wide) @ self.weight[0].to(wide)


class RankingModel(nn.Module):
    """A scorer with what only its training needs: how likely ties are. `forward(batch)` gives (rewards [R], log nu)."""

    def __init__(self, scorer: TreeScorer, *, log_tie: float | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.scorer = scorer
        self.tie = None if log_tie is None else TieStrength(log_tie, dtype)

    def forward(self, batch: TreeBatch) -> tuple[Tensor, Tensor | None]:
        return self.scorer(batch), None if self.tie is None else self.tie()


class TieStrength(nn.Module):
    """log nu of Davidson (1970), a scalar that is trained: its start, and what training has added to it.

    Apart from each other, so that in bfloat16 the small part keeps its digits.
    """

    def __init__(self, start: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.start = start
        self.moved = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self) -> Tensor:
        return self.start + self.moved[0].float()


def draw_head(inner: Any, seed: int) -> None:
    """Draw the head from N(0, 1 / (H + 1)) (Stiennon et al. 2020; Huang et al. 2024, detail 4 of its reward model).

    The same numbers on any number of processes; `inner` may be in ZeRO-3 partitions.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    weight = inner.score.weight
    shape = getattr(weight, "ds_shape", weight.shape)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(shape[1] + 1)
    if is_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0), torch.no_grad():
            weight.copy_(drawn)
    else:
        with torch.no_grad():
            weight.copy_(drawn)
