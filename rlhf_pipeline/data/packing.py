"""Packs token trees into rows: who computes what (`plan`), and the integers a model needs for it (`pack`).

A global batch is a set of trees, chosen without regard to processes. `plan` splits it over ranks by tokens and into
micro-batches of equally many on every rank; it is a pure function of the trees' lengths, so that every rank knows the
whole plan without a word to the others. Torch-free: `models.tree_model` turns the arrays into tensors.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_pipeline.data.tree import Tree

PADDING = -1  # tree number of positions that belong to none


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens along one path: a prompt with its first response, a further response, or padding."""

    length: int
    trunk: int | None = None  # of a further response: the segment that begins with its prompt
    prompt_length: int = 0  # of a further response


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTrees:
    """One micro-batch: B rows of T tokens, N scored response tokens, R responses.

    The hidden state at flat position `source[i]` (row * T + column) predicts token `target[i]`. A token attends to
    itself and to earlier tokens of its tree that are prompt or of its own branch.
    """

    tokens: np.ndarray  # int64 [B, T]
    positions: np.ndarray  # int64 [B, T]; every branch goes on from the end of its prompt
    tree: np.ndarray  # int32 [B, T]; number of the tree within its row, PADDING where there is none
    branch: np.ndarray  # int32 [B, T]; 0 in a prompt, k + 1 in response k
    source: np.ndarray  # int64 [N]
    target: np.ndarray  # int64 [N]
    sequence: np.ndarray  # int64 [N]; the response that a scored token belongs to, 0..R-1
    last: np.ndarray  # int64 [R]; flat position of each response's last token
    group: np.ndarray  # int64 [R]; which data set a response comes from
    index: np.ndarray  # int64 [R]; the response's example within that data set
    prompt: np.ndarray  # int64 [R]; which of the micro-batch's trees the response belongs to
    rank: np.ndarray  # int64 [R]; 0 for the best of a ranking, equal for a tie
    score: np.ndarray  # float32 [R]; the labels' score, NaN where there is none
    segments: tuple[Segment, ...]  # the B * T positions, in order
    numbers: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [N] each; NaN of trees without this name

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.tree != PADDING).sum())


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens: longest trees first, each into the fullest row that still has room for it.

    A tree longer than `capacity` gets a row of its own. Returns indices into `lengths`.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [r for r, free in enumerate(room) if free >= lengths[i]]
        if fitting:
            r = min(fitting, key=lambda r: (room[r], r))
            rows[r].append(i)
            room[r] -= lengths[i]
        else:
            rows.append([i])
            room.append(capacity - lengths[i])
    return rows


def split(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Each tree to the rank with the fewest tokens so far, longest first. Returns indices into `lengths` for each rank."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [(0, rank) for rank in range(num_ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, rank = heapq.heappop(load)
        ranks[rank].append(i)
        heapq.heappush(load, (tokens + lengths[i], rank))
    return ranks


def plan(lengths: Sequence[int], *, num_ranks: int, row_length: int, micro_rows: int) -> list[list[list[list[int]]]]:
    """plan[rank][micro-batch][row] = indices of trees. Every rank has equally many micro-batches; some may be empty.

    Rows are sorted by fullness, so that a micro-batch can be cut to its longest row.
    """
    ranks: list[list[list[list[int]]]] = []
    for mine in split(lengths, num_ranks):
        rows = [[mine[i] for i in row] for row in first_fit([lengths[i] for i in mine], row_length)]
        rows.sort(key=lambda row: -sum(lengths[i] for i in row))
        ranks.append([rows[i : i + micro_rows] for i in range(0, len(rows), micro_rows)])
    most = max(1, *(len(micro_batches) for micro_batches in ranks))
    return [micro_batches + [[] for _ in range(most - len(micro_batches))] for micro_batches in ranks]


def pack(
    rows: Sequence[Sequence[Tree]], *, groups: Sequence[Sequence[int]] | None = None, width_multiple: int = 1
) -> PackedTrees:
    """Lay the trees of each row end to end. `groups[r][t]` is the data set of tree t in row r (default 0).

    The width is that of the fullest row, rounded up to `width_multiple`.

    No trees at all gives one row of padding without a target: a micro-batch of weight zero.
    """
    rows = rows or [[]]
    num_rows = len(rows)
    width = max((sum(len(tree) for tree in row) for row in rows), default=0) or 8
    width = -(-width // width_multiple) * width_multiple
    tokens = np.zeros((num_rows, width), np.int64)
    positions = np.zeros((num_rows, width), np.int64)
    tree_of = np.full((num_rows, width), PADDING, np.int32)
    branch_of = np.zeros((num_rows, width), np.int32)
    source: list[np.ndarray] = []
    target: list[np.ndarray] = []
    scored_counts: list[int] = []
    last: list[int] = []
    group: list[int] = []
    index: list[int] = []
    trees: list[Tree] = []
    segments: list[Segment] = []
    for r, row in enumerate(rows):
        start = 0
        for t, tree in enumerate(row):
            assert tree.responses, "a prompt alone is sampled from, not packed"
            trees.append(tree)
            length = len(tree.prompt)
            tree_of[r, start : start + len(tree)] = t
            tokens[r, start : start + length] = tree.prompt
            positions[r, start : start + length] = np.arange(length)
            prompt_end = at = start + length
            trunk = len(segments)
            for k, (response, scored) in enumerate(zip(tree.responses, tree.scored, strict=True)):
                end = at + len(response)
                tokens[r, at:end] = response
                positions[r, at:end] = np.arange(length, length + len(response))
                branch_of[r, at:end] = k + 1
                segments.append(
                    Segment(length + len(response)) if k == 0 else Segment(len(response), trunk, prompt_length=length)
                )
                here = np.flatnonzero(scored)
                # The token before the first of a branch is the prompt's last one, wherever the branch lies.
                source.append(r * width + np.where(here == 0, prompt_end - 1, at + here - 1))
                target.append(response[here])
                scored_counts.append(len(here))
                last.append(r * width + end - 1)
                group.append(groups[r][t] if groups is not None else 0)
                index.append(tree.index)
                at = end
            start += len(tree)
        if start < width:
            segments.append(Segment(width - start))
    return PackedTrees(
        tokens=tokens,
        positions=positions,
        tree=tree_of,
        branch=branch_of,
        source=_concatenate(source),
        target=_concatenate(target),
        sequence=np.repeat(np.arange(len(last), dtype=np.int64), np.asarray(scored_counts, np.int64)),
        last=np.asarray(last, np.int64),
        group=np.asarray(group, np.int64),
        index=np.asarray(index, np.int64),
        prompt=np.repeat(np.arange(len(trees)), [len(tree.responses) for tree in trees]).astype(np.int64),
        rank=_concatenate([tree.ranks for tree in trees]),
        score=np.concatenate([tree.scores for tree in trees]) if trees else np.zeros(0, np.float32),
        segments=tuple(segments),
        numbers=_numbers(trees),
    )


def _numbers(trees: list[Tree]) -> dict[str, np.ndarray]:
    """Those of the scored tokens, in the order of `source`, under every name that a tree has."""
    names = sorted({name for tree in trees for name in tree.numbers})
    return {
        name: np.concatenate([part for tree in trees for part in _scored_numbers(tree, name)]).astype(np.float32)
        for name in names
    }


def _scored_numbers(tree: Tree, name: str) -> list[np.ndarray]:
    values = tree.numbers.get(name)
    if values is None:
        return [np.full(int(scored.sum()), np.nan, np.float32) for scored in tree.scored]
    return [numbers[scored] for numbers, scored in zip(values, tree.scored, strict=True)]


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
