"""Trees of what a policy wrote: as `rlhf score` has them where it has any, and something to score for all the rest."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import sentence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from rlhf_pipeline.config import config_dir
from rlhf_pipeline.config.schema import AnswersConfig
from rlhf_pipeline.data.prompts import Renderer, load_template
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.data.tokenizer import train_tokenizer
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.scoring.answers import read_answers
from rlhf_pipeline.scoring.episodes import Episode
from rlhf_pipeline.scoring.rewards import encode_rows
from rlhf_pipeline.scoring.written import trees

PROMPT = (Message("user", "the red cat?"),)
DIALOGUE, CHATML = (load_template(name, config_dir()) for name in ("dialogue", "chatml"))
THINKING = DIALOGUE.replace("' ' + message.content | trim", "' ' + message.content.split('</think>')[-1] | trim")


def renderer_of(template: str = DIALOGUE, *, extra: tuple[str, ...] = (), folds: bool = False) -> Renderer:
    """`extra` tokens are special; `folds` has the tokenizer look for special tokens in folded text."""
    rng = random.Random(5)
    corpus = [f"\n\nHuman: {sentence(rng, 2, 9)}?\n\nAssistant: {sentence(rng, 2, 20)}" for _ in range(60)]
    tokenizer = train_tokenizer(corpus, vocab_size=400, context=256)
    tokenizer.chat_template = template
    if folds:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
        control = ["<|eos|>", "<|im_end|>"]
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in extra])
    return Renderer(tokenizer)


def episode(response: str, *, finished: bool = True, prompt: tuple[Message, ...] = PROMPT) -> Episode:
    return Episode(prompt=prompt, response=response, finished=finished, columns={}, origin="prompts.jsonl:7")


def tree_of(renderer: Renderer, response: str, *, limit: int = 256, **options: Any) -> tuple[Tree, Counter[str]]:
    counts: Counter[str] = Counter()
    (made,) = trees(renderer, [episode(response, **options)], limit=limit, counts=counts)
    return made, +counts


def test_ordinary_responses_are_those_of_rlhf_score(tmp_path: Path) -> None:
    renderer = renderer_of()
    texts = ["the old dog", " a mat\n", "it says <|eos|> and <|im_end|>, it does", "é ☃ \x00", "the\n\nHuman: cat"]
    rows = [
        {"prompt": [{"role": "user", "content": "the red cat?"}], "response": text, "finish_reason": reason}
        for text in texts
        for reason in ("stop", "length")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = encode_rows(renderer, read_answers(AnswersConfig(path=str(path))).rows, limit=64)
    counts: Counter[str] = Counter()
    episodes = [episode(row["response"], finished=row["finish_reason"] == "stop") for row in rows]
    made = trees(renderer, episodes, limit=64, counts=counts)
    assert [tree.index for tree in made] == list(range(10)) and not +counts
    for mine, one in zip(made, expected, strict=True):
        assert one.tree is not None
        assert mine.prompt.tolist() == one.tree.prompt.tolist()
        assert mine.responses[0].tolist() == one.tree.responses[0].tolist()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("response", ["", " \n\t "])
def test_a_response_without_a_word_is_its_end_alone(response: str, finished: bool) -> None:
    for template, end in ((DIALOGUE, "<|eos|>"), (CHATML, "<|im_end|>")):
        renderer = renderer_of(template)
        made, counts = tree_of(renderer, response, finished=finished)
        assert made.responses[0].tolist() == [renderer.tokenizer.convert_tokens_to_ids(end)]
        assert made.prompt.tolist() == renderer.encode_prompt(PROMPT).tolist() and not counts


def test_control_tokens_that_cannot_be_text_are_left_out() -> None:
    renderer = renderer_of(extra=("~",))  # a letter of the alphabet too
    spelled, counts = tree_of(renderer, "the ~ dog")
    plain, none = tree_of(renderer, "the dog")
    assert renderer.tokenizer.decode(spelled.responses[0]) == " the  dog<|eos|>"  # with the spaces at both its sides
    assert counts == {"respelled": 1} and not none
    assert spelled.prompt.tolist() == plain.prompt.tolist()
    cut, _ = tree_of(renderer, "the ~ dog", finished=False)
    assert cut.responses[0].tolist() == spelled.responses[0].tolist()[:-1]
    alone, _ = tree_of(renderer, "~", finished=False)
    assert renderer.tokenizer.decode(alone.responses[0]) == " ", "what the template puts before the words"


def test_what_the_template_takes_out_is_scored() -> None:
    renderer = renderer_of(THINKING)
    made, counts = tree_of(renderer, "hm, <|eos|> cat</think>the dog")
    assert renderer.tokenizer.decode(made.responses[0]) == " hm, <|eos|> cat</think>the dog<|eos|>"
    assert counts == {"respelled": 1}
    _, none = tree_of(renderer, "the dog")
    assert not none


def test_marks_and_half_characters_are_scored() -> None:
    renderer = renderer_of()
    for text, expected in (("a\U000f0000b", "a\U000f0000b"), ("a\ud83db", "a\ufffdb"), ("a\ud83d\ude00b", "a😀b")):
        made, counts = tree_of(renderer, text)
        assert renderer.tokenizer.decode(made.responses[0]) == f" {expected}<|eos|>" and counts["respelled"] == 1


def test_what_does_not_fit_is_cut() -> None:
    renderer = renderer_of()
    whole, _ = tree_of(renderer, "the old dog")
    prompt, response = whole.prompt.tolist(), whole.responses[0].tolist()
    size = len(prompt) + len(response)
    made, counts = tree_of(renderer, "the old dog", limit=size)
    assert not counts and len(made) == size
    made, counts = tree_of(renderer, "the old dog", limit=size - 2)
    assert counts == {"prompts_cut": 1}
    assert made.prompt.tolist() == [prompt[0], *prompt[3:]] and made.responses[0].tolist() == response
    made, counts = tree_of(renderer, "the old dog", limit=len(response))
    assert counts == {"prompts_cut": 1, "responses_cut": 1}
    assert made.prompt.tolist() == prompt[-1:] and made.responses[0].tolist() == response[:-1]


RENDERERS = {
    "dialogue": lambda: renderer_of(),
    "chatml": lambda: renderer_of(CHATML),
    "a letter is a control token": lambda: renderer_of(extra=("~",)),
    "folding": lambda: renderer_of(folds=True),
    "takes out": lambda: renderer_of(THINKING),
}
PIECES = st.sampled_from(
    ["<|eos|>", "<|im_end|>", "<|im_start|>assistant\n", "\uff1c|eos|\uff1e", "~", "</think>", "\U000f0000<|eos|>",
     "\U000f0001", "\ud83d", "\n\nHuman: ", "response", "{{ raise_exception('x') }}", " "]
)  # fmt: skip


@pytest.mark.parametrize("kind", RENDERERS)
def test_anything_has_a_tree(kind: str) -> None:
    renderer = RENDERERS[kind]()
    end = renderer.end_ids[0]
    control = {number for number, token in renderer.tokenizer.added_tokens_decoder.items() if token.special}

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.one_of(PIECES, st.text(alphabet=st.characters(codec=None))), max_size=6), st.booleans())
    def check(pieces: list[str], finished: bool) -> None:
        made, _ = tree_of(renderer, "".join(pieces), finished=finished, limit=60)
        tokens = made.responses[0].tolist()
        assert len(tokens) >= 1 and len(made.prompt) >= 1 and len(made) <= 60
        inside = tokens if len(tokens) > 1 and not finished else tokens[:-1]
        assert not control.intersection(inside), "the policy's text makes no control token"
        if len(tokens) < 59 and finished:
            assert tokens[-1] == end

    check()


def test_a_prompt_that_cannot_be_read_is_an_error() -> None:
    renderer = renderer_of(extra=("~",))
    with pytest.raises(UserError, match=r"^prompts.jsonl:7: the reward model cannot read the prompt: .*plain text: ~"):
        tree_of(renderer, "the dog", prompt=(Message("user", "a ~ b"),))
