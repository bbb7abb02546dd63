"""Generation: free text within bounds. Any sentence of the village's grammar will do that holds what was asked for."""

from __future__ import annotations

import random
import re

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.forms import Form
from rlhf_pipeline.data.lab.reading import Mark, named, names_just, parts, sentences, words
from rlhf_pipeline.data.lab.task import Slots, TaskType, asked_form, stable_rng

_NOUNS = frozenset(
    (*lex.THINGS, *lex.ANIMALS, *lex.GARMENTS, *lex.TOOLS, *lex.PLACES, *lex.PLANTS, *lex.JOBS, *lex.FOODS)
)
_VERBS = frozenset((*lex.PAST, *lex.PAST.values(), "saw", "sees", "has", "had", "found", "put", "left", "met", "likes"))
# One letter a word: N name, D the or a, C colour, O noun, V verb, P preposition, A and, X anything else.
_PHRASE = "(?:N|DC?O|O)"
_GRAMMAR = re.compile(
    rf"{_PHRASE}(?:A{_PHRASE})?V{_PHRASE}(?:P{_PHRASE})*(?:A(?:V|{_PHRASE}V?){_PHRASE}?(?:P{_PHRASE})*)?"
)


def _letter(word: str, before: str) -> str:
    if word in ("the", "a", "an"):
        return "D"
    if word == "and":
        return "A"
    if word in ("at", "to", "near", "with", "of", "from", "in", "for"):
        return "P"
    if word == "saw" and before not in ("the", "a"):
        return "V"
    if word in lex.COLOURS:
        return "C"
    if word in _NOUNS:
        return "O"
    if word in _VERBS:
        return "V"
    return "N" if word.capitalize() in lex.NAMES else "X"


def grammatical(text: str) -> bool:
    """Whether one sentence is of the small grammar: somebody does something to something, somewhere."""
    said = words(text)
    letters = "".join(_letter(word, before) for before, word in zip(["", *said], said, strict=False))
    return bool(_GRAMMAR.fullmatch(letters))


def _written(answer: str, wanted: list[str]) -> Mark:
    """What was asked for, and at most two other things beside it; a quarter of that where a sentence is none."""
    # "saw" is what somebody did, unless it is the tool.
    said = dict.fromkeys(word for word in named(answer) if word != "saw")
    asked = [word.lower() for word in wanted]
    more = [word for word in said if word not in asked]
    mark = parts(sum(word in said for word in asked), max(0, len(more) - 2), len(wanted), more)
    if all(grammatical(part) for part in sentences(answer)):
        return mark
    return Mark(mark.share / 4, f"{mark.why}, but it makes no whole sentence")


# --- a sentence with three things in it ---


def _sentence_draw(rng: random.Random) -> dict[str, str]:
    return {"name": rng.choice(lex.NAMES), "thing": rng.choice(lex.THINGS), "place": rng.choice(lex.PLACES)}


def _sentence_references(s: Slots) -> tuple[str, ...]:
    rng = stable_rng(s)
    name, thing, place, verb = s["name"], s["thing"], s["place"], rng.choice(tuple(lex.PAST.values()))
    return (
        f"{name} {verb} the {thing} to the {place}.",
        f"{name} saw a {rng.choice(lex.COLOURS)} {thing} at the {place}.",
        f"{name} found a {thing} and a {rng.choice(lex.GARMENTS)} near the {place}.",
    )


SENTENCE = TaskType(
    category="generation",
    name="sentence",
    wordings=(
        "Write a sentence about {name}, a {thing} and the {place}.",
        "Make a sentence with {name}, {thing} and {place}.",
        "Tell me in one sentence about {name}, the {thing} and the {place}.",
    ),
    draw=_sentence_draw,
    references=_sentence_references,
    correct=lambda s, answer: _written(answer, [s["name"], s["thing"], s["place"]]),
    form=asked_form,
)

# --- two sentences ---


def _two_draw(rng: random.Random) -> dict[str, str]:
    return {"name": rng.choice(lex.NAMES), "colour": rng.choice(lex.COLOURS), "animal": rng.choice(lex.ANIMALS)}


def _two_references(s: Slots) -> tuple[str, ...]:
    rng = stable_rng(s)
    name, animal, colour = s["name"], s["animal"], s["colour"]
    place, food, verb = rng.choice(lex.PLACES), rng.choice(lex.FOODS), rng.choice(("likes", "has"))
    return (
        f"{name} has a {colour} {animal}. The {animal} {verb} {food}.",
        f"{name} met a {colour} {animal} at the {place}. The {animal} took the {food}.",
    )


def _two_correct(s: Slots, answer: str) -> Mark:
    """The colour counts where it is the animal's."""
    if f"{s['colour']} {s['animal']}" not in answer:
        answer = answer.replace(s["colour"], "")
    return _written(answer, [s["name"], s["colour"], s["animal"]])


TWO = TaskType(
    category="generation",
    name="two",
    wordings=(
        "Write two sentences about {name} and a {colour} {animal}.",
        "Tell a story of two sentences: {name} and a {colour} {animal}.",
        "I want two sentences on {name} and a {colour} {animal}.",
    ),
    draw=_two_draw,
    references=_two_references,
    correct=_two_correct,
    form=lambda s: Form("sentence", 2),
)

# --- an invitation ---


def _invite_draw(rng: random.Random) -> dict[str, str]:
    one, two = rng.sample(lex.NAMES, 2)
    return {"name1": one, "name2": two, "food": rng.choice(lex.FOODS), "place": rng.choice(lex.PLACES)}


def _invite_references(s: Slots) -> tuple[str, ...]:
    return (
        f"Dear {s['name2']}, please come to the {s['place']} for {s['food']}. Yours, {s['name1']}.",
        f"Dear {s['name2']}, I have {s['food']} for you at the {s['place']}. Yours, {s['name1']}.",
    )


def _invite_correct(s: Slots, answer: str) -> Mark:
    """Four parts: the guest is greeted, the host signs, the food and the place; without the first two it is no letter."""
    greets, signs = f"Dear {s['name2']}," in answer, f"Yours, {s['name1']}." in answer
    if not greets and not signs:
        return Mark(0.0, "it neither greets the guest nor is signed by the host")
    mark = names_just(answer, [s["food"], s["place"]], may=[s["name1"], s["name2"]])
    return Mark((greets + signs + 2 * mark.share) / 4, f"greeting and signature are {greets + signs} of 2; {mark.why}")


INVITATION = TaskType(
    category="generation",
    name="invitation",
    wordings=(
        "Write a letter from {name1} to {name2}, who is invited for {food} at the {place}.",
        "{name1} invites {name2} for {food} at the {place}. Write the letter.",
        "Help {name1} to invite {name2} by letter. There is {food} at the {place}.",
    ),
    draw=_invite_draw,
    references=_invite_references,
    correct=_invite_correct,
    form=lambda s: Form("letter"),
)

TYPES = (SENTENCE, TWO, INVITATION)
