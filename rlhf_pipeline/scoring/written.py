"""Trees of what a policy wrote: whatever that is, a reward model can score it.

A run must not end because its policy said nothing, spelled a control token or left no room for its prompt. Nearly all
responses are rendered as everywhere (`rewards`). The rules for the others:

- A response without a word is its end token alone, even one that was cut off.
- One that the reward model's template or tokenizer cannot hold as it is (a control token that cannot be told from text,
  say, or words that the template takes out) is put as plain characters where the template puts a response, without
  tokens of control.
- One that leaves no room for a token of its prompt keeps its beginning.

A prompt that cannot be rendered is the data's fault and an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_pipeline.data.encode import shortened
from rlhf_pipeline.data.prompts import Renderer, Segment
from rlhf_pipeline.data.records import BadRow, Message
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.scoring.answers import Answered
from rlhf_pipeline.scoring.episodes import Episode
from rlhf_pipeline.scoring.rewards import TOKENISED, rendered

STAND_IN = "response"  # rendered to see where the template puts one


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    prompt: list[Segment]
    response: list[Segment]  # none of a response without a word
    plain: int | None = None  # which of them is the policy's text that may hold no control token


def trees(renderer: Renderer, episodes: Sequence[Episode], *, limit: int, counts: Counter[str]) -> list[Tree]:
    """A tree an episode, of at most `limit` >= 2 tokens; `index` is the episode's place.

    `counts` gets how many prompts have lost their beginning ("prompts_cut") and responses their end ("responses_cut"),
    and how many responses had to be put as plain characters ("respelled").

    Raises:
        UserError: for a prompt that cannot be rendered, naming its origin.
    """
    control = np.asarray(
        [*renderer.tokenizer.all_special_ids]
        + [number for number, token in renderer.tokenizer.added_tokens_decoder.items() if token.special]
    )
    made: list[Tree] = []
    for start in range(0, len(episodes), TOKENISED):
        several = [_parts(renderer, episode) for episode in episodes[start : start + TOKENISED]]
        tokens = iter(renderer.tokenize([segment for one in several for segment in (*one.prompt, *one.response)]))
        for parts in several:
            prompt, response = _tokens(parts, tokens, control)
            counts["respelled"] += parts.plain is not None
            if not len(response):
                response = np.asarray(renderer.end_ids[:1], np.int32)
            if len(response) > limit - 1:
                counts["responses_cut"] += 1
                response = response[: limit - 1]
            room = limit - len(response)
            if len(prompt) > room:
                counts["prompts_cut"] += 1
                prompt = shortened(prompt, room, "keep_end", renderer.tokenizer.bos_token_id)
            made.append(
                Tree(prompt=prompt, responses=(response,), scored=(np.ones(len(response), bool),), index=len(made))
            )
    return made


def check_prompt(renderer: Renderer, prompt: Sequence[Message]) -> None:
    """
    Raises:
        BadRow, UserError: for a prompt that the renderer refuses.
    """
    renderer.branches(prompt, [STAND_IN])


def _parts(renderer: Renderer, episode: Episode) -> _Parts:
    is_said = bool(episode.response.strip())
    row = Answered(
        index=0,
        origin=episode.origin,
        prompt=episode.prompt,
        responses=(episode.response,),
        finished=(episode.finished or not is_said,),
        many=False,
        row={},
    )
    try:
        prompt, (response,) = rendered(renderer, row)
        return _Parts(prompt=prompt, response=response)
    except (BadRow, UserError):  # of the response or of the prompt
        pass
    try:
        return _plainly(renderer, episode)
    except (BadRow, UserError) as error:
        raise UserError(f"{episode.origin}: the reward model cannot read the prompt: {error}") from error


def _plainly(renderer: Renderer, episode: Episode) -> _Parts:
    """The response in the place of a stand-in, all of it plain text."""
    prompt, ((*before, last),) = renderer.branches(episode.prompt, [STAND_IN])
    head, _, end = last.text.rpartition(STAND_IN)
    # The two halves of a character are put together, and one without the other is no character.
    whole = episode.response.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()
    start = len(head) if head.strip() else 0  # a space before the words belongs to the first one
    text = Segment(text=head + whole, scored=True, first=False, plain=((start, len(head + whole)),))
    ending = [Segment(text=end, scored=True, first=False)] if episode.finished and end else []
    return _Parts(prompt=prompt, response=[*before, text, *ending], plain=len(before))


def _tokens(parts: _Parts, tokens: Iterator[np.ndarray], control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [P] and [L] of the prompt and the response, which come next in `tokens`."""
    prompt = np.concatenate([next(tokens) for _ in parts.prompt])
    response = [next(tokens) for _ in parts.response]
    if parts.plain is not None:
        text = response[parts.plain]
        response[parts.plain] = text[~np.isin(text, control)]
    return prompt, np.concatenate([np.zeros(0, np.int32), *response])
