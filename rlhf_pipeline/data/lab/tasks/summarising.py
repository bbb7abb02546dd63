"""Summarising: what matters stays, what does not is left out, and it is short."""

from __future__ import annotations

import random
import re

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.forms import Form
from rlhf_pipeline.data.lab.reading import Mark, in_order, in_words, names_just, sentences, words
from rlhf_pipeline.data.lab.task import Slots, TaskType

BUY = ("bought", "found", "got")
GIVE = ("gave", "sold", "sent")
_STORY = re.compile(
    r"([A-Z][a-z]+) (bought|found|got) ([a-z]+) at the ([a-z]+)\..* "
    r"[A-Z][a-z]+ (gave|sold|sent) the ([a-z]+) to ([A-Z][a-z]+)\."
)
_HAS = re.compile(r"([A-Z][a-z]+) has a ([a-z]+)\.")


def _short(answer: str, most: int, mark: Mark) -> Mark:
    """The mark of a summary; nothing for the text once more."""
    if len(sentences(answer)) > 1 or len(words(answer)) > most:
        return Mark(0.0, "it is as long as a text, not a summary")
    return mark


# --- a story of two who trade, with the weather and other things between ---


def _story_draw(rng: random.Random) -> dict[str, str]:
    one, two = rng.sample(lex.NAMES, 2)
    food = rng.choice(lex.FOODS)
    asides = rng.sample(
        (
            f"The sky was {rng.choice(lex.COLOURS)}.",
            f"A {rng.choice(lex.ANIMALS)} slept in the sun.",
            f"A {rng.choice(lex.COLOURS)} {rng.choice(lex.GARMENTS)} lay there.",
        ),
        2,
    )
    text = (
        f"{one} {rng.choice(BUY)} {food} at the {rng.choice(lex.PLACES)}. {' '.join(asides)} "
        f"Then {one} {rng.choice(GIVE)} the {food} to {two}."
    )
    return {"text": text}


def _story(s: Slots) -> re.Match[str] | None:
    match = _STORY.fullmatch(s["text"])
    return match if match and match[3] == match[6] else None


def _story_references(s: Slots) -> tuple[str, ...]:
    match = _story(s)
    if not match:
        return ()
    one, bought, food, place, gave, _, two = match.groups()
    return (
        f"{one} {bought} {food} at the {place} and {gave} it to {two}.",
        f"At the {place} {one} {bought} {food} and {gave} it to {two}.",
    )


def _story_correct(s: Slots, answer: str) -> Mark:
    """Who, what and to whom in this order, and the place anywhere; every aside costs."""
    match = _story(s)
    assert match is not None, "a task has references"
    one, bought, food, place, gave, _, two = match.groups()
    universe = (lex.ITEMS | set(BUY) | set(GIVE)) - {place}
    order = in_order(answer, [one, bought, food, gave, two], universe=universe)
    share = 5 / 6 * order.share + (1 / 6 if order.share and place in words(answer) else 0.0)
    mark = Mark(share, f"of who, what and to whom {order.why}")
    return _short(answer, 16, in_words(mark, answer))


STORY = TaskType(
    category="summarising",
    name="story",
    wordings=(
        "Sum up in one sentence: {text}",
        "{text} What happened, in one sentence?",
        "Give a short summary of this: {text}",
    ),
    draw=_story_draw,
    references=_story_references,
    correct=_story_correct,
    form=lambda s: Form("sentence", most=16),
    extra={"text": r"[A-Z][a-z]+ (?:bought|found|got) [A-Za-z. ]+\."},
)

# --- several sentences into one ---


def _together_draw(rng: random.Random) -> dict[str, str]:
    name, count = rng.choice(lex.NAMES), rng.choice((2, 3))
    things = rng.sample((*lex.THINGS, *lex.ANIMALS, *lex.GARMENTS), count)
    return {"text": " ".join(f"{name} has a {thing}." for thing in things)}


def _owned(s: Slots) -> tuple[str, list[str]]:
    rows = _HAS.findall(s["text"])
    return (rows[0][0], [thing for _, thing in rows]) if rows else ("", [])


def _together_references(s: Slots) -> tuple[str, ...]:
    name, things = _owned(s)
    listed = [f"a {thing}" for thing in things]
    return (f"{name} has {lex.series(listed)}.", f"{name} owns {lex.series(listed)}.") if len(things) > 1 else ()


def _together_correct(s: Slots, answer: str) -> Mark:
    name, things = _owned(s)
    return _short(answer, 16, in_words(names_just(answer, [name, *things]), answer))


TOGETHER = TaskType(
    category="summarising",
    name="together",
    wordings=(
        "Say this in one sentence: {text}",
        "{text} Put that into one sentence.",
        "Make one sentence of this: {text}",
    ),
    draw=_together_draw,
    references=_together_references,
    correct=_together_correct,
    form=lambda s: Form("sentence", most=16),
    extra={"text": r"[A-Z][a-z]+ has a [A-Za-z. ]+\."},
)

# --- a title ---

_TITLE = re.compile(r"([A-Z][a-z]+) has a ([a-z]+) ([a-z]+)\. It ([a-z ]+)\. (?:.*)")
ABOUT = ("stands at the mill", "is old and small", "lay in the rain", "was a present", "cost nine coins", "is the best")


def _title_draw(rng: random.Random) -> dict[str, str]:
    name, thing = rng.choice(lex.NAMES), rng.choice(lex.THINGS)
    first, second = rng.sample(ABOUT, 2)
    return {"text": f"{name} has a {rng.choice(lex.COLOURS)} {thing}. It {first}. It {second}."}


def _title_references(s: Slots) -> tuple[str, ...]:
    match = _TITLE.fullmatch(s["text"])
    if not match:
        return ()
    name, colour, thing = match[1], match[2], match[3]
    return f"The {colour} {thing} of {name}.", f"The {thing} of {name}."


def _title_correct(s: Slots, answer: str) -> Mark:
    match = _TITLE.fullmatch(s["text"])
    assert match is not None, "a task has references"
    mark = names_just(answer, [match[1], match[3]], may=[match[2]])
    if {"has", "is", "was", "it"} & set(words(answer)):
        mark = Mark(mark.share / 2, f"{mark.why}, but it is a sentence and no title")
    if not {"the", "a", "of"} & set(words(answer)):
        mark = Mark(mark.share / 4, f"{mark.why}, but it only lists words")
    return _short(answer, 8, mark)


TITLE = TaskType(
    category="summarising",
    name="title",
    wordings=("Give this text a title: {text}", "{text} What is a good title?", "Find a title for this: {text}"),
    draw=_title_draw,
    references=_title_references,
    correct=_title_correct,
    form=lambda s: Form("phrase", most=8),
    extra={"text": r"[A-Z][a-z]+ has a [A-Za-z. ]+\. It [A-Za-z. ]+\."},
)

TYPES = (STORY, TOGETHER, TITLE)
