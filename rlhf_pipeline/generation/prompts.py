"""Prompts to answer, from files, the lab or standard input, with everything else that their rows hold."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_pipeline.config.schema import LongPrompt, OnBadRow, PromptsConfig
from rlhf_pipeline.data import lab_files
from rlhf_pipeline.data.encode import shortened
from rlhf_pipeline.data.formats import detect, to_records
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.records import BadRow, Message, Opening, Prompt
from rlhf_pipeline.data.sources import Row, read_rows
from rlhf_pipeline.errors import UserError

STDIN = "-"
SHOWN = 10  # bad rows that are named


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A prompt. `index` counts the prompts of the input from 0, those that are left out too.

    The opening of a document, as long as it is asked for, is the one message of a user; its tokens have no template.
    """

    index: int
    origin: str
    messages: tuple[Message, ...]
    columns: dict[str, Any]  # of its row, but the field `prompt`
    tokens: np.ndarray  # int32 [P]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    asked: list[Asked]
    fingerprint: str  # of all prompts and columns
    notes: list[str]  # what was left out or cut, for people


def read_prompts(config: PromptsConfig, renderer: Renderer, *, context: int | None) -> Prompts:
    """Read and tokenise the prompts; one token at least of the model's context is left to the answer.

    Raises:
        UserError: for what cannot be read, bad rows unless they are to be skipped, prompts too long where the policy
            says so, and when no prompt is left.
    """
    limit = config.max_prompt_length if context is None else min(config.max_prompt_length, context - 1)
    digest = hashlib.sha256()
    counts: Counter[str] = Counter()
    bad: list[str] = []
    asked: list[Asked] = []
    for index, (origin, record, columns) in enumerate(_prompts(config, bad)):
        told = [_told(record), columns]
        digest.update(json.dumps(told, sort_keys=True, default=str).encode() + b"\n")
        counts["prompts"] += 1
        try:
            tokens = _tokens(record, renderer)
        except BadRow as error:
            bad.append(f"{origin}: {error}")
            continue
        if len(tokens) > limit:
            counts["long"] += 1
            if config.long_prompt is LongPrompt.drop:
                continue
            if config.long_prompt is LongPrompt.error:
                raise UserError(
                    f"{origin}: the prompt has {len(tokens)} tokens, more than {limit}. Raise prompts.max_prompt_length "
                    "(the model's context is a limit too), or set prompts.long_prompt to drop, keep_end or keep_start"
                )
            keep: Literal["keep_end", "keep_start"] = (
                "keep_end" if config.long_prompt is LongPrompt.keep_end else "keep_start"
            )
            tokens = shortened(tokens, limit, keep, renderer.tokenizer.bos_token_id)
        messages = messages_of(record, tokens, renderer)
        asked.append(Asked(index=index, origin=origin, messages=messages, columns=columns, tokens=tokens))
    notes = []
    if bad:
        shown = "".join(f"\n  {line}" for line in bad[:SHOWN]) + (
            f"\n  and {len(bad) - SHOWN} more" if bad[SHOWN:] else ""
        )
        if config.on_bad_row is OnBadRow.error:
            raise UserError(
                f"{len(bad)} rows of prompts.path={config.path} cannot be used:{shown}\n"
                "Correct them, or set prompts.on_bad_row=skip to go on without them"
            )
        notes.append(f"{len(bad)} rows cannot be used and are left out:{shown}")
    if counts["long"]:
        done = {"drop": "are left out", "keep_end": "keep their end", "keep_start": "keep their start"}
        notes.append(
            f"{counts['long']} of {counts['prompts']} prompts have more than {limit} tokens and "
            f"{done[config.long_prompt.value]} (prompts.long_prompt={config.long_prompt.value})"
        )
    if not asked:
        raise UserError("\n".join([f"prompts.path={config.path}: no prompt in it to answer", *notes]))
    return Prompts(asked=asked, fingerprint=digest.hexdigest(), notes=notes)


def messages_of(record: Prompt | Opening, tokens: np.ndarray, renderer: Renderer) -> tuple[Message, ...]:
    """What readers of conversations are shown of a prompt that became `tokens`; of an opening, what was kept of it."""
    if isinstance(record, Prompt):
        return record.messages
    kept = str(renderer.tokenizer.decode(tokens, skip_special_tokens=True))
    return (Message("user", kept if kept.strip() else record.text),)


def _told(record: Prompt | Opening) -> Any:
    return record.text if isinstance(record, Opening) else [(m.role, m.content) for m in record.messages]


def _tokens(record: Prompt | Opening, renderer: Renderer) -> np.ndarray:
    if isinstance(record, Prompt):
        return renderer.encode_prompt(record.messages)
    return renderer.encode_text(record.text)[:-1]  # but the end token


def _prompts(config: PromptsConfig, bad: list[str]) -> Iterator[tuple[str, Prompt | Opening, dict[str, Any]]]:
    """(origin, prompt, other columns) of each prompt, of at most `max_examples` rows; bad rows go to `bad`."""
    rows = 0
    for entry in config.path if isinstance(config.path, list) else [config.path]:
        settings = {"format": config.format, "columns": config.columns, "split": config.split}
        if isinstance(entry, dict):
            if entry.get("weight", 1) != 1:
                raise UserError(f"prompts.path: {entry['path']} has a weight, and prompts are answered once each")
            settings |= {name: value for name, value in entry.items() if name in settings}
            entry = entry["path"]
        format, columns = settings["format"], settings["columns"]
        for row in _rows(entry, config, settings["split"]):
            if config.max_examples is not None and rows >= config.max_examples:
                return
            rows += 1
            try:
                if isinstance(row.value, BadRow):
                    raise row.value
                if format == "auto":
                    format = detect(row.value, "prompt", columns=columns)
                records = to_records(row.value, "prompt", format, columns=columns)
            except BadRow as error:
                bad.append(f"{row.origin}: {error}")
                continue
            except UserError as error:
                raise UserError(f"{row.origin}: {str(error).replace('data.', 'prompts.')}") from error
            others = {name: value for name, value in row.value.items() if name != "prompt"}
            for record in records:
                assert isinstance(record, Prompt | Opening)
                yield row.origin, record, others


def _rows(path: str, config: PromptsConfig, split: str) -> Iterator[Row]:
    if path == STDIN:
        yield from _lines(sys.stdin.buffer.read(), "stdin")
        return
    file = Path(path).expanduser()
    if file.suffix == ".txt" and file.is_file():
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"prompts.path={path}: cannot be read: {error.strerror}") from error
        yield from _lines(content, path)
        return
    if path.startswith(lab_files.PREFIX):
        path = str(lab_files.local_path(path, config.lab, Path(config.cache_dir)))
    yield from read_rows(path, split=split)


def _lines(data: bytes, name: str) -> Iterator[Row]:
    """Prompts of a text: one a line, or an object a line if the first one is. Blank lines do not count."""
    objects: bool | None = None
    for number, line in enumerate(data.splitlines(), start=1):
        origin = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            yield Row(origin, BadRow("not UTF-8"))
            continue
        if objects is None:
            objects = text.startswith("{") and isinstance(_object(text), dict)
        yield Row(origin, _object(text) if objects else {"prompt": text})


def _object(text: str) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", str(error))
    return value if isinstance(value, dict) else BadRow("not a JSON object", type(value).__name__)
