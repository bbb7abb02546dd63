"""A small generated world, so that the first command a newcomer types needs no download.

`data.train=demo:documents` is text about a village: who lives where, owns what, and what they did. `demo:dialogues` asks
questions that the text answers, and asks to list, copy, count or spell. The facts are the same in both, so that what
pretraining teaches is what fine-tuning needs. Deterministic; written once as JSONL into the cache folder.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import sync

PREFIX = "demo:"
VERSION = 1  # part of the file names: a change of the world is a change of the data
WORLD_SEED = 7

NAMES = [
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ivo",
    "Jin",
    "Kira",
    "Leo",
    "Mia",
    "Nils",
    "Olga",
    "Pia",
    "Quin",
    "Rosa",
    "Sam",
    "Tess",
    "Uma",
    "Vic",
    "Wes",
    "Yara",
]
PLACES = [
    "the mill",
    "the harbour",
    "the school",
    "the old tower",
    "the bakery",
    "the farm",
    "the market",
    "the bridge",
]
JOBS = ["baker", "teacher", "farmer", "sailor", "carpenter", "doctor", "painter", "gardener"]
THINGS = ["boat", "cart", "lamp", "drum", "kite", "clock", "chair", "violin", "ladder", "basket"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "grey"]
ANIMALS = ["dog", "cat", "goat", "horse", "hen", "duck", "pony", "parrot"]
FOODS = ["bread", "soup", "apples", "cheese", "honey", "fish", "beans", "cake"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def _people() -> dict[str, dict[str, str]]:
    """Every person's facts, the same in documents and dialogues."""
    rng = random.Random(WORLD_SEED)
    return {
        name: {
            "place": rng.choice(PLACES),
            "job": rng.choice(JOBS),
            "thing": rng.choice(THINGS),
            "colour": rng.choice(COLOURS),
            "animal": rng.choice(ANIMALS),
            "food": rng.choice(FOODS),
        }
        for name in NAMES
    }


def documents(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Short texts: portraits, days in the village, lists, counting and spelling."""
    rng, people = random.Random(seed), _people()
    for _ in range(count):
        yield {"text": rng.choice((_portrait, _day, _lists, _exercise))(rng, people)}


def dialogues(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """One request in two or three wordings, one right answer."""
    rng, people = random.Random(seed), _people()
    for _ in range(count):
        request, answer = rng.choice(TASKS)(rng, people)
        yield {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}


def _portrait(rng: random.Random, people: dict[str, dict[str, str]]) -> str:
    name = rng.choice(NAMES)
    facts = people[name]
    sentences = [
        f"{name} lives at {facts['place']}.",
        f"{name} is a {facts['job']}.",
        f"{name} has a {facts['colour']} {facts['thing']}.",
        f"{name} has a {facts['animal']}.",
        f"{name} likes {facts['food']}.",
        f"The {facts['thing']} of {name} is {facts['colour']}.",
    ]
    rng.shuffle(sentences)
    return " ".join(sentences[: rng.randint(3, 6)])


def _day(rng: random.Random, people: dict[str, dict[str, str]]) -> str:
    one, two = rng.sample(NAMES, 2)
    a, b = people[one], people[two]
    return (
        f"In the morning {one} the {a['job']} left {a['place']} with the {a['animal']}. At {b['place']} {one} met {two}. "
        f"{two} had {rng.choice(NUMBERS[1:])} baskets of {b['food']}. They ate {a['food']} and went home."
    )


def _lists(rng: random.Random, people: dict[str, dict[str, str]]) -> str:
    kind, items = rng.choice((("colours", COLOURS), ("animals", ANIMALS), ("foods", FOODS), ("things", THINGS)))
    return f"Here are three {kind}: {', '.join(rng.sample(items, 3))}."


def _exercise(rng: random.Random, people: dict[str, dict[str, str]]) -> str:
    request, answer = rng.choice((_count, _spell, _repeat))(rng, people)
    return f"{request} {answer}"


Task = Callable[[random.Random, dict[str, dict[str, str]]], tuple[str, str]]


def _where(rng: random.Random, people: dict[str, dict[str, str]]) -> tuple[str, str]:
    name = rng.choice(NAMES)
    request = rng.choice((f"Where does {name} live?", f"Tell me where {name} lives."))
    return request, f"{name} lives at {people[name]['place']}."


def _job(rng: random.Random, people: dict[str, dict[str, str]]) -> tuple[str, str]:
    name = rng.choice(NAMES)
    return rng.choice((f"What is {name}?", f"What work does {name} do?")), f"{name} is a {people[name]['job']}."


def _colour(rng: random.Random, people: dict[str, dict[str, str]]) -> tuple[str, str]:
    name = rng.choice(NAMES)
    facts = people[name]
    return f"Which colour has the {facts['thing']} of {name}?", f"The {facts['thing']} of {name} is {facts['colour']}."


def _likes(rng: random.Random, people: dict[str, dict[str, str]]) -> tuple[str, str]:
    name = rng.choice(NAMES)
    return rng.choice(
        (f"What does {name} like?", f"What food does {name} like?")
    ), f"{name} likes {people[name]['food']}."


def _list(rng: random.Random, people: dict[str, dict[str, str]]) -> tuple[str, str]:
    kind, items = rng.choice((("colours", COLOURS), ("animals", ANIMALS), ("foods", FOODS), ("things", THINGS)))
    return rng.choice((f"Name three {kind}.", f"Give me three {kind}.")), ", ".join(rng.sample(items, 3)) + "."


def _count(rng: random.Random, people: dict[str, dict[str, str]]) -> tuple[str, str]:
    first = rng.randint(0, 7)
    last = rng.randint(first + 2, min(first + 5, 11))
    return f"Count from {NUMBERS[first]} to {NUMBERS[last]}.", ", ".join(NUMBERS[first : last + 1]) + "."


def _spell(rng: random.Random, people: dict[str, dict[str, str]]) -> tuple[str, str]:
    word = rng.choice((*COLOURS, *ANIMALS, *FOODS))
    return f"Spell {word}.", "-".join(word) + "."


def _repeat(rng: random.Random, people: dict[str, dict[str, str]]) -> tuple[str, str]:
    words = rng.sample((*COLOURS, *ANIMALS, *THINGS), rng.randint(2, 4))
    return f"Repeat: {' '.join(words)}.", " ".join(words) + "."


TASKS: tuple[Task, ...] = (_where, _job, _colour, _likes, _list, _count, _spell, _repeat)

# name -> (generator, rows, seed)
SETS: dict[str, tuple[Callable[[int, int], Iterator[dict[str, Any]]], int, int]] = {
    "documents": (documents, 6000, 1),
    "dialogues": (dialogues, 3000, 2),
}


def local_paths(paths: str | list[str], cache_dir: Path) -> list[str]:
    """`paths` with every demo:<set> replaced by the file that it was written to.

    Raises:
        UserError: for a set that does not exist.
    """
    every = [paths] if isinstance(paths, str) else paths
    return [str(_write(p.removeprefix(PREFIX), cache_dir)) if p.startswith(PREFIX) else p for p in every]


def _write(name: str, cache_dir: Path) -> Path:
    if name not in SETS:
        raise UserError(f"{PREFIX}{name}: no such set; there are {', '.join(PREFIX + known for known in SETS)}")
    generate, count, seed = SETS[name]
    path = cache_dir / f"demo_{name}_v{VERSION}.jsonl"
    if not path.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{random.SystemRandom().randrange(10**9)}.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in generate(count, seed)))
        sync(partial)
        partial.replace(path)
    return path
