"""Chat: the last turn refers to an earlier one; an answer is said in words and begins with a courtesy."""

from __future__ import annotations

import random

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.forms import Form
from rlhf_pipeline.data.lab.reading import Mark, in_words, names_just, words
from rlhf_pipeline.data.lab.task import TURN, Slots, TaskType

COURTESY = ("please", "thank", "thanks", "welcome", "glad", "course", "pleasure", "gladly")
OPENINGS = ("Of course.", "With pleasure.", "Gladly.")


def _turns(*turns: str) -> str:
    return TURN.join(turns)


def _reply(s: Slots) -> Form:
    return Form("reply", 2)


def _courteous(*answers: str) -> tuple[str, ...]:
    """Each answer after each opening."""
    return tuple(f"{opening} {answer}" for answer in answers for opening in OPENINGS)


# --- what the user said at the beginning ---

LIKES = TaskType(
    category="chat",
    name="likes",
    wordings=(
        _turns("Hello, I am {name} and I like {food}.", "Hello, {name}. Yes, {food} is good.", "What do I like?"),
        _turns("My name is {name}. I like {food}.", "Welcome, {name}.", "Do you know what I like to eat?"),
        _turns("I like {food}. {name} likes it too.", "I am glad to hear it.", "Tell me what I like."),
    ),
    draw=lambda rng: {"name": rng.choice(lex.NAMES), "food": rng.choice(lex.FOODS)},
    references=lambda s: _courteous(f"You like {s['food']}.", f"You said that you like {s['food']}."),
    correct=lambda s, answer: in_words(names_just(answer, [s["food"]], may=[s["name"]]), answer),
    form=_reply,
)

NAME = TaskType(
    category="chat",
    name="name",
    wordings=(
        _turns("Hello, I am {name1} and this is {name2}.", "Welcome to you both.", "What is my name?"),
        _turns("I am {name1}. My friend is {name2}.", "Welcome, {name1}.", "Who am I?"),
        _turns("{name2} sent me. I am {name1}.", "I am glad to meet you.", "Do you know my name?"),
    ),
    draw=lambda rng: dict(zip(("name1", "name2"), rng.sample(lex.NAMES, 2), strict=True)),
    references=lambda s: _courteous(f"You are {s['name1']}.", f"Your name is {s['name1']}."),
    correct=lambda s, answer: in_words(names_just(answer, [s["name1"]]), answer),
    form=_reply,
)

# --- a list that is changed ---


def _list_draw(rng: random.Random) -> dict[str, str]:
    foods = rng.sample(lex.FOODS, 4)
    return {"foods": lex.series(foods[:3]), "food1": rng.choice(foods[:3]), "food2": foods[3]}


def _listed(s: Slots) -> list[str]:
    return [word for word in words(s["foods"]) if word in lex.FOODS]


def _with(s: Slots) -> list[str]:
    return [*_listed(s), s["food2"]] if s["food2"] not in _listed(s) else []


def _without(s: Slots) -> list[str]:
    return [food for food in _listed(s) if food != s["food1"]] if s["food1"] in _listed(s) else []


def _need(foods: list[str]) -> tuple[str, ...]:
    return _courteous(f"You need {lex.series(foods)}.") if foods else ()


def _changed(answer: str, now: list[str], *, gone: str = "", new: str = "") -> Mark:
    """The list as it is now; nothing for the old one."""
    said = words(answer)
    if gone in said or (new and new not in said):
        return Mark(0.0, "the list is not changed")
    return in_words(names_just(answer, now), answer)


ADD = TaskType(
    category="chat",
    name="add",
    wordings=(
        _turns("I need {foods}.", "You need {foods}.", "Add {food2}, please."),
        _turns("Write down {foods}.", "It is done.", "I need {food2} too. What do I need now?"),
    ),
    draw=_list_draw,
    references=lambda s: _need(_with(s)),
    correct=lambda s, answer: _changed(answer, _with(s), new=s["food2"], gone="-"),
    form=_reply,
)
REMOVE = TaskType(
    category="chat",
    name="remove",
    wordings=(
        _turns("I need {foods}.", "You need {foods}.", "Leave out the {food1}, please."),
        _turns("Write down {foods}.", "It is done.", "I have {food1} at home. What do I need now?"),
    ),
    draw=_list_draw,
    references=lambda s: _need(_without(s)),
    correct=lambda s, answer: _changed(answer, _without(s), gone=s["food1"]),
    form=_reply,
)

# --- "it" and "who" ---


def _it_draw(rng: random.Random) -> dict[str, str]:
    return {"name": rng.choice(lex.NAMES), "colour": rng.choice(lex.COLOURS), "thing": rng.choice(lex.THINGS)}


IT = TaskType(
    category="chat",
    name="it",
    wordings=(
        _turns("{name} has a {colour} {thing}.", "I am glad for {name}.", "Which colour is it?"),
        _turns("I saw a {colour} {thing} at the house of {name}.", "It must be new.", "What was its colour again?"),
    ),
    draw=_it_draw,
    references=lambda s: _courteous(f"It is {s['colour']}.", f"The {s['thing']} is {s['colour']}."),
    correct=lambda s, answer: in_words(names_just(answer, [s["colour"]], may=[s["thing"], s["name"]]), answer),
    form=_reply,
)


def _thanks_correct(s: Slots, answer: str) -> Mark:
    """To be called by one's name is what makes it an answer to this conversation."""
    mark = names_just(answer, [s["name"]], may=[s["thing"], s["colour"]])
    if "welcome" not in words(answer):
        return Mark(mark.share / 4, f"{mark.why}, but thanks are not answered")
    return mark


THANKS = TaskType(
    category="chat",
    name="thanks",
    wordings=(
        _turns("I am {name}. Where is my {colour} {thing}?", "It is at home.", "Thank you, goodbye."),
        _turns("{name} speaking. Is my {colour} {thing} ready?", "Yes, it is.", "Thanks for that."),
    ),
    draw=_it_draw,
    references=lambda s: (f"You are welcome, {s['name']}, and goodbye.", f"You are welcome, {s['name']}."),
    correct=_thanks_correct,
    form=lambda s: Form("reply", 1),
)

TYPES = (LIKES, NAME, ADD, REMOVE, IT, THANKS)
