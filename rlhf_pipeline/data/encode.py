"""From records to token trees, under an explicit policy for what is too long. Pure functions; no files.

A record is first drafted (rendered into segments), then, once all segments of many drafts have been tokenised
together, fitted to the length limits. Nothing is shortened or dropped without being reported to the caller.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from rlhf_pipeline.data.prompts import Renderer, Segment
from rlhf_pipeline.data.records import Demonstration, Feedback, Message, Opening, Prompt, Ranking, Record, Text
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError

LongPrompt = Literal["drop", "keep_end", "keep_start", "error"]
LongResponse = Literal["cut", "drop", "error"]
Loss = Literal["responses", "all"]
Rankings = Literal["whole", "pairs"]
Empty = Literal["dropped_by_template", "dropped_all_tied"]  # of a row without a record
Outcome = Empty | Literal["kept", "dropped_long_prompt", "dropped_long_response", "dropped_no_target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Limits in tokens. A prompt and any one of its responses have at most `max_length` together.

    `keep_end` keeps the start token, if there is one, and the end of a long prompt. `cut` ends a long
    response without its end token: a model must not learn to stop there. Documents know `max_length` only.
    """

    max_length: int
    max_prompt_length: int
    long_prompt: LongPrompt
    long_response: LongResponse

    def __post_init__(self) -> None:
        if not 1 <= self.max_prompt_length < self.max_length:
            raise UserError(
                f"max_prompt_length={self.max_prompt_length}: must be at least 1 and less than "
                f"max_length={self.max_length}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What became of the rows: rows = kept + bad + dropped. The row of a document, or a ranking, can make several trees."""

    rows: int
    kept: int
    bad: dict[str, int]  # rows by reason
    dropped_long_prompt: int
    dropped_long_response: int
    dropped_no_target: int
    dropped_by_template: int = 0  # see templates.Templates.records
    dropped_all_tied: int = 0  # rankings without a comparison that somebody won, where each is an example of its own
    prompt_truncated: int  # rows
    response_truncated: int  # responses
    trees: int
    tokens: int
    targets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A rendered record. Without a prompt, the first token of the (only) response serves as the prompt.

    `ranks` and `scores` are those of `Tree`; without `ranks` all are 0, without `scores` there are none.
    """

    prompt: list[Segment]
    responses: list[list[Segment]]
    group: (
        int | None
    )  # equal for equal prompts, whatever the template; None: told by the prompt's tokens, once it is cut
    document: tuple[int, int] | None = None  # of a document, and of the opening of one: its start and end token
    ranks: tuple[int, ...] | None = None
    scores: tuple[float, ...] | None = None
    is_prompt: bool = False  # waits for an answer: no response is meant to be there

    @property
    def segments(self) -> list[Segment]:
        """All segments, in the order in which `fit` wants their tokens."""
        return [*self.prompt, *(segment for response in self.responses for segment in response)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What became of one record."""

    outcome: Outcome
    trees: tuple[Tree, ...] = ()
    prompt_truncated: bool = False
    num_responses_truncated: int = 0


def draft(record: Record, renderer: Renderer, *, loss: Loss) -> Draft:
    """Render a record. With `loss="all"` every token of a demonstration but the first is a target.

    Raises BadRow and UserError as `Renderer.segments` does.
    """
    match record:
        case Text(text):
            ends = (renderer.document_start_id, renderer.eos_id)
            return Draft(prompt=[], responses=[[renderer.document(text)]], group=_hash(text), document=ends)
        case Demonstration(messages):
            segments = renderer.segments(messages)
            first = next((i for i, message in enumerate(messages) if _is_target(message)), len(messages))
            group = group_of(messages[:first])
            if loss == "all":
                return Draft(prompt=[], responses=[segments], group=group)
            start = next((i for i, segment in enumerate(segments) if segment.scored), len(segments))
            response = segments[start:]
            return Draft(prompt=segments[:start], responses=[response] if response else [], group=group)
        case Ranking(prompt, responses, ranks, scores):
            context, answers = renderer.branches(prompt, responses)
            return Draft(prompt=context, responses=answers, group=group_of(prompt), ranks=ranks, scores=scores)
        case Feedback(prompt, response, desirable):
            context, answers = renderer.branches(prompt, (response,))
            return Draft(prompt=context, responses=answers, group=group_of(prompt), ranks=(0 if desirable else 1,))
        case Prompt(messages):
            context, _ = renderer.branches(messages, ())
            return Draft(prompt=context, responses=[], group=group_of(messages), is_prompt=True)
        case Opening(text):
            ends = (renderer.document_start_id, renderer.eos_id)
            return Draft(prompt=[renderer.document(text)], responses=[], group=None, document=ends, is_prompt=True)


def fit(
    draft: Draft, tokens: Sequence[np.ndarray], lengths: Lengths, *, bos_id: int | None, first_index: int = 0
) -> Encoded:
    """The trees of a draft, given the tokens of its segments. UserError where the policy says "error".

    A ranking is kept with all of its responses or dropped. A prompt that waits for an answer becomes a tree without
    responses.
    """
    supply = iter(zip(draft.segments, tokens, strict=True))
    prompt = _join(list(islice(supply, len(draft.prompt))))[0]
    responses = [_join(list(islice(supply, len(segments)))) for segments in draft.responses]
    if not responses and not draft.is_prompt:
        return Encoded(outcome="dropped_no_target")
    if draft.document is not None and draft.is_prompt:
        prompt = np.concatenate([[draft.document[0]], prompt]).astype(np.int32)
    elif draft.document is not None:
        return Encoded(outcome="kept", trees=_chunks(responses[0][0], draft.document, lengths.max_length, first_index))
    if not draft.prompt:
        whole = responses[0][0]
        prompt, responses = whole[:1], [(whole[1:], np.ones(len(whole) - 1, bool))]
    full_length = len(prompt)
    if full_length > lengths.max_prompt_length:
        if lengths.long_prompt == "drop":
            return Encoded(outcome="dropped_long_prompt")
        if lengths.long_prompt == "error":
            raise UserError(
                f"the prompt has {len(prompt)} tokens, more than data.max_prompt_length={lengths.max_prompt_length}. "
                "Raise it, or set data.long_prompt to drop, keep_end or keep_start"
            )
        prompt = shortened(prompt, lengths.max_prompt_length, lengths.long_prompt, bos_id)
    room = lengths.max_length - len(prompt)
    num_long = sum(len(ids) > room for ids, _ in responses)
    if num_long and lengths.long_response == "drop":
        return Encoded(outcome="dropped_long_response")
    if num_long and lengths.long_response == "error":
        longest = max(len(ids) for ids, _ in responses)
        raise UserError(
            f"a response has {longest} tokens, its prompt {len(prompt)}; together more than "
            f"data.max_length={lengths.max_length}. Raise it, or set data.long_response to cut or drop"
        )
    tree = Tree(
        prompt=prompt,
        responses=tuple(ids[:room] for ids, _ in responses),
        scored=tuple(scored[:room] for _, scored in responses),
        index=first_index,
        ranks=np.asarray(draft.ranks or [0] * len(responses), np.int32),
        scores=np.asarray(draft.scores or [np.nan] * len(responses), np.float32),
    )
    if not all(scored.any() for scored in tree.scored):
        return Encoded(outcome="dropped_no_target")
    return Encoded(
        outcome="kept",
        trees=(tree,),
        prompt_truncated=len(prompt) < full_length,
        num_responses_truncated=num_long,
    )


def encode(record: Record, renderer: Renderer, lengths: Lengths, *, loss: Loss = "responses") -> Encoded:
    """One record at a time; many are faster drafted, tokenised together and fitted."""
    drafted = draft(record, renderer, loss=loss)
    return fit(drafted, renderer.tokenize(drafted.segments), lengths, bos_id=renderer.tokenizer.bos_token_id)


def _join(parts: list[tuple[Segment, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [L] and scored bool [L] of segments in a row."""
    if not parts:
        return np.zeros(0, np.int32), np.zeros(0, bool)
    scored = np.repeat([segment.scored for segment, _ in parts], [len(ids) for _, ids in parts])
    return np.concatenate([ids for _, ids in parts]), scored


def shortened(
    prompt: np.ndarray, limit: int, keep: Literal["keep_end", "keep_start"], bos_id: int | None
) -> np.ndarray:
    """`limit` tokens of a longer prompt: its start, or its end with the start token where it has one."""
    if keep == "keep_start":
        return prompt[:limit]
    if prompt[0] == bos_id and limit > 1:
        return np.concatenate([prompt[:1], prompt[len(prompt) - limit + 1 :]])
    return prompt[len(prompt) - limit :]


def _chunks(ids: np.ndarray, ends: tuple[int, int], max_length: int, first_index: int) -> tuple[Tree, ...]:
    """A document in trees of at most `max_length` tokens.

    Each begins with the last token of the one before it: every token but the first is a target exactly once.
    """
    whole = np.concatenate([[ends[0]], ids, [ends[1]]]).astype(np.int32)
    pieces = [whole[at : at + max_length] for at in range(0, len(whole) - 1, max_length - 1)]
    return tuple(
        Tree(
            prompt=piece[:1],
            responses=(piece[1:],),
            scored=(np.ones(len(piece) - 1, bool),),
            index=first_index + number,
        )
        for number, piece in enumerate(pieces)
    )


def _is_target(message: Message) -> bool:
    return message.role == "assistant" and message.scored


def group_of(prompt: Sequence[Message]) -> int:
    """Equal for equal prompts: a signed 64-bit hash of the messages' roles and contents."""
    return _hash(json.dumps([[message.role, message.content] for message in prompt]))


def group_of_tokens(prompt: np.ndarray) -> int:
    """The same of a prompt without messages, int32 [P]."""
    return _hash_bytes(prompt.astype("<i4").tobytes())


def _hash(text: str) -> int:
    return _hash_bytes(text.encode())


def _hash_bytes(value: bytes) -> int:
    """A signed 64-bit hash that stays the same between runs and machines."""
    return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest(), "little", signed=True)
