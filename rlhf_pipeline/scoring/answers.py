"""Answers to be scored, from files, the lab or standard input: one or several to a prompt, ranked or not.

Every row of the input keeps its place, the bad ones too. What a row's format is, is found at the first row of each source:
rows of `rlhf generate` first, then rankings, lists of answers, verdicts, and conversations with one answer.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.schema import AnswersConfig, OnBadRow
from rlhf_pipeline.data import comparisons, conversations, lab_files
from rlhf_pipeline.data.fields import Fields, items, shape_of
from rlhf_pipeline.data.format_table import FORMATS, Kind
from rlhf_pipeline.data.formats import detect, renamed, to_records
from rlhf_pipeline.data.records import BadRow, Demonstration, Feedback, Message, Prompt, Ranking
from rlhf_pipeline.data.sources import Row, read_rows
from rlhf_pipeline.errors import UserError

STDIN = "-"
SHOWN = 10  # bad rows that are named
KINDS: tuple[Kind, ...] = ("ranking", "feedback", "demonstration")  # what answers are made of, in this order
LISTED = ("kwise", "kwise_ranks")  # formats with a list `responses`
UNRANKED = "responses"  # the same without an order; no format of `formats`, for nothing is learned from it
ANSWER = ("response", "completion", "output", "answer")  # fields that hold the one answer of a row
STAND_IN = "-"  # for an empty answer while a row is read
CUT = "length"  # finish_reason of an answer that did not come to its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A prompt and K >= 1 answers to it, in the order of the row; an answer may be empty.

    An answer that is not `finished` was cut off: it is scored without an end token. `ranks` are 0 for the best, equal for
    a tie, and None where nobody ranked the answers.
    """

    index: int  # of the row in the input, from 0
    origin: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    finished: tuple[bool, ...]
    many: bool  # the row has a list of answers, or a pair: so it has a list of rewards
    ranks: tuple[int, ...] | None = None
    scores: tuple[float, ...] | None = None
    row: dict[str, Any]  # as it was read


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """A row that gets no reward, and why."""

    index: int
    origin: str
    why: str
    row: dict[str, Any]  # as it was read; empty where it was none


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """All rows of an input: each index from 0 is in `rows` or in `bad`, both in order."""

    rows: list[Answered]
    bad: list[Unusable]
    notes: list[str]  # what cannot be used, for people
    fingerprint: str  # of all prompts and answers

    @property
    def size(self) -> int:
        """Rows of the input."""
        return len(self.rows) + len(self.bad)


def read_answers(config: AnswersConfig) -> Answers:
    """Read the answers.

    Raises:
        UserError: for what cannot be read, for bad rows unless they are to be skipped, and when no answer is left.
    """
    rows: list[Answered] = []
    bad: list[Unusable] = []
    digest = hashlib.sha256()
    for one in _all(config):
        if isinstance(one, Unusable):
            bad.append(one)
            continue
        rows.append(one)
        told = [[(m.role, m.content) for m in one.prompt], one.responses, one.finished]
        digest.update(json.dumps(told).encode() + b"\n")
    notes = settle(bad, config)
    if not rows:
        raise UserError("\n".join([f"data.path={config.path}: no answer in it to score", *notes]))
    return Answers(rows=rows, bad=bad, notes=notes, fingerprint=digest.hexdigest())


def settle(bad: Sequence[Unusable], config: AnswersConfig) -> list[str]:
    """A note that names the bad rows, where there are any and they are to be skipped.

    Raises:
        UserError: where they are not.
    """
    if not bad:
        return []
    shown = "".join(f"\n  {one.origin}: {one.why}" for one in bad[:SHOWN])
    shown += f"\n  and {len(bad) - SHOWN} more" if bad[SHOWN:] else ""
    if config.on_bad_row is OnBadRow.error:
        raise UserError(
            f"{len(bad)} rows of data.path={config.path} cannot be scored:{shown}\n"
            "Correct them, or set data.on_bad_row=skip to go on without them"
        )
    return [f"{len(bad)} rows cannot be scored and have no reward:{shown}"]


def _all(config: AnswersConfig) -> Iterator[Answered | Unusable]:
    """Every row of every source, at most `max_examples`."""
    index = 0
    for entry in config.path if isinstance(config.path, list) else [config.path]:
        settings = {"format": config.format, "columns": config.columns, "split": config.split}
        if isinstance(entry, dict):
            if entry.get("weight", 1) != 1:
                raise UserError(f"data.path: {entry['path']} has a weight, and answers are scored once each")
            settings |= {name: value for name, value in entry.items() if name in settings}
            entry = entry["path"]
        format, columns = settings["format"], settings["columns"]
        unknown = ""  # why the first row has no format
        for row in _rows(entry, config, settings["split"]):
            if index == config.max_examples:
                break
            values: dict[str, Any] = {} if isinstance(row.value, BadRow) else row.value
            try:
                if isinstance(row.value, BadRow):
                    raise row.value
                if format == "auto":
                    format = _format(values, columns)
                fields = renamed(values, columns)
                yield _answered(fields, format, index=index, origin=row.origin, read=values)
            except BadRow as error:
                unknown = unknown or f"{row.origin}: {error}"
                yield Unusable(index=index, origin=row.origin, why=str(error), row=values)
            except UserError as error:
                raise UserError(f"{row.origin}: {error}") from error
            index += 1
        if format == "auto" and unknown:  # nor has any other
            raise UserError(unknown)


def _rows(path: str, config: AnswersConfig, split: str) -> Iterator[Row]:
    if path == STDIN:
        return _lines(sys.stdin.buffer.read())
    if path.startswith(lab_files.PREFIX):
        path = str(lab_files.local_path(path, config.lab, Path(config.cache_dir)))
    return read_rows(path, split=split)


def _lines(data: bytes) -> Iterator[Row]:
    """Standard input has an object a line; blank lines do not count."""
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        value: Any
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            value = BadRow("not JSON", str(error))
        if not isinstance(value, dict | BadRow):
            value = BadRow("not a JSON object", type(value).__name__)
        yield Row(f"stdin:{number}", value)


# What a row holds


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The fields of `Answered` that a reader finds."""

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    many: bool
    ranks: tuple[int, ...] | None = None
    scores: tuple[float, ...] | None = None


def _answered(row: Fields, format: str, *, index: int, origin: str, read: dict[str, Any]) -> Answered:
    found = _listed(row, ranked=format != UNRANKED) if format in (*LISTED, UNRANKED) else _recorded(row, format)
    reasons = row.get("finish_reason")
    each = reasons if isinstance(reasons, list) else [reasons] * len(found.responses)
    if len(each) != len(found.responses):
        raise BadRow("finish_reason does not fit the responses", f"{len(each)} for {len(found.responses)}")
    return Answered(
        index=index,
        origin=origin,
        prompt=found.prompt,
        responses=found.responses,
        finished=tuple(reason != CUT for reason in each),
        many=found.many,
        ranks=found.ranks,
        scores=found.scores,
        row=read,
    )


def _format(row: dict[str, Any], columns: Any) -> str:
    """The format of the rows that begin with this one; a name of `formats`, or UNRANKED.

    Raises:
        BadRow: for a row in which there is no answer; the next one may show the format.
        UserError: for columns that no format has.
    """
    fields = renamed(row, columns)
    sampled = "finish_reason" in fields and isinstance(fields.get("prompt"), list)
    if sampled and not FORMATS["prompt_response"].unfit(fields):
        return "prompt_response"  # of `rlhf generate`, which keeps the columns of other formats that its prompts had
    for kind in KINDS:
        try:
            return detect(row, kind, columns=columns)
        except UserError:
            if kind == "ranking" and "prompt" in fields and isinstance(fields.get("responses"), list):
                return UNRANKED
    raise BadRow(
        "no answer is found in the row; a prompt and a response will do, a prompt and responses, chosen and rejected, or "
        "messages (set data.columns where yours have other names)",
        ", ".join(f"{name} ({shape_of(value)})" for name, value in fields.items()),
    )


def _listed(row: Fields, *, ranked: bool) -> _Found:
    """`prompt` and `responses`: here one answer will do, and some of them may be empty."""
    given = items(row, "responses")
    if not given:
        raise BadRow("the list of responses is empty")
    for response in given:
        if not isinstance(response, str):
            raise BadRow("a response is not a string", type(response).__name__)
        if response.strip():
            Message("assistant", response)  # checks the text
    asked = Prompt(conversations.context(conversations.prompt(row))).messages
    if not ranked or (row.get("ranks") is None and row.get("scores") is None):
        return _Found(prompt=asked, responses=tuple(given), many=True)
    known = comparisons.kwise(row)
    return _Found(prompt=asked, responses=tuple(given), many=True, ranks=known.ranks, scores=known.scores)


def _recorded(row: Fields, format: str) -> _Found:
    """What a reader of `formats` makes of the row."""
    if format not in FORMATS:
        raise UserError(f"data.format={format}: there is no such format; known are {', '.join((*FORMATS, UNRANKED))}")
    kind = next((kind for kind in KINDS if FORMATS[format].adapter(kind)), None)
    if kind is None:
        raise UserError(f"data.format={format}: holds no answers ({FORMATS[format].description})")
    # No record has an empty answer, but a policy may say nothing.
    silent = [name for name in ANSWER if name in FORMATS[format].fields and _is_blank(row.get(name))]
    records = to_records({**row, **dict.fromkeys(silent, STAND_IN)}, kind, format)
    if len(records) != 1:
        raise BadRow("answers to several prompts in one row", f"{len(records)} prompts; write a row for each")
    match records[0]:
        case Ranking(prompt, responses, ranks, scores):
            return _Found(prompt=prompt, responses=responses, many=True, ranks=ranks, scores=scores)
        case Feedback(prompt, response):
            asked, answer = prompt, response
        case Demonstration((*before, last)):
            asked, answer = conversations.context(before), last.content
        case other:
            raise AssertionError(other)
    return _Found(prompt=asked, responses=("" if silent else answer,), many=False)


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()
