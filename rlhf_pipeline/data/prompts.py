"""The one renderer: conversations to text to tokens, for training and for sampling alike.

The template is the tokenizer's own Jinja chat template. Text is tokenised segment by segment, cut where an
assistant's turn begins and ends, so that the prompt of a training example has the very tokens that sampling
will see and a response's tokens are known, never searched for. A template that does not allow it is refused.

Control tokens (the tokenizer's special tokens) come from the template alone: where somebody's text spells
one, it is tokenised as the characters it is. Lengths and truncation are `encode`'s business.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_pipeline.data.chat_templates import load_template
from rlhf_pipeline.data.records import BadRow, Message
from rlhf_pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Renderer", "Segment", "load_template", "tokenizer_hash"]

# Set around control tokens that somebody's text spells, while the text goes through the template.
_OPEN, _CLOSE = "\U000f0000", "\U000f0001"
_ANCHORS = ("\n", "a")  # see Renderer.tokenize
_ADVICE = "Set tokenizer.template to dialogue, to chatml, or to a file."

Span = tuple[int, int]
Chat = list[dict[str, str]]


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of what decides the tokens of a text; not of padding, truncation and the chat template."""
    state = tokenizer.backend_tokenizer.to_str()
    state = state[state.index('"added_tokens"') :]  # before it: truncation and padding, which any call may set
    return hashlib.sha256(f"{tokenizer.bos_token} {tokenizer.eos_token} {state}".encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Text that is tokenised on its own."""

    text: str
    scored: bool  # its tokens are training targets
    first: bool  # begins the conversation
    plain: tuple[Span, ...] = ()  # characters that spell a control token and must not become one


class Renderer:
    """Renders and tokenises by a tokenizer's chat template; UserError if the template is unfit.

    `template_hash` and `tokenizer_hash` identify it. `end_ids` are the tokens that end a response (the
    template's end of turn first): sampling stops at them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.is_fast:
            raise UserError("this tokenizer has no fast version (tokenizer.json); choose one that has")
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several, by purpose
            template = template.get("default")
        if not template:
            raise UserError(f"the tokenizer has no chat template. {_ADVICE}")
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token; set its eos_token")
        self.tokenizer = tokenizer
        self.template_hash = hashlib.sha256(template.encode()).hexdigest()
        self.tokenizer_hash = tokenizer_hash(tokenizer)
        self.eos_id: int = tokenizer.eos_token_id
        self.document_start_id: int = self.eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self._template = template
        self._special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._has_blocks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        control = {token.content for token in special} | set(tokenizer.all_special_tokens)
        # Some tokenizers look for special tokens in normalised text: there, other characters can come to spell one.
        normalizes = tokenizer.backend_tokenizer.normalizer is not None
        self._has_other_spellings = normalizes and any(token.normalized for token in special)
        self._control = re.compile(_any_of(control))
        self._marked = re.compile(f"{_OPEN}({self._control.pattern}){_CLOSE}")
        self._control_ids = {self._id(token) for token in control}
        self._anchor_ids = self._ids(list(_ANCHORS), plain=False)
        alone, anchored = self._ids(["a", _ANCHORS[0] + "a"], plain=False)
        self._anchored = alone != anchored[len(self._anchor_ids[0]) :]
        self._end = self._probe_end()
        self._ending = re.compile(f"(?<!{_OPEN}){re.escape(self._end)}")  # the template's own, not a message's
        self.end_ids = tuple(dict.fromkeys((self._id(self._end), self.eos_id)))
        self._probe_prompt()
        self._probe_start()

    def encode(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [T] of a conversation that the assistant ends, and which are targets, bool [T]."""
        segments = self.segments(messages)
        tokens = self.tokenize(segments)
        scored = [np.full(len(ids), segment.scored) for ids, segment in zip(tokens, segments, strict=True)]
        return np.concatenate(tokens), np.concatenate(scored)

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Tokens int32 [P] that sampling continues: the conversation and the start of the answer."""
        segments, _ = self.branches(messages, ())
        return np.concatenate(self.tokenize(segments))

    def encode_text(self, text: str) -> np.ndarray:
        """Tokens int32 [T] of a document between a start token (or else an end token) and an end token."""
        (ids,) = self.tokenize([self.document(text)])
        return np.concatenate([[self.document_start_id], ids, [self.eos_id]], dtype=np.int32)

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The segments of a conversation that the assistant ends; the scored ones hold its scored turns.

        BadRow if the template refuses the conversation or leaves out part of it; UserError if earlier turns
        are to be scored and the template rewrites them.
        """
        *prompt, last = messages
        assert last.role == "assistant"
        chat, text, blocks = self._prompt(prompt)
        return self._prompt_segments(chat, text, blocks, prompt) + self._response(chat, text, last)

    def branches(
        self, prompt: Sequence[Message], responses: Sequence[str]
    ) -> tuple[list[Segment], list[list[Segment]]]:
        """Segments of a prompt, all of it context, and of each response to it. Raises as `segments` does."""
        chat, text, blocks = self._prompt(prompt)
        answers = [self._response(chat, text, Message("assistant", response)) for response in responses]
        return self._prompt_segments(chat, text, blocks, ()), answers

    def document(self, text: str) -> Segment:
        """A document as one segment, without its start and end tokens."""
        self._check_spellings(text)
        spells_control = self._control.search(text) is not None
        return Segment(text=text, scored=True, first=True, plain=((0, len(text)),) if spells_control else ())

    def tokenize(self, segments: Sequence[Segment]) -> list[np.ndarray]:
        """Tokens int32 of each segment; many at once are fast.

        Some tokenizers put a space before whatever they are given. Where a segment goes on from another one,
        that is prevented by tokenising it after a line break or a letter, whose tokens are then taken away.
        """
        pieces = [
            (s, text, plain, begins) for s, segment in enumerate(segments) for text, plain, begins in _pieces(segment)
        ]
        found: list[list[np.ndarray]] = [[] for _ in segments]
        tokens: dict[int, list[int]] = {}
        for plain in (False, True):
            chosen = [i for i, piece in enumerate(pieces) if piece[2] == plain]
            ids = self._ids_in_place([pieces[i][1] for i in chosen], [pieces[i][3] for i in chosen], plain=plain)
            tokens.update(zip(chosen, ids, strict=True))
        for i, (s, *_) in enumerate(pieces):
            found[s].append(np.asarray(tokens[i], np.int32))
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in found]

    # Text to tokens

    def _id(self, token: str) -> int:
        found = self.tokenizer.backend_tokenizer.token_to_id(token)
        assert found is not None, token
        return found

    def _ids(self, texts: list[str], *, plain: bool) -> list[list[int]]:
        """Tokens of whole texts; with `plain` no special token is recognised in them."""
        backend = self.tokenizer.backend_tokenizer  # the wrapper around it takes a third longer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = plain
        ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        backend.encode_special_tokens = False
        return ids

    def _ids_in_place(self, texts: list[str], begins: list[bool], *, plain: bool) -> list[list[int]]:
        if not self._anchored:
            return self._ids(texts, plain=plain)
        ids = self._ids(texts, plain=plain)
        waiting = [i for i, first in enumerate(begins) if not first]
        for anchor, anchor_ids in zip(_ANCHORS, self._anchor_ids, strict=True):
            found = self._ids([anchor + texts[i] for i in waiting], plain=plain)
            for i, given in zip(waiting, found, strict=True):
                if given[: len(anchor_ids)] == anchor_ids:
                    ids[i] = given[len(anchor_ids) :]
            # Where the anchor became one token with what follows it, the next one is tried.
            waiting = [i for i, given in zip(waiting, found, strict=True) if given[: len(anchor_ids)] != anchor_ids]
        return ids

    def _check_spellings(self, text: str) -> None:
        """BadRow if the text spells a control token that cannot be written as, or be told from, plain text."""
        for spelling in set(self._control.findall(text)):
            if self._control_ids.intersection(self._ids([spelling], plain=True)[0]):
                raise BadRow("the text holds a control token that cannot be written as plain text", spelling)
        if self._has_other_spellings:
            for ids in self._ids(self._control.split(text), plain=False):
                if found := self._control_ids.intersection(ids):
                    token = str(self.tokenizer.backend_tokenizer.id_to_token(min(found)))
                    raise BadRow("the tokenizer's normalisation makes a control token of the text", token)

    # Messages to text

    def _mark(self, content: str) -> str:
        if _OPEN in content or _CLOSE in content:
            raise BadRow("the text holds U+F0000 or U+F0001, which serve as marks here")
        self._check_spellings(content)
        return self._control.sub(f"{_OPEN}\\g<0>{_CLOSE}", content)

    def _segment(self, marked: str, *, scored: bool, first: bool = False) -> Segment:
        if _OPEN not in marked:
            return Segment(text=marked, scored=scored, first=first)
        text, plain = "", []
        for i, part in enumerate(self._marked.split(marked)):
            if _OPEN in part or _CLOSE in part:
                raise BadRow("the chat template takes apart a control token that the text spells")
            if i % 2:
                plain.append((len(text), len(text) + len(part)))
            text += part
        return Segment(text=text, scored=scored, first=first, plain=tuple(plain))

    def _render(self, chat: Chat, *, prompt: bool) -> tuple[str, list[Span]]:
        """The text and the spans of its {% generation %} blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(  # annotated as a string, but it returns texts and spans
                [chat],
                chat_template=self._template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self._has_blocks,
                **self._special_tokens,
            )
        except Exception as error:  # its own complaint, or whatever an expression of somebody's template does
            raise BadRow("the chat template refuses the conversation", str(error)) from error
        (text,), spans = rendered
        return text, spans[0] if spans else []

    def _prompt(self, messages: Sequence[Message]) -> tuple[Chat, str, list[Span]]:
        """The conversation with control tokens marked, its text up to the answer, its blocks."""
        chat = [{"role": message.role, "content": self._mark(message.content)} for message in messages]
        text, blocks = self._render(chat, prompt=True)
        for message in chat:
            if message["role"] != "assistant":  # of earlier answers a template may keep the conclusion only
                _check_kept(message["content"], text)
        return chat, text, blocks

    def _prompt_segments(
        self, chat: Chat, text: str, blocks: list[Span], scored_by: Sequence[Message]
    ) -> list[Segment]:
        """Segments of a prompt, cut at the assistant's turns; those that `scored_by` scores are scored."""
        scored = {i for i, m in enumerate(scored_by) if m.role == "assistant" and m.scored}
        turns = self._turns(chat, text, blocks)
        self._check_found(chat, scored - turns.keys())
        segments, at = [], 0
        for i, (start, end) in turns.items():
            close = self._close(text, start, end + len(self._end))
            if i in scored:
                if close < 0:
                    raise BadRow("the chat template ends a turn without its end token")
                _check_kept(chat[i]["content"], text[start:end])
            end = end if close < 0 else close
            segments += [(text[at:start], False), (text[start:end], i in scored)]
            at = end
        segments.append((text[at:], False))
        return [
            self._segment(part, scored=is_scored, first=number == 0)
            for number, (part, is_scored) in enumerate(segments)
            if part
        ]

    def _turns(self, chat: Chat, text: str, blocks: list[Span]) -> dict[int, Span]:
        """Where the assistant's turns lie in a prompt's text, by message; without those that the template hides."""
        answers = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        if self._has_blocks:
            return dict(zip(answers, blocks, strict=True)) if len(blocks) == len(answers) else {}
        turns = {}
        for i in answers:
            try:
                before, through = (
                    self._render(chat[:i], prompt=True)[0],
                    self._render(chat[: i + 1], prompt=False)[0],
                )
            except BadRow:  # it renders no part of a conversation
                continue
            # After the last turn some templates write what ends the whole conversation (Phi-3 does).
            close = self._close(through, len(before), len(through))
            through = through if close < 0 else through[:close]
            if text.startswith(through) and through.startswith(before):
                turns[i] = (len(before), len(through))
        return turns

    def _close(self, text: str, start: int, stop: int) -> int:
        """Where the first end token of the template's own ends that lies between; -1 if none does."""
        found = self._ending.search(text, start, stop)
        return found.end() if found else -1

    def _check_found(self, chat: Chat, lost: set[int]) -> None:
        """Raises if turns that are to be scored were not found in the text."""
        asked = next((i for i, message in enumerate(chat) if message["role"] == "user"), len(chat))
        if any(i > asked for i in lost):
            raise UserError(
                "the chat template rewrites the assistant's earlier turns (as those that strip reasoning "
                "do), so they cannot be trained on. Score the last turn only (weight: 0 on the earlier "
                "ones), or use a template that marks the turns with {% generation %} blocks. " + _ADVICE
            )
        if lost:  # nothing to sample from would render as what stands before it
            raise BadRow("the chat template has no prompt for an answer before the first question; give it weight 0")

    def _response(self, chat: Chat, prompt: str, message: Message) -> list[Segment]:
        """The last turn, up to and with its end token: what sampling would have had to produce."""
        answer = {"role": "assistant", "content": self._mark(message.content)}
        text, blocks = self._render([*chat, answer], prompt=False)
        if not text.startswith(prompt):
            raise UserError(
                "the chat template renders a prompt that is to be answered in another way than the same "
                f"prompt with its answer, so training and sampling would differ. {_ADVICE}"
            )
        start = max(len(prompt), blocks[-1][0]) if blocks else len(prompt)
        close = self._close(text, start, len(text))
        if close < 0:
            raise BadRow("the chat template ends a turn without its end token")
        _check_kept(answer["content"], text[len(prompt) : close])
        parts = [(text[len(prompt) : start], False), (text[start:close], message.scored)]
        return [self._segment(part, scored=scored) for part, scored in parts if part]

    # Checks of the template, once

    def _probe_end(self) -> str:
        """The special token with which the template ends an assistant's turn."""
        chat = [{"role": "user", "content": "first probe"}, {"role": "assistant", "content": "second probe"}]
        try:
            text = self._render(chat, prompt=False)[0]
        except BadRow as error:
            raise UserError(f"the chat template renders no question and answer: {error}. {_ADVICE}") from error
        end = self._control.search(text, text.rfind(chat[1]["content"]) + len(chat[1]["content"]))
        if chat[1]["content"] not in text or end is None:
            raise UserError(
                "the chat template ends the assistant's turn with none of the tokenizer's special tokens, so "
                f"a model could not learn to stop. {_ADVICE} Or add the template's end of turn as one."
            )
        return end.group()

    def _probe_prompt(self) -> None:
        """A prompt leads up to the answer: a template may not keep for later what stands before an answer."""
        asked = [{"role": "user", "content": "first probe"}]
        prompt = self._render(asked, prompt=True)[0]
        whole = self._render([*asked, {"role": "assistant", "content": "second probe"}], prompt=False)[0]
        before = whole.removeprefix(prompt).partition("second probe")[0]
        # Those that open an answer with an empty thought do it behind their generation prompt.
        if whole.startswith(prompt) and before.strip() and prompt == self._render(asked, prompt=False)[0]:
            raise UserError(
                f"the chat template has no generation prompt (it ignores add_generation_prompt): {before!r} would be "
                f"learned and sampled as part of every answer. {_ADVICE}"
            )

    def _probe_start(self) -> None:
        """A question and answer renders as a prompt and its response, with at most one start token in all."""
        probe = [Message("user", "first probe"), Message("assistant", "second probe", scored=False)] * 2
        try:
            tokens, _ = self.encode([*probe[:3], Message("assistant", "third probe")])
        except BadRow as error:
            raise UserError(f"the chat template is unfit: {error}. {_ADVICE}") from error
        if tokens[-1] != self.end_ids[0]:
            raise UserError(
                f"the tokenizer does not read {self._end} in a text as the token it is, so a model could not learn to "
                "stop. Save the tokenizer anew with that token's `normalized` false"
            )
        bos = self.tokenizer.bos_token_id
        ends_turns = bos in self.end_ids  # one token for both, as GPT-2 has it
        if bos is not None and (tokens[0] == tokens[1] == bos if ends_turns else (tokens == bos).sum() > 1):
            raise UserError(f"the chat template writes {self.tokenizer.bos_token} more than once. {_ADVICE}")


def _any_of(tokens: Collection[str]) -> str:
    """A regular expression for any of the tokens, the longest that fits; as a tree, for some have thousands."""
    tails: dict[str, list[str]] = {}
    for token in filter(None, tokens):
        tails.setdefault(token[0], []).append(token[1:])
    if not tails:
        return ""
    branches = "|".join(re.escape(head) + _any_of(rest) for head, rest in sorted(tails.items()))
    return f"(?:{branches}){'?' if '' in tokens else ''}"


def _pieces(segment: Segment) -> list[tuple[str, bool, bool]]:
    """(text, whether it must stay plain, whether it begins the conversation) of the parts of a segment."""
    pieces, at = [], 0
    for start, end in segment.plain:
        pieces += [(segment.text[at:start], False), (segment.text[start:end], True)]
        at = end
    pieces = [piece for piece in (*pieces, (segment.text[at:], False)) if piece[0]]
    return [(text, plain, segment.first and number == 0) for number, (text, plain) in enumerate(pieces)]


def _check_kept(content: str, text: str) -> None:
    """BadRow if a message does not stand in the text; a template may change white space."""
    if content.strip() not in text and "".join(content.split()) not in "".join(text.split()):
        raise BadRow("the chat template leaves out part of a message")
