"""Extraction: to take out of a text the words that are asked for, and only those."""

from __future__ import annotations

import random
import re

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.forms import Form
from rlhf_pipeline.data.lab.reading import named, names_just
from rlhf_pipeline.data.lab.task import Slots, TaskType, one_of

SORTS = {"names": lex.NAMES, "colours": lex.COLOURS, "animals": lex.ANIMALS, "places": lex.PLACES, "foods": lex.FOODS}


def _line(rng: random.Random, names: list[str]) -> str:
    """A sentence of a day in the village."""
    name, colour, place = names.pop(), rng.choice(lex.COLOURS), rng.choice(lex.PLACES)
    return rng.choice(
        (
            f"{name} brought {rng.choice(lex.FOODS)} to the {place}.",
            f"{name} saw a {colour} {rng.choice(lex.ANIMALS)} at the {place}.",
            f"{name} gave {rng.choice(lex.FOODS)} to the {rng.choice(lex.ANIMALS)}.",
            f"The {colour} {rng.choice(lex.ANIMALS)} followed {name}.",
        )
    )


def _found(s: Slots) -> list[str]:
    """What the text names of the sort, each once, in the text's order and writing."""
    sort = {word.lower(): word for word in SORTS[s["sort"]]}
    return [sort[word] for word in dict.fromkeys(named(s["text"], sort))]


def _all_draw(rng: random.Random) -> dict[str, str]:
    names = rng.sample(lex.NAMES, 3)
    text = " ".join(_line(rng, names) for _ in range(rng.choice((2, 2, 3))))
    present = [sort for sort in SORTS if _found({"sort": sort, "text": text})]
    return {"text": text, "sort": rng.choice(present)}


def _all_references(s: Slots) -> tuple[str, ...]:
    found = _found(s)
    if not found:
        return ()
    lists = dict.fromkeys((", ".join(found), lex.series(found)))
    return tuple(f"{lex.sentence(text)}." for text in lists)


ALL = TaskType(
    category="extraction",
    name="all",
    wordings=(
        "List the {sort} in this text: {text}",
        "{text} Which {sort} are in the text? Give a list.",
        "Take out all {sort}: {text}",
    ),
    draw=_all_draw,
    references=_all_references,
    correct=lambda s, answer: names_just(answer, _found(s)),
    form=lambda s: Form("list", len(_found(s))),
    extra={"sort": one_of(tuple(SORTS))},
)

FIELDS = ("seller", "goods", "place", "price")
_NOTICE = re.compile(r"([A-Z][a-z]+) sells ([a-z]+) at the ([a-z]+) for ([a-z]+) coins\.")


def _notice_draw(rng: random.Random) -> dict[str, str]:
    one, two = rng.sample(FIELDS, 2)
    text = (
        f"{rng.choice(lex.NAMES)} sells {rng.choice(lex.FOODS)} at the {rng.choice(lex.PLACES)} "
        f"for {rng.choice(lex.NUMBERS)} coins."
    )
    return {"text": text, "field1": one, "field2": two}


def _fields(s: Slots) -> list[str]:
    match = _NOTICE.fullmatch(s["text"])
    if not match:
        return []
    row = dict(zip(FIELDS, match.groups(), strict=True))
    return [row[s[key]] for key in ("field1", "field2") if key in s]


def _notice_references(s: Slots) -> tuple[str, ...]:
    found = _fields(s)
    return (f"{lex.sentence(', '.join(found))}.",) if found else ()


def _notice(name: str, form: Form, wordings: tuple[str, ...]) -> TaskType:
    return TaskType(
        category="extraction",
        name=name,
        wordings=wordings,
        draw=_notice_draw,
        references=_notice_references,
        correct=lambda s, answer: names_just(answer, _fields(s)),
        form=lambda s: form,
        extra={"field": one_of(FIELDS), "text": r"[A-Z][a-z]+ sells [a-z ]+\."},
    )


ONE_FIELD = _notice(
    "one_field",
    Form("word"),
    (
        "{text} Give the {field1} in one word.",
        "Notice: {text} Write only the {field1}, one word.",
        "What is the {field1} here? One word. {text}",
    ),
)
TWO_FIELDS = _notice(
    "two_fields",
    Form("list", 2),
    (
        "{text} Give the {field1} and the {field2} with a comma.",
        "Notice: {text} Write only the {field1} and the {field2} with a comma.",
        "What are the {field1} and the {field2} here? Use a comma. {text}",
    ),
)

TYPES = (ALL, ONE_FIELD, TWO_FIELDS)
