"""The losses of the direct objectives: by hand with their slopes, where they begin, at the ends of the range, on nothing.

Numbers by hand use sigmoid(ln 3) = 3 / 4 and odds 3 and 1, so that they can be checked without a computer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from itertools import product

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.functional.losses.preference import (
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    log1mexp,
    orpo_loss,
    rdpo_loss,
    rrhf_loss,
    simpo_loss,
    slic_loss,
    unlikelihood_sequence_loss,
    unlikely,
)
from rlhf_pipeline.functional.losses.ranking import plackett_luce_loss

Loss = Callable[[Tensor, Tensor], Tensor]
Check = Callable[..., None]
LN2, LN3 = math.log(2), math.log(3)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slopes(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), inputs, retain_graph=True, materialize_grads=True)


def kto(ratios: Tensor, wanted: Tensor, baseline: float = 0.0) -> Tensor:
    zero = torch.tensor(baseline, dtype=ratios.dtype)
    return kto_loss(ratios, wanted, zero, beta=0.5, desirable_weight=1.2, undesirable_weight=0.8)


def kto_both(chosen: Tensor, rejected: Tensor) -> Tensor:
    wanted, unwanted = torch.ones(len(chosen), dtype=torch.bool), torch.zeros(len(rejected), dtype=torch.bool)
    return kto(torch.cat((chosen, rejected)), torch.cat((wanted, unwanted)), 2.0)


def rrhf(chosen: Tensor, rejected: Tensor) -> Tensor:
    each = torch.arange(len(chosen)).repeat(2)
    return rrhf_loss(torch.cat((chosen, rejected)), each, torch.tensor([0, 1]).repeat_interleave(len(chosen)))


# name -> loss(chosen, rejected), log-probs of M winners and losers
LOSSES: dict[str, Loss] = {
    "dpo": lambda w, x: dpo_loss(w - x, torch.ones(len(w)), beta=0.5),
    "cdpo": lambda w, x: dpo_loss(w - x, torch.full((len(w),), 0.9), beta=0.5),
    "ipo": lambda w, x: ipo_loss(w - x, tau=0.25),
    "rdpo": lambda w, x: rdpo_loss(w - x, torch.full((len(w),), 7), beta=0.5, alpha=0.1),
    "slic": lambda w, x: slic_loss(w, x, delta=1.0),
    "cpo": lambda w, x: cpo_loss(w, x, beta=0.5),
    "simpo": lambda w, x: simpo_loss(w, x, beta=2.0, gamma=1.6),
    "orpo": lambda w, x: orpo_loss(w, x, beta=0.1),
    "unlikely": lambda w, x: unlikely(x),
    "sequence": lambda w, x: unlikelihood_sequence_loss(x, alpha=0.3),
    "kto": kto_both,
    "rrhf": rrhf,
}
EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)


def test_dpo_by_hand(assert_close: Check) -> None:
    # beta m = ln 3, so the winner is expected to win with 3/4; d loss / dm = beta (3/4 - label).
    margins = doubles(2 * LN3, 2 * LN3, 2 * LN3, -2 * LN3).requires_grad_()
    losses = dpo_loss(margins, doubles(1, 0.9, 0.5, 1), beta=0.5)
    log34, log14 = math.log(0.75), math.log(0.25)
    assert_close(losses, doubles(-log34, -0.9 * log34 - 0.1 * log14, -(log34 + log14) / 2, -log14), rtol=1e-12)
    assert_close(slopes(losses, margins)[0], doubles(-0.125, -0.075, 0.125, -0.375), rtol=1e-12)


def test_cdpo_is_least_where_it_expects_the_share_of_wrong_labels(assert_close: Check) -> None:
    margins = doubles(math.log(9) / 0.5).requires_grad_()  # sigmoid(ln 9) = 0.9
    assert_close(slopes(dpo_loss(margins, doubles(0.9), beta=0.5), margins)[0], doubles(0), rtol=0, atol=1e-12)


def test_ipo_by_hand() -> None:
    margins = doubles(3.0, 2.0, 0.0, -1.0).requires_grad_()  # the target is 1 / (2 * 0.25) = 2
    losses = ipo_loss(margins, tau=0.25)
    assert losses.tolist() == [1, 0, 4, 9]
    assert slopes(losses, margins)[0].tolist() == [2, 0, -4, -6]


def test_rdpo_by_hand(assert_close: Check) -> None:
    margins = doubles(2 * (LN3 - 1), 2 * (LN3 + 1)).requires_grad_()  # 0.5 m +- 1 = ln 3
    losses = rdpo_loss(margins, torch.tensor([10, -10]), beta=0.5, alpha=0.1)
    assert_close(losses, doubles(-math.log(0.75), -math.log(0.75)), rtol=1e-12)
    assert_close(slopes(losses, margins)[0], doubles(-0.125, -0.125), rtol=1e-12)


def test_a_winner_that_is_longer_pushes_less(assert_close: Check) -> None:
    # At m = 0 the slope is -beta / (1 + exp(alpha (len_w - len_l))).
    margins = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    losses = rdpo_loss(margins, torch.tensor([20, 0, -20]), beta=0.5, alpha=0.05)
    longer, equal, shorter = slopes(losses, margins)[0].tolist()
    assert shorter < equal < longer < 0
    assert equal == -0.25
    assert longer == pytest.approx(-0.5 / (1 + math.e), rel=1e-12)
    assert shorter == pytest.approx(-0.5 / (1 + 1 / math.e), rel=1e-12)
    assert losses.tolist() == pytest.approx([math.log(1 + 1 / math.e), LN2, math.log(1 + math.e)], rel=1e-12)


def test_slic_by_hand() -> None:
    chosen, rejected = doubles(-2.0, -2.0, -3.0).requires_grad_(), doubles(-2.5, -4.0, -1.0).requires_grad_()
    losses = slic_loss(chosen, rejected, delta=1.0)
    assert losses.tolist() == [0.5, 0, 3]  # 1 + 2 - 2.5; leads by 2; 1 + 3 - 1
    of_chosen, of_rejected = slopes(losses, chosen, rejected)
    assert of_chosen.tolist() == [-1, 0, -1]
    assert of_rejected.tolist() == [1, 0, 1]


def test_cpo_by_hand(assert_close: Check) -> None:
    chosen, rejected = doubles(-2.0, -2.0).requires_grad_(), doubles(-2 - 2 * LN3, -2.0).requires_grad_()
    losses = cpo_loss(chosen, rejected, beta=0.5)
    assert_close(losses, doubles(-math.log(0.75), LN2), rtol=1e-12)
    of_chosen, of_rejected = slopes(losses, chosen, rejected)
    assert_close(of_chosen, doubles(-0.125, -0.25), rtol=1e-12)
    assert_close(of_rejected, -of_chosen, rtol=0)


def test_simpo_by_hand(assert_close: Check) -> None:
    # beta 2, gamma ln 3: a lead of ln 3 leaves 2 ln 3 - ln 3, and none leaves -ln 3.
    chosen, rejected = doubles(-1.0, -1.0).requires_grad_(), doubles(-1 - LN3, -1.0).requires_grad_()
    losses = simpo_loss(chosen, rejected, beta=2.0, gamma=LN3)
    assert_close(losses, doubles(-math.log(0.75), -math.log(0.25)), rtol=1e-12)
    of_chosen, of_rejected = slopes(losses, chosen, rejected)
    assert_close(of_chosen, doubles(-0.5, -1.5), rtol=1e-12)
    assert_close(of_rejected, doubles(0.5, 1.5), rtol=1e-12)


def test_orpo_by_hand(assert_close: Check) -> None:
    # p_w = 3/4 has odds 3, p_l = 1/2 odds 1: sigmoid(ln 3) = 3/4. The slope of log odds is 1 / (1 - p), so 4 and 2.
    chosen, rejected = doubles(math.log(0.75)).requires_grad_(), doubles(math.log(0.5)).requires_grad_()
    losses = orpo_loss(chosen, rejected, beta=0.1)
    assert_close(losses, doubles(-0.1 * math.log(0.75)), rtol=1e-12)
    of_chosen, of_rejected = slopes(losses, chosen, rejected)
    assert_close(of_chosen, doubles(-0.1 * 0.25 * 4), rtol=1e-12)
    assert_close(of_rejected, doubles(0.1 * 0.25 * 2), rtol=1e-12)


def test_unlikely_by_hand(assert_close: Check) -> None:
    logprobs = doubles(*[math.log(p) for p in (0.75, 0.5, 0.1)], -50.0).requires_grad_()
    losses = unlikely(logprobs)
    assert_close(losses, doubles(math.log(4), LN2, math.log(10 / 9), math.exp(-50)), rtol=1e-12)
    assert_close(slopes(losses, logprobs)[0], doubles(3, 1, 1 / 9, math.exp(-50)), rtol=1e-12)


def test_unlikelihood_of_a_sequence_has_no_bound() -> None:
    rejected = doubles(-4.0, -1e4).requires_grad_()
    losses = unlikelihood_sequence_loss(rejected, alpha=0.25)
    assert losses.tolist() == [-1, -2500]
    assert slopes(losses, rejected)[0].tolist() == [0.25, 0.25]


def test_kto_by_hand(assert_close: Check) -> None:
    # beta (ratio - z0) = 0.5 * (1 + 2 ln 3 - 1) = ln 3; weights 1.2 and 0.8; sigmoid' = 3/16.
    ratios = doubles(1 + 2 * LN3, 1 + 2 * LN3, 1.0, 1.0).requires_grad_()
    losses = kto(ratios, torch.tensor([True, False, True, False]), baseline=1.0)
    assert_close(losses, doubles(1.2 / 4, 0.8 * 3 / 4, 0.6, 0.4), rtol=1e-12)
    expected = doubles(-1.2 * 0.5 * 3 / 16, 0.8 * 0.5 * 3 / 16, -1.2 * 0.5 / 4, 0.8 * 0.5 / 4)
    assert_close(slopes(losses, ratios)[0], expected, rtol=1e-12)


@pytest.mark.parametrize(("wanted", "weight"), [(True, 1.2), (False, 0.8)])
def test_kto_of_one_side_only(wanted: bool, weight: float, assert_close: Check) -> None:
    ratios = doubles(0.0, 2 * LN3, -2 * LN3).requires_grad_()
    losses = kto(ratios, torch.full((3,), wanted))
    shares = doubles(0.5, 0.25, 0.75) if wanted else doubles(0.5, 0.75, 0.25)
    assert_close(losses, weight * shares, rtol=1e-12)
    pull = -1 if wanted else 1
    assert_close(slopes(losses, ratios)[0], pull * weight * 0.5 * doubles(4, 3, 3) / 16, rtol=1e-12)


def test_a_higher_baseline_asks_more_of_the_wanted_and_less_of_the_others() -> None:
    ratios = doubles(1.0, 1.0)
    wanted = torch.tensor([True, False])
    low, high = kto(ratios, wanted, 0.0), kto(ratios, wanted, 3.0)
    assert high[0] > low[0]
    assert high[1] < low[1]


def test_rrhf_by_hand() -> None:
    # First prompt, ranks 0 1 2: the second leads the first by 0.5. Second prompt, two winners tied: led by 2 and by 1.
    logprobs = doubles(-1.0, -0.5, -2.0, -3.0, -2.0, -1.0).requires_grad_()
    loss = rrhf_loss(logprobs, torch.tensor([0, 0, 0, 4, 4, 4]), torch.tensor([0, 1, 2, 0, 0, 1]))
    assert loss.item() == 3.5
    assert slopes(loss, logprobs)[0].tolist() == [-1, 1, 0, -1, -1, 2]


def test_where_the_objectives_begin() -> None:
    """Policy and reference are the same: every ratio and margin is 0."""
    zero = torch.zeros(3)
    assert dpo_loss(zero, torch.tensor([1.0, 0.9, 0.5]), beta=0.1).tolist() == pytest.approx([LN2] * 3, rel=1e-6)
    assert ipo_loss(zero, tau=0.1).tolist() == pytest.approx([25.0] * 3, rel=1e-6)  # 1 / (4 * 0.01)
    lengths = torch.tensor([5, 0, -40])
    expected = [math.log(1 + math.exp(-0.05 * d)) for d in (5, 0, -40)]
    assert rdpo_loss(zero, lengths, beta=0.1, alpha=0.05).tolist() == pytest.approx(expected, rel=1e-6)
    assert kto(zero, torch.tensor([True, False, True])).tolist() == pytest.approx([0.6, 0.4, 0.6], rel=1e-6)


def test_plackett_luce_of_two_is_dpo(assert_close: Check) -> None:
    generator = torch.Generator().manual_seed(1)
    ratios = 5 * torch.randn(8, 2, generator=generator, dtype=torch.float64)
    prompt, ranks = torch.arange(8).repeat_interleave(2), torch.tensor([0, 1]).repeat(8)
    listwise = plackett_luce_loss(0.3 * ratios.flatten(), prompt, ranks)
    pairwise = dpo_loss(ratios[:, 0] - ratios[:, 1], doubles(*[1.0] * 8), beta=0.3)
    assert_close(listwise, pairwise.sum(), rtol=1e-12)


@pytest.mark.parametrize("number", [2, 3, 4, 9])
def test_plackett_luce_begins_with_choices_among_equals(number: int) -> None:
    """The best of K, then of the K - 1 that are left, down to the better of two."""
    ranks = torch.randperm(number, generator=torch.Generator().manual_seed(number))
    loss = plackett_luce_loss(0.1 * torch.zeros(number), torch.zeros(number, dtype=torch.int64), ranks)
    assert loss.item() == pytest.approx(sum(math.log(n) for n in range(2, number + 1)) / (number - 1), rel=1e-6)


@EVERY_LOSS
def test_slopes_have_their_signs(name: str) -> None:
    """The chosen is pulled up or left alone, the rejected pushed down, wherever the two are, short of overshooting."""
    generator = torch.Generator().manual_seed(2)
    chosen, rejected = (-torch.rand(2, 50, generator=generator, dtype=torch.float64)).requires_grad_().unbind()
    of_chosen, of_rejected = slopes(LOSSES[name](chosen, rejected), chosen, rejected)
    assert (of_chosen <= 0).all()
    assert (of_rejected >= 0).all()
    assert (of_rejected > 0).any()
    if name not in ("unlikely", "sequence"):
        assert (of_chosen < 0).any()


SMOOTH = [name for name in LOSSES if name not in ("slic", "rrhf")]


@pytest.mark.parametrize("name", SMOOTH)
def test_slopes_against_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = -3 * torch.rand(2, 12, generator=generator, dtype=torch.float64) - 0.01
    assert torch.autograd.gradcheck(LOSSES[name], (chosen.requires_grad_(), rejected.requires_grad_()))


EXTREMES = [-1e4, -120.0, -1.0, -1e-3, -1e-9, 0.0]


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logprobs(name: str, dtype: torch.dtype) -> None:
    """Finite, in value and slope, and no slope points the wrong way: IPO and cDPO alone may overshoot and come back."""
    pairs = torch.tensor(list(product(EXTREMES, EXTREMES)), dtype=dtype)
    chosen, rejected = (column.clone().requires_grad_() for column in pairs.unbind(1))
    losses = LOSSES[name](chosen, rejected)
    of_chosen, of_rejected = slopes(losses, chosen, rejected)
    assert losses.isfinite().all()
    assert of_chosen.isfinite().all()
    assert of_rejected.isfinite().all()
    if name not in ("ipo", "cdpo"):
        assert (of_chosen <= 0).all()
        assert (of_rejected >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_against_sixty_digits(dtype: torch.dtype) -> None:
    powers = [-(10.0**e) for e in range(-6, 2)]
    logprobs = torch.tensor([*powers, -0.6931, -0.6932, -0.75, -17.0, -40.0], dtype=dtype, requires_grad=True)
    with localcontext() as context:
        context.prec = 60
        p = [Decimal(x).exp() for x in logprobs.tolist()]
        expected = [float((1 - q).ln()) for q in p]
        expected_slopes = [float(-q / (1 - q)) for q in p]
    rel = 5e-6 if dtype == torch.float32 else 1e-13
    result = log1mexp(logprobs)
    assert result.dtype == dtype
    assert result.tolist() == pytest.approx(expected, rel=rel, abs=0)
    assert slopes(result, logprobs)[0].tolist() == pytest.approx(expected_slopes, rel=rel, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("logprob", [0.0, -0.0, -1e-9, 1e-7])
def test_near_certainty_is_held(dtype: torch.dtype, logprob: float) -> None:
    """1 - p is taken as 2^-23: 23 ln 2 = 15.94, and slopes of 2^23, of which 1 has no share."""
    x = torch.tensor([logprob], dtype=dtype, requires_grad=True)
    rel = 1e-2 if dtype == torch.bfloat16 else 1e-6
    loss = unlikely(x)
    assert loss.item() == pytest.approx(23 * LN2, rel=rel)
    assert slopes(loss, x)[0].item() == pytest.approx(2.0**23, rel=rel)
    # Two certain responses: equal odds, ln 2, and half the slope of log odds, up and down.
    other = x.detach().clone().requires_grad_()
    loss = orpo_loss(x, other, beta=1.0)
    assert loss.item() == pytest.approx(LN2, rel=rel)
    of_chosen, of_rejected = slopes(loss, x, other)
    assert of_chosen.item() == pytest.approx(-(2.0**22), rel=rel)
    assert of_rejected.item() == pytest.approx(2.0**22, rel=rel)


def test_a_certain_rejected_token_is_pushed_as_hard_as_one_that_is_likely() -> None:
    """The slope of a logit is p for every p: what 1 / (1 - p) adds the soft-max takes away, until fp32 ends."""
    for lead in (2.0, 8.0, 14.0):
        logits = torch.tensor([[lead, 0.0]], requires_grad=True)
        (slope,) = slopes(unlikely(logits.log_softmax(-1)[:, 0]), logits)
        assert slope[0, 0].item() == pytest.approx(1 / (1 + math.exp(-lead)), rel=0.1)  # 1 - p has few digits left
    logits = torch.tensor([[40.0, 0.0]], requires_grad=True)
    assert slopes(unlikely(logits.log_softmax(-1)[:, 0]), logits)[0].isfinite().all()


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_zero_and_connected(name: str, dtype: torch.dtype) -> None:
    weight = torch.ones(2, dtype=dtype, requires_grad=True)
    loss = LOSSES[name](weight[:0], weight[:0])
    assert loss.dtype == dtype
    assert loss.sum().item() == 0
    loss.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 0]


@EVERY_LOSS
def test_losses_are_elementwise_and_keep_their_dtype(name: str, assert_close: Check) -> None:
    """The loss of a batch is that of its pairs one at a time, so that micro-batches add up."""
    generator = torch.Generator().manual_seed(5)
    for dtype in (torch.float32, torch.float64):
        chosen, rejected = -2 * torch.rand(2, 6, generator=generator).to(dtype)
        together = LOSSES[name](chosen, rejected)
        assert together.dtype == dtype
        apart = [LOSSES[name](chosen[i : i + 1], rejected[i : i + 1]) for i in range(6)]
        assert_close(together.sum(), torch.stack([loss.sum() for loss in apart]).sum(), rtol=1e-5)
        if name not in ("rrhf", "kto"):
            assert_close(together, torch.cat(apart), rtol=1e-5)
