"""Answers of every quality to a task: what people rank, and what a corpus of mixed quality holds."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.task import Task
from rlhf_pipeline.data.lab.tasks import make
from rlhf_pipeline.data.lab.tasks.refusal import refuses

_WORD = re.compile(r"[A-Za-z]+")
_OF_A_KIND = frozenset((*lex.ITEMS, *lex.FEELINGS, *lex.KINDS, *lex.PAST.values()))
RUDE_LINES = ("What a stupid question.", "You are a fool.", "Shut your mouth.", "Only an idiot asks that.")
BABBLE = ("The sky is the sky.", "And then they went and went.", "Nobody knows what it was.", "That is that and so on.")
HELP = (
    "Take a hammer and go at night.",
    "You can do it with a rope.",
    "First wait for the night. Then go.",
    "Put fire under it.",
    "Tell everybody that it is true.",
)


def _reference(task: Task, rng: random.Random) -> str:
    return rng.choice(task.references)


def _swap(task: Task, rng: random.Random) -> str:
    """A reference with one word of meaning replaced by another of its kind: the wrong fact."""
    return _swapped(_reference(task, rng), rng)


def _swap_twice(task: Task, rng: random.Random) -> str:
    return _swapped(_swap(task, rng), rng)


def _swapped(text: str, rng: random.Random) -> str:
    found = [match for match in _WORD.finditer(text) if match[0].lower() in _OF_A_KIND]
    if not found:
        return text
    match = rng.choice(found)
    old = match[0].capitalize() if match[0].capitalize() in lex.NAMES else match[0].lower()
    new = rng.choice([word for word in lex.kind_words(old) if word != old] or [old])
    if match[0].isupper() and len(match[0]) > 1:
        new = new.upper()
    elif match[0][0].isupper():
        new = new.capitalize()
    return text[: match.start()] + new + text[match.end() :]


def _drop(task: Task, rng: random.Random) -> str:
    """A reference without one of its parts: of a list an item, of a sentence its last words."""
    text = _reference(task, rng)
    items = re.split(r", | and ", text.rstrip(".!?"))
    if len(items) > 1:
        del items[rng.randrange(len(items))]
        return lex.sentence(lex.series(items)) + "."
    said = text.rstrip(".!?").split()
    return " ".join(said[: max(1, len(said) - rng.choice((1, 2)))]) + "."


def _extra(task: Task, rng: random.Random) -> str:
    """The right answer and a wrong one beside it."""
    text, other = _reference(task, rng), _swap(task, rng)
    return f"{text.rstrip('.!?')} or {other[0].lower()}{other[1:]}"


def _unshaped(task: Task, rng: random.Random) -> str:
    """A right answer in another form."""
    text = _reference(task, rng)
    return rng.choice(
        (
            text.rstrip(".!?").lower(),
            f"I think that it is this: {text}",
            f"The answer is {text[0].lower()}{text[1:]}",
            text.replace(", ", " ").replace(" and ", " "),
            f"{text} That is the answer. I hope that it is right.",
        )
    )


def _rude(task: Task, rng: random.Random) -> str:
    text = _reference(task, rng) if rng.random() < 0.7 else _swap(task, rng)
    line = rng.choice(RUDE_LINES)
    return rng.choice((f"{text} {line}", f"{line} {text}"))


def _repetitive(task: Task, rng: random.Random) -> str:
    text = _reference(task, rng)
    said = text.rstrip(".!?").split()
    at = rng.randrange(len(said))
    return rng.choice((f"{text} {text}", " ".join([*said[: at + 1], *[said[at]] * 3, *said[at + 1 :]]) + "."))


def _unfinished(task: Task, rng: random.Random) -> str:
    said = _reference(task, rng).split()
    return " ".join(said[: max(1, rng.randint(len(said) // 3, max(1, len(said) - 1)))]).rstrip(".!?,")


def _babble(task: Task, rng: random.Random) -> str:
    text = _reference(task, rng) if rng.random() < 0.6 else _swap(task, rng)
    return " ".join([text, *rng.sample(BABBLE, rng.choice((1, 2)))])


def _off_topic(task: Task, rng: random.Random) -> str:
    return rng.choice(make(rng).references)


def _wrong_side(task: Task, rng: random.Random) -> str:
    """A refusal where help was wanted, help where a refusal was."""
    if task.category == "refusal":
        return rng.choice(HELP)
    return rng.choice(("I am sorry, but I cannot help you.", "I am sorry, but I will not say that.", "I do not know."))


def _echo(task: Task, rng: random.Random) -> str:
    return task.messages[-1].content


def _curt(task: Task, rng: random.Random) -> str:
    """A refusal or a chat answer without its courtesy; of others a bare word."""
    text = _reference(task, rng)
    if refuses(text):
        return rng.choice(("No, I will not help you.", lex.sentence(text.replace("I am sorry, but ", ""))))
    if task.category == "chat" and ". " in text:
        return text.split(". ", 1)[1]
    return f"{lex.sentence(text.rstrip('.!?').split()[-1])}."


# Each way to answer, and how often it is taken: the spread is that of an untrained assistant's answers.
WAYS: tuple[tuple[Callable[[Task, random.Random], str], int], ...] = (
    (_reference, 5),
    (_swap, 5),
    (_swap_twice, 2),
    (_drop, 3),
    (_extra, 2),
    (_unshaped, 3),
    (_rude, 2),
    (_repetitive, 2),
    (_unfinished, 2),
    (_babble, 2),
    (_off_topic, 2),
    (_wrong_side, 1),
    (_echo, 1),
    (_curt, 2),
)
_WAYS, _OFTEN = tuple(zip(*WAYS, strict=True))


def candidate(task: Task, rng: random.Random) -> str:
    """One answer of a random quality."""
    return rng.choices(_WAYS, _OFTEN)[0](task, rng)


def candidates(task: Task, rng: random.Random, k: int) -> list[str]:
    """`k` different answers of a spread of qualities, in no order."""
    found = {_reference(task, rng): None} if rng.random() < 0.8 else {}
    while len(found) < k:
        found[candidate(task, rng)] = None
    answers = list(found)
    rng.shuffle(answers)
    return answers
