"""Brainstorming: many answers are right, and the prompt bounds them."""

from __future__ import annotations

import random

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.forms import Form
from rlhf_pipeline.data.lab.reading import Mark, named, parts, words
from rlhf_pipeline.data.lab.task import Slots, TaskType, stable_rng

COUNT = {word: i + 2 for i, word in enumerate(lex.NUMBERS)}
PRESENTS = (*lex.THINGS, *lex.GARMENTS)
# First letters with at least six words.
LETTERS = {
    letter: tuple(word for word in (*lex.KIND_OF, *lex.THINGS) if word[0] == letter) for letter in "bcdfghlmprst"
}


def _lists(slots: Slots, choices: list[str]) -> tuple[str, ...]:
    """Three lists of as many of the choices as are asked for."""
    rng, count = stable_rng(slots), COUNT[slots["n"]]
    if len(choices) < count:
        return ()
    lists = (rng.sample(choices, count) for _ in range(3))
    return tuple(f"{lex.sentence(lex.series(words))}." for words in lists)


def _count(said: list[str], right: set[str], wanted: int, may: set[str]) -> Mark:
    """Different right words up to the number asked for; wrong ones and those too many cost."""
    good = set(said) & right
    wrong = set(said) - right - may
    return parts(min(len(good), wanted), len(wrong) + max(0, len(good) - wanted), wanted, sorted(wrong))


# --- some of a kind, other than two ---


def _others_draw(rng: random.Random) -> dict[str, str]:
    kinds = rng.choice(tuple(lex.PLURALS))
    item1, item2 = rng.sample(lex.KINDS[lex.PLURALS[kinds]], 2)
    return {"kinds": kinds, "n": rng.choice(("two", "three", "four")), "item1": item1, "item2": item2}


def _others(slots: Slots) -> list[str]:
    return [w for w in lex.KINDS[lex.PLURALS[slots["kinds"]]] if w not in (slots["item1"], slots["item2"])]


OTHERS = TaskType(
    category="brainstorming",
    name="others",
    wordings=(
        "Name {n} {kinds} other than {item1} and {item2}.",
        "I know {item1} and {item2}. Give me {n} more {kinds}.",
        "Please list {n} {kinds}, but not {item1} or {item2}.",
        "What are {n} {kinds} besides {item1} and {item2}?",
    ),
    draw=_others_draw,
    references=lambda s: _lists(s, _others(s)),
    correct=lambda s, answer: _count(named(answer), set(_others(s)), COUNT[s["n"]], set()),
    form=lambda s: Form("list", COUNT[s["n"]]),
)

# --- presents of a colour ---


def _presents_draw(rng: random.Random) -> dict[str, str]:
    return {"name": rng.choice(lex.NAMES), "colour": rng.choice(lex.COLOURS), "n": rng.choice(("two", "three"))}


def _presents_correct(slots: Slots, answer: str) -> Mark:
    """A present counts when the colour stands before it; colours and presents that go with no other are wrong."""
    said, good, wrong = words(answer), set(), []
    for before, word in zip(["", *said], said, strict=False):
        if word in PRESENTS and before == slots["colour"]:
            good.add(word)
        elif word in lex.ITEMS and word not in (slots["colour"], slots["name"].lower()):
            wrong.append(word)
    wanted = COUNT[slots["n"]]
    return parts(min(len(good), wanted), len(wrong) + max(0, len(good) - wanted), wanted, wrong)


PRESENTS_TYPE = TaskType(
    category="brainstorming",
    name="presents",
    wordings=(
        "{name} likes {colour} things. Suggest {n} presents.",
        "What {n} presents suit {name}, who loves {colour}?",
        "I look for {n} {colour} presents for {name}. Any ideas?",
        "Think of {n} {colour} presents for {name}.",
    ),
    draw=_presents_draw,
    references=lambda s: _lists(s, [f"a {s['colour']} {word}" for word in PRESENTS]),
    correct=_presents_correct,
    form=lambda s: Form("list", COUNT[s["n"]]),
)

# --- words that begin with a letter ---


def _letter_draw(rng: random.Random) -> dict[str, str]:
    return {"name": rng.choice(lex.NAMES), "letter": rng.choice(tuple(LETTERS)), "n": rng.choice(("two", "three"))}


LETTER = TaskType(
    category="brainstorming",
    name="letter",
    wordings=(
        "{name} needs {n} words that begin with {letter}.",
        "Help {name} to find {n} words with the first letter {letter}.",
        "Which {n} words could {name} write under the letter {letter}?",
    ),
    draw=_letter_draw,
    references=lambda s: _lists(s, list(LETTERS.get(s["letter"], ()))),
    correct=lambda s, answer: _count(named(answer), set(LETTERS[s["letter"]]), COUNT[s["n"]], {s["name"].lower()}),
    form=lambda s: Form("list", COUNT[s["n"]]),
)

TYPES = (OTHERS, PRESENTS_TYPE, LETTER)
