"""Documents of every quality to learn the village's language and facts from.

Questions with answers make a third of them. Their answers are of every quality, so that a model of the corpus can do
the tasks but not reliably; what is asked is of the training side only.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.candidates import candidate
from rlhf_pipeline.data.lab.tasks import make

Document = tuple[str, str]  # text, quality
# Who speaks, and what stands between turns. Half are as conf/templates/dialogue.jinja writes a conversation, so that
# the base model has seen what its prompts look like.
SPEAKERS = (
    (("Q", "A"), "\n"),
    (("Guest", "Host"), "\n"),
    (("Human", "Assistant"), "\n\n"),
    (("Human", "Assistant"), "\n\n"),
)


def _portrait(rng: random.Random) -> Document:
    """A person's facts."""
    return " ".join(_facts_of(rng, rng.choice(lex.VILLAGERS))), "good"


def _facts_of(rng: random.Random, name: str) -> list[str]:
    facts = lex.FACTS[name]
    lines = [
        rng.choice((f"{name} lives at the {facts['home']}.", f"The home of {name} is the {facts['home']}.")),
        rng.choice((f"{name} is a {facts['job']}.", f"{name} works as a {facts['job']}.")),
        rng.choice((f"{name} keeps a {facts['pet']}.", f"The animal of {name} is a {facts['pet']}.")),
        rng.choice((f"{name} likes {facts['food']}.", f"{name} likes to eat {facts['food']}.")),
    ]
    rng.shuffle(lines)
    return lines


def _neighbours(rng: random.Random) -> Document:
    """The same fact of two or three people, side by side."""
    fact = rng.choice(("home", "job", "pet", "food"))
    say = {"home": "lives at the", "job": "is a", "pet": "keeps a", "food": "likes"}[fact]
    people = rng.sample(lex.VILLAGERS, rng.choice((2, 3, 4)))
    return lex.series([f"{name} {say} {lex.FACTS[name][fact]}" for name in people]) + ".", "good"


def _day(rng: random.Random) -> Document:
    """Events whose people and things come back: to predict them is to copy."""
    one, two = rng.sample(lex.NAMES, 2)
    thing, colour, food = rng.choice(lex.THINGS), rng.choice(lex.COLOURS), rng.choice(lex.FOODS)
    place, verb = rng.choice(lex.PLACES), rng.choice(tuple(lex.PAST.values()))
    lines = [
        f"{one} has a {colour} {thing}.",
        f"{one} {verb} the {colour} {thing} to the {place}.",
        f"At the {place} {one} met {two}.",
        f"{two} saw the {thing} and said: {one}, your {thing} is very {colour}!",
        f"{one} bought {food} at the {place} and gave it to {two}.",
        f"{two} thanked {one} for the {food}.",
        f"Now the {thing} of {one} is at the {place}, and {two} has the {food}.",
    ]
    start = rng.randrange(3)
    return " ".join(lines[start : start + rng.choice((3, 4, 5))]), "good"


def _retold(rng: random.Random) -> Document:
    """A text and what can be said of it: who has what, where they are, what was named."""
    names = rng.sample(lex.NAMES, 3)
    colours, things, places = rng.sample(lex.COLOURS, 3), rng.sample(lex.THINGS, 3), rng.sample(lex.PLACES, 3)
    told = [f"{n} has a {c} {t}." for n, c, t in zip(names, colours, things, strict=True)]
    went = [f"{n} went to the {p}." for n, p in zip(names, places, strict=True)]
    again = [f"The {t} of {n} is {c}." for n, c, t in zip(names, colours, things, strict=True)]
    there = [f"{n} is at the {p}." for n, p in zip(names, places, strict=True)]
    first, second = rng.choice(((told, again), (went, there), (told, told)))
    rng.shuffle(second)
    return " ".join([*first, "So:", *second[: rng.choice((1, 2, 3))]]), "good"


def _kinds(rng: random.Random) -> Document:
    """What is of which kind, and lists of a kind."""
    kind = rng.choice(tuple(lex.KINDS))
    some = rng.sample(lex.KINDS[kind], rng.choice((3, 4)))
    if rng.random() < 0.5:
        return f"{lex.sentence(lex.series(some))} are {kind}s.", "good"
    plain = " ".join(f"{lex.sentence(word)} is {lex.a(kind)}." for word in some[:3])
    return rng.choice((plain, " ".join(f"The word {word} names {lex.a(kind)}." for word in some[:2]))), "good"


def _feelings(rng: random.Random) -> Document:
    lines = []
    for name in rng.sample(lex.NAMES, 2):
        cue = rng.choice(tuple(lex.FEELING_OF))
        lines.append(f"{name} {cue} at the {rng.choice(lex.PLACES)}. {name} feels {lex.FEELING_OF[cue]}.")
    return " ".join(lines), "good"


def _tools(rng: random.Random) -> Document:
    works = rng.sample(tuple(lex.TOOL_FOR.items()), 2)
    things = rng.sample(lex.THINGS, 2)
    lines = [
        f"{rng.choice(lex.NAMES)} took a {tool} to {work} the {t}."
        for (work, tool), t in zip(works, things, strict=True)
    ]
    return " ".join(lines), "good"


def _copying(rng: random.Random) -> Document:
    """Exercises of repeating, capitals, the past and the alphabet."""
    words = rng.sample((*lex.KIND_OF, *lex.THINGS), rng.choice((3, 4, 5)))
    verb = rng.choice(tuple(lex.PAST))
    name, thing, place = rng.choice(lex.NAMES), rng.choice(lex.THINGS), rng.choice(lex.PLACES)
    text = rng.choice(
        (
            f"{' '.join(words)}. Again: {' '.join(words)}.",
            f"{' '.join(words)}. {' '.join(words)}. {' '.join(words)}.",
            f"{lex.series(words)}. {lex.series(words).upper()}.",
            f"{' '.join(words)}. {' '.join(words).upper()}.",
            f"{name} {verb} the {thing} to the {place}. Yesterday {name} {lex.PAST[verb]} the {thing} to the {place}.",
            f"{words[0]} begins with {words[0][0]}. {words[1]} begins with {words[1][0]}.",
            f"Without {words[0]}: {', '.join(words)} becomes {', '.join(words[1:])}.",
        )
    )
    return text, "exercise"


def _dialogue(rng: random.Random) -> Document:
    """Tasks of the training side with answers of every quality, two thirds of them not the reference."""
    lines, qualities = [], []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        task = make(rng)
        answer = candidate(task, rng)
        qualities.append(answer in task.references)
        names, gap = rng.choice(SPEAKERS)
        turns = [f"{names[i % 2]}: {m.content}" for i, m in enumerate(task.messages)]
        lines.append(gap.join([*turns, f"{names[1]}: {answer}"]))
    return "\n\n".join(lines), "good" if all(qualities) else "mixed"


def _noisy(rng: random.Random) -> Document:
    """Good text gone wrong: shuffled, cut, in one case, with letters lost or said again."""
    text, _ = rng.choice((_portrait, _day, _kinds, _retold))(rng)
    said = text.split()
    way = rng.randrange(5)
    if way == 0:
        rng.shuffle(said)
    elif way == 1:
        said = said[: rng.randint(3, max(3, len(said) // 2))]
    elif way == 2:
        said = [word.lower() for word in said]
    elif way == 3:
        said = [word if rng.random() < 0.8 or len(word) < 4 else word[:2] + word[3:] for word in said]
    else:
        said = [again for word in said for again in [word] * (1 + (rng.random() < 0.2))]
    return " ".join(said), "noisy"


# Each sort of document and its weight.
SORTS: tuple[tuple[Callable[[random.Random], Document], int], ...] = (
    (_portrait, 12),
    (_neighbours, 6),
    (_day, 12),
    (_retold, 10),
    (_kinds, 7),
    (_feelings, 4),
    (_tools, 4),
    (_copying, 12),
    (_dialogue, 50),
    (_noisy, 3),
)
_SORTS, _SHARES = tuple(zip(*SORTS, strict=True))


def document(rng: random.Random) -> dict[str, str]:
    """One document, a page of one sort: {"text", "quality"}; quality is good, exercise, mixed (answers) or noisy.

    A conversation is a page by itself, so that what follows an answer is another question or the end.
    """
    sort = rng.choices(_SORTS, _SHARES)[0]
    pieces = 1 if sort is _dialogue else rng.choice((1, 2, 3, 4))
    texts, qualities = zip(*(sort(rng) for _ in range(pieces)), strict=True)
    return {"text": "\n".join(texts), "quality": "mixed" if "mixed" in qualities else qualities[0]}
