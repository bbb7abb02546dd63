"""The sampling loop against `model.generate`, a plain loop without a cache, and itself in other batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_pipeline.config.schema import SamplingConfig
from rlhf_pipeline.generation import decode
from rlhf_pipeline.generation.cache import Family
from rlhf_pipeline.generation.decode import Completion, Question, batches, closed_up, completions, generate
from rlhf_pipeline.models import path_attention

WINDOW: dict[str, Any] = {"sliding_window": 5}
GEMMA: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
# Families whose layers all attend run in slots; the others in transformers' own cache, in rows of one length.
SLOTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen3", {}),
    ("gpt2", {}),
    ("gpt_neox", {"num_key_value_heads": 2}),
    ("mistral", WINDOW),
    ("gemma2", GEMMA),
    ("gemma3_text", GEMMA),
    ("phi3", {}),
    ("falcon", {}),
]
GROWN: list[tuple[str, dict[str, Any]]] = [("bloom", {}), ("mpt", {}), ("gpt_neo", {}), ("mamba", {})]
END = tuple(range(3, 97, 12))
LENGTHS = (1, 9, 4, 17, 9, 2, 12)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(4, 50, n).astype(np.int32) for n in lengths]


def ask(model: Any, given: list[np.ndarray], seed: int = 0, **options: Any) -> list[Completion]:
    settings = {"temperature": 0.0, "max_new_tokens": 24, **options}
    return generate(
        model,
        given,
        SamplingConfig(**settings),
        end_ids=END,
        pad_id=0,
        seed=seed,
        ids=[100 + i for i in range(len(given))],
    )


def plain(model: Any, prompt: np.ndarray, count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens by a whole forward for each, and how far ahead of the second each one was."""
    tokens, leads = [int(t) for t in prompt], []
    with torch.no_grad():
        for _ in range(count):
            best = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            leads.append(float(best.values[0] - best.values[1]))
            if tokens[-1] in END:
                break
    return tokens[len(prompt) :], leads


@pytest.mark.parametrize(("family", "config"), SLOTS + GROWN, ids=lambda v: v if isinstance(v, str) else "")
def test_greedy_answers_of_mixed_lengths_are_those_of_a_plain_loop(
    tiny_model: Callable[..., Any], family: str, config: dict[str, Any]
) -> None:
    model = tiny_model(
        family,
        attention="eager" if (family, config) in GROWN or family == "gemma2" else "sdpa",
        tie_word_embeddings=False,
        **config,
    ).eval()
    assert Family(model).slots == ((family, config) in SLOTS)
    given = prompts()
    found = ask(model, given)
    for prompt, answer in zip(given, found, strict=True):
        expected, leads = plain(model, prompt, 24)
        assert min(leads) > 1e-4, "the test's model is undecided; choose another seed"
        assert answer.tokens.tolist() == expected
        assert answer.finish == ("stop" if expected[-1] in END else "length")
        assert answer.text_tokens.tolist() == [t for t in expected if t not in END]
    assert len({len(answer.tokens) for answer in found}) > 1, "no row left the batch"


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {}), ("qwen3", {}), ("gpt2", {}), ("gemma3_text", GEMMA), ("mistral", WINDOW)],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_greedy_answers_are_those_of_transformers(
    tiny_model: Callable[..., Any], family: str, config: dict[str, Any]
) -> None:
    model = tiny_model(family, **config).eval()
    for prompt, answer in zip(prompts(), ask(model, prompts()), strict=True):
        theirs = model.generate(
            input_ids=torch.from_numpy(prompt.astype(np.int64))[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=list(END),
            pad_token_id=0,
        )
        assert answer.tokens.tolist() == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("family", "config"), [SLOTS[0], SLOTS[2], SLOTS[6], GROWN[0]], ids=lambda v: str(v)[:8])
def test_a_sampled_answer_does_not_depend_on_its_batch(
    tiny_model: Callable[..., Any], family: str, config: dict[str, Any]
) -> None:
    attention = "eager" if (family, config) in GROWN else "sdpa"
    model = tiny_model(family, attention=attention, dtype=torch.float64, **config)
    given = prompts()
    together = ask(model, given, temperature=1.0, samples=3)
    assert len({tuple(one.tokens) for one in together}) > len(given), "samples of a prompt are all the same"
    in_small_batches = ask(model, given, temperature=1.0, samples=3, batch_tokens=90)
    for one, other in zip(together, in_small_batches, strict=True):
        assert (one.id, one.sample) == (other.id, other.sample)
        np.testing.assert_array_equal(one.tokens, other.tokens)
    question = Question(prompt=given[3], id=103, samples=(2,))
    options = SamplingConfig(max_new_tokens=24, samples=3)
    ((alone,),) = completions(model, [question], options, end_ids=END, pad_id=0, seed=0)
    np.testing.assert_array_equal(alone.tokens, together[3 * 3 + 2].tokens)
    np.testing.assert_allclose(alone.logprobs, together[3 * 3 + 2].logprobs, atol=1e-6)
    assert any(
        a.tokens.tolist() != b.tokens.tolist()
        for a, b in zip(together, ask(model, given, seed=1, temperature=1.0, samples=3), strict=True)
    )


def test_logprobs_are_those_of_one_forward_over_the_answer(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").eval()
    for temperature in (1.0, 0.7):
        for prompt, answer in zip(prompts(), ask(model, prompts(), temperature=temperature), strict=True):
            path = torch.tensor([[*prompt.tolist(), *answer.tokens.tolist()]])
            with torch.no_grad():
                logits = model(input_ids=path).logits[0, len(prompt) - 1 : -1] / temperature
            expected = logits.log_softmax(-1).gather(1, path[0, len(prompt) :, None])[:, 0]
            np.testing.assert_allclose(answer.logprobs, expected.numpy(), atol=2e-5)


def test_rows_leave_at_every_share_and_the_answers_stay(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gemma3_text", dtype=torch.float64, **GEMMA)
    seen = []
    for share in (0.0001, 0.25, 2.0):  # at once, as shipped, never
        monkeypatch.setattr(decode, "LEAVE", share)
        seen.append(
            [one.tokens.tolist() for one in ask(model, prompts(), temperature=1.0, samples=4, repetition_penalty=1.3)]
        )
    assert seen[0] == seen[1] == seen[2]
    assert len({len(tokens) for tokens in seen[0]}) > 5


def test_repetition_penalty_and_least_length_reach_the_loop(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").eval()
    penalised = ask(model, prompts(), repetition_penalty=1e6, max_new_tokens=12)
    for prompt, answer in zip(prompts(), penalised, strict=True):
        every = [*prompt.tolist(), *answer.tokens.tolist()]
        assert len(set(answer.tokens.tolist())) == len(answer.tokens)
        assert not set(answer.tokens.tolist()) & set(prompt.tolist()), every
    lengths = [len(one.tokens) for one in ask(model, prompts(), temperature=1.0, samples=8)]
    assert min(lengths) < 6
    at_least = ask(model, prompts(), temperature=1.0, samples=8, min_new_tokens=6)
    assert min(len(one.tokens) for one in at_least) >= 7  # six and the end token
    assert all(not set(one.tokens[:6].tolist()) & set(END) for one in at_least)


def test_an_answer_ends_where_the_context_does(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2", n_positions=20).eval()
    found = generate(model, prompts((20, 14, 3)), SamplingConfig(temperature=0, max_new_tokens=9), end_ids=(96,),
                     pad_id=0, seed=0, ids=range(3))  # fmt: skip
    assert [len(one.tokens) for one in found] == [0, 6, 9]
    assert [one.finish for one in found] == ["length"] * 3


def test_the_model_is_left_as_it_was(tiny_model: Callable[..., Any]) -> None:
    path_attention.register()
    model = tiny_model("llama", attention_dropout=0.5).train()
    expected = [one.tokens.tolist() for one in ask(model.eval(), prompts())]
    model.train()
    for attention in ("sdpa", "eager", "flex_attention", path_attention.NAME):
        model.set_attn_implementation(attention)
        torch.manual_seed(5)
        found = ask(model, prompts())
        assert torch.initial_seed() == 5 and torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
        assert [one.tokens.tolist() for one in found] == expected, attention
        assert model.training and model.config._attn_implementation == attention
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_number_of_forwards_is_that_of_the_longest_answer(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").eval()
    calls: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = ask(model, prompts(), temperature=1.0, samples=4)
    handle.remove()
    # Seven prompts, of which one is a single token; the last token of each is the loop's.
    assert calls[0] == (6, 16), "samples of a prompt share its prefill"
    assert calls[1] == (28, 1)
    assert len(calls) == 1 + max(len(one.tokens) for one in found)
    assert [rows for rows, _ in calls[1:]] == sorted((rows for rows, _ in calls[1:]), reverse=True)
    assert calls[-1][0] < 28


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_model_is_told(tiny_model: Callable[..., Any], bad: float, temperature: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(bad)
    with pytest.raises(Exception, match="not finite"):
        ask(model, prompts(), temperature=temperature)


def test_batches_stay_within_their_tokens() -> None:
    options = SamplingConfig(max_new_tokens=10, batch_tokens=60)
    questions = [Question(prompt=p, id=i, samples=(0, 1, 2)) for i, p in enumerate(prompts((5, 70, 15, 2, 10)))]
    found = batches(questions, options)
    # widths 80 (one row at a time), 25 (two rows), 20 (three), 15 and 12 (four and five rows)
    assert [[(q.id, q.samples) for q in batch] for batch in found] == [
        [(1, (0,))],
        [(1, (1,))],
        [(1, (2,))],
        [(2, (0, 1))],
        [(2, (2,))],
        [(4, (0, 1, 2))],
        [(0, (0, 1, 2))],
        [(3, (0, 1, 2))],
    ]
    same = [Question(prompt=p, id=i) for i, p in enumerate(prompts((4, 3, 4, 3)))]
    assert [[q.id for q in batch] for batch in batches(same, SamplingConfig(), equal=True)] == [[0, 2], [1, 3]]


def test_prompts_go_through_the_model_in_chunks_of_similar_length(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gemma3_text", dtype=torch.float64, **GEMMA)
    whole = [one.tokens.tolist() for one in ask(model, prompts(), temperature=1.0, samples=2)]
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 20)
    calls: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    assert [one.tokens.tolist() for one in ask(model, prompts(), temperature=1.0, samples=2)] == whole
    # lengths 17, 12, 9, 9, 4, 2, 1 without their last tokens
    assert calls[:5] == [(1, 16), (1, 11), (2, 8), (2, 3), (14, 1)]


def test_rows_close_up_with_few_copies() -> None:
    alive = np.array([True, False, True, True, False, True, False])
    assert closed_up(alive).tolist() == [0, 5, 2, 3]  # only row 5 moves
    assert closed_up(np.array([True, True, False])).tolist() == [0, 1]
    assert closed_up(np.array([False, False, True])).tolist() == [2]
