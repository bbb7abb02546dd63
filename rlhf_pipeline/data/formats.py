"""Turns the fields of a row into a record. One function a format, one line in FORMATS.

Rows are not checked here beyond finding their fields; records check their own content.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from rlhf_pipeline.data.records import BadRow, Demonstration, Message, Ranking, Record, Text
from rlhf_pipeline.errors import UserError

Kind = Literal["text", "demonstration", "ranking"]
Fields = Mapping[str, Any]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ASSISTANT = "\n\nAssistant:"
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """The fields a row must have, and what makes a record of each kind from it; None where nothing can."""

    fields: tuple[str, ...]
    description: str
    text: Callable[[Fields], Record] | None = None
    demonstration: Callable[[Fields], Record] | None = None
    ranking: Callable[[Fields], Record] | None = None

    def adapter(self, kind: Kind) -> Callable[[Fields], Record] | None:
        return {"text": self.text, "demonstration": self.demonstration, "ranking": self.ranking}[kind]


def detect(row: Fields, kind: Kind) -> str:
    """The name of the first format that makes a `kind` of rows with these fields; UserError if none does."""
    for name, format in FORMATS.items():
        if format.adapter(kind) and all(field in row for field in format.fields):
            return name
    known = "\n".join(
        f"  {name}: {', '.join(format.fields)} ({format.description})"
        for name, format in FORMATS.items()
        if format.adapter(kind)
    )
    raise UserError(f"no format makes a {kind} of rows with the fields {', '.join(row)}; known are\n{known}")


def to_record(row: Fields, kind: Kind, format: str) -> Record:
    """The record of a row. BadRow if a field is missing or unfit, UserError if the format makes no `kind`."""
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    adapter = FORMATS[format].adapter(kind)
    if adapter is None:
        able = [name for name, other in FORMATS.items() if other.adapter(kind)]
        raise UserError(f"the format {format!r} makes no {kind}; {', '.join(able)} do")
    return adapter(row)


def _get(row: Fields, field: str) -> Any:
    if field not in row:
        raise BadRow(f"no field {field!r}", f"there is {', '.join(row)}")
    return row[field]


def _string(row: Fields, field: str) -> str:
    value = _get(row, field)
    if not isinstance(value, str):
        raise BadRow(f"{field} is not a string", type(value).__name__)
    return value


def _text(row: Fields) -> Text:
    return Text(_string(row, "text"))


def _messages(row: Fields) -> Demonstration:
    """`weight: 0` on an assistant's message keeps it out of the loss, as in OpenAI's fine-tuning files."""
    values = _get(row, "messages")
    if not isinstance(values, list):
        raise BadRow("messages is not a list", type(values).__name__)
    return Demonstration(tuple(_message(value) for value in values))


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise BadRow("a message is not an object", type(value).__name__)
    weight = value.get("weight")
    if weight not in (None, 0, 1):
        raise BadRow("a message's weight is neither 0 nor 1", repr(weight))
    return Message(_string(value, "role"), _string(value, "content"), scored=weight != 0)


def _hh_prompt_and_answers(row: Fields) -> tuple[tuple[Message, ...], str, str]:
    """Both dialogues agree up to an `Assistant:`; what follows the last agreed one are the two answers."""
    chosen, rejected = _string(row, "chosen"), _string(row, "rejected")
    cut = chosen.rfind(_ASSISTANT)
    while cut >= 0 and not rejected.startswith(chosen[: cut + len(_ASSISTANT)]):
        cut = chosen.rfind(_ASSISTANT, 0, cut)
    if cut < 0:
        raise BadRow("chosen and rejected share no beginning up to an Assistant turn")
    answers = chosen[cut + len(_ASSISTANT) :], rejected[cut + len(_ASSISTANT) :]
    if any(_TURN.search(answer) for answer in answers):
        raise BadRow("chosen and rejected part before their last turn")
    start, *turns = _TURN.split(chosen[:cut])
    if start.strip():
        raise BadRow("the dialogue does not begin with a turn", repr(start[:40]))
    prompt = tuple(
        Message(_ROLES[who], content.strip(), scored=False)
        for who, content in zip(turns[::2], turns[1::2], strict=True)
    )
    return prompt, answers[0].strip(), answers[1].strip()


def _hh_demonstration(row: Fields, *, side: Literal["chosen", "rejected"]) -> Demonstration:
    """Only the last answer is to be learned: the earlier ones stand in both dialogues, nobody chose them."""
    prompt, chosen, rejected = _hh_prompt_and_answers(row)
    return Demonstration((*prompt, Message("assistant", chosen if side == "chosen" else rejected)))


def _hh_ranking(row: Fields) -> Ranking:
    prompt, chosen, rejected = _hh_prompt_and_answers(row)
    return Ranking(prompt=prompt, responses=(chosen, rejected), ranks=(0, 1))


def _alpaca(row: Fields) -> Demonstration:
    instruction, context, output = (_string(row, field) for field in ("instruction", "input", "output"))
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    return Demonstration((Message("user", question), Message("assistant", output)))


def _prompt_answer(row: Fields, *, answer: str) -> Demonstration:
    return Demonstration((Message("user", _string(row, "prompt")), Message("assistant", _string(row, answer))))


# Order matters where a row fits several: the first one that makes the wanted kind is taken.
FORMATS: dict[str, Format] = {
    "text": Format(fields=("text",), description="a document", text=_text),
    "messages": Format(
        fields=("messages",),
        description="a list of {role, content}, optionally weight 0 or 1",
        demonstration=_messages,
    ),
    "hh": Format(
        fields=("chosen", "rejected"),
        description="whole dialogues of Human: and Assistant: turns",
        demonstration=partial(_hh_demonstration, side="chosen"),
        ranking=_hh_ranking,
    ),
    "hh_rejected": Format(
        fields=("chosen", "rejected"),
        description="the same, the rejected answer as the demonstration",
        demonstration=partial(_hh_demonstration, side="rejected"),
    ),
    "alpaca": Format(
        fields=("instruction", "input", "output"),
        description="a task, optionally its input, and the answer",
        demonstration=_alpaca,
    ),
    "prompt_response": Format(
        fields=("prompt", "response"),
        description="two strings",
        demonstration=partial(_prompt_answer, answer="response"),
    ),
    "prompt_completion": Format(
        fields=("prompt", "completion"),
        description="two strings",
        demonstration=partial(_prompt_answer, answer="completion"),
    ),
}
