"""A conversation against answers to its whole prompt; text that comes in pieces; what the commands of chat do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_runs import make_base

from rlhf_pipeline.config.schema import ReadyModelConfig, SamplingConfig, TokenizerConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation import conversation as module
from rlhf_pipeline.generation.conversation import Conversation, Detokenizer
from rlhf_pipeline.generation.decode import generate
from rlhf_pipeline.generation.load import open_renderer
from rlhf_pipeline.models.ready import open_model
from rlhf_pipeline.recipes import chat


class Recorder(chat.Screen):
    """A screen that keeps what it is told."""

    def __init__(self) -> None:
        self.terminal = False
        self.notes: list[str] = []
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = make_base(tmp_path_factory.mktemp("chat") / "base", context=128)
    config = ReadyModelConfig(path=str(folder))
    renderer = open_renderer(config, TokenizerConfig())
    return open_model(config, renderer.tokenizer, "cpu"), renderer


def talk(parts: tuple[Any, Any], **options: Any) -> Conversation:
    settings = {"temperature": 0.0, "max_new_tokens": 12, **options}
    return Conversation(parts[0], parts[1], SamplingConfig(**settings), seed=0)


def expected(parts: tuple[Any, Any], conversation: Conversation) -> str:
    """The greedy answer to all messages, from nothing."""
    model, renderer = parts
    prompt = renderer.encode_prompt(conversation._all(0))
    (answer,) = generate(model, [prompt], SamplingConfig(temperature=0, max_new_tokens=12), end_ids=renderer.end_ids,
                         pad_id=0, seed=0, ids=[0])  # fmt: skip
    return str(renderer.tokenizer.decode(answer.text_tokens, skip_special_tokens=True)).strip()


def test_answers_are_those_to_the_whole_prompt_and_the_cache_is_reused(parts: tuple[Any, Any]) -> None:
    conversation = talk(parts)
    for turn, text in enumerate(("the red cat?", "who sits?", "and then?")):
        said = "".join(conversation.ask(text))
        answer = conversation.messages.pop()
        assert said.strip() == answer.content == expected(parts, conversation)
        if turn:
            whole = len(parts[1].encode_prompt(conversation._all(0)))
            assert 0 < conversation.computed < whole - 8, "only the new part goes through the model"
        conversation.messages.append(answer)
    conversation.system = "be old"
    "".join(conversation.ask("and now?"))
    answer = conversation.messages.pop()
    assert answer.content == expected(parts, conversation), "another beginning: nothing old may be used"


def test_the_oldest_turns_are_left_out_when_the_context_is_full(parts: tuple[Any, Any]) -> None:
    conversation = talk(parts)
    conversation.system = "be red"
    for number in range(9):
        "".join(conversation.ask(f"the old man reads the book number {number}?"))
    assert conversation.left_out > 0 and conversation.left_out % 2 == 0
    seen = conversation._all(conversation.left_out)[:-1]
    prompt = parts[1].encode_prompt(seen)
    assert len(prompt) + 12 <= 128 and seen[0].role == "system"
    earlier = parts[1].encode_prompt(conversation._all(conversation.left_out - 2)[:-1])
    assert len(earlier) + 12 > 128, "no more than needed is left out"


def test_an_answer_as_long_as_the_context_does_not_push_out_short_history(parts: tuple[Any, Any]) -> None:
    conversation = talk(parts, max_new_tokens=500)
    for text in ("the cat?", "who sits?"):
        stream = conversation.ask(text)
        next(stream, None)
        stream.close()
        assert conversation.left_out == 0


def test_a_message_longer_than_the_context_is_refused_and_forgotten(parts: tuple[Any, Any]) -> None:
    conversation = talk(parts)
    "".join(conversation.ask("the cat?"))
    with pytest.raises(UserError, match="context is 128"):
        "".join(conversation.ask("red " * 400))
    assert len(conversation.messages) == 2
    "".join(conversation.ask("the cat?"))


def test_retry_draws_another_answer_and_undo_forgets(parts: tuple[Any, Any]) -> None:
    conversation = talk(parts, temperature=1.0)
    first = "".join(conversation.ask("the red cat?"))
    second = "".join(conversation.retry())
    assert first != second and len(conversation.messages) == 2
    again = talk(parts, temperature=1.0)
    assert "".join(again.ask("the red cat?")) == first, "the seed decides"
    conversation.undo()
    assert not conversation.messages
    with pytest.raises(UserError, match="nothing to answer"):
        "".join(conversation.retry())


def test_stopping_keeps_what_was_said_and_the_next_answer_is_right(
    parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation, screen = talk(parts), Recorder()
    whole = "".join(talk(parts).ask("the red cat?"))
    forward, calls = Conversation._forward, []

    def interrupted(self: Conversation, tokens: list[int]) -> torch.Tensor:
        calls.append(tokens)
        logits = forward(self, tokens)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(Conversation, "_forward", interrupted)
    assert chat.turn("the red cat?", conversation, screen)
    assert screen.text.endswith(" ...\n")
    said = conversation.messages[-1].content
    assert said and whole.strip().startswith(said) and len(said) < len(whole.strip())
    monkeypatch.setattr(Conversation, "_forward", forward)
    "".join(conversation.ask("who sits?"))
    answer = conversation.messages.pop()
    assert answer.content == expected(parts, conversation)


def test_an_empty_answer_leaves_no_turn(parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def ends_at_once(self: Conversation, prompt: list[int], count: int) -> Iterator[int]:
        yield from ()

    monkeypatch.setattr(module.Conversation, "_tokens", ends_at_once)
    conversation, screen = talk(parts), Recorder()
    chat.turn("the red cat?", conversation, screen)
    assert conversation.messages == [] and "answers nothing" in screen.notes[0]


def test_commands(parts: tuple[Any, Any], tmp_path: Path) -> None:
    conversation, screen = talk(parts), Recorder()
    file = tmp_path / "saved.jsonl"
    for line in (
        "/system be old",
        "the red cat?",
        f"/save {file}",
        " /exit",
        f"/save {file}",
        "/undo",
        "/nothing",
        "/help",
    ):
        assert chat.turn(line, conversation, screen)
    one, two = (json.loads(line)["messages"] for line in file.read_text().splitlines())
    assert [m["role"] for m in one] == ["system", "user", "assistant"]
    assert two[:3] == one and two[3] == {"role": "user", "content": "/exit"}
    assert len(conversation.messages) == 2
    assert any("/nothing: no such command" in note for note in screen.notes)
    chat.turn("/reset", conversation, screen)
    assert conversation.messages == [] and conversation.system == "be old"
    with pytest.raises(UserError, match="no answer to save"):
        chat.turn(f"/save {file}", conversation, screen)
    with pytest.raises(UserError, match="cannot be written"):
        conversation.messages = [module.Message("user", "a"), module.Message("assistant", "b")]
        chat.turn(f"/save {tmp_path}/none/x", conversation, screen)
    assert not chat.turn("/exit", conversation, screen)


def test_what_a_model_writes_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    chat.Screen.write(Recorder(), "a\x1b[2Jb\n\tc")
    assert capsys.readouterr().out == "a\\x1b[2Jb\n\tc"


TEXTS = ["the red cat", " Ünïcödé 🦊 日本語 ends", "a\n\n  b   c ", "🦊🦊", "x"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_byte_level_tokenizer_are_the_whole_text(parts: tuple[Any, Any], text: str) -> None:
    tokenizer = parts[1].tokenizer
    said = Detokenizer(tokenizer)
    pieces = [said.add(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) + said.end() == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", ["the red cat", "a b  c", "the cat 🦊 sits"])
def test_pieces_of_a_sentencepiece_tokenizer_keep_their_spaces(text: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁the", "▁red", "▁cat", "▁a", "▁b", "▁c", "▁", "▁sits", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids: list[int] = []
    for word in text.replace("  ", " _").split(" "):
        fox = [words.index(f"<0x{byte:02X}>") for byte in "🦊".encode()]
        ids += {"🦊": [words.index("▁"), *fox]}.get(word) or (
            [words.index("▁"), words.index("▁" + word[1:])] if word[0] == "_" else [words.index("▁" + word)]
        )
    said = Detokenizer(tokenizer)
    assert "".join(said.add(token) for token in ids) + said.end() == tokenizer.decode(ids) == text


def test_bytes_that_are_no_character_do_not_wait_for_ever(parts: tuple[Any, Any]) -> None:
    tokenizer = parts[1].tokenizer
    torn = tokenizer.encode("🦊", add_special_tokens=False)[:1]
    said = Detokenizer(tokenizer)
    pieces = [said.add(token) for token in torn * 6]
    assert any(pieces[:4])
    assert np.all([isinstance(piece, str) for piece in pieces])
