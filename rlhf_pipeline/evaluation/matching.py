"""Answers of several systems, matched by prompt: only answers to the same question can be compared.

A prompt is its messages. Where a file asks the same thing twice, the first answer to it belongs to the first, and so on.
Who is better is `winrate`'s business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_pipeline.data.records import BadRow, Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.judging.pairs import Answer, Pair

Line = Mapping[str, Any]  # of `rlhf generate`; sample (0), index, response_tokens and origin may be missing
FIELDS = ("prompt", "response", "finish_reason")  # what a line must have
CATEGORY = ("category", "use_case", "subset")  # columns that say what kind of prompt it is; the first that is there
CUT = "length"  # finish_reason of an answer that did not come to its end

_Messages = tuple[Message, ...]
_Key = tuple[_Messages, int]  # a prompt, and which of those that ask the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A prompt that every system answered."""

    index: int  # of the first system's line; its place here where that has none
    messages: _Messages
    category: str | None
    samples: Mapping[str, tuple[Line, ...]]  # every system's answers; the first of them, sample 0, is compared

    def answer(self, system: str) -> Line:
        return self.samples[system][0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """The prompts that all systems answered, in the order of the first one."""

    systems: tuple[str, ...]
    prompts: tuple[Asked, ...]
    unmatched: dict[str, int]  # of each system's prompts, those that are not among them

    def same(self) -> np.ndarray:
        """A number for each prompt, int64 [prompts]; equal for equal messages, whose answers are no independent draws."""
        known: dict[_Messages, int] = {}
        return np.array([known.setdefault(asked.messages, len(known)) for asked in self.prompts], np.int64)


def match(answers: Mapping[str, Sequence[Line]]) -> Matched:
    """Put together what the systems answered to the same prompts.

    Raises:
        UserError: for a system without answers, lines that lack a field or whose prompt is no conversation, and systems
            without a prompt that all of them answered.
    """
    found = {name: _by_prompt(name, lines) for name, lines in answers.items()}
    first, *others = found
    common = [key for key in found[first] if all(key in found[name] for name in others)]
    if not common:
        counts = ", ".join(f"{name} {len(mine)}" for name, mine in found.items())
        raise UserError(
            f"systems: no prompt was answered by all of them (prompts: {counts}); only answers to the same one are compared"
        )
    return Matched(
        systems=tuple(found),
        prompts=tuple(
            _asked(place, key[0], {name: mine[key] for name, mine in found.items()}) for place, key in enumerate(common)
        ),
        unmatched={name: len(mine) - len(common) for name, mine in found.items()},
    )


def pairs(matched: Matched, system: str, baseline: str) -> list[Pair]:
    """What a judge is asked: of each matched prompt, the answer of `system` as a and that of `baseline` as b."""
    return [
        Pair(
            prompt=asked.messages,
            a=_answer(asked.answer(system)),
            b=_answer(asked.answer(baseline)),
            origin=str(asked.answer(system).get("origin", f"prompt {asked.index}")),
        )
        for asked in matched.prompts
    ]


def _by_prompt(system: str, lines: Sequence[Line]) -> dict[_Key, tuple[Line, ...]]:
    """The answers to each prompt by sample, those with a sample 0, in the order of the lines."""
    if not lines:
        raise UserError(f"systems.{system}: holds no answers; name a model, or a file of rlhf generate")
    times: Counter[tuple[_Messages, int]] = Counter()  # of a prompt, by sample
    found: dict[_Key, dict[int, Line]] = {}
    for line in lines:
        messages, sample = _messages(system, line), int(line.get("sample", 0))
        found.setdefault((messages, times[messages, sample]), {})[sample] = line
        times[messages, sample] += 1
    return {key: tuple(mine[n] for n in sorted(mine)) for key, mine in found.items() if 0 in mine}


def _messages(system: str, line: Line) -> _Messages:
    lacking = next((field for field in FIELDS if field not in line), None)
    if lacking:
        raise UserError(f"systems.{system}: a line has no {lacking!r}; name a model, or a file of rlhf generate")
    try:
        return tuple(Message(turn["role"], turn["content"]) for turn in line["prompt"])
    except (TypeError, KeyError, BadRow) as error:
        said = error if isinstance(error, BadRow) else "it is not a list of messages with role and content"
        raise UserError(
            f"systems.{system}: the prompt {str(line['prompt'])[:60]!r} of a line cannot be used ({said}); "
            "name a model, or a file of rlhf generate"
        ) from None


def _asked(place: int, messages: _Messages, samples: Mapping[str, tuple[Line, ...]]) -> Asked:
    lines = [mine[0] for mine in samples.values()]
    given = (line.get(column) for line in lines for column in CATEGORY)
    return Asked(
        index=int(lines[0].get("index", place)),
        messages=messages,
        category=next((str(one) for one in given if one not in (None, "")), None),
        samples=samples,
    )


def _answer(line: Line) -> Answer:
    return Answer(text=line["response"], finished=line["finish_reason"] != CUT, tokens=line.get("response_tokens"))
