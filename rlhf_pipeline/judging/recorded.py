"""Verdicts that somebody has given before, in a file: of people, or of a judge that cannot be asked again.

A row has `prompt` (a string or messages), `response_a`, `response_b` and `verdict`, perhaps `reason` and `rater`. One row
serves both orders of its pair. Texts are compared without white space around them.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.data import conversations
from rlhf_pipeline.data.fields import Fields, get, optional_string, string
from rlhf_pipeline.data.records import BadRow
from rlhf_pipeline.data.sources import fingerprint, read_rows
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.judging.pairs import Outcome, Pair, Verdict

SHOWN = 10  # bad rows that are named
MISSING = "not in the file"
WORDS = {
    Outcome.a: ("a", "response_a", "first", "left"),
    Outcome.b: ("b", "response_b", "second", "right"),
    Outcome.tie: ("tie", "tied", "draw", "equal", "same", "both", "neither"),
}
_MEANING = {word: outcome for outcome, words in WORDS.items() for word in words}
_TURNED = {Outcome.a: Outcome.b, Outcome.b: Outcome.a, Outcome.tie: Outcome.tie}

Key = tuple[tuple[tuple[str, str], ...], str, str]  # the prompt's messages and both answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """One row's verdict, in the letters of the order that it is filed under."""

    outcome: Outcome
    said: str  # who, and why, as far as the row tells
    turned: bool  # the row has the answers in the other order


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedJudge:
    name: str
    path: str
    digest: str  # of the file's content
    votes: Mapping[Key, Sequence[Vote]]  # every pair in both orders

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "recorded", "path": self.path, "content_hash": self.digest}

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """A pair without a row has a malformed verdict.

        Raises:
            UserError: when none of the pairs has a row.
        """
        found = [self.votes.get(_key_of(pair), ()) for pair in pairs]
        if pairs and not any(found):
            raise UserError(
                f"judge.path={self.path}: has no verdict on any of the {len(pairs)} pairs; its prompts and answers must "
                "be those of the systems, word for word, and every two systems that are compared must be in it"
            )
        return [_majority(votes) for votes in found]


def open_recorded_judge(path: str, *, name: str) -> RecordedJudge:
    """
    Raises:
        UserError: for a file that cannot be read, naming the rows that are no verdicts.
    """
    votes: defaultdict[Key, list[Vote]] = defaultdict(list)
    bad: list[str] = []
    try:
        for row in read_rows(path):
            try:
                if isinstance(row.value, BadRow):
                    raise row.value
                _file(row.value, votes)
            except BadRow as error:
                bad.append(f"\n  {row.origin}: {error}")
        digest = fingerprint(path)
    except UserError as error:
        raise UserError(f"judge.path={path}: {error}") from error
    if bad:
        more = f"\n  and {len(bad) - SHOWN} more" if bad[SHOWN:] else ""
        raise UserError(f"judge.path={path}: {len(bad)} rows hold no verdict:{''.join(bad[:SHOWN])}{more}")
    if not votes:
        raise UserError(f"judge.path={path}: no rows in it")
    return RecordedJudge(name=name, path=path, digest=digest, votes=dict(votes))


def _file(row: Fields, votes: defaultdict[Key, list[Vote]]) -> None:
    """Put a row's verdict under both orders of its pair. BadRow for a row that has none."""
    prompt = _prompt(row)
    a, b = (_plain(string(row, name)) for name in ("response_a", "response_b"))
    word = string(row, "verdict").strip().lower()
    if word not in _MEANING:
        raise BadRow("an unknown verdict", f"{word!r}; known are {', '.join(_MEANING)}")
    rater = str(row.get("rater") or "").strip()  # a name or a number
    reason = optional_string(row, "reason").strip()
    said = f"{rater}: {reason}" if rater and reason else rater or reason
    outcome = _MEANING[word]
    votes[prompt, a, b].append(Vote(outcome=outcome, said=said, turned=False))
    if a != b:
        votes[prompt, b, a].append(Vote(outcome=_TURNED[outcome], said=said, turned=True))


def _majority(votes: Sequence[Vote]) -> Verdict:
    """What more than half of the votes are for, else a tie."""
    if not votes:
        return Verdict(outcome=Outcome.malformed, reason=MISSING)
    counts = Counter(vote.outcome for vote in votes)
    ((outcome, most),) = counts.most_common(1)
    if 2 * most <= len(votes):
        outcome = Outcome.tie
    notes = [vote.said + (" (of the other order)" if vote.turned else "") for vote in votes if vote.said]
    count = ", ".join(f"{counts[one]} for {one.value}" for one in Outcome if counts[one])
    return Verdict(outcome=outcome, reason="; ".join([count, *notes]))


def _key_of(pair: Pair) -> Key:
    messages = tuple((message.role, _plain(message.content)) for message in pair.prompt)
    return messages, _plain(pair.a.text), _plain(pair.b.text)


def _prompt(row: Fields) -> tuple[tuple[str, str], ...]:
    """The messages of `prompt`; a string that is their JSON, as in CSV, is read as such."""
    value = get(row, "prompt")
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        with contextlib.suppress(ValueError, RecursionError):  # a question that begins like that
            row = {**row, "prompt": json.loads(value)}
    return tuple((message.role, _plain(message.content)) for message in conversations.prompt(row))


def _plain(text: str) -> str:
    """As it is compared: spreadsheets and forms change the ends of lines and take away white space around a text."""
    return text.replace("\r\n", "\n").strip()
