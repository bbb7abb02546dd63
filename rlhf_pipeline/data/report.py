"""What a data set holds, in figures: made by `rlhf prep` before any training, saved as JSON. `report_view` shows it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_pipeline.data import order
from rlhf_pipeline.data.contents import SHOWN, Contents, Duplicates, Overlap, duplicates, read_contents
from rlhf_pipeline.data.encode import Counts
from rlhf_pipeline.data.formats import Kind
from rlhf_pipeline.data.packing import plan
from rlhf_pipeline.data.store import TreeDataset

STEPS_PACKED = 16  # steps that the packing is tried on


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Lengths, in tokens (or characters)."""

    mean: float
    p50: int
    p90: int
    p95: int
    p99: int
    max: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> Spread | None:
        """Percentiles are lengths that occur: the smallest that so many are not longer than. None of nothing."""
        if not len(lengths):
            return None
        at = [int(n) for n in np.percentile(lengths, [50, 90, 95, 99], method="inverted_cdf")]
        return cls(
            mean=round(float(lengths.mean()), 1), p50=at[0], p90=at[1], p95=at[2], p99=at[3], max=int(lengths.max())
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReport:
    """One entry of data.train or the like: what became of its rows, and how many examples are on this side."""

    name: str
    weight: float
    counts: Counts
    examples: int
    tokens: int
    an_epoch: float  # examples in an epoch, on average


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """Trees longer than a limit, and the first few of them."""

    limit: int
    trees: int
    first: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    """One data set. `counts` tell of all rows of its sources; None for the part of another set that is held out."""

    kind: Kind
    sources: tuple[SourceReport, ...]
    counts: Counts | None
    bad_rows: tuple[str, ...]  # the first of them, with their reasons
    examples: int
    tokens: int
    targets: int
    prompt: Spread | None
    response: Spread | None
    tree: Spread | None  # a prompt with all of its responses
    prompts: int | None  # different ones; None of documents
    answers: dict[int, int]  # of rankings: how many have K responses
    comparisons: int | None  # of rankings: pairs of answers to the same prompt, K(K - 1)/2 of each
    tied: float | None  # of rankings: share of the comparisons that are ties
    all_tied: int | None  # of rankings: how many have no other comparisons
    wanted: float | None  # of feedback: share of the answers that are
    duplicates: Duplicates
    over_row_length: Over | None
    over_max_length: Over | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a stage makes of its training set."""

    epochs: int
    steps: int
    examples_a_step: float
    tokens_a_step: float
    # Share of the positions of packed rows that hold a token, one process, over a few steps; None of prompts, whose
    # responses are yet to be drawn.
    fill: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that `rlhf prep` finds."""

    unit: str  # what lengths count: tokens or characters
    sets: dict[str, SetReport]
    overlap: Overlap | None  # between training and held-out set, where that is a source of its own
    run: RunReport | None

    @property
    def num_bad(self) -> int:
        return sum(sum(one.counts.bad.values()) for one in self.sets.values() if one.counts is not None)


def set_report(
    data: TreeDataset,
    contents: Contents,
    *,
    kind: Kind,
    row_length: int | None = None,
    max_length: int | None = None,
    is_part: bool = False,
) -> SetReport:
    """Figures of one data set; `contents` are its own (`read_contents`). Of a part, the rows are told elsewhere."""
    texts = kind == "text"
    ranking = kind == "ranking"
    sizes, numbers = np.unique(contents.num_responses, return_counts=True)
    return SetReport(
        kind=kind,
        sources=_sources(data),
        counts=None if is_part else data.counts,
        bad_rows=() if is_part else tuple(data.bad_rows),
        examples=len(data),
        tokens=int(data.lengths.sum()),
        targets=int(data.targets.sum()),
        prompt=None if texts else Spread.of(contents.prompt_length),  # a document has none but its first token
        response=None if texts else Spread.of(contents.response_length),
        tree=Spread.of(data.lengths),
        prompts=None if texts else len(np.unique(data.groups)),
        answers=dict(zip(sizes.tolist(), numbers.tolist(), strict=True)) if ranking else {},
        comparisons=_pairs(contents.num_responses) if ranking else None,
        tied=tied_share(contents) if ranking else None,
        all_tied=len(data) - len(np.unique(contents.tree[contents.rank > 0])) if ranking else None,
        wanted=float((contents.rank == 0).mean()) if kind == "feedback" and len(contents.rank) else None,
        duplicates=duplicates(data, contents),
        over_row_length=_over(data, row_length),
        over_max_length=_over(data, max_length),
    )


def run_report(
    data: TreeDataset, batches: order.BatchOrder, *, max_steps: int | None, row_length: int | None, micro_rows: int
) -> RunReport:
    """Steps of a run over `data`, and how full its packed rows are, tried on a few steps of one process."""
    steps = min(batches.num_steps, max_steps or batches.num_steps)
    tried = np.unique(np.linspace(0, steps - 1, STEPS_PACKED).astype(int))
    tokens = positions = examples = 0
    for step in tried.tolist():
        lengths = data.lengths[batches.indices(step)].tolist()
        tokens += sum(lengths)
        examples += len(lengths)
        if row_length is None:
            continue
        (micro_batches,) = plan(lengths, num_ranks=1, row_length=row_length, micro_rows=micro_rows)
        for rows in micro_batches:
            filled = [sum(lengths[i] for i in row) for row in rows]
            positions += max(filled, default=0) * len(rows)
    return RunReport(
        epochs=len(batches.starts),
        steps=steps,
        examples_a_step=round(examples / len(tried), 1),
        tokens_a_step=round(tokens / len(tried), 1),
        fill=None if row_length is None else round(tokens / max(positions, 1), 4),
    )


def to_json(report: Report) -> dict[str, Any]:
    return dataclasses.asdict(report)


def _sources(data: TreeDataset) -> tuple[SourceReport, ...]:
    tokens = np.bincount(data.sources, weights=data.lengths, minlength=len(data.shares))
    return tuple(
        SourceReport(
            name=share.name,
            weight=share.weight,
            counts=share.counts,
            examples=part.size,
            tokens=int(tokens[i]),
            an_epoch=round(part.size * share.weight, 1),
        )
        for i, (share, part) in enumerate(zip(data.shares, data.parts, strict=False))
    )


def _pairs(sizes: np.ndarray) -> int:
    return int((sizes * (sizes - 1) // 2).sum())


def tied_share(contents: Contents) -> float | None:
    """The share of ties among all pairs of answers to the same prompt: m answers that tie make m(m - 1)/2 of them."""
    pairs = _pairs(contents.num_responses)
    _, size = np.unique(np.stack([contents.tree, contents.rank]), axis=1, return_counts=True)
    return round(_pairs(size) / pairs, 4) if pairs else None


def _over(data: TreeDataset, limit: int | None) -> Over | None:
    if limit is None:
        return None
    long = np.flatnonzero(data.lengths > limit)
    first = tuple(f"{data.origin(i)} ({data.lengths[i]})" for i in long[:SHOWN].tolist())
    return Over(limit=limit, trees=len(long), first=first)


__all__ = ["Report", "RunReport", "SetReport", "Spread", "read_contents", "run_report", "set_report", "to_json"]
