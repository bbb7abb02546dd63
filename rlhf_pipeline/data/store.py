"""Token trees in an Arrow file, read back as arrays over a memory map; `dataset` decides what goes in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rlhf_pipeline.data.encode import Counts
from rlhf_pipeline.data.order import Part
from rlhf_pipeline.data.tree import Tree

_SCHEMA = pa.schema(
    {
        "prompt": pa.list_(pa.int32()),
        "responses": pa.list_(pa.list_(pa.int32())),
        "scored": pa.list_(pa.list_(pa.bool_())),
        "ranks": pa.list_(pa.int32()),
        "scores": pa.list_(pa.float32()),
        "targets": pa.int32(),
        "group": pa.int64(),
        "origin": pa.string(),
    }
)
_SUMMARY = b"summary"  # metadata of the last, empty record batch: counts, bad rows, fingerprint


@dataclass(frozen=True, slots=True)
class Example:
    """A tree, the hash of its prompt and its place in the source."""

    tree: Tree
    group: int
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A source within a data set, and what became of its rows."""

    name: str
    weight: float  # how often its examples are seen in an epoch
    counts: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One record batch as arrays over the memory map; `*_at` are offsets, one more than there are items."""

    prompt_at: np.ndarray  # int32, tree -> prompt
    prompt: np.ndarray  # int32
    tree_at: np.ndarray  # int32, tree -> response, rank and score
    response_at: np.ndarray  # int32, response -> responses and scored
    responses: np.ndarray  # int32
    scored: np.ndarray  # uint8, 8 tokens a byte, lowest bit first
    ranks: np.ndarray  # int32
    scores: np.ndarray  # float32
    targets: np.ndarray  # int32
    group: np.ndarray  # int64
    origin: pa.StringArray

    def __len__(self) -> int:
        return len(self.targets)

    def lengths(self) -> np.ndarray:
        return np.diff(self.prompt_at) + np.diff(self.response_at[self.tree_at])

    def update(self, digest: Any) -> None:
        """Enter everything that is trained on into a hash; where it came from is left out."""
        digest.update(self.prompt_at)
        digest.update(self.prompt)
        digest.update(self.tree_at)
        digest.update(self.response_at)
        digest.update(self.responses)
        digest.update(self.scored)
        digest.update(self.ranks)
        digest.update(self.scores)
        digest.update(self.targets)
        digest.update(self.group)


@dataclass(frozen=True, slots=True)
class Numbers:
    """What each response token of a data set has beside its id, the trees one after the other in any order."""

    flat: np.ndarray  # float32; may be a memory map
    starts: np.ndarray  # int64 [trees], where the responses of each tree begin

    @classmethod
    def of(cls, flat: np.ndarray, response_tokens: np.ndarray) -> Numbers:
        """In the order of the data set; `response_tokens` is int64 [trees]."""
        ends = np.cumsum(response_tokens)
        assert flat.dtype == np.float32 and flat.shape == (int(ends[-1]),), (flat.dtype, flat.shape, ends[-1])
        return cls(np.asarray(flat), ends - response_tokens)  # a slice of a np.memmap object takes ten times as long

    def split(self, index: int, lengths: Iterable[int]) -> tuple[np.ndarray, ...]:
        """Of the responses of one tree, whose lengths these are."""
        ends = list(accumulate(lengths, initial=int(self.starts[index])))
        return tuple(self.flat[a:b] for a, b in pairwise(ends))


NO_NUMBERS: Mapping[str, Numbers] = {}


class TreeDataset:
    """Token trees on disk, or some of them in another order (`select`). `data[i].index` is i.

    `lengths` and `targets` are int64 [trees]: tokens of each tree and scored tokens among them; `groups`
    int64 [trees] is equal for equal prompts. `fingerprint` is a hash of the content. `counts` and `bad_rows`
    (the first few, with their reasons) tell what became of the rows of the source and are the same in a
    selection. A data set of several sources (`concatenate`) has their `shares`; `sources`, int64 [trees], says which
    of them an example is from. Its trees have the `numbers` that it was given (`with_numbers`), else none.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        rows: np.ndarray,
        *,
        counts: Counts,
        bad_rows: list[str],
        fingerprint: str,
        shares: tuple[Share, ...] = (),
        sources: np.ndarray | None = None,
        numbers: Mapping[str, Numbers] = NO_NUMBERS,
    ) -> None:
        self.counts = counts
        self.bad_rows = bad_rows
        self.fingerprint = fingerprint
        self.shares = shares
        self.sources = np.zeros(len(rows), np.int64) if sources is None else sources
        self.lengths = np.concatenate([block.lengths() for block in blocks]).astype(np.int64)[rows]
        self.targets = np.concatenate([block.targets for block in blocks]).astype(np.int64)[rows]
        self.groups = np.concatenate([block.group for block in blocks])[rows]
        self.blocks = blocks
        self.rows = rows
        self.numbers = numbers
        self._starts = np.cumsum([0, *map(len, blocks[:-1])]).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tree:
        block, row = self._place(index)
        first, end = block.tree_at[row], block.tree_at[row + 1]
        at = block.response_at[first : end + 1].tolist()
        low, high = at[0], at[-1]
        bits = np.unpackbits(block.scored[low >> 3 : (high + 7) >> 3], bitorder="little").view(np.bool_)
        scored = bits[low & 7 :]
        spans = list(pairwise(at))
        return Tree(
            prompt=block.prompt[block.prompt_at[row] : block.prompt_at[row + 1]],
            responses=tuple(block.responses[a:b] for a, b in spans),
            scored=tuple(scored[a - low : b - low] for a, b in spans),
            index=int(index),
            ranks=block.ranks[first:end],
            scores=block.scores[first:end],
            numbers={name: one.split(index, (b - a for a, b in spans)) for name, one in self.numbers.items()},
        )

    def origin(self, index: int) -> str:
        """Where an example comes from, as "file:line"."""
        block, row = self._place(index)
        return block.origin[row].as_py()

    def select(self, indices: np.ndarray) -> TreeDataset:
        """The examples `indices`, numbered anew from 0."""
        rows = self.rows[indices]
        digest = hashlib.sha256(self.fingerprint.encode() + np.asarray(indices, np.int64).tobytes())
        return TreeDataset(
            self.blocks,
            rows,
            counts=self.counts,
            bad_rows=self.bad_rows,
            fingerprint=digest.hexdigest(),
            shares=self.shares,
            sources=self.sources[indices],
            numbers={name: Numbers(one.flat, one.starts[indices]) for name, one in self.numbers.items()},
        )

    def with_numbers(self, name: str, flat: np.ndarray) -> TreeDataset:
        """The same examples, whose trees have `numbers[name]`. The fingerprint stays: it is that of the examples.

        Args:
            flat: float32, of every response token of data[0], data[1] and so on.
        """
        return TreeDataset(
            self.blocks,
            self.rows,
            counts=self.counts,
            bad_rows=self.bad_rows,
            fingerprint=self.fingerprint,
            shares=self.shares,
            sources=self.sources,
            numbers={**self.numbers, name: Numbers.of(flat, self.response_tokens)},
        )

    @property
    def response_tokens(self) -> np.ndarray:
        """Tokens of all responses of each tree, int64 [trees]."""
        return self.lengths - np.concatenate([np.diff(block.prompt_at) for block in self.blocks])[self.rows]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sources as `order` wants them. They must still lie one after the other, as they do after a split."""
        if not self.shares:
            return (Part(len(self)),)
        assert (np.diff(self.sources) >= 0).all()
        sizes = np.bincount(self.sources, minlength=len(self.shares))
        return tuple(Part(int(size), share.weight) for size, share in zip(sizes, self.shares, strict=True))

    def _place(self, index: int) -> tuple[Block, int]:
        if not 0 <= index < len(self.rows):
            raise IndexError(index)
        row = int(self.rows[index])
        b = bisect_right(self._starts, row) - 1
        return self.blocks[b], row - self._starts[b]


def concatenate(datasets: Sequence[TreeDataset], shares: Sequence[Share]) -> TreeDataset:
    """The examples of several data sets, one after the other. One alone keeps its fingerprint. None has numbers yet."""
    assert not any(one.numbers for one in datasets)
    firsts = np.cumsum([0, *(sum(map(len, one.blocks)) for one in datasets[:-1])])
    prints = [one.fingerprint for one in datasets]
    names = [f.name for f in dataclasses.fields(Counts) if f.name != "bad"]
    bad: Counter[str] = Counter()
    for one in datasets:
        bad.update(one.counts.bad)
    return TreeDataset(
        [block for one in datasets for block in one.blocks],
        np.concatenate([one.rows + first for one, first in zip(datasets, firsts, strict=True)]),
        counts=Counts(bad=dict(bad), **{name: sum(getattr(one.counts, name) for one in datasets) for name in names}),
        bad_rows=[line for one in datasets for line in one.bad_rows],
        fingerprint=prints[0] if len(prints) == 1 else hashlib.sha256(" ".join(prints).encode()).hexdigest(),
        shares=tuple(shares),
        sources=np.repeat(np.arange(len(datasets)), [len(one) for one in datasets]),
    )


def write(
    file: Path, parts: Iterable[pa.RecordBatch], summarise: Callable[[int, int], tuple[Counts, list[str]]]
) -> None:
    """Write all examples, which `to_batch` made, then an empty record batch whose metadata sums them up.

    `summarise(tokens, targets)` is called at the end for the counts and the bad rows.
    """
    num_tokens = num_targets = 0
    digest = hashlib.sha256()
    with file.open("wb") as sink:
        with pa.ipc.new_file(sink, _SCHEMA) as writer:
            for batch in parts:
                block = _block(batch)
                block.update(digest)
                num_tokens += int(block.lengths().sum())
                num_targets += int(block.targets.sum())
                writer.write_batch(batch)
            counts, bad_rows = summarise(num_tokens, num_targets)
            summary = {
                "counts": dataclasses.asdict(counts),
                "bad_rows": bad_rows,
                "fingerprint": digest.hexdigest(),
            }
            empty = pa.RecordBatch.from_pylist([], schema=_SCHEMA)
            writer.write_batch(empty, {_SUMMARY: json.dumps(summary).encode()})
        sink.flush()
        os.fsync(sink.fileno())


def to_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Some examples, at least one, as they are stored."""
    trees = [example.tree for example in examples]
    responses = [response for tree in trees for response in tree.responses]
    scored = [mask for tree in trees for mask in tree.scored]
    prompt_at = _offsets([len(tree.prompt) for tree in trees])
    tree_at = _offsets([len(tree.responses) for tree in trees])
    response_at = _offsets([len(response) for response in responses])
    lists = pa.ListArray.from_arrays
    return pa.record_batch(
        [
            lists(prompt_at, _column(np.concatenate([tree.prompt for tree in trees]))),
            lists(tree_at, lists(response_at, _column(_joined(responses, np.int32)))),
            lists(tree_at, lists(response_at, _column(_joined(scored, bool)))),
            lists(tree_at, _column(_joined([tree.ranks for tree in trees], np.int32))),
            lists(tree_at, _column(_joined([tree.scores for tree in trees], np.float32))),
            _column(np.asarray([sum(int(mask.sum()) for mask in tree.scored) for tree in trees], np.int32)),
            _column(np.asarray([example.group for example in examples], np.int64)),
            _strings([example.origin for example in examples]),
        ],
        schema=_SCHEMA,
    )


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """The parts one after the other; prompts that wait for an answer have none."""
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _offsets(lengths: Sequence[int]) -> pa.Int32Array:
    return _column(np.cumsum([0, *lengths]).astype(np.int32))


# pa.array and Array.to_numpy load pandas where it is installed, a third of a second at every start; buffers do not.
def _column(values: np.ndarray) -> pa.Array:
    content = np.packbits(values, bitorder="little") if values.dtype == bool else values
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(content))])


def _strings(values: Sequence[str]) -> pa.Array:
    encoded = [value.encode(errors="backslashreplace") for value in values]  # file names may be no UTF-8
    offsets = np.cumsum([0, *map(len, encoded)]).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


def open_dataset(file: Path) -> TreeDataset:
    """The trees of a file. Raises ValueError, or an error of pyarrow, if it is not what `write` wrote."""
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    if reader.num_record_batches < 2 or reader.schema != _SCHEMA:
        raise ValueError("not a file of trees")
    _, metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
    summary = json.loads(metadata[_SUMMARY])
    blocks = [_block(reader.get_batch(i)) for i in range(reader.num_record_batches - 1)]
    digest = hashlib.sha256()
    for block in blocks:
        block.update(digest)
    counts = Counts(**summary["counts"])
    num_trees = sum(map(len, blocks))
    if digest.hexdigest() != summary["fingerprint"] or num_trees != counts.trees:
        raise ValueError("its content does not fit its checksum")
    return TreeDataset(
        blocks,
        np.arange(num_trees),
        counts=counts,
        bad_rows=summary["bad_rows"],
        fingerprint=summary["fingerprint"],
    )


def _block(batch: pa.RecordBatch) -> Block:
    prompt, responses, scored, ranks, scores, targets, group, origin = batch.columns
    prompt_at = _view(prompt, 1, np.int32, len(prompt) + 1)
    tree_at = _view(responses, 1, np.int32, len(responses) + 1)
    inner = responses.values
    response_at = _view(inner, 1, np.int32, int(tree_at[-1]) + 1)
    num_tokens = int(response_at[-1])
    return Block(
        prompt_at=prompt_at,
        prompt=_view(prompt.values, 1, np.int32, int(prompt_at[-1])),
        tree_at=tree_at,
        response_at=response_at,
        responses=_view(inner.values, 1, np.int32, num_tokens),
        scored=_view(scored.values.values, 1, np.uint8, (num_tokens + 7) // 8),
        ranks=_view(ranks.values, 1, np.int32, int(tree_at[-1])),
        scores=_view(scores.values, 1, np.float32, int(tree_at[-1])),
        targets=_view(targets, 1, np.int32, len(targets)),
        group=_view(group, 1, np.int64, len(group)),
        origin=origin,
    )


def _view(array: pa.Array, buffer: int, dtype: type, count: int) -> np.ndarray:
    """An array over one buffer of an Arrow array that has no offset, as those of a file have none."""
    assert array.offset == 0
    if count == 0:
        return np.zeros(0, dtype)  # there may be no buffer
    return np.frombuffer(array.buffers()[buffer], dtype, count)
