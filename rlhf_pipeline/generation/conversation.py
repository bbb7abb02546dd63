"""A conversation with a model, answered token by token. What stays the same from turn to turn is computed once."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from rlhf_pipeline.config.schema import SamplingConfig
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.records import BadRow, Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.cache import Family
from rlhf_pipeline.generation.decode import sampling_mode
from rlhf_pipeline.generation.draw import draw, uniforms

LONGEST_CHARACTER = 4  # tokens, of one byte each


class Detokenizer:
    """Text of tokens as they come; what is not yet a whole character waits.

    Tokens are decoded together with those before them, for some tokenizers drop the space of a first word.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = self._done = 0  # decoding starts at the first; up to the second the text is out

    def add(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        self._tokens.append(token)
        return self._next(last=False)

    def end(self) -> str:
        """What still waits."""
        return self._next(last=True)

    def _next(self, *, last: bool) -> str:
        before = self._decode(self._tokens[self._context : self._done])
        text = self._decode(self._tokens[self._context :])
        waits = text.endswith("\ufffd") and len(self._tokens) - self._done < LONGEST_CHARACTER
        if len(text) <= len(before) or (waits and not last):
            return ""
        self._context, self._done = self._done, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Conversation:
    """Messages so far, and the model's keys and values of their tokens."""

    def __init__(self, model: Any, renderer: Renderer, options: SamplingConfig, *, seed: int) -> None:
        self.model, self.renderer, self.options, self.seed = model, renderer, options, seed
        self.messages: list[Message] = []
        self.system: str | None = None
        self.left_out = 0  # messages that the last answer could not see any more
        self.computed = 0  # tokens that went through the model for the last answer, before its first
        self._family = Family(model)
        self._device = next(model.parameters()).device
        self._cached: list[int] = []  # tokens whose keys and values the cache holds
        self._attempt = 0
        self._forget()

    def ask(self, text: str) -> Generator[str, None, None]:
        """Add a user's message and answer it; yields the answer's text in pieces. It is in `messages` afterwards.

        Where the caller stops early, what was said so far is the answer.

        Raises:
            UserError: for a message that the template or the context has no room for; it is not kept.
        """
        self.messages.append(self._message("user", text))
        self._attempt = 0
        return self._answer()

    def retry(self) -> Generator[str, None, None]:
        """Answer the last question in another way."""
        if self.messages and self.messages[-1].role == "assistant":
            self.messages.pop()
        if not self.messages:
            raise UserError("there is nothing to answer yet")
        self._attempt += 1
        return self._answer()

    def undo(self) -> None:
        """Forget the last question and its answer."""
        while self.messages and self.messages.pop().role != "user":
            pass

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages.clear()

    def row(self) -> dict[str, Any]:
        """The conversation as `rlhf sft` reads it.

        Raises:
            UserError: when there is no answer in it.
        """
        if not self.messages or self.messages[-1].role != "assistant":
            raise UserError("there is no answer to save yet")
        return {"messages": [{"role": m.role, "content": m.content} for m in self._all(0)]}

    def _message(self, role: str, text: str) -> Message:
        try:
            return Message(role, text)
        except BadRow as error:
            raise UserError(str(error)) from error

    def _all(self, start: int) -> list[Message]:
        system = [self._message("system", self.system)] if self.system else []
        return [*system, *self.messages[start:]]

    def _prompt(self) -> np.ndarray:
        """Tokens of the conversation, without its oldest turns where the answer would not fit in."""
        questions = [number for number, m in enumerate(self.messages) if m.role == "user"]
        context = self._family.context
        for start in questions:
            try:
                tokens = self.renderer.encode_prompt(self._all(start))
            except BadRow as error:
                raise UserError(str(error)) from error
            self.left_out = start
            # Room for a whole answer, but history does not give way to more than half of a small context.
            if context is None or len(tokens) + min(self.options.max_new_tokens, context // 2) <= context:
                return tokens
        if len(tokens) >= (context or 0):
            raise UserError(f"the message has {len(tokens)} tokens with its frame; the model's context is {context}")
        return tokens  # the last question alone; its answer ends where the context does

    def _answer(self) -> Generator[str, None, None]:
        try:
            prompt = self._prompt()
        except UserError:
            self.messages.pop()
            raise
        room = self._family.context - len(prompt) if self._family.context else self.options.max_new_tokens
        said = Detokenizer(self.renderer.tokenizer)
        text = ""
        finished = False
        try:
            for token in self._tokens([int(t) for t in prompt], min(room, self.options.max_new_tokens)):
                piece = said.add(token)
                piece = piece if text else piece.lstrip()
                text += piece
                if piece:
                    yield piece
            rest = said.end()
            rest = rest if text else rest.lstrip()
            text += rest
            finished = True
            if rest:
                yield rest
        finally:
            if not finished:
                self._forget()  # a forward pass may have been cut short
            if text.strip():
                self.messages.append(Message("assistant", text.strip()))
            else:
                self.messages.pop()  # an empty answer is no turn, and a question without one would stand alone

    def _tokens(self, prompt: list[int], count: int) -> Iterator[int]:
        """The tokens of an answer, without the end token."""
        known = _common(prompt[:-1], self._cached) if self._family.slots else 0
        if self._family.slots:
            self._cache.cut(known)
        else:
            self._forget()
        self._cached = prompt[:known]
        self.computed = len(prompt) - known
        u = None
        if self.options.temperature > 0:
            u = torch.from_numpy(uniforms(self.seed, [len(self.messages)], [self._attempt], count)).to(self._device)
        seen = self._seen(prompt)
        new = prompt[known:]
        for step in range(count):
            with sampling_mode(self.model):
                logits = self._forward(new)
            drawn, _ = draw(
                logits,
                u[:, step] if u is not None else None,
                self.options,
                seen=seen,
                forbidden=self.renderer.end_ids if step < self.options.min_new_tokens else (),
            )
            token = int(drawn)
            if token in self.renderer.end_ids:
                return
            if seen is not None:
                seen[0, token] = True
            new = [token]
            yield token

    def _forward(self, tokens: list[int]) -> torch.Tensor:
        """Logits [1, V] after these tokens, which are cached from now on."""
        start = len(self._cached)
        given = torch.tensor([tokens], device=self._device)
        positions = torch.arange(start, start + len(tokens), device=self._device)[None]
        logits = self.model(**self._family.inputs(given, positions, self._cache)).logits[:, -1]
        self._cached += tokens
        return logits

    def _seen(self, prompt: list[int]) -> torch.Tensor | None:
        if self.options.repetition_penalty == 1:
            return None
        seen = torch.zeros(1, self.model.config.get_text_config().vocab_size, dtype=torch.bool, device=self._device)
        seen[0, torch.tensor(prompt, device=self._device)] = True
        return seen

    def _forget(self) -> None:
        """Nothing is cached."""
        self._cache: Any = self._family.cache(1, 256)
        self._cached = []


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
