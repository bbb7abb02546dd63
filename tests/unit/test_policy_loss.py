"""The losses of PPO: by hand, against loops over floats, their gradients, and the weights that make means of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.config.ppo import Mean
from rlhf_pipeline.functional.losses.policy import (
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    ratio,
    token_weights,
)
from rlhf_pipeline.functional.terms import Term, add_counts, objective


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ratio, advantage -> loss at clip 0.2, and d loss / d logprob = -A ratio unless the clip took it away
CASES = [
    (1.0, 2.0, -2.0, -2.0),
    (1.0, -2.0, 2.0, 2.0),
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.4, 0.0),  # better, and far enough already
    (1.5, -2.0, 3.0, 3.0),  # worse, and the wrong way: no clip stops the way back
    (0.5, 2.0, -1.0, -1.0),
    (0.5, -2.0, 1.6, 0.0),  # worse, and far enough already
    (0.9, -2.0, 1.8, 1.8),
    (1.5, 0.0, 0.0, 0.0),
]
RATIOS, ADVANTAGES, LOSSES, SLOPES = (doubles(*column) for column in zip(*CASES, strict=True))
OLD = torch.linspace(-3, -0.5, len(CASES), dtype=torch.float64)


def test_policy_loss_by_hand(assert_close: Callable[..., None]) -> None:
    logprobs = (OLD + RATIOS.log()).requires_grad_()
    assert_close(ratio(logprobs, OLD), RATIOS, rtol=1e-12)
    losses = clipped_policy_loss(logprobs, OLD, ADVANTAGES, clip=0.2)
    assert_close(losses, LOSSES, rtol=1e-12)
    losses.sum().backward()
    assert_close(logprobs.grad, SLOPES, rtol=1e-12)


def test_clip_fraction_counts_the_gradients_that_the_clip_took() -> None:
    logprobs = (OLD + RATIOS.log()).requires_grad_()
    clipped = clip_fraction(logprobs, OLD, ADVANTAGES, clip=0.2)
    assert clipped.tolist() == [0, 0, 0, 1, 0, 0, 1, 0, 0]
    assert not clipped.requires_grad
    assert clip_fraction(logprobs, OLD, ADVANTAGES, clip=0.6).tolist() == [0] * 9


def test_the_first_pass_gives_the_policy_gradient() -> None:
    logprobs = OLD.clone().requires_grad_()
    clipped_policy_loss(logprobs, OLD, ADVANTAGES, clip=0.2).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == (-ADVANTAGES).tolist()


@pytest.mark.parametrize("clip", [0.05, 0.2, 1.0])
def test_policy_loss_against_a_loop(clip: float, assert_close: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(1)
    logprobs, old, advantages = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    expected, clipped = [], []
    for new, before, advantage in zip(logprobs.tolist(), old.tolist(), advantages.tolist(), strict=True):
        r = math.exp(new - before)
        bounded = 1 - clip if r < 1 - clip else 1 + clip if r > 1 + clip else r
        expected.append(-min(r * advantage, bounded * advantage))
        clipped.append(float((advantage > 0 and r > 1 + clip) or (advantage < 0 and r < 1 - clip)))
    assert_close(clipped_policy_loss(logprobs, old, advantages, clip=clip), doubles(*expected), rtol=1e-12)
    assert clip_fraction(logprobs, old, advantages, clip=clip).tolist() == clipped
    assert torch.autograd.gradcheck(
        lambda x: clipped_policy_loss(x, old, advantages, clip=clip), logprobs.requires_grad_()
    )


# value, old value, return, clip -> loss, d loss / d value
VALUE_CASES = [
    (1.0, 1.0, 3.0, 2.0, -2.0),  # unmoved: (1 - 3)^2 / 2
    (1.1, 1.0, 3.0, 1.805, -1.9),  # within the range: 1.9^2 / 2
    (2.0, 1.0, 3.0, 1.62, 0.0),  # moved too far the right way: counted from 1.2, 1.8^2 / 2
    (0.0, 1.0, 3.0, 4.5, -3.0),  # moved too far the wrong way: from where it is, 3^2 / 2
    (0.0, 1.0, -1.0, 1.62, 0.0),  # the same downwards: counted from 0.8
    (2.0, 1.0, -1.0, 4.5, 3.0),
]


def test_value_loss_by_hand(assert_close: Callable[..., None]) -> None:
    values, old, returns, expected, slopes = (doubles(*column) for column in zip(*VALUE_CASES, strict=True))
    values.requires_grad_()
    losses = clipped_value_loss(values, old, returns, clip=0.2)
    assert_close(losses, expected, rtol=1e-12)
    assert_close(torch.autograd.grad(losses.sum(), values)[0], slopes, rtol=1e-12)

    plain = clipped_value_loss(values, old, returns, clip=None)
    assert_close(plain, doubles(2.0, 1.805, 0.5, 4.5, 0.5, 4.5), rtol=1e-12)
    assert_close(torch.autograd.grad(plain.sum(), values)[0], values - returns, rtol=1e-12)


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_against_a_loop(clip: float | None, assert_close: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(2)
    values, old, returns = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    expected = []
    for v, before, target in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        near = v if clip is None else min(max(v, before - clip), before + clip)
        expected.append(0.5 * max((v - target) ** 2, (near - target) ** 2))
    assert_close(clipped_value_loss(values, old, returns, clip=clip), doubles(*expected), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: clipped_value_loss(x, old, returns, clip=clip), values.requires_grad_())


def test_weights_by_hand(assert_close: Callable[..., None]) -> None:
    # Six tokens of responses 2, 0 and 4 out of five; responses 1 and 3 have no token here.
    sequence = torch.tensor([2, 2, 2, 0, 4, 4])
    weights, count = token_weights(sequence, 5, mean=Mean.tokens)
    assert weights.tolist() == [1, 1, 1, 1, 1, 1]
    assert int(count) == 6
    weights, count = token_weights(sequence, 5, mean=Mean.sequences)
    assert_close(weights, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0, 0.5, 0.5]), rtol=1e-6)
    assert int(count) == 3


def test_weights_do_not_need_tokens_in_order() -> None:
    weights, count = token_weights(torch.tensor([1, 0, 1, 1, 0]), 2, mean=Mean.sequences)
    assert weights.tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 3, 1 / 3, 1 / 2], rel=1e-6)
    assert int(count) == 2


@pytest.mark.parametrize("mean", list(Mean))
@pytest.mark.parametrize("cuts", [[9], [1, 8], [4, 0, 5], [1] * 9])
def test_micro_batches_add_up_to_the_named_mean(mean: Mean, cuts: list[int]) -> None:
    """Nine responses of 1..9 tokens, whole in one micro-batch each, one of which may be empty."""
    generator = torch.Generator().manual_seed(4)
    responses = [torch.randn(length, generator=generator, dtype=torch.float64) for length in range(1, 10)]
    every = [float(x) for response in responses for x in response]
    own = [sum(response.tolist()) / len(response) for response in responses]
    expected = sum(every) / len(every) if mean is Mean.tokens else sum(own) / len(own)

    terms = []
    for start, size in zip([sum(cuts[:i]) for i in range(len(cuts))], cuts, strict=True):
        here = responses[start : start + size]
        sequence = torch.tensor([i for i, response in enumerate(here) for _ in response], dtype=torch.int64)
        losses = torch.cat([*here, torch.zeros(0, dtype=torch.float64)])
        weights, count = token_weights(sequence, len(here), mean=mean)
        terms.append({"policy": Term((weights * losses).sum(), float(count))})
    total = add_counts({"policy": term["policy"].count} for term in terms)
    assert float(sum(objective(term, total) for term in terms)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mean", list(Mean))
@pytest.mark.parametrize("num_sequences", [0, 3])
def test_an_empty_micro_batch_is_connected_to_the_model(mean: Mean, num_sequences: int) -> None:
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(0, dtype=torch.float64)
    weights, count = token_weights(torch.zeros(0, dtype=torch.int64), num_sequences, mean=mean)
    assert weights.shape == (0,)
    assert int(count) == 0
    losses = [
        clipped_policy_loss(weight[:0], none, none, clip=0.2),
        clipped_value_loss(weight[:0], none, none, clip=0.2),
        clipped_value_loss(weight[:0], none, none, clip=None),
    ]
    for loss in losses:
        (weights * loss).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 0]
    assert clip_fraction(weight[:0], none, none, clip=0.2).sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_keep_their_dtype(dtype: torch.dtype) -> None:
    x = torch.zeros(2, dtype=dtype)
    assert clipped_policy_loss(x, x, x, clip=0.2).dtype == dtype
    assert clipped_value_loss(x, x, x, clip=0.2).dtype == dtype
    assert clip_fraction(x, x, x, clip=0.2).dtype == dtype
