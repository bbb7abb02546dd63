"""Tokenises a data source once and keeps the trees in a cache; splits off the held-out prompts.

A cached file is named by everything that its content depends on, so that a changed source, tokenizer,
template or policy makes a new one. Build before any process group exists: the other ranks would wait in a
collective meanwhile. Which examples make which batch is `order`'s business, several sources `prepare`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rlhf_pipeline.data import templates
from rlhf_pipeline.data.contents import mix
from rlhf_pipeline.data.encode import Counts, Draft, Empty, Lengths, Loss, Rankings, draft, fit, group_of_tokens
from rlhf_pipeline.data.formats import Kind, detect, to_records
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.records import BadRow, Ranking, Record
from rlhf_pipeline.data.sources import Row, fingerprint, read_rows
from rlhf_pipeline.data.store import Example, TreeDataset, open_dataset, to_batch, write
from rlhf_pipeline.data.workers import map_in_order
from rlhf_pipeline.errors import UserError

ROWS_AT_ONCE = 1024  # rows that are tokenised together; also the size of a record batch
BAD_ROWS_SHOWN = 10

_CODE = (
    *("records.py", "sources.py", "fields.py", "conversations.py", "comparisons.py", "format_table.py", "formats.py"),
    *("templates.py", "prompts.py", "encode.py", "store.py", "tree.py", "dataset.py"),
)
_log = logging.getLogger(__name__)

Progress = Callable[[str, int], None]  # told the name of a source and how many of its rows are done
Reader = Callable[[Row], Sequence[Record]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where rows come from and what they mean."""

    path: str | Sequence[str]  # see sources.read_rows
    kind: Kind
    format: str = "auto"  # a name in formats.FORMATS; "auto" tells it by the first row's fields
    columns: Mapping[str, str] | None = None  # our field: the source's column
    templates: str | None = None  # see templates.load; in place of a format
    seed: int = 0  # chooses among templates and their solved examples
    split: str = "train"
    max_examples: int | None = None  # rows from the start; the others are not read
    rankings: Rankings = "whole"  # pairs: every comparison is an example of its own
    on_bad_row: Literal["error", "skip"] = "error"

    @property
    def name(self) -> str:
        return self.path if isinstance(self.path, str) else ", ".join(self.path)


def build(
    source: Source,
    renderer: Renderer,
    lengths: Lengths,
    *,
    cache_dir: Path,
    loss: Loss = "responses",
    workers: int = 1,
    progress: Progress | None = None,
) -> TreeDataset:
    """The trees of a source, from `cache_dir` if they are there, else tokenised now and put there.

    The file is the same, byte for byte, whatever the number of processes in `workers`.

    Raises UserError for what cannot be read, for rows that are too long where the policy says so, for bad rows (the
    first few and their number) unless they are to be skipped, and when nothing is left.
    """
    file = cache_file(source, renderer, lengths, cache_dir=cache_dir, loss=loss)
    if file.exists():
        try:
            data = open_dataset(file)
            _check(data.counts, data.bad_rows, source)
            return data
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            _log.warning("%s is damaged (%s) and is made again", file, error)
    tally = _Tally()
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Under a name of its own: processes that build the same file do not meet, and the last to finish wins.
    unfinished = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        tokenised = _examples(source, renderer, lengths, loss, tally, workers, progress)
        with closing(tokenised):
            write(unfinished, tokenised, tally.result)
        _check(*tally.result(tally.counts["tokens"], tally.counts["targets"]), source)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
    return open_dataset(file)


def cache_file(source: Source, renderer: Renderer, lengths: Lengths, *, cache_dir: Path, loss: Loss) -> Path:
    """Where `build` keeps the trees. `on_bad_row` is no part of the name: it decides whether, not what."""
    told = dataclasses.asdict(source)
    del told["on_bad_row"]
    if source.templates is None:
        del told["seed"]
    else:
        told["templates"] = dataclasses.asdict(templates.load(source.templates))
    if source.kind != "ranking":
        del told["rankings"]
    identity = {
        "source": [fingerprint(source.path, source.split), told],
        "form": [loss, dataclasses.asdict(lengths)],
        "renderer": [renderer.tokenizer_hash, renderer.template_hash],
        "code": _code_hash(),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_dir / f"{source.kind}-{key[:24]}.arrow"


def split_heldout(dataset: TreeDataset, fraction: float, seed: int) -> tuple[TreeDataset, TreeDataset]:
    """(train, held out), by prompt: about `fraction` of the prompts are held out, with all of their examples.

    A prompt's side depends on the prompt and the seed alone, so it is the same in every data set (but where
    one side would be empty, the prompt nearest to it is moved there). UserError for fewer than two prompts.
    """
    if not 0 < fraction < 1:
        raise UserError(f"data.heldout_fraction={fraction}: must be more than 0 and less than 1 to split")
    place = mix(dataset.groups.view(np.uint64) ^ mix(np.array([seed], np.uint64)))  # even over 64 bits
    if len(dataset) == 0 or place.min() == place.max():
        raise UserError("a data set needs two different prompts to hold some out; name data.heldout instead")
    border = np.uint64(min(int(fraction * 2**64), 2**64 - 1))
    is_heldout = place < border
    if not is_heldout.any():
        is_heldout = place == place.min()
    elif is_heldout.all():
        is_heldout = place < place.max()
    return dataset.select(np.flatnonzero(~is_heldout)), dataset.select(np.flatnonzero(is_heldout))


def records_of(source: Source, rows: Iterable[Row]) -> tuple[Reader, Iterator[Row]]:
    """What makes the records of a row, decided by the first row that can be read; and the rows, from the first on.

    Raises:
        UserError: when no format, or the one that is named, makes records of the wanted kind.
    """
    rows = iter(rows)
    head: list[Row] = []
    for row in rows:
        head.append(row)
        if not isinstance(row.value, BadRow):
            break
    first = head[-1] if head and not isinstance(head[-1].value, BadRow) else None
    if source.templates is not None:
        head += islice(rows, templates.POOL_SIZE - len(head))
    try:
        read = _reader(source, first, head)
    except UserError as error:
        raise UserError(f"{first.origin}: {error}" if first else str(error)) from error
    return read, chain(head, rows)


def _reader(source: Source, first: Row | None, head: Sequence[Row]) -> Reader:
    if source.templates is not None:
        if source.kind != "demonstration":
            raise UserError(f"data.templates={source.templates}: makes demonstrations, not a {source.kind}")
        wordings = templates.load(source.templates)
        if first is not None:
            wordings.check(_fields(first))
        pool = [row.value for row in head if not isinstance(row.value, BadRow)]
        return lambda row: wordings.records(_fields(row), row.origin, pool, source.seed)
    format = source.format
    if format == "auto" and first is not None:
        format = detect(_fields(first), source.kind, columns=source.columns)
    if _in_pairs(source):
        return lambda row: _comparisons(to_records(_fields(row), source.kind, format, columns=source.columns))
    return lambda row: to_records(_fields(row), source.kind, format, columns=source.columns)


def _in_pairs(source: Source) -> bool:
    return source.kind == "ranking" and source.rankings == "pairs"


def _comparisons(rankings: Sequence[Record]) -> list[Ranking]:
    return [pair for ranking in rankings if isinstance(ranking, Ranking) for pair in ranking.comparisons()]


def _fields(row: Row) -> dict[str, Any]:
    if isinstance(row.value, BadRow):
        raise row.value
    return row.value


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

    def add(self, other: _Tally) -> None:
        self.counts.update(other.counts)
        self.bad.update(other.bad)
        self.bad_rows += other.bad_rows[: BAD_ROWS_SHOWN - len(self.bad_rows)]

    def result(self, num_tokens: int, num_targets: int) -> tuple[Counts, list[str]]:
        self.counts["tokens"], self.counts["targets"] = num_tokens, num_targets
        names = [f.name for f in dataclasses.fields(Counts) if f.name != "bad"]
        return Counts(bad=dict(self.bad), **{name: self.counts[name] for name in names}), self.bad_rows


def _examples(
    source: Source,
    renderer: Renderer,
    lengths: Lengths,
    loss: Loss,
    tally: _Tally,
    workers: int,
    progress: Progress | None,
) -> Generator[pa.RecordBatch, None, None]:
    """The examples of a source, many rows at a time; what becomes of each row enters `tally`."""
    read, rows = records_of(source, islice(read_rows(source.path, split=source.split), source.max_examples))
    chunks = iter(lambda: list(islice(rows, ROWS_AT_ONCE)), [])
    # What is not pickled: the processes have these from the start.
    empty: Empty = "dropped_all_tied" if _in_pairs(source) else "dropped_by_template"
    tokenise = partial(_tokenise, read=read, renderer=renderer, lengths=lengths, loss=loss, empty=empty)
    with closing(map_in_order(tokenise, chunks, workers=workers)) as parts:
        for batch, counted in parts:
            tally.add(counted)
            if progress is not None:
                progress(source.name, tally.counts["rows"])
            if batch is not None:
                yield batch


def _tokenise(
    rows: Sequence[Row], *, read: Reader, renderer: Renderer, lengths: Lengths, loss: Loss, empty: Empty
) -> tuple[pa.RecordBatch | None, _Tally]:
    """The examples of some rows, all of their text tokenised together.

    In one piece, as they are stored: their arrays one by one take ten times as long to hand from process to process.
    """
    tally = _Tally()
    drafts: list[tuple[str, list[Draft]]] = []
    for row in rows:
        tally.counts["rows"] += 1
        try:
            drafted = [draft(record, renderer, loss=loss) for record in read(row)]
        except BadRow as bad:
            tally.add_bad(row.origin, bad)
        except UserError as error:
            raise UserError(f"{row.origin}: {error}") from error
        else:
            drafts.append((row.origin, drafted))
    tokens = iter(renderer.tokenize([s for _, drafted in drafts for one in drafted for s in one.segments]))
    examples: list[Example] = []
    for origin, drafted in drafts:
        try:
            encoded = [
                fit(one, list(islice(tokens, len(one.segments))), lengths, bos_id=renderer.tokenizer.bos_token_id)
                for one in drafted
            ]
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
        # A row that makes several records is kept if one of them is.
        outcomes = [one.outcome for one in encoded] or [empty]
        tally.counts["kept" if "kept" in outcomes else outcomes[0]] += 1
        tally.counts["prompt_truncated"] += any(one.prompt_truncated for one in encoded)
        for one, drawn in zip(encoded, drafted, strict=True):
            for tree in one.trees:
                group = group_of_tokens(tree.prompt) if drawn.group is None else drawn.group
                examples.append(Example(tree, group, origin))
            tally.counts["response_truncated"] += one.num_responses_truncated
            tally.counts["trees"] += len(one.trees)
    return to_batch(examples) if examples else None, tally


def _check(counts: Counts, bad_rows: Sequence[str], source: Source) -> None:
    num_bad = sum(counts.bad.values())
    dropped = {name: n for name, n in dataclasses.asdict(counts).items() if name.startswith("dropped")}
    assert counts.rows == counts.kept + num_bad + sum(dropped.values()), counts
    shown = "".join(f"\n  {line}" for line in bad_rows)
    more = f"\n  and {num_bad - len(bad_rows)} more" if num_bad > len(bad_rows) else ""
    if num_bad and source.on_bad_row == "error":
        raise UserError(
            f"{num_bad} of {counts.rows} rows of {source.name} cannot be used:{shown}{more}\n"
            "Correct them, or set data.on_bad_row=skip to go on without them"
        )
    if not counts.trees:
        fates = ", ".join(f"{number} {name}" for name, number in {"bad": num_bad, **dropped}.items() if number)
        raise UserError(f"{source.name}: none of {counts.rows} rows is left ({fates or 'it is empty'}){shown}{more}")


@cache
def _code_hash() -> str:
    """Of the code that decides the content, so that a change of it never meets a file of before."""
    import tokenizers
    import transformers

    digest = hashlib.sha256(f"{tokenizers.__version__} {transformers.__version__}".encode())
    for name in _CODE:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()
