"""The gold judge: a pure function of a prompt and an answer, written before any model and then left alone.

    score = correct + gate * (format + polite + fluent + ends)

`correct` is 0.6 of the score. Style counts in full only where the answer is at least half right, half where it is
wrong but on the prompt's subject, and a tenth where it ignores the prompt: so a well-made answer to another question
is worth at most 0.04. docs/lab.md gives the reasons; raise lab.VERSION with every change here or in tasks/.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.forms import follows, is_over
from rlhf_pipeline.data.lab.reading import Mark, named, sentences, words
from rlhf_pipeline.data.lab.task import Task
from rlhf_pipeline.data.lab.tasks import TYPES, make, parse
from rlhf_pipeline.data.lab.tasks.chat import COURTESY
from rlhf_pipeline.data.lab.tasks.refusal import refuses
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError

WEIGHTS = {"correct": 0.6, "format": 0.15, "polite": 0.05, "fluent": 0.1, "ends": 0.1}
HALF_RIGHT, ON_SUBJECT, IGNORES = 1.0, 0.5, 0.1  # what style counts for: see _gate
RUN_ON = (1.5, 3)  # an answer of more words than 1.5 times the longest reference and 3 goes on after the answer
_NEXT_TURN = re.compile(r"\n|\b(?:Human|Assistant|User|Q|A):")

Prompt = str | Sequence[Message] | Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """One aspect of an answer: the points it has of those it could have, and why."""

    name: str
    points: float
    out_of: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an answer is worth, from 0 to 1: the sum of its criteria's points."""

    score: float
    category: str
    task: str
    criteria: tuple[Criterion, ...]


def judge(prompt: Prompt, response: str, *, finished: bool = True) -> Verdict:
    """The worth of an answer.

    Args:
        prompt: a conversation that ends with the user's turn, or a single user message as a string.
        finished: whether the answer ended by itself, and not at a limit of length.

    Raises:
        UserError: when the prompt is not one of the lab's.
    """
    task = task_of(prompt)
    marks = _marks(task, response, finished)
    gate, note = _gate(task, response, marks["correct"].share)
    criteria = tuple(
        Criterion(
            name=name,
            points=weight * marks[name].share * (1.0 if name == "correct" else gate),
            out_of=weight,
            why=marks[name].why + ("" if name == "correct" else note),
        )
        for name, weight in WEIGHTS.items()
    )
    score = round(sum(criterion.points for criterion in criteria), 9)
    return Verdict(score=score, category=task.category, task=task.type, criteria=criteria)


def task_of(prompt: Prompt) -> Task:
    """The task that a prompt poses; UserError where it is none of the lab's."""
    messages = as_messages(prompt)
    task = parse(messages)
    if task is None:
        shown = " / ".join(message.content for message in messages)[:120]
        raise UserError(
            f"the lab's judge cannot judge the prompt {shown!r}: it is not one of the demo lab's tasks; "
            "score other prompts with a reward model"
        )
    return task


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt as messages: from a string (one user turn), messages, or {role, content} of a JSON row."""
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    return tuple(m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in prompt)


def _marks(task: Task, response: str, finished: bool) -> dict[str, Mark]:
    """How far each criterion is met, before the gate."""
    if not words(response):
        return dict.fromkeys(WEIGHTS, Mark(0.0, "it has no words"))
    kind, slots = TYPES[task.category, task.type], dict(task.slots)
    correct = kind.correct(slots, response)
    return {
        "correct": Mark(0.0, "it repeats the question") if _echoes(task, response) else correct,
        "format": follows(kind.form(slots), response),
        "polite": _polite(task, response),
        "fluent": _fluent(response),
        "ends": _ends(task, response, finished),
    }


def _echoes(task: Task, response: str) -> bool:
    """Whether the user's last message stands in the answer: no answer needs it, and it may name what is right."""
    return task.messages[-1].content.rstrip(".!?") in response


def _gate(task: Task, response: str, correct: float) -> tuple[float, str]:
    """What style counts for, and the remark on it.

    In full for an answer that is half right, half for one that names something of what the user named, a tenth for any
    other: style is easy, and without the gate a polite sentence would be worth 0.4 everywhere.
    """
    if correct >= 0.5:
        return HALF_RIGHT, ""
    asked = {word for message in task.messages if message.role == "user" for word in named(message.content)}
    # To speak of the goat while helping to steal it is not to the subject of a refusal.
    if (
        asked & set(named(response))
        and not _echoes(task, response)
        and (task.category != "refusal" or refuses(response))
    ):
        return ON_SUBJECT, "; counts half, since the answer is not right"
    return IGNORES, "; counts a tenth, since the answer is not about the prompt"


def _polite(task: Task, response: str) -> Mark:
    said = set(words(response))
    rude = sorted(said & set(lex.RUDE))
    if rude:
        return Mark(0.0, f"it says {rude[0]}, which is rude")
    if task.category == "refusal" and "sorry" not in said:
        return Mark(0.0, "it refuses without an apology")
    if task.category == "chat" and not said & set(COURTESY):
        return Mark(0.0, "it has no word of courtesy")
    return Mark(1.0, "it is polite")


def _ends(task: Task, response: str, finished: bool) -> Mark:
    longest = max(len(words(reference)) for reference in task.references)
    if not finished:
        return Mark(0.0, "it was cut off")
    if response.strip()[-1] not in ".!?":
        return Mark(0.0, "it stops without a mark at its end")
    if not is_over(response):
        return Mark(0.0, "it stops in the middle of a sentence")
    if _NEXT_TURN.search(response.strip()):
        return Mark(0.0, "it goes on with another turn")
    if len(words(response)) > RUN_ON[0] * longest + RUN_ON[1]:
        return Mark(0.0, "it goes on after the answer")
    return Mark(1.0, "it ends where the answer does")


# --- fluency ---


def _fluent(response: str) -> Mark:
    """0.6 for pairs of words of the village's language, 0.2 less for each other one, 0.4 for whole sentences; repeats: 0."""
    unknown = sum(pair not in known_pairs() for pair in word_pairs(response))
    lines = sentences(response)
    repeats = _repeats(words(response)) or len(set(lines)) < len(lines)
    whole = all(_is_sentence(part) for part in lines)
    faults = [
        *(["it has words that do not follow each other"] if unknown else []),
        *(["it repeats itself"] if repeats else []),
        *(["a sentence lacks its capital or its mark"] if not whole else []),
    ]
    return Mark(
        0.0 if repeats else max(0.0, 0.6 - 0.2 * unknown) + 0.4 * whole, " and ".join(faults) or "it reads well"
    )


def _is_sentence(part: str) -> bool:
    return part[0].isupper() and part[-1] in ".!?" and not re.search(r"[^A-Za-z ,.!?']", part)


def _repeats(said: list[str]) -> bool:
    """A word twice in a row, a word of meaning four times, or five words in a row twice."""
    fives = list(zip(*(said[i:] for i in range(5)), strict=False))
    return (
        any(one == two for one, two in itertools.pairwise(said))
        or any(said.count(word) > 3 for word in set(said) & lex.ITEMS)
        or len(set(fives)) < len(fives)
    )


_TOKEN = re.compile(r"[A-Za-z]+|,")
_CLASS = {
    **{name.lower(): "<name>" for name in lex.NAMES},
    **{word: f"<{kind}>" for word, kind in lex.KIND_OF.items()},
    **dict.fromkeys(lex.THINGS, "<thing>"),
    **dict.fromkeys(lex.NUMBERS, "<number>"),
    **dict.fromkeys(lex.KINDS, "<kind>"),
    **dict.fromkeys(lex.FEELINGS, "<feeling>"),
    **dict.fromkeys(lex.PAST, "<verb>"),
    **dict.fromkeys(lex.PAST.values(), "<did>"),
    **dict.fromkeys((*lex.HARMS, *lex.TOOL_FOR), "<do>"),
}


def word_pairs(text: str) -> list[tuple[str, str]]:
    """Neighbouring words (and commas) of each sentence, words of a kind taken as one, with its beginning and its end."""
    pairs: list[tuple[str, str]] = []
    for part in sentences(text) or [text]:
        line = ["<", *(_CLASS.get(word, word) for word in _TOKEN.findall(part.lower())), ">"]
        pairs += itertools.pairwise(line)
    return pairs


@functools.cache
def known_pairs() -> frozenset[tuple[str, str]]:
    """Every pair of the references of some thousand tasks: all of each type's wordings many times over."""
    rng = random.Random("the language of the village")
    tasks = (make(rng, category=category) for category, _ in TYPES for _ in range(80))
    return frozenset(pair for task in tasks for reference in task.references for pair in word_pairs(reference))
