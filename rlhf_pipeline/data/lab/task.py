"""A task, and a type of tasks: wordings with slots that are filled to make a prompt and matched to read one back.

Each wording is invertible, so the judge needs the prompt's text alone and files need no hidden columns.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.forms import REQUESTS, Form
from rlhf_pipeline.data.lab.reading import Mark
from rlhf_pipeline.data.records import Message

Slots = Mapping[str, str]
TURN = "\x1f"  # stands between the turns of a wording; no prompt contains it
HELD_OUT_SHARE = 6  # one task in six is held out
_SIDE = "side 1240"  # chosen so that even a type of twelve tasks has two or three on the held-out side
_SLOT = re.compile(r"\{(\w+)\}")


def one_of(options: Sequence[str]) -> str:
    return "(?:" + "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True)) + ")"


def many_of(options: Sequence[str]) -> str:
    """A series: one, two and three; or with `or`."""
    one = one_of(options)
    return rf"{one}(?:, {one})* (?:and|or) {one}"


_KIND_WORDS = tuple(lex.KIND_OF)
# What may stand in a slot, by its name without digits.
PATTERNS = {
    "name": one_of(lex.NAMES),
    "villager": one_of(lex.VILLAGERS),
    "animal": one_of(lex.ANIMALS),
    "food": one_of(lex.FOODS),
    "thing": one_of(lex.THINGS),
    "noun": one_of((*lex.THINGS, *lex.ANIMALS)),
    "colour": one_of(lex.COLOURS),
    "place": one_of(lex.PLACES),
    "job": one_of(lex.JOBS),
    "item": one_of(_KIND_WORDS),
    "items": many_of(_KIND_WORDS),
    "foods": many_of(lex.FOODS),
    "kinds": one_of(tuple(lex.PLURALS)),
    "options": many_of(tuple(lex.KINDS)),
    "feelings": many_of(tuple(lex.FEELINGS)),
    "cue": one_of(tuple(lex.FEELING_OF)),
    "n": one_of(lex.NUMBERS),
    "letter": "[a-z]",
    "work": one_of(tuple(lex.TOOL_FOR)),
    "verb": one_of(tuple(lex.PAST)),
    "harm": one_of(tuple(lex.HARMS)),
    "form": one_of(tuple(REQUESTS)),
    "text": rf"[^{TURN}]+",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One prompt, and what its judge needs: the slots that the wording was filled with."""

    category: str
    type: str
    messages: tuple[Message, ...]
    slots: tuple[tuple[str, str], ...]
    references: tuple[str, ...]  # each of them is a full answer

    def held_out(self) -> bool:
        """The side of this task in whatever wording and form: decided by a hash of its content, so no seed can move it."""
        content = "|".join([_SIDE, self.type, *(f"{key}={value}" for key, value in self.slots if key != "form")])
        return hashlib.sha256(content.encode()).digest()[0] % HELD_OUT_SHARE == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskType:
    """How tasks of one type are drawn, answered and checked.

    `wordings` name slots in braces; turns of the user and the assistant are divided by TURN. `draw` fills the slots,
    `references` gives full answers (none for slots that make no sense), `correct` marks an answer, `form` says which
    form is asked. `extra` are patterns of slots that only this type has.
    """

    category: str
    name: str
    wordings: tuple[str, ...]
    draw: Callable[[random.Random], dict[str, str]]
    references: Callable[[Slots], tuple[str, ...]]
    correct: Callable[[Slots, str], Mark]
    form: Callable[[Slots], Form]
    extra: Mapping[str, str] = field(default_factory=dict)

    def make(self, rng: random.Random) -> Task:
        """A task of this type in one of its wordings."""
        slots, wording = self.draw(rng), rng.choice(self.wordings)
        used = {key: slots[key] for key in _SLOT.findall(wording)}
        return self._task(used, wording.format_map(used))

    def read(self, text: str) -> Task | None:
        """The task that a prompt (turns divided by TURN) poses, or None if it is not of this type."""
        for pattern in _patterns(self.wordings, tuple(self.extra.items())):
            match = pattern.fullmatch(text)
            if match and self.references(match.groupdict()):
                return self._task(match.groupdict(), text)
        return None

    def _task(self, slots: Slots, text: str) -> Task:
        turns = text.split(TURN)
        return Task(
            category=self.category,
            type=self.name,
            messages=tuple(Message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)),
            slots=tuple(sorted(slots.items())),
            references=self.references(slots),
        )


@functools.cache
def _patterns(wordings: tuple[str, ...], extra: tuple[tuple[str, str], ...]) -> tuple[re.Pattern[str], ...]:
    return tuple(_compile(wording, {**PATTERNS, **dict(extra)}) for wording in wordings)


def _compile(wording: str, patterns: Mapping[str, str]) -> re.Pattern[str]:
    """The regular expression of a wording: its text, each slot a named group, a slot used again the same text again."""
    out, seen = "", set()
    for i, part in enumerate(_SLOT.split(wording)):
        if i % 2 == 0:
            out += re.escape(part)
        elif part in seen:
            out += f"(?P={part})"
        else:
            seen.add(part)
            out += f"(?P<{part}>{patterns[part.rstrip('0123456789')]})"
    return re.compile(out)


def asked_form(slots: Slots, default: str = "sentence") -> Form:
    """The form that the prompt asks for in words, or the default."""
    return Form(REQUESTS.get(slots.get("form", ""), default))


def by_form(slots: Slots, word: str, *whole: str) -> tuple[str, ...]:
    """References for a task which asks for one word or for a sentence."""
    return (f"{lex.sentence(word)}.",) if asked_form(slots).kind == "word" else whole


def stable_rng(slots: Slots) -> random.Random:
    """The same draws for the same slots: references are a function of the prompt."""
    return random.Random(str(sorted(slots.items())))
