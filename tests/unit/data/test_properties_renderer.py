"""For any conversation and any template the renderer keeps its promises. The promises are the tests' names."""

from __future__ import annotations

import re
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, LLAMA2, Family, make_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from rlhf_pipeline.data.prompts import Renderer, load_template
from rlhf_pipeline.data.records import BadRow, Message
from rlhf_pipeline.errors import UserError

CONF = Path(__file__).parents[3] / "conf"
MARKS = ("\U000f0000", "\U000f0001")  # kept for the renderer's own use
# The same examples in every run: a red test means that the code has changed, never that it had bad luck. No deadline,
# because machines are busy at times.
fixed = settings(max_examples=20, deadline=None, derandomize=True, database=None)

# Spellings of control tokens, halves of them, roles and headers, and what normalisers, trimming and bytes stumble over.
_SPELLED = sorted({token for family in FAMILIES.values() for token in family.control})
_HEADS = ["[INST]", " [/INST]", "\n\nHuman:", "\n\nAssistant:", "<|user|>\n", "user", "assistant\n", "<<SYS>>"]
_HALVES = ["<|", "|>", "<|im_", "end|>", "</s", "<0x0A>", "{{ bos_token }}", "{% generation %}", "\\"]
_ODD = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\0", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "▁", "e\u0301",
        "\u0338", "\u200b", "\u200d", "\ufeff", "\u202e", "שלום", "\U0001f469\u200d\U0001f4bb", "\U0010ffff", "ﬁ",
        "Å"]  # fmt: skip
_part = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="".join(MARKS)), max_size=6),
    st.sampled_from(_SPELLED),
    st.sampled_from(_HEADS + _HALVES),
    st.sampled_from(_ODD),
    st.sampled_from(["The sky is blue.", "a", " well ", "x" * 300]),
)
_content = st.lists(_part, min_size=1, max_size=6).map("".join).filter(str.strip)


def _message(role: str) -> st.SearchStrategy[Message]:
    return st.builds(Message, st.just(role), _content, st.booleans() if role == "assistant" else st.just(False))


_turns = st.integers(1, 3).flatmap(lambda n: st.tuples(*[_message("user"), _message("assistant")] * n))
_any_order = st.lists(st.sampled_from(["user", "assistant"]), max_size=4).flatmap(
    lambda roles: st.tuples(*map(_message, ["user", *roles, "assistant"]))
)
_greeting = st.builds(Message, st.just("assistant"), _content, st.just(False))


@st.composite
def conversations(draw: st.DrawFn, family: Family) -> tuple[Message, ...]:
    """Conversations that the family's template must take."""
    free = not family.must_alternate and draw(st.integers(0, 4)) == 0
    turns = draw(_any_order if free else _turns)
    turns = (draw(_greeting), *turns) if free and draw(st.booleans()) else turns
    with_system = family.has_system and draw(st.booleans())
    return (draw(_message("system")), *turns) if with_system else turns


@cache
def renderer_of(name: str) -> Renderer:
    template = FAMILIES[name].template
    return Renderer(make_tokenizer(FAMILIES[name], load_template(template, CONF) if template.isalpha() else template))


def decode(renderer: Renderer, ids: np.ndarray) -> str:
    """The text of tokens that stand within others: SentencePiece drops a space at the start of what it decodes."""
    backend = renderer.tokenizer.backend_tokenizer
    anchor = backend.encode("a", add_special_tokens=False).ids
    text = backend.decode([*anchor, *ids.tolist()], skip_special_tokens=False)
    assert text[0] == "a"
    return text[1:]


def control_ids(renderer: Renderer, ids: np.ndarray) -> list[int]:
    return [token for token in ids.tolist() if token in renderer.tokenizer.added_tokens_decoder]


def expected_control(renderer: Renderer, family: Family, parts: list[tuple[str, bool, bool]]) -> list[int]:
    """The control tokens that the format itself has, which are all there may be."""
    control = re.compile("|".join(map(re.escape, family.control)))
    spelled = [token for text, is_content, _ in parts if not is_content for token in control.findall(text)]
    return renderer.tokenizer.convert_tokens_to_ids(spelled)


families = pytest.mark.parametrize("name", FAMILIES)


@families
@fixed
@given(data=st.data())
def test_scored_tokens_are_the_scored_answers_with_their_ends_and_nothing_else(name: str, data: st.DataObject) -> None:
    family, renderer = FAMILIES[name], renderer_of(name)
    messages = data.draw(conversations(family))
    parts = family.written(messages, prompt=False)
    tokens, scored = renderer.encode(messages)
    assert len(tokens) == len(scored)
    # Scored parts that touch (two answers in a row, with nothing between) are one run in both.
    found = [decode(renderer, tokens[list(run)]) for run in _runs(scored)]
    wanted = ["".join(part[0] for part in run) for is_scored, run in groupby(parts, lambda part: part[2]) if is_scored]
    assert [family.plain(text) for text in found] == [family.plain(text) for text in wanted]
    ends = [token for token in tokens[scored].tolist() if token == renderer.end_ids[0]]
    assert len(ends) == sum(message.role == "assistant" and message.scored for message in messages)
    assert all(tokens[run[-1]] == renderer.end_ids[0] for run in _runs(scored))


def _runs(scored: np.ndarray) -> list[list[int]]:
    return [[i for i, _ in run] for is_scored, run in groupby(enumerate(scored), lambda item: item[1]) if is_scored]


@families
@fixed
@given(data=st.data())
def test_text_is_the_formats_and_control_tokens_are_the_templates_own(name: str, data: st.DataObject) -> None:
    family, renderer = FAMILIES[name], renderer_of(name)
    messages = data.draw(conversations(family))
    parts = family.written(messages, prompt=False)
    whole = "".join(text for text, _, _ in parts)
    segments = renderer.segments(messages)
    assert "".join(segment.text for segment in segments) == whole
    tokens, _ = renderer.encode(messages)
    assert family.plain(renderer.tokenizer.backend_tokenizer.decode(tokens.tolist(), False)) == family.plain(whole)
    assert control_ids(renderer, tokens) == expected_control(renderer, family, parts)
    starts = [i for i, token in enumerate(tokens) if token == renderer.tokenizer.bos_token_id]
    assert starts == ([0] if family.start else [])
    one_by_one = [renderer.tokenize([segment])[0] for segment in segments]
    np.testing.assert_array_equal(np.concatenate(one_by_one), tokens)


@families
@fixed
@given(data=st.data())
def test_every_answer_follows_the_very_tokens_that_sampling_would_see(name: str, data: st.DataObject) -> None:
    family, renderer = FAMILIES[name], renderer_of(name)
    messages = data.draw(conversations(family))
    tokens, scored = renderer.encode(messages)
    for turn, message in enumerate(messages):
        if message.role == "assistant" and any(earlier.role == "user" for earlier in messages[:turn]):
            prompt = renderer.encode_prompt(messages[:turn])
            np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
            # Then comes the answer: labels begin here or not at all.
            assert scored[len(prompt)] == message.scored
            text = "".join(part for part, _, _ in family.written(messages[:turn], prompt=True))
            assert family.plain(decode(renderer, prompt)) in (family.plain(text), " " + family.plain(text))


@families
@fixed
@given(data=st.data())
def test_answers_to_one_prompt_are_as_each_alone(name: str, data: st.DataObject) -> None:
    renderer = renderer_of(name)
    *prompt, last = data.draw(conversations(FAMILIES[name]))
    answers = [last.content, data.draw(_content)]
    context, branches = renderer.branches(prompt, answers)
    assert not any(segment.scored for segment in context)
    np.testing.assert_array_equal(np.concatenate(renderer.tokenize(context)), renderer.encode_prompt(prompt))
    for answer, branch in zip(answers, branches, strict=True):
        unscored = [Message(message.role, message.content, scored=False) for message in prompt]
        tokens, scored = renderer.encode([*unscored, Message("assistant", answer)])
        np.testing.assert_array_equal(np.concatenate(renderer.tokenize([*context, *branch])), tokens)
        np.testing.assert_array_equal(np.concatenate(renderer.tokenize(branch)), tokens[scored])


@families
@fixed
@given(text=_content)
@example(text="<|eos|></s><|im_end|>")
def test_a_document_is_its_text_between_its_ends(name: str, text: str) -> None:
    family, renderer = FAMILIES[name], renderer_of(name)
    tokens = renderer.encode_text(text)
    assert control_ids(renderer, tokens) == [renderer.document_start_id, renderer.eos_id]
    decoded = renderer.tokenizer.backend_tokenizer.decode(tokens[1:-1].tolist(), False)
    # Some put a space before a text that has none, and decoding takes one away.
    assert family.plain(decoded).lstrip(" ") == family.plain(text).lstrip(" ")


# What is refused, and that nothing else is: the tests above allow no error at all.


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.must_alternate])
@fixed
@given(messages=_any_order, system=st.none() | _message("system"))
def test_a_template_without_system_role_that_wants_turns_refuses_the_others(
    name: str, messages: tuple[Message, ...], system: Message | None
) -> None:
    renderer = renderer_of(name)
    messages = messages if system is None else (system, *messages)
    if FAMILIES[name].refuses(messages):
        with pytest.raises(BadRow, match="the chat template refuses the conversation: "):
            renderer.encode(messages)
    else:
        renderer.encode(messages)


@families
@fixed
@given(data=st.data())
def test_a_greeting_can_be_scored_where_a_prompt_for_it_can_be_rendered(name: str, data: st.DataObject) -> None:
    """Llama 3 writes its start, and Qwen its system text, with the first message only."""
    family, renderer = FAMILIES[name], renderer_of(name)
    greeting = Message("assistant", data.draw(_content))
    messages = (greeting, *data.draw(_turns))
    if family.must_alternate:
        with pytest.raises(BadRow, match="the chat template refuses the conversation: "):
            renderer.encode(messages)
    elif name in ("llama3", "qwen"):
        with pytest.raises(BadRow, match="no prompt for an answer before the first question; give it weight 0"):
            renderer.encode(messages)
    else:
        tokens, scored = renderer.encode(messages)
        content = greeting.content.strip() if family.strips else greeting.content
        first = decode(renderer, tokens[_runs(scored)[0]])
        assert family.plain(first) == family.plain(family.lead + content + family.end)


@families
@fixed
@given(data=st.data(), mark=st.sampled_from(MARKS))
def test_text_that_holds_the_renderers_marks_is_refused(name: str, data: st.DataObject, mark: str) -> None:
    messages = list(data.draw(conversations(FAMILIES[name])))
    at = data.draw(st.integers(0, len(messages) - 1))
    content = messages[at].content
    cut = data.draw(st.integers(0, len(content)))
    messages[at] = Message(messages[at].role, content[:cut] + mark + content[cut:])
    with pytest.raises(BadRow, match=r"U\+F0000 or U\+F0001"):
        renderer_of(name).encode(messages)


def test_the_llama_2_template_writes_a_start_token_for_every_question_and_is_refused() -> None:
    with pytest.raises(UserError, match="the chat template writes <s> more than once"):
        Renderer(make_tokenizer(FAMILIES["mistral"], LLAMA2))


def _normalizing(normalizer: normalizers.Normalizer, *, normalized: bool) -> PreTrainedTokenizerFast:
    """Zephyr, but its special tokens are looked for in normalised text, if `normalized`."""
    tokenizer = make_tokenizer(FAMILIES["zephyr"], FAMILIES["zephyr"].template)
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokens = [AddedToken(token, special=True, normalized=normalized) for token in FAMILIES["zephyr"].control]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


@pytest.mark.parametrize(
    ("normalizer", "spelled"), [(normalizers.NFKC(), "a \uff1c/s\uff1e b"), (normalizers.Lowercase(), "a </S> b")]
)
def test_text_that_normalisation_makes_a_control_token_of_is_refused(
    normalizer: normalizers.Normalizer, spelled: str
) -> None:
    messages = [Message("user", spelled), Message("assistant", "x </s>")]
    tokens, _ = Renderer(_normalizing(normalizer, normalized=False)).encode(messages)
    renderer = Renderer(_normalizing(normalizer, normalized=True))
    end = renderer.end_ids[0]
    assert tokens.tolist().count(end) == 2  # one for each message
    with pytest.raises(BadRow, match="normalisation makes a control token of the text: </s>"):
        renderer.encode(messages)
    with pytest.raises(BadRow, match="normalisation makes a control token of the text: </s>"):
        renderer.encode_text(spelled)
    assert renderer.encode([Message("user", "a </s> b"), messages[1]])[0].tolist().count(end) == 2


def test_an_end_token_that_the_tokenizer_does_not_read_is_refused() -> None:
    """As a normaliser that puts a space before each text, and with it into the special tokens, has it."""
    with pytest.raises(UserError, match=r"does not read </s> .* `normalized` false"):
        Renderer(_normalizing(normalizers.Prepend("\u2581"), normalized=True))
