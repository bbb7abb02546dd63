"""Closed questions: the answer stands in the prompt and is to be copied."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.reading import names_just
from rlhf_pipeline.data.lab.task import Slots, TaskType, asked_form, by_form

FORMS = ("Answer in one word.", "Answer in a sentence.")
_HAS = re.compile(r"([A-Z][a-z]+) has a ([a-z]+) ([a-z]+)\.")
_WENT = re.compile(r"([A-Z][a-z]+) went to the ([a-z]+)\.")


def _owners(rng: random.Random) -> dict[str, str]:
    """A text of two or three owners, and one of them to ask about."""
    count = rng.choice((2, 2, 3))
    rows = list(
        zip(rng.sample(lex.NAMES, count), rng.sample(lex.COLOURS, count), rng.sample(lex.THINGS, count), strict=True)
    )
    name, _, thing = rng.choice(rows)
    text = " ".join(f"{who} has a {colour} {what}." for who, colour, what in rows)
    return {"text": text, "name": name, "thing": thing, "form": rng.choice(FORMS)}


def _owner_of(slots: Slots) -> dict[str, str]:
    """The row of the text that is asked about; empty if there is none."""
    for name, colour, thing in _HAS.findall(slots["text"]):
        if slots.get("thing") == thing or slots.get("name") == name:
            return {"name": name, "colour": colour, "thing": thing}
    return {}


def _about_owner(
    name: str, wordings: tuple[str, ...], wanted: tuple[str, ...], say: Callable[[Slots, Slots], tuple[str, ...]]
) -> TaskType:
    """A question for the `wanted` parts of a row; the row's other parts may be said too."""

    def references(slots: Slots) -> tuple[str, ...]:
        row = _owner_of(slots)
        return say(slots, row) if row else ()

    return TaskType(
        category="closed_qa",
        name=name,
        wordings=wordings,
        draw=_owners,
        references=references,
        correct=lambda s, answer: names_just(
            answer, [_owner_of(s)[key] for key in wanted], may=list(_owner_of(s).values())
        ),
        form=asked_form,
    )


OWNER = _about_owner(
    "owner",
    (
        "{text} Who has the {thing}?",
        "Read this: {text} Who is the owner of the {thing}?",
        "Who has the {thing}? {text}",
        "{text} Who has the {thing}? {form}",
    ),
    ("name",),
    lambda s, row: by_form(
        s,
        row["name"],
        "{name} has the {thing}.".format_map(row),
        "The {thing} belongs to {name}.".format_map(row),
        "{name} has the {colour} {thing}.".format_map(row),
    ),
)
COLOUR = _about_owner(
    "colour",
    (
        "{text} Which colour is the {thing}?",
        "Read this: {text} What is the colour of the {thing}?",
        "{text} Which colour has the {thing}? {form}",
    ),
    ("colour",),
    lambda s, row: by_form(
        s,
        row["colour"],
        "The {thing} is {colour}.".format_map(row),
        "The {thing} of {name} is {colour}.".format_map(row),
    ),
)
WHAT = _about_owner(
    "what",
    ("{text} What does {name} have?", "Read this: {text} What belongs to {name}?", "What does {name} have? {text}"),
    ("colour", "thing"),
    lambda s, row: (
        "{name} has a {colour} {thing}.".format_map(row),
        "A {colour} {thing} belongs to {name}.".format_map(row),
    ),
)


def _trips(rng: random.Random) -> dict[str, str]:
    count = rng.choice((2, 2, 3))
    rows = list(zip(rng.sample(lex.NAMES, count), rng.sample(lex.PLACES, count), strict=True))
    text = " ".join(f"{who} went to the {where}." for who, where in rows)
    return {"text": text, "name": rng.choice(rows)[0], "form": rng.choice(FORMS)}


def _where(slots: Slots) -> str:
    return dict(_WENT.findall(slots["text"])).get(slots["name"], "")


def _where_references(slots: Slots) -> tuple[str, ...]:
    place, name = _where(slots), slots["name"]
    return by_form(slots, place, f"{name} is at the {place}.", f"{name} went to the {place}.") if place else ()


WHERE = TaskType(
    category="closed_qa",
    name="where",
    wordings=(
        "{text} Where is {name}?",
        "Read this: {text} Where did {name} go?",
        "Where is {name}? {text}",
        "{text} Where is {name}? {form}",
    ),
    draw=_trips,
    references=_where_references,
    correct=lambda s, answer: names_just(answer, [_where(s)], may=[s["name"]]),
    form=asked_form,
)

TYPES = (OWNER, COLOUR, WHAT, WHERE)
