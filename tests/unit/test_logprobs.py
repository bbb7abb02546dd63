"""Log-probabilities of given tokens, and entropies: against torch's log_softmax and its gradients, whatever the chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_pipeline.functional import logprobs as module
from rlhf_pipeline.functional.logprobs import linear_entropy, linear_logprobs, token_entropy, token_logprobs

WIDTH, WORDS = 6, 11
SMALLEST_CHUNK = 16  # rows; what CHUNK_ELEMENTS = 1 gives


def inputs(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], target [N], gradient of the log-probs [N]."""
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(WORDS, WIDTH, generator=generator, dtype=torch.float64)
    target = torch.randint(0, WORDS, (count,), generator=generator)
    grad = torch.randn(count, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target, grad


def reference(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All logits at once, through torch's own log_softmax."""
    logits = torch.nn.functional.linear(hidden, weight)
    return torch.stack([torch.log_softmax(row, 0)[t] for row, t in zip(logits, target, strict=True)])


def test_token_logprobs_by_hand(assert_close: Callable[..., None]) -> None:
    # softmax of (log 1, log 2, log 5) is (1/8, 2/8, 5/8)
    logits = torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]], dtype=torch.float64).log()
    expected = torch.tensor([5 / 8, 1 / 8], dtype=torch.float64).log()
    assert_close(token_logprobs(logits, torch.tensor([2, 0])), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "out"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_log_probabilities_are_at_least_fp32(dtype: torch.dtype, out: torch.dtype) -> None:
    hidden, weight, target, _ = inputs(3, dtype)
    assert linear_logprobs(hidden, weight, target).dtype == out
    assert token_logprobs(hidden @ weight.T, target).dtype == out


def test_large_logits_do_not_overflow(assert_close: Callable[..., None]) -> None:
    # Two words tie at the top; the third is 1e4 lower.
    hidden, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [1.0], [0.0]])
    for word, expected in ((1, -0.6931472), (2, -1e4 - 0.6931472)):
        target = torch.tensor([word])
        # fp32 keeps 1e4 to 5e-4
        assert_close(linear_logprobs(hidden, weight, target), torch.tensor([expected]), rtol=1e-7, atol=1e-3)
        assert_close(token_logprobs(hidden @ weight.T, target), torch.tensor([expected]), rtol=1e-7, atol=1e-3)


# 16 rows a chunk: one short of it, exactly it, one more, several, several and a rest
@pytest.mark.parametrize("count", [1, 15, 16, 17, 48, 50])
@pytest.mark.parametrize("elements", [1, module.CHUNK_ELEMENTS])
@pytest.mark.parametrize("kept", [0, module.KEEP_ELEMENTS])
def test_values_and_gradients(
    count: int, elements: int, kept: int, monkeypatch: pytest.MonkeyPatch, assert_close: Callable[..., None]
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(module, "KEEP_ELEMENTS", kept)
    hidden, weight, target, grad = inputs(count)
    expected = reference(hidden, weight, target)
    expected_grads = torch.autograd.grad(expected, (hidden, weight), grad)

    actual = linear_logprobs(hidden, weight, target)
    actual_grads = torch.autograd.grad(actual, (hidden, weight), grad)

    assert_close(actual, expected, rtol=1e-12)
    assert_close(token_logprobs(hidden @ weight.T, target), expected, rtol=1e-12)
    for one, other in zip(actual_grads, expected_grads, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-13)


class Shapes(TorchDispatchMode):
    """Remembers the shape of every tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.seen.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("keeps", [True, False])
def test_logits_are_held_a_chunk_at_a_time(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens of 200 words in chunks of 20 tokens; few logits are kept for the backward pass, many are not."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 20 * 200)
    monkeypatch.setattr(module, "KEEP_ELEMENTS", 64 * 200 if keeps else 64 * 200 - 1)
    hidden = torch.randn(64, 2, requires_grad=True)
    weight = torch.randn(200, 2, requires_grad=True)
    saved: list[int] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with Shapes() as shapes:
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            logprobs = linear_logprobs(hidden, weight, torch.zeros(64, dtype=torch.int64))
        logprobs.sum().backward()
    assert max(map(math.prod, shapes.seen)) == 20 * 200
    inputs_and_result = 64 * 2 + 200 * 2 + 64 + 64
    assert sum(saved) == inputs_and_result + (64 * 200 if keeps else 0)


@pytest.mark.parametrize("count", [0, 1, 18])
@pytest.mark.parametrize("kept", [0, module.KEEP_ELEMENTS])
def test_gradcheck(count: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(module, "KEEP_ELEMENTS", kept)
    hidden, weight, target, _ = inputs(count)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, target), (hidden, weight))


def test_no_tokens_give_zero_gradients() -> None:
    hidden, weight, target, _ = inputs(0)
    result = linear_logprobs(hidden, weight, target)
    assert result.shape == (0,)
    result.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, WIDTH)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("kept", [0, module.KEEP_ELEMENTS])
@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_frozen_gets_no_gradient(
    frozen: str, kept: int, monkeypatch: pytest.MonkeyPatch, assert_close: Callable[..., None]
) -> None:
    monkeypatch.setattr(module, "KEEP_ELEMENTS", kept)
    hidden, weight, target, grad = inputs(20)
    expected = torch.autograd.grad(reference(hidden, weight, target), (hidden, weight), grad)
    (weight if frozen == "weight" else hidden).requires_grad_(False)
    with Shapes() as shapes:
        linear_logprobs(hidden, weight, target).backward(grad)
    if frozen == "weight":
        assert weight.grad is None
        assert weight.shape not in shapes.seen  # not computed and thrown away either: the largest matrix of a model
        assert_close(hidden.grad, expected[0], rtol=1e-10, atol=1e-13)
    else:
        assert hidden.grad is None
        assert_close(weight.grad, expected[1], rtol=1e-10, atol=1e-13)


def test_the_gradient_of_a_plain_sum(assert_close: Callable[..., None]) -> None:
    """`sum().backward()` hands over an expanded gradient, one number in memory for all tokens."""
    hidden, weight, target, _ = inputs(20)
    expected = torch.autograd.grad(reference(hidden, weight, target).sum(), (hidden, weight))
    actual = torch.autograd.grad(linear_logprobs(hidden, weight, target).sum(), (hidden, weight))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kept", [0, module.KEEP_ELEMENTS])
def test_inputs_are_left_alone(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass works in place on its own copies: a second one gives the same."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(module, "KEEP_ELEMENTS", kept)
    hidden, weight, target, grad = inputs(20)
    before = [t.detach().clone() for t in (hidden, weight, target, grad)]
    result = linear_logprobs(hidden, weight, target)
    first = torch.autograd.grad(result, (hidden, weight), grad, retain_graph=True)
    second = torch.autograd.grad(result, (hidden, weight), grad)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(now, then) for now, then in zip((hidden, weight, target, grad), before, strict=True))


def test_bf16_is_close_to_fp32(monkeypatch: pytest.MonkeyPatch, assert_close: Callable[..., None]) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    hidden, weight, target, grad = inputs(200, torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    expected = reference(wide[0], wide[1], target)
    expected_grads = torch.autograd.grad(expected, wide, grad.float())

    actual = linear_logprobs(hidden, weight, target)
    actual_grads = torch.autograd.grad(actual, (hidden, weight), grad.float())

    # bf16 keeps 8 bits: a logit is off by up to 2^-9 of itself (they reach 8 here), a gradient by a few of its own.
    assert_close(actual, expected, rtol=0, atol=0.04)
    for one, other in zip(actual_grads, expected_grads, strict=True):
        assert one.dtype == torch.bfloat16
        assert_close(one.float(), other, rtol=0, atol=float(0.02 * other.abs().max()))


@pytest.mark.parametrize("kept", [0, module.KEEP_ELEMENTS])
def test_gradients_of_a_token_that_is_almost_certain(
    kept: int, monkeypatch: pytest.MonkeyPatch, assert_close: Callable[..., None]
) -> None:
    """1 - p is 0.0013: p itself, rounded to bf16, is 1 and would leave no gradient."""
    monkeypatch.setattr(module, "KEEP_ELEMENTS", kept)
    hidden = torch.tensor([[1.0, 0.5]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[7.0, 1.0], [0.0, 0.5], [-1.0, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = torch.autograd.grad(reference(wide[0], wide[1], torch.tensor([0])), wide)
    assert 0 < float(expected[0].abs().max()) < 0.01

    actual = torch.autograd.grad(linear_logprobs(hidden, weight, torch.tensor([0])), (hidden, weight))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one.double(), other, rtol=0.01, atol=float(0.01 * other.abs().max()))


def test_the_weight_gradient_is_added_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 chunks of equal shares: added up in bf16, the sum stops growing once a share is half a unit of it."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    count = 64 * SMALLEST_CHUNK
    hidden = torch.ones(count, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_logprobs(hidden, weight, torch.zeros(count, dtype=torch.int64)).backward(torch.full((count,), 0.9961))
    # d/dw of log softmax at w = 0 is (1/2, -1/2) a token, times 0.9961 (255/256, exact in bf16): +-510 in all.
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [510.0, -510.0]


def entropy_by_hand(hidden: Tensor, weight: Tensor) -> Tensor:
    """-sum p log p with p = exp(logit) / sum exp(logit), as written."""
    odds = (hidden @ weight.T).exp()
    p = odds / odds.sum(1, keepdim=True)
    return -(p * p.log()).sum(1)


def test_entropy_by_hand(assert_close: Callable[..., None]) -> None:
    # (1/2, 1/4, 1/4): (1/2) log 2 + (1/2) log 4 = 1.5 log 2. Uniform over three: log 3. One word almost surely: 0.
    logits = torch.tensor([[2.0, 1.0, 1.0], [7.0, 7.0, 7.0], [1e4, 1.0, 1.0]], dtype=torch.float64)
    logits[:2] = logits[:2].log()
    expected = torch.tensor([1.5 * math.log(2), math.log(3), 0.0], dtype=torch.float64)
    assert_close(token_entropy(logits), expected, rtol=1e-12)
    assert_close(linear_entropy(logits, torch.eye(3, dtype=torch.float64)), expected, rtol=1e-12)
    assert_close(token_entropy(logits.float()), expected.float(), rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "out"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_entropy_is_at_least_fp32(dtype: torch.dtype, out: torch.dtype) -> None:
    hidden, weight, _, grad = inputs(3, dtype)
    entropy = linear_entropy(hidden, weight)
    assert entropy.dtype == token_entropy(hidden @ weight.T).dtype == out
    entropy.backward(grad.to(out))
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == dtype


@pytest.mark.parametrize("count", [1, 15, 16, 17, 48, 50])
@pytest.mark.parametrize("elements", [1, module.CHUNK_ELEMENTS])
def test_entropy_and_its_gradients(
    count: int, elements: int, monkeypatch: pytest.MonkeyPatch, assert_close: Callable[..., None]
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    hidden, weight, _, grad = inputs(count)
    expected = entropy_by_hand(hidden, weight)
    expected_grads = torch.autograd.grad(expected, (hidden, weight), grad)
    for actual in (linear_entropy(hidden, weight), token_entropy(hidden @ weight.T)):
        assert_close(actual, expected, rtol=1e-12)
        for one, other in zip(torch.autograd.grad(actual, (hidden, weight), grad), expected_grads, strict=True):
            assert_close(one, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("count", [0, 1, 18])
def test_gradcheck_of_entropy(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    hidden, weight, _, _ = inputs(count)
    assert torch.autograd.gradcheck(linear_entropy, (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: token_entropy(h @ w.T), (hidden, weight))


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_entropy_gives_what_is_frozen_no_gradient(frozen: str, assert_close: Callable[..., None]) -> None:
    hidden, weight, _, grad = inputs(20)
    expected = torch.autograd.grad(entropy_by_hand(hidden, weight), (hidden, weight), grad)
    (weight if frozen == "weight" else hidden).requires_grad_(False)
    with Shapes() as shapes:
        linear_entropy(hidden, weight).backward(grad)
    if frozen == "weight":
        assert weight.grad is None
        assert weight.shape not in shapes.seen
        assert_close(hidden.grad, expected[0], rtol=1e-9, atol=1e-13)
    else:
        assert hidden.grad is None
        assert_close(weight.grad, expected[1], rtol=1e-9, atol=1e-13)


def test_entropy_holds_a_chunk_of_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens of 200 words in chunks of 20 tokens; the backward pass computes them again."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 20 * 200)
    hidden = torch.randn(64, 2, requires_grad=True)
    weight = torch.randn(200, 2, requires_grad=True)
    saved: list[int] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with Shapes() as shapes:
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            entropy = linear_entropy(hidden, weight)
        entropy.sum().backward()
    assert max(map(math.prod, shapes.seen)) == 20 * 200
    assert sum(saved) == 64 * 2 + 200 * 2 + 64


def test_entropy_leaves_its_inputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    hidden, weight, _, grad = inputs(20)
    before = [t.detach().clone() for t in (hidden, weight, grad)]
    result = linear_entropy(hidden, weight)
    first = torch.autograd.grad(result, (hidden, weight), grad, retain_graph=True)
    second = torch.autograd.grad(result, (hidden, weight), grad)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(now, then) for now, then in zip((hidden, weight, grad), before, strict=True))


def test_entropy_in_bf16_is_close_to_fp32(monkeypatch: pytest.MonkeyPatch, assert_close: Callable[..., None]) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    hidden, weight, _, grad = inputs(200, torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    expected = entropy_by_hand(wide[0], wide[1])
    expected_grads = torch.autograd.grad(expected, wide, grad.float())
    actual = linear_entropy(hidden, weight)
    actual_grads = torch.autograd.grad(actual, (hidden, weight), grad.float())
    assert_close(actual, expected, rtol=0, atol=0.04)  # as for log-probs
    for one, other in zip(actual_grads, expected_grads, strict=True):
        assert one.dtype == torch.bfloat16
        assert_close(one.float(), other, rtol=0, atol=float(0.02 * other.abs().max()))


def test_the_weight_gradient_of_entropy_is_added_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 chunks of equal shares, as for log-probs: in bf16 the sum would stop growing on the way."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    hidden = torch.ones(64 * SMALLEST_CHUNK, 1, dtype=torch.bfloat16)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    linear_entropy(hidden, weight).sum().backward()
    # p = sigmoid(1); dE/dw = -+p (1 - p), since log p - log(1 - p) = 1: 0.19661 a token, 201.3 for 1,024.
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx([-201.3, 201.3], rel=0.01)


def test_entropy_gradients_of_a_flat_distribution(assert_close: Callable[..., None]) -> None:
    """log p + E is about 0.01 where both are 1.1: their difference in bf16, of steps of 0.008, would be noise."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[0.011], [0.0], [-0.007]], dtype=torch.bfloat16, requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = torch.autograd.grad(entropy_by_hand(wide[0], wide[1]), wide)
    actual = torch.autograd.grad(linear_entropy(hidden, weight), (hidden, weight))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one.double(), other, rtol=0.02)
