"""What a row of any file means, once its format is understood: frozen records, checked when they are made.

All checks of content live here, so that a record which exists is fit for training. Rendering and tokens come
later.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

ROLES = ("system", "user", "assistant")
LARGEST_SCORE = 3.4028234663852886e38  # of 32 bits, in which scores are stored


class BadRow(Exception):
    """An unusable row. `reason` names the kind of fault (rows are counted by it), `detail` this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        # Details quote the row, which may hold anything: lone surrogates, or more than anybody will read.
        detail = (detail if len(detail) <= 300 else f"{detail[:300]}...").encode(errors="backslashreplace").decode()
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise BadRow(f"{what} is not a string", type(value).__name__)
    if not value.strip():
        raise BadRow(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} is not valid Unicode", f"a lone surrogate at character {error.start}") from None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `scored=False` keeps an assistant's turn as context; other roles are context always."""

    role: str
    content: str
    scored: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise BadRow("unknown role", f"{self.role!r}; known are {', '.join(ROLES)}")
        _check_text(self.content, f"the {self.role} message")


def _check_prompt(messages: tuple[Message, ...]) -> None:
    if not any(message.role == "user" for message in messages):
        raise BadRow("the prompt has no user message")


@dataclass(frozen=True, slots=True)
class Text:
    """A document to learn the language from."""

    text: str

    def __post_init__(self) -> None:
        _check_text(self.text, "the text")


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A conversation that ends with an answer to learn."""

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1].role != "assistant":
            raise BadRow("the last message is not the assistant's")
        _check_prompt(self.messages[:-1])


@dataclass(frozen=True, slots=True)
class Ranking:
    """K >= 2 different answers to one prompt. Rank 0 is best, equal ranks are a tie; a preference pair is K = 2."""

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        if len(self.responses) < 2:
            raise BadRow("fewer than two responses")
        for response in self.responses:
            _check_text(response, "a response")
        _check_different(self.responses)
        if len(self.ranks) != len(self.responses) or min(self.ranks) != 0:
            raise BadRow("ranks do not fit the responses", f"{self.ranks} for {len(self.responses)}")
        if self.scores is not None:
            if len(self.scores) != len(self.responses):
                raise BadRow("scores do not fit the responses", f"{self.scores} for {len(self.responses)}")
            if not all(abs(score) <= LARGEST_SCORE for score in self.scores):  # NaN is not either
                raise BadRow("a score is not a finite number")

    def comparisons(self) -> list[Ranking]:
        """Every comparison that somebody won as a ranking of two, the better answer first. Ties are left out."""
        found = []
        for pair in combinations(range(len(self.responses)), 2):
            better, worse = sorted(pair, key=lambda i: self.ranks[i])
            if self.ranks[better] != self.ranks[worse]:
                scores = None if self.scores is None else (self.scores[better], self.scores[worse])
                found.append(Ranking(self.prompt, (self.responses[better], self.responses[worse]), (0, 1), scores))
        return found


def _check_different(responses: tuple[str, ...]) -> None:
    """The same answer twice is no comparison, and where the ranks differ it is a contradiction."""
    seen: dict[str, int] = {}
    for number, response in enumerate(responses, start=1):
        first = seen.setdefault(response.strip(), number)
        if first != number:
            raise BadRow("two responses are the same", f"numbers {first} and {number}, {response.strip()[:40]!r}")


@dataclass(frozen=True, slots=True)
class Feedback:
    """One answer and whether it was wanted."""

    prompt: tuple[Message, ...]
    response: str
    desirable: bool

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        _check_text(self.response, "the response")
        if not isinstance(self.desirable, bool):
            raise BadRow("the label is not true or false", repr(self.desirable))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for an answer."""

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        _check_prompt(self.messages)
        if self.messages[-1].role == "assistant":
            raise BadRow("the prompt ends with the assistant's message")


@dataclass(frozen=True, slots=True)
class Opening:
    """A document's beginning that waits to be gone on from: a prompt of a model that has no turns, only text."""

    text: str

    def __post_init__(self) -> None:
        _check_text(self.text, "the text")


Record = Text | Demonstration | Ranking | Feedback | Prompt | Opening
