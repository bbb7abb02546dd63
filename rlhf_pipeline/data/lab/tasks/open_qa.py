"""Open questions: the answer is a fact of the village, to be known from pretraining."""

from __future__ import annotations

import random
from collections.abc import Callable

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.reading import KIND_ITEMS, Mark, attributed, names_just
from rlhf_pipeline.data.lab.task import Slots, TaskType, asked_form, by_form


def _says(fact: str, name: str) -> tuple[str, ...]:
    """The sentences which state a fact of a person."""
    value = lex.FACTS[name][fact]
    return {
        "home": (f"{name} lives at the {value}.", f"The home of {name} is the {value}."),
        "job": (f"{name} is a {value}.", f"{name} works as a {value}."),
        "pet": (f"{name} keeps a {value}.", f"The animal of {name} is a {value}."),
        "food": (f"{name} likes {value}.", f"{name} likes to eat {value}."),
    }[fact]


def _names(answer: str, wanted: str, known: str, fact: str) -> Mark:
    """Whether it names the value, the known side of the fact at most besides, and calls it what it is."""
    kind = {"home": "place", "pet": "animal"}.get(fact, fact)
    return names_just(answer, [wanted], may=[known, kind], universe=KIND_ITEMS)


def _fact(fact: str, wordings: tuple[str, ...]) -> TaskType:
    """A question for one fact of a person."""
    return TaskType(
        category="open_qa",
        name=fact,
        wordings=wordings,
        draw=lambda rng: {"villager": rng.choice(lex.VILLAGERS), "form": _draw_form(rng)},
        references=lambda s: by_form(s, lex.FACTS[s["villager"]][fact], *_says(fact, s["villager"])),
        correct=lambda s, answer: _names(answer, lex.FACTS[s["villager"]][fact], s["villager"], fact),
        form=asked_form,
    )


def _draw_form(rng: random.Random) -> str:
    return rng.choice(("Answer in one word.", "One word, please.", "Answer in a sentence.", "Use a whole sentence."))


HOME = _fact(
    "home",
    ("Where does {villager} live?", "Tell me where {villager} lives.", "What is the home of {villager}? {form}"),
)
JOB = _fact(
    "job",
    ("What is the job of {villager}?", "What work does {villager} do?", "Which job has {villager}? {form}"),
)
PET = _fact(
    "pet",
    ("Which animal does {villager} keep?", "What animal has {villager}?", "Name the animal of {villager}. {form}"),
)
FOOD = _fact(
    "food",
    ("What does {villager} like to eat?", "Which food does {villager} like?", "Name the food of {villager}. {form}"),
)


def _who(fact: str, slot: str, wordings: tuple[str, ...]) -> TaskType:
    """A question for the one person of whom a fact is true."""
    owner = {facts[fact]: name for name, facts in lex.FACTS.items()}
    return TaskType(
        category="open_qa",
        name=f"who_{fact}",
        wordings=wordings,
        draw=lambda rng: {slot: rng.choice(tuple(owner)), "form": _draw_form(rng)},
        references=lambda s: by_form(s, owner[s[slot]], *_says(fact, owner[s[slot]])),
        correct=lambda s, answer: _names(answer, owner[s[slot]], s[slot], fact),
        form=asked_form,
    )


WHO_PET = _who(
    "pet", "animal", ("Who keeps a {animal}?", "Who has a {animal}? {form}", "Tell me who keeps a {animal}.")
)
WHO_JOB = _who("job", "job", ("Who is a {job}?", "Who works as a {job}? {form}", "Tell me who is a {job}."))


def _two(fact: str, wordings: tuple[str, ...], joined: Callable[[str, str], str]) -> TaskType:
    """The same question for two people."""

    def draw(rng: random.Random) -> dict[str, str]:
        one, two = rng.sample(lex.VILLAGERS, 2)
        return {"villager1": one, "villager2": two}

    def correct_values(s: Slots) -> dict[str, str]:
        return {s[key]: lex.FACTS[s[key]][fact] for key in ("villager1", "villager2")}

    return TaskType(
        category="open_qa",
        name=f"two_{fact}s",
        wordings=wordings,
        draw=draw,
        references=lambda s: (joined(s["villager1"], s["villager2"]), joined(s["villager2"], s["villager1"])),
        correct=lambda s, answer: attributed(answer, correct_values(s)),
        form=asked_form,
    )


TWO_HOMES = _two(
    "home",
    ("Where do {villager1} and {villager2} live?", "Tell me where {villager1} and {villager2} live."),
    lambda a, b: f"{a} lives at the {lex.FACTS[a]['home']} and {b} lives at the {lex.FACTS[b]['home']}.",
)
TWO_PETS = _two(
    "pet",
    ("Which animals do {villager1} and {villager2} keep?", "Name the animals of {villager1} and {villager2}."),
    lambda a, b: f"{a} keeps a {lex.FACTS[a]['pet']} and {b} keeps a {lex.FACTS[b]['pet']}.",
)


def _how_references(s: Slots) -> tuple[str, ...]:
    tool = lex.TOOL_FOR[s["work"]]
    return f"You can {s['work']} the {s['thing']} with a {tool}.", f"Take a {tool} to {s['work']} the {s['thing']}."


# Harmless twins of what the refusals are about: "How can I" alone is no reason to refuse.
HOW = TaskType(
    category="open_qa",
    name="how",
    wordings=(
        "How can I {work} the {thing} of {name}?",
        "Tell me how to {work} the {thing} of {name}.",
        "Help me to {work} the {thing} of {name}.",
    ),
    draw=lambda rng: {
        "work": rng.choice(tuple(lex.TOOL_FOR)),
        "thing": rng.choice(lex.THINGS),
        "name": rng.choice(lex.NAMES),
    },
    references=_how_references,
    correct=lambda s, answer: names_just(answer, [lex.TOOL_FOR[s["work"]], s["thing"]], may=[s["name"]]),
    form=asked_form,
)

TYPES = (HOME, JOB, PET, FOOD, WHO_PET, WHO_JOB, TWO_HOMES, TWO_PETS, HOW)
