"""Rewriting: most of the text stays, and what is asked changes."""

from __future__ import annotations

import random
import re

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.forms import Form
from rlhf_pipeline.data.lab.reading import Mark, in_order, named, words
from rlhf_pipeline.data.lab.task import Slots, TaskType, one_of

VERBS = frozenset((*lex.PAST, *lex.PAST.values()))
ASKED = ("give", "bring", "show", "sell", "lend", "send")
CONTENT = lex.ITEMS | VERBS | set(ASKED)


def _sentence_form(s: Slots) -> Form:
    return Form("sentence")


def _rewritten(answer: str, target: str, *, new: str, old: str) -> Mark:
    """The content words of the target in its order; nothing where the change itself is not made."""
    said = words(answer)
    if new.lower() not in said:
        return Mark(0.0, f"{new} is missing, so the change is not made")
    if old and old.lower() in said:
        return Mark(0.0, f"{old} is still there, so the change is not made")
    return in_order(answer, [word for word in words(target) if word in CONTENT], universe=CONTENT)


# --- capital letters ---


def _capitals_correct(s: Slots, answer: str) -> Mark:
    """The words in capital letters in their order; every one in small letters is wrong."""
    said = re.findall("[A-Za-z]+", answer)
    mark = in_order(" ".join(w for w in said if w.isupper()), [s["colour"], s["noun1"], s["noun2"]], universe=CONTENT)
    small = len(named(" ".join(w for w in said if not w.isupper()), CONTENT))
    return Mark(max(0.0, mark.share - small / 3), f"in capital letters {mark.why}, in small letters it has {small}")


def _capitals_draw(rng: random.Random) -> dict[str, str]:
    one, two = rng.sample((*lex.THINGS, *lex.ANIMALS), 2)
    return {"colour": rng.choice(lex.COLOURS), "noun1": one, "noun2": two}


CAPITALS = TaskType(
    category="rewriting",
    name="capitals",
    wordings=(
        "Write in capital letters: the {colour} {noun1} and the {noun2}",
        "Put this in capital letters: the {colour} {noun1} and the {noun2}",
        "The {colour} {noun1} and the {noun2}. Write that in capital letters.",
    ),
    draw=_capitals_draw,
    references=lambda s: (f"the {s['colour']} {s['noun1']} and the {s['noun2']}.".upper(),),
    correct=_capitals_correct,
    form=lambda s: Form("capitals"),
)

# --- past ---


def _past_draw(rng: random.Random) -> dict[str, str]:
    return {
        "name": rng.choice(lex.NAMES),
        "verb": rng.choice(tuple(lex.PAST)),
        "colour": rng.choice(lex.COLOURS),
        "thing": rng.choice(lex.THINGS),
        "place": rng.choice(lex.PLACES),
    }


def _past(s: Slots) -> str:
    return f"{s['name']} {lex.PAST[s['verb']]} the {s['colour']} {s['thing']} to the {s['place']}."


PAST = TaskType(
    category="rewriting",
    name="past",
    wordings=(
        "Put this in the past: {name} {verb} the {colour} {thing} to the {place}.",
        "{name} {verb} the {colour} {thing} to the {place}. Say that it was yesterday.",
        "Rewrite in the past: {name} {verb} the {colour} {thing} to the {place}.",
    ),
    draw=_past_draw,
    references=lambda s: (_past(s), f"Yesterday {_past(s)}"),
    correct=lambda s, answer: _rewritten(answer, _past(s), new=lex.PAST[s["verb"]], old=s["verb"]),
    form=_sentence_form,
)

# --- another person ---


def _swap_draw(rng: random.Random) -> dict[str, str]:
    one, two, other = rng.sample(lex.NAMES, 3)
    return {**_past_draw(rng), "name1": one, "name2": two, "name3": other}


def _swapped(s: Slots) -> str:
    return f"{s['name3']} {s['verb']} the {s['thing']} of {s['name2']} to the {s['place']}."


SWAP = TaskType(
    category="rewriting",
    name="swap",
    wordings=(
        "Put {name3} for {name1}: {name1} {verb} the {thing} of {name2} to the {place}.",
        "{name1} {verb} the {thing} of {name2} to the {place}. Write it with {name3} for {name1}.",
        "It was {name3}, not {name1}. Correct this: {name1} {verb} the {thing} of {name2} to the {place}.",
    ),
    draw=_swap_draw,
    references=lambda s: (_swapped(s),),
    correct=lambda s, answer: _rewritten(answer, _swapped(s), new=s["name3"], old=s["name1"]),
    form=_sentence_form,
)

# --- politely ---


def _polite_draw(rng: random.Random) -> dict[str, str]:
    return {**_past_draw(rng), "asked": rng.choice(ASKED)}


def _politely(s: Slots) -> str:
    return f"Please {s['asked']} me the {s['colour']} {s['thing']} of {s['name']}."


POLITELY = TaskType(
    category="rewriting",
    name="politely",
    wordings=(
        "Say it politely: {asked} me the {colour} {thing} of {name}!",
        "Make this polite: {asked} me the {colour} {thing} of {name}!",
        "How do I say this with please: {asked} me the {colour} {thing} of {name}!",
    ),
    draw=_polite_draw,
    references=lambda s: (
        _politely(s),
        f"Could you please {s['asked']} me the {s['colour']} {s['thing']} of {s['name']}?",
    ),
    correct=lambda s, answer: _rewritten(answer, _politely(s), new="please", old=""),
    form=_sentence_form,
    extra={"asked": one_of(ASKED)},
)

TYPES = (CAPITALS, PAST, SWAP, POLITELY)
