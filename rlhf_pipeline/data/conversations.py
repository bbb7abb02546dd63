"""Reads messages out of other people's rows: whole conversations, and the prompts that they begin with.

Which rows have which reader is the table in `formats`. Content is checked by the records that are made of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from rlhf_pipeline.data.fields import Fields, get, object_of, optional_string, string
from rlhf_pipeline.data.records import BadRow, Message, Opening

Messages = tuple[Message, ...]

_TURN = re.compile(r"\n\n(Human|Assistant):")
ASSISTANT = "\n\nAssistant:"
_ROLES = {
    "Human": "user",
    "Assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "developer": "system",  # OpenAI's newer name for it
}
_TOOLS = ("tool", "function", "function_call", "function_response", "observation")


def read_message(value: Any) -> Message:
    """One of {role, content} or {from, value}; BadRow for tools and pictures.

    `weight: 0` keeps an assistant's message out of the loss, as in OpenAI's fine-tuning files.
    """
    if not isinstance(value, dict):
        raise BadRow("a message is not an object", type(value).__name__)
    names = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    role = string(value, names[0])
    if role in _TOOLS or value.get("tool_calls") or value.get("function_call"):
        raise BadRow("a tool's message, or a call of a tool", role)
    content = _joined(get(value, names[1]))
    if not isinstance(content, str):
        raise BadRow(f"{names[1]} is not a string", type(content).__name__)
    weight = value.get("weight")
    if weight not in (None, 0, 1):
        raise BadRow("a message's weight is neither 0 nor 1", repr(weight))
    return Message(_ROLES.get(role, role), content, scored=weight != 0)


def _joined(content: Any) -> Any:
    """The text of a list of parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise BadRow("a part of a message is not text", str(kind))
    return "".join(string(part, "text") for part in content)


def read_messages(value: Any, field: str) -> Messages:
    if not isinstance(value, list):
        raise BadRow(f"{field} is not a list", type(value).__name__)
    return tuple(map(read_message, value))


def context(messages: Sequence[Message]) -> Messages:
    """The same messages, no answer among them to be learned."""
    return tuple(dataclasses.replace(m, scored=False) if m.role == "assistant" else m for m in messages)


def with_system(row: Fields, messages: Messages) -> Messages:
    """A system text that has a column of its own comes first, unless the conversation brings one."""
    system = optional_string(row, "system", "system_prompt")
    if not system or (messages and messages[0].role == "system"):
        return messages
    return (Message("system", system), *messages)


# Prompts


def prompt(row: Fields, *, field: str = "prompt") -> Messages:
    """A string, which is the user's message, or messages."""
    value = get(row, field)
    if isinstance(value, list):
        return with_system(row, context(read_messages(value, field)))
    return with_system(row, (Message("user", string(row, field)),))


def instruction(row: Fields, *, extra: str = "input") -> Messages:
    """The user's message is the instruction, a blank line, and the extra field where there is one.

    `history` holds earlier [question, answer] pairs, whose answers are learned too (as LLaMA-Factory has it).
    """
    history = row.get("history") or []
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRow("history is not a list of pairs", repr(history)[:40])
    turns = [message for asked, answer in history for message in (Message("user", asked), Message("assistant", answer))]
    task, more = string(row, "instruction"), optional_string(row, extra)
    return with_system(row, (*turns, Message("user", f"{task}\n\n{more}" if more else task)))


def dialogue(text: str) -> Messages:
    """The turns of "\\n\\nHuman: ... \\n\\nAssistant: ...", as context."""
    start, *turns = _TURN.split(text)
    if start.strip():
        raise BadRow("the dialogue does not begin with a turn", repr(start[:40]))
    return tuple(
        Message(_ROLES[who], content.strip(), scored=False)
        for who, content in zip(turns[::2], turns[1::2], strict=True)
    )


def dialogue_prompt(row: Fields) -> Messages:
    """`prompt` is a dialogue up to the last "Assistant:"."""
    text = "\n\n" + string(row, "prompt").strip()
    if not text.endswith(ASSISTANT):
        raise BadRow("the prompt does not end with Assistant:", repr(text[-40:]))
    return dialogue(text.removesuffix(ASSISTANT))


def prompt_text(row: Fields) -> Messages:
    return (Message("user", string(object_of(row, "prompt"), "text")),)


def opening(row: Fields) -> Opening:
    return Opening(string(row, "text"))


# Whole conversations


def messages(row: Fields) -> Messages:
    return read_messages(get(row, "messages"), "messages")


def sharegpt(row: Fields) -> Messages:
    return with_system(row, read_messages(get(row, "conversations"), "conversations"))


def task(row: Fields, *, extra: str = "input", answer: str = "output") -> Messages:
    return (*instruction(row, extra=extra), Message("assistant", string(row, answer)))


def question_and_answer(row: Fields, *, question: str, answer: str) -> Messages:
    """Two fields. Of an answer in several messages, all that are the assistant's are learned."""
    asked, answered = prompt(row, field=question), get(row, answer)
    if isinstance(answered, list):
        return (*asked, *read_messages(answered, answer))
    return (*asked, Message("assistant", string(row, answer)))


def tldr(row: Fields) -> Messages:
    """The summary that a person wrote; what stands around it belongs to the file."""
    asked, reference = (string(row, field).strip() for field in ("query", "reference_responses"))
    return Message("user", asked), Message("assistant", reference)


def answered_dialogue(row: Fields, *, answer: str) -> Messages:
    return (*dialogue_prompt(row), Message("assistant", string(row, answer).strip()))
