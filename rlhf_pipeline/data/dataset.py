"""Tokenises a data source once and keeps the trees in a cache; splits off the held-out prompts.

A cached file is named by everything that its content depends on, so that a changed source, tokenizer,
template or policy makes a new one. Build before any process group exists: the other ranks would wait in a
collective meanwhile. Which examples make which batch is `order`'s business.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from rlhf_pipeline.data.encode import Counts, Draft, Lengths, Loss, draft, fit
from rlhf_pipeline.data.formats import Kind, detect, to_record
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.records import BadRow
from rlhf_pipeline.data.sources import fingerprint, read_rows
from rlhf_pipeline.data.store import Example, TreeDataset, open_dataset, write
from rlhf_pipeline.errors import UserError

ROWS_AT_ONCE = 1024  # rows that are tokenised together; also the size of a record batch
BAD_ROWS_SHOWN = 10

_CODE = ("records.py", "sources.py", "formats.py", "prompts.py", "encode.py", "store.py", "dataset.py")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where rows come from and what they mean."""

    path: str | Sequence[str]  # see sources.read_rows
    kind: Kind
    format: str = "auto"  # a name in formats.FORMATS; "auto" tells it by the first row's fields
    split: str = "train"
    max_examples: int | None = None  # rows from the start; the others are not read
    on_bad_row: Literal["error", "skip"] = "error"


def build(
    source: Source, renderer: Renderer, lengths: Lengths, *, cache_dir: Path, loss: Loss = "responses"
) -> TreeDataset:
    """The trees of a source, from `cache_dir` if they are there, else tokenised now and put there.

    Raises UserError for what cannot be read, for rows that are too long where the policy says so, for bad rows (the
    first few and their number) unless they are to be skipped, and when nothing is left.
    """
    identity = {
        "source": [fingerprint(source.path, source.split), dataclasses.asdict(source)],
        "form": [loss, dataclasses.asdict(lengths)],
        "renderer": [renderer.tokenizer_hash, renderer.template_hash],
        "code": _code_hash(),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    file = cache_dir / f"{source.kind}-{key[:24]}.arrow"
    if file.exists():
        try:
            return open_dataset(file)
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            _log.warning("%s is damaged (%s) and is made again", file, error)
    tally = _Tally()
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Under a name of its own: processes that build the same file do not meet, and the last to finish wins.
    unfinished = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write(unfinished, _examples(source, renderer, lengths, loss, tally), tally.result)
        _check(tally, source)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
    return open_dataset(file)


def split_heldout(dataset: TreeDataset, fraction: float, seed: int) -> tuple[TreeDataset, TreeDataset]:
    """(train, held out), by prompt: about `fraction` of the prompts are held out, with all of their examples.

    A prompt's side depends on the prompt and the seed alone, so it is the same in every data set (but where
    one side would be empty, the prompt nearest to it is moved there). UserError for fewer than two prompts.
    """
    if not 0 < fraction < 1:
        raise UserError(f"data.heldout_fraction={fraction}: must be more than 0 and less than 1 to split")
    place = _mix(dataset.groups.view(np.uint64) ^ _mix(np.array([seed], np.uint64)))  # even over 64 bits
    if len(dataset) == 0 or place.min() == place.max():
        raise UserError("a data set needs two different prompts to hold some out; name data.heldout instead")
    border = np.uint64(min(int(fraction * 2**64), 2**64 - 1))
    is_heldout = place < border
    if not is_heldout.any():
        is_heldout = place == place.min()
    elif is_heldout.all():
        is_heldout = place < place.max()
    return dataset.select(np.flatnonzero(~is_heldout)), dataset.select(np.flatnonzero(is_heldout))


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014, figure 16): each bit of the input changes about half of the output."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(slots=True)
class _Tally:
    """Counts while they are being made."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)

    def add_bad(self, origin: str, bad: BadRow) -> None:
        self.bad[bad.reason] += 1
        if len(self.bad_rows) < BAD_ROWS_SHOWN:
            self.bad_rows.append(f"{origin}: {bad}")

    def result(self, num_tokens: int, num_targets: int) -> tuple[Counts, list[str]]:
        self.counts["tokens"], self.counts["targets"] = num_tokens, num_targets
        names = [f.name for f in dataclasses.fields(Counts) if f.name != "bad"]
        return Counts(bad=dict(self.bad), **{name: self.counts[name] for name in names}), self.bad_rows


def _examples(
    source: Source, renderer: Renderer, lengths: Lengths, loss: Loss, tally: _Tally
) -> Iterator[list[Example]]:
    """The examples of a source, many rows at a time; what becomes of each row enters `tally`."""
    rows = islice(read_rows(source.path, split=source.split), source.max_examples)
    format = source.format
    bos_id = renderer.tokenizer.bos_token_id
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        drafts: list[tuple[str, Draft]] = []
        for row in chunk:
            tally.counts["rows"] += 1
            try:
                if isinstance(row.value, BadRow):
                    raise row.value
                format = detect(row.value, source.kind) if format == "auto" else format
                drafts.append((row.origin, draft(to_record(row.value, source.kind, format), renderer, loss=loss)))
            except BadRow as bad:
                tally.add_bad(row.origin, bad)
            except UserError as error:
                raise UserError(f"{row.origin}: {error}") from error
        tokens = iter(renderer.tokenize([segment for _, drafted in drafts for segment in drafted.segments]))
        examples: list[Example] = []
        for origin, drafted in drafts:
            try:
                encoded = fit(drafted, list(islice(tokens, len(drafted.segments))), lengths, bos_id=bos_id)
            except UserError as error:
                raise UserError(f"{origin}: {error}") from error
            examples += [Example(tree, drafted.group, origin) for tree in encoded.trees]
            tally.counts[encoded.outcome] += 1
            tally.counts["prompt_truncated"] += encoded.prompt_truncated
            tally.counts["response_truncated"] += encoded.num_responses_truncated
            tally.counts["trees"] += len(encoded.trees)
        yield examples


def _check(tally: _Tally, source: Source) -> None:
    counts, num_bad = tally.counts, tally.bad.total()
    name = source.path if isinstance(source.path, str) else ", ".join(source.path)
    dropped = {name: number for name, number in counts.items() if name.startswith("dropped")}
    assert counts["rows"] == counts["kept"] + num_bad + sum(dropped.values()), counts
    shown = "".join(f"\n  {line}" for line in tally.bad_rows)
    more = f"\n  and {num_bad - len(tally.bad_rows)} more" if num_bad > len(tally.bad_rows) else ""
    if num_bad and source.on_bad_row == "error":
        raise UserError(
            f"{num_bad} of {counts['rows']} rows of {name} cannot be used:{shown}{more}\n"
            "Correct them, or set data.on_bad_row=skip to go on without them"
        )
    if not counts["trees"]:
        fates = ", ".join(f"{number} {name}" for name, number in {"bad": num_bad, **dropped}.items() if number)
        raise UserError(f"{name}: none of {counts['rows']} rows is left ({fates or 'it is empty'}){shown}{more}")


@cache
def _code_hash() -> str:
    """Of the code that decides the content, so that a change of it never meets a file of before."""
    import tokenizers
    import transformers

    digest = hashlib.sha256(f"{tokenizers.__version__} {transformers.__version__}".encode())
    for name in _CODE:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()
