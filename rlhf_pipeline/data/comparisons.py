"""Reads answers and what people thought of them out of other people's rows: pairs, rankings, single verdicts.

Which rows have which reader is the table in `formats`. Ranks count from 0, the best; equal ranks are a tie.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rlhf_pipeline.data.conversations import (
    ASSISTANT,
    Messages,
    context,
    dialogue,
    dialogue_prompt,
    instruction,
    prompt,
    read_message,
    read_messages,
)
from rlhf_pipeline.data.fields import Fields, boolean, get, items, number, object_of, string
from rlhf_pipeline.data.records import BadRow, Message

# Names under which people keep the scores of a pair, in the row or in its `metadata`.
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating"))
MARGIN = "margin"  # how much better the better answer of a pair is
_APART = "chosen and rejected part before their last turn"


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to one prompt, not yet checked."""

    prompt: Messages
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer to a prompt and whether it was wanted, not yet checked."""

    prompt: Messages
    response: str
    desirable: bool


# Pairs


def hh(row: Fields) -> Answers:
    """Both dialogues agree up to an `Assistant:`; what follows the last agreed one are the two answers."""
    chosen, rejected = string(row, "chosen"), string(row, "rejected")
    cut = chosen.rfind(ASSISTANT)
    while cut >= 0 and not rejected.startswith(chosen[: cut + len(ASSISTANT)]):
        cut = chosen.rfind(ASSISTANT, 0, cut)
    if cut < 0:
        raise BadRow("chosen and rejected share no beginning up to an Assistant turn")
    ends = [whole[cut + len(ASSISTANT) :] for whole in (chosen, rejected)]
    if any("\n\nHuman:" in end or ASSISTANT in end for end in ends):
        raise BadRow(_APART)
    return _pair(row, dialogue(chosen[:cut]), ends[0].strip(), ends[1].strip())


def hh_with_prompt(row: Fields) -> Answers:
    """A dialogue up to "Assistant:", and two answers, which may repeat it."""
    asked, whole = dialogue_prompt(row), string(row, "prompt").strip()
    chosen, rejected = (string(row, field).strip().removeprefix(whole).strip() for field in ("chosen", "rejected"))
    return _pair(row, asked, chosen, rejected)


def pair(row: Fields, *, read_prompt: Callable[[Fields], Messages] = prompt) -> Answers:
    """`chosen` and `rejected`, each a string, a message, or messages that may begin with the prompt."""
    asked = context(read_prompt(row))
    return _pair(row, asked, _answer(row, "chosen", asked), _answer(row, "rejected", asked))


def pair_with_prompt(row: Fields) -> Answers:
    """As `pair`. A prompt that is a string may be one of the user's messages in longer conversations."""
    chosen = get(row, "chosen")
    if not (isinstance(get(row, "prompt"), str) and isinstance(chosen, list) and len(chosen) > 1):
        return pair(row)
    asked = row["prompt"].strip()
    found = conversation_pair(row)
    if not any(m.role == "user" and m.content.strip() == asked for m in found.prompt):
        raise BadRow("the prompt is not in the conversation of chosen", repr(asked[:40]))
    return found


def conversation_pair(row: Fields) -> Answers:
    """Two conversations that differ in their last message."""
    chosen, rejected = (read_messages(get(row, field), field) for field in ("chosen", "rejected"))
    if not _same(chosen[:-1], rejected[:-1]):
        raise BadRow(_APART)
    asked = context(chosen[:-1])
    return _pair(row, asked, _answer(row, "chosen", asked), _answer(row, "rejected", asked))


def text_pair(row: Fields) -> Answers:
    """Two texts; the prompt is the words with which both begin."""
    texts = [string(row, field) for field in ("chosen", "rejected")]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
    shared = "".join(char for char, _ in same)
    shared = shared[: max(map(shared.rfind, " \n\t")) + 1]  # up to a whole word
    if not shared.strip():
        raise BadRow("chosen and rejected share no beginning")
    chosen, rejected = (text[len(shared) :].strip() for text in texts)
    return _pair(row, (Message("user", shared.strip()),), chosen, rejected)


def openai_pair(row: Fields) -> Answers:
    """As OpenAI's preference fine-tuning has it."""
    asked = context(read_messages(get(object_of(row, "input"), "messages"), "input.messages"))
    chosen, rejected = (_answer(row, field, asked) for field in ("preferred_output", "non_preferred_output"))
    return Answers(asked, (chosen, rejected), (0, 1))


def _answer(row: Fields, field: str, asked: Messages) -> str:
    """The one answer of a field: a string, a message, or messages that may repeat the prompt."""
    value = get(row, field)
    if isinstance(value, str):
        return value
    said = (read_message(value),) if isinstance(value, dict) else read_messages(value, field)
    if len(said) > 1 and _same(said[: len(asked)], asked):
        said = said[len(asked) :]
    if len(said) != 1 or said[0].role != "assistant":
        raise BadRow(f"{field} is not one answer to the prompt", ", ".join(message.role for message in said))
    return said[0].content


def _same(one: Sequence[Message], other: Sequence[Message]) -> bool:
    return [(m.role, m.content.strip()) for m in one] == [(m.role, m.content.strip()) for m in other]


def _pair(row: Fields, asked: Messages, chosen: str, rejected: str) -> Answers:
    """Equal scores are a tie; scores that prefer the rejected answer are refused."""
    scores = _pair_scores(row)
    if scores is not None and scores[0] < scores[1]:
        raise BadRow("the scores contradict the preference", f"chosen {scores[0]:g}, rejected {scores[1]:g}")
    is_tie = scores is not None and scores[0] == scores[1]
    return Answers(asked, (chosen, rejected), (0, 0) if is_tie else (0, 1), scores)


def _pair_scores(row: Fields) -> tuple[float, float] | None:
    metadata = row.get("metadata")
    for place in (row, metadata if isinstance(metadata, dict) else {}):
        for names in SCORES:
            given = [name for name in names if place.get(name) not in (None, "")]
            if len(given) == 1:
                raise BadRow("only one of two answers has a score", given[0])
            if given:
                return number(place[names[0]], names[0]), number(place[names[1]], names[1])
    return None


def with_margin(read: Callable[[Fields], Answers]) -> Callable[[Fields], Answers]:
    """The same reader of two answers, which also takes the row's margin where it has one: what the scores differ by.

    Which answer is better, and whether they tie, is told by all else: a margin of 0 is no tie, and a tie has no margin.
    """

    def read_both(row: Fields) -> Answers:
        found = read(row)
        if row.get(MARGIN) in (None, ""):
            return found
        margin = number(row[MARGIN], MARGIN)
        if margin < 0:
            raise BadRow("the margin is negative", f"{margin:g}")
        if found.ranks[0] == found.ranks[1]:
            return found
        return dataclasses.replace(found, scores=(margin, 0.0) if found.ranks[0] == 0 else (0.0, margin))

    return read_both


# Rankings


def kwise(row: Fields) -> Answers:
    """`responses` and their `scores` (higher is better), `ranks` (lower is better), or both where they agree."""
    responses = tuple(items(row, "responses"))
    ranks, scores = _numbers(row, "ranks"), _numbers(row, "scores")
    if scores is None and ranks is None:
        raise BadRow("no field 'scores' or 'ranks'", f"there is {', '.join(row)}")
    order = [_places([-score for score in scores])] if scores is not None else []
    order += [_places(ranks)] if ranks is not None else []
    if len(order[0]) != len(responses) or len(order[-1]) != len(responses):
        raise BadRow("ranks do not fit the responses", f"{order[-1]} for {len(responses)}")
    if order[0] != order[-1]:
        raise BadRow("ranks and scores disagree", f"by scores {order[0]}, by ranks {order[-1]}")
    return Answers(context(prompt(row)), responses, order[-1], None if scores is None else tuple(scores))


def _numbers(row: Fields, field: str) -> list[float] | None:
    if row.get(field) is None:
        return None
    return [number(value, f"a value of {field}") for value in items(row, field)]


def _places(values: Sequence[float]) -> tuple[int, ...]:
    """The place of each value among the different ones, from 0 for the lowest."""
    places = {value: place for place, value in enumerate(sorted(set(values)))}
    return tuple(places[value] for value in values)


# Rankings as published


def ultrafeedback(row: Fields) -> Answers:
    """As UltraFeedback was published: completions with one overall score each."""
    completions = _objects(row, "completions")
    scores = [number(get(completion, "overall_score"), "overall_score") for completion in completions]
    responses = tuple(string(completion, "response") for completion in completions)
    return Answers(instruction(row), responses, _places([-score for score in scores]), tuple(scores))


def shp(row: Fields) -> Answers:
    """Stanford Human Preferences: label 1 prefers A. Its scores are votes, which no one gave to compare two answers."""
    ranks = (0, 1) if boolean(row, "labels") else (1, 0)
    return Answers(_asked(string(row, "history")), _strings(row, "human_ref_A", "human_ref_B"), ranks)


def safe_rlhf(row: Fields) -> Answers:
    """PKU-SafeRLHF by helpfulness; for harmlessness map better_response_id to safer_response_id."""
    ranks = (1, 0) if boolean(row, "better_response_id") else (0, 1)
    return Answers(prompt(row), _strings(row, "response_0", "response_1"), ranks)


def webgpt(row: Fields) -> Answers:
    """WebGPT's comparisons: a question, two answers and their scores."""
    scores = tuple(number(get(row, field), field) for field in ("score_0", "score_1"))
    asked = _asked(string(object_of(row, "question"), "full_text"))
    return Answers(asked, _strings(row, "answer_0", "answer_1"), _places([-score for score in scores]), scores)


def summaries(row: Fields) -> Answers:
    """The comparisons of Stiennon et al. 2020, worded as in its appendix B: subreddit, title, post, "TL;DR:"."""
    info = object_of(row, "info")
    post = "\n\n".join(
        f"{name}: {string(info, field)}"
        for name, field in (("SUBREDDIT", "subreddit"), ("TITLE", "title"), ("POST", "post"))
        if info.get(field)
    )
    texts = tuple(string(summary, "text").strip() for summary in _objects(row, "summaries"))
    if len(texts) != 2:
        raise BadRow("not two summaries", f"{len(texts)}")
    ranks = (1, 0) if boolean(row, "choice") else (0, 1)
    return Answers(_asked(f"{post}\n\nTL;DR:"), texts, ranks)


def nectar(row: Fields) -> Answers:
    """Nectar: a dialogue that waits for an answer, and seven of them with their ranks."""
    answers = _objects(row, "answers")
    ranks = _places([number(get(answer, "rank"), "rank") for answer in answers])
    return Answers(dialogue_prompt(row), tuple(string(answer, "answer").strip() for answer in answers), ranks)


def oasst_tree(row: Fields) -> list[Answers]:
    """OpenAssistant's trees: every question with at least two ranked answers is a ranking of its own."""
    found = [one for one in _questions(object_of(row, "prompt"), ()) if len(one.responses) > 1]
    if not found:
        raise BadRow("no question of the tree has two ranked answers")
    return found


def _questions(question: Fields, before: Messages) -> Iterator[Answers]:
    """A question with its ranked answers, and those that follow from any of them."""
    asked = (*before, Message("user", string(question, "text")))
    replies = [reply for reply in _objects(question, "replies") if reply.get("role") == "assistant"]
    ranked = [reply for reply in replies if reply.get("rank") is not None]
    ranks = _places([number(reply["rank"], "rank") for reply in ranked])
    yield Answers(asked, tuple(string(reply, "text") for reply in ranked), ranks)
    for reply in replies:
        said = (*asked, Message("assistant", string(reply, "text"), scored=False))
        for follow_up in _objects(reply, "replies"):
            yield from _questions(follow_up, said)


def _asked(text: str) -> Messages:
    return (Message("user", text),)


def _strings(row: Fields, *names: str) -> tuple[str, ...]:
    return tuple(string(row, name) for name in names)


def _objects(row: Fields, field: str) -> list[Fields]:
    found = items(row, field)
    if not all(isinstance(item, dict) for item in found):
        raise BadRow(f"{field} is not a list of objects")
    return found


# Verdicts


def judged_conversation(row: Fields, *, read: Callable[[Fields], Messages], label: str = "label") -> Verdict:
    """A conversation whose last answer was wanted or not."""
    messages = read(row)
    if not messages or messages[-1].role != "assistant":
        raise BadRow("the last message is not the assistant's")
    return Verdict(context(messages[:-1]), messages[-1].content, boolean(row, label))


def judged_completion(row: Fields, *, answer: str = "completion") -> Verdict:
    asked = prompt(row)
    return Verdict(asked, _answer(row, answer, asked), boolean(row, "label"))
