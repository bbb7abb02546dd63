"""Classification: of a word, of a feeling, and of the odd one out."""

from __future__ import annotations

import random

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.reading import KIND_ITEMS, Mark, names_just
from rlhf_pipeline.data.lab.task import Slots, TaskType, asked_form, by_form

FORMS = ("Answer in one word.", "Answer in a sentence.", "One word, please.", "Use a whole sentence.")


def _options(rng: random.Random, truth: str, every: tuple[str, ...]) -> str:
    """The truth and two or three others, in any order."""
    others = rng.sample([option for option in every if option != truth], rng.choice((2, 3)))
    return lex.series(rng.sample([truth, *others], len(others) + 1), "or")


def _kind_draw(rng: random.Random) -> dict[str, str]:
    kind = rng.choice(tuple(lex.KINDS))
    options = _options(rng, kind, tuple(lex.KINDS))
    return {"item": rng.choice(lex.KINDS[kind]), "options": options, "form": rng.choice(FORMS)}


def _kind_references(s: Slots) -> tuple[str, ...]:
    kind = lex.KIND_OF[s["item"]]
    if kind not in s["options"].replace(",", "").split():
        return ()
    return by_form(
        s, kind, f"The word {s['item']} names {lex.a(kind)}.", f"{lex.sentence(s['item'])} is {lex.a(kind)}."
    )


KIND = TaskType(
    category="classification",
    name="kind",
    wordings=(
        "What does the word {item} name: {options}? {form}",
        "Sort the word {item} under {options}. {form}",
        "Is {item} the word for {options}? {form}",
    ),
    draw=_kind_draw,
    references=_kind_references,
    correct=lambda s, answer: names_just(answer, [lex.KIND_OF[s["item"]]], may=[s["item"]], universe=KIND_ITEMS),
    form=asked_form,
)


def _feeling_draw(rng: random.Random) -> dict[str, str]:
    cue = rng.choice(tuple(lex.FEELING_OF))
    return {
        "name": rng.choice(lex.NAMES),
        "cue": cue,
        "place": rng.choice(lex.PLACES),
        "feelings": _options(rng, lex.FEELING_OF[cue], tuple(lex.FEELINGS)),
        "form": rng.choice(FORMS),
    }


def _feeling_references(s: Slots) -> tuple[str, ...]:
    feeling = lex.FEELING_OF[s["cue"]]
    if feeling not in s["feelings"].replace(",", "").split():
        return ()
    return by_form(s, feeling, f"{s['name']} feels {feeling}.", f"{s['name']} is {feeling}.")


FEELING = TaskType(
    category="classification",
    name="feeling",
    wordings=(
        "{name} {cue} at the {place}. Is {name} {feelings}? {form}",
        "Choose from {feelings}: how does {name} feel? {name} {cue} at the {place}. {form}",
        "At the {place} {name} {cue}. Does {name} feel {feelings}? {form}",
    ),
    draw=_feeling_draw,
    references=_feeling_references,
    correct=lambda s, answer: names_just(
        answer, [lex.FEELING_OF[s["cue"]]], may=[s["name"]], universe=lex.ITEMS | set(lex.FEELINGS)
    ),
    form=asked_form,
)


def _odd_draw(rng: random.Random) -> dict[str, str]:
    kind, other = rng.sample(tuple(lex.KINDS), 2)
    items = [*rng.sample(lex.KINDS[kind], 3), rng.choice(lex.KINDS[other])]
    return {"items": lex.series(rng.sample(items, 4)), "form": rng.choice(FORMS)}


def _odd(s: Slots) -> str:
    """The one word whose kind no other word of the list has; empty if there is no such word."""
    items = s["items"].replace(",", "").replace(" and ", " ").replace(" or ", " ").split()
    kinds = [lex.KIND_OF[item] for item in items]
    alone = [item for item, kind in zip(items, kinds, strict=True) if kinds.count(kind) == 1]
    return alone[0] if len(alone) == 1 and len(items) >= 3 else ""


def _odd_references(s: Slots) -> tuple[str, ...]:
    odd = _odd(s)
    return by_form(s, odd, f"The word {odd} does not belong.", f"The word {odd} is different.") if odd else ()


def _odd_correct(s: Slots, answer: str) -> Mark:
    # "does not belong" is no denial here.
    return names_just(answer.replace(" does not belong", " is different"), [_odd(s)])


ODD = TaskType(
    category="classification",
    name="odd",
    wordings=(
        "Which word does not belong: {items}? {form}",
        "One word is of another kind: {items}. Which one? {form}",
        "Find the odd word in {items}. {form}",
    ),
    draw=_odd_draw,
    references=_odd_references,
    correct=_odd_correct,
    form=asked_form,
)

TYPES = (KIND, FEELING, ODD)
