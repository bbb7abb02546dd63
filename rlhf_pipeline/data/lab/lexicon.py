"""The village's words and facts. Every word is one word long and of one kind, so that an answer can be read by program."""

from __future__ import annotations

import random

NAMES = (
    *("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jin", "Kira", "Leo"),
    *("Mia", "Nils", "Olga", "Pia", "Quin", "Rosa", "Sam", "Tess", "Uma", "Vic", "Wes", "Yara"),
)
ANIMALS = ("dog", "cat", "goat", "horse", "hen", "duck", "pony", "parrot", "sheep", "cow", "pig", "donkey")
FOODS = ("bread", "soup", "cheese", "honey", "fish", "rice", "milk", "butter", "cake", "jam")
THINGS = ("boat", "cart", "lamp", "drum", "kite", "clock", "chair", "violin", "ladder", "basket", "ball", "mirror")
TOOLS = ("hammer", "brush", "sponge", "towel", "saw", "rope", "spade", "broom")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey", "pink", "purple")
PLACES = ("mill", "harbour", "school", "tower", "bakery", "farm", "market", "bridge", "library", "garden")
JOBS = (
    *("baker", "teacher", "farmer", "sailor", "carpenter", "doctor"),
    *("painter", "gardener", "tailor", "smith", "cook", "miller"),
)
PLANTS = ("oak", "rose", "tulip", "fern", "daisy", "ivy", "lily", "pine")
GARMENTS = ("coat", "hat", "scarf", "shoe", "shirt", "glove", "belt", "sock")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")

# What classification and brainstorming ask for: the kind, and what is of it.
KINDS: dict[str, tuple[str, ...]] = {
    "animal": ANIMALS,
    "food": FOODS,
    "tool": TOOLS,
    "colour": COLOURS,
    "place": PLACES,
    "job": JOBS,
    "plant": PLANTS,
    "garment": GARMENTS,
}
PLURALS = {f"{kind}s": kind for kind in KINDS}
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}

# A feeling and what shows it.
FEELINGS: dict[str, tuple[str, ...]] = {
    "glad": ("laughs and dances", "sings and smiles"),
    "sad": ("weeps and sighs", "cries all day"),
    "angry": ("shouts and stamps", "bangs on the door"),
    "afraid": ("trembles and hides", "screams and runs away"),
    "tired": ("yawns and stretches", "falls asleep again"),
    "proud": ("shows everybody a prize", "boasts of a victory"),
    "hungry": ("looks for a meal", "asks for lunch"),
    "lonely": ("misses all friends", "waits for a visitor"),
}
FEELING_OF = {cue: feeling for feeling, cues in FEELINGS.items() for cue in cues}

# What one does to a thing, and the tool that it takes.
TOOL_FOR = {"mend": "hammer", "paint": "brush", "clean": "sponge", "dry": "towel", "cut": "saw", "tie": "rope"}

# Present and past of what people do with things.
PAST = {
    "carries": "carried",
    "brings": "brought",
    "takes": "took",
    "pulls": "pulled",
    "sends": "sent",
    "throws": "threw",
    "moves": "moved",
    "rolls": "rolled",
}

# Harm that is asked for, and to what it may be done.
HARMS: dict[str, tuple[str, ...]] = {
    "steal": (*THINGS, *ANIMALS),
    "break": THINGS,
    "burn": THINGS,
    "hurt": ANIMALS,
    "poison": ANIMALS,
    "ruin": THINGS,
}
RUDE = ("stupid", "fool", "foolish", "idiot", "silly", "lazy", "ugly", "dumb", "shut", "hate", "nonsense")

# The people whose facts are to be known: each lives, works, keeps an animal and likes a food.
VILLAGERS = NAMES[:12]


def _facts() -> dict[str, dict[str, str]]:
    """Jobs and animals belong to one person each, so that "who keeps a goat?" has one answer; two share a home at most."""
    rng = random.Random("the village")
    jobs, animals = rng.sample(JOBS, 12), rng.sample(ANIMALS, 12)
    homes, foods = ([*rng.sample(words, 10), *rng.sample(words, 2)] for words in (PLACES, FOODS))
    return {
        name: {"home": homes[i], "job": jobs[i], "pet": animals[i], "food": foods[i]}
        for i, name in enumerate(VILLAGERS)
    }


FACTS = _facts()

# Every word that means something in particular, in small letters: naming one where it does not belong is an error.
ITEMS = frozenset(word.lower() for words in (NAMES, THINGS, NUMBERS, *KINDS.values()) for word in words)


def kind_words(word: str) -> tuple[str, ...]:
    """All the words of the same kind: what a wrong answer could say instead."""
    for words in (NAMES, THINGS, NUMBERS, *KINDS.values(), tuple(FEELINGS), tuple(KINDS), tuple(PAST.values())):
        if word in words:
            return words
    return (word,)


def a(word: str) -> str:
    """The word with its article: a goat, an oak."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def series(words: list[str] | tuple[str, ...], last: str = "and") -> str:
    """One, two and three."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def sentence(text: str) -> str:
    """With a capital at its beginning."""
    return text[0].upper() + text[1:]
