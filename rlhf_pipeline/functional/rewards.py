"""From the score of a response to the rewards of its tokens. A score is one number a response, a reward one a token.

Shapes: R responses, L tokens of the longest. Padded tensors are [R, L], padded on the right; `mask` bool [R, L] is
True where there is a token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_pipeline.config.ppo import MissingEnd


def final_scores(
    scores: Tensor, ended: Tensor, *, missing_end: MissingEnd, missing_end_score: float, clip: float | None
) -> Tensor:
    """Scores clipped to +-`clip`, and then what `missing_end` makes of those of responses that did not end.

    scores [R], ended bool [R] -> [R]. `keep`: nothing. `subtract`: less `missing_end_score`. `replace`:
    `missing_end_score`, whatever was scored ("EOS trick", Huang et al. 2024, "The N+ implementation details of RLHF
    with PPO"). The clip comes first, so that it does not undo the rule.
    """
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    if missing_end is MissingEnd.keep:
        return scores
    cut_off = scores - missing_end_score if missing_end is MissingEnd.subtract else missing_end_score
    return torch.where(ended, scores, cut_off)


def token_rewards(scores: Tensor, penalty: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """-beta * penalty at every token, and the score at the response's last one; 0 outside the mask.

    scores [R], penalty and mask [R, L] -> [R, L]. With k1 for the penalty the rewards of a response add up to
    score - beta * log(policy / reference) (Ouyang et al. 2022, equation 2; Ziegler et al. 2019, equation 2).
    A response without tokens has nowhere to put its score.
    """
    is_last = mask & ~pad(mask, (0, 1))[:, 1:]
    rewards = torch.where(is_last, scores[:, None], 0.0) - beta * penalty
    return torch.where(mask, rewards, 0.0)  # not a product: outside the mask there may be NaN
