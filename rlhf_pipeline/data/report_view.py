"""Shows a report of `rlhf prep`: tables for the terminal, histograms as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf_pipeline.data.contents import Contents
from rlhf_pipeline.data.encode import Counts
from rlhf_pipeline.data.report import Report, SetReport, Spread

if TYPE_CHECKING:
    from rich.table import Table

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
BINS = 40


def tables(report: Report) -> Iterator[Table]:
    """Rows and lengths of every set, then the sources where there are several."""
    from rich.table import Table

    names = list(report.sets)
    rows = Table(title="Rows", title_justify="left")
    lengths = Table(title=f"Lengths in {report.unit}", title_justify="left")
    rows.add_column("")
    for name in names:
        rows.add_column(name, justify="right")
    figures = [dict(_figures(one, report.unit)) for one in report.sets.values()]
    for label in dict.fromkeys(label for one in figures for label in one):
        rows.add_row(label, *(one.get(label, "") for one in figures))
    yield rows

    for heading in ("", "mean", "50 %", "90 %", "95 %", "99 %", "longest"):
        lengths.add_column(heading, justify="right" if heading else "left")
    for name, one in report.sets.items():
        for part, spread in (("prompt", one.prompt), ("response", one.response), ("whole example", one.tree)):
            if spread is not None:
                lengths.add_row(f"{name}: {part}", *_cells(spread))
    yield lengths

    if any(len(one.sources) > 1 for one in report.sets.values()):
        yield _sources_table(report)


def lines(report: Report) -> Iterator[str]:
    """What a table has no room for: places of bad rows, duplicates, long trees; the run that would follow."""
    for name, one in report.sets.items():
        if one.bad_rows:
            bad = sum(one.counts.bad.values()) if one.counts else 0
            yield from _listed(f"{name}: {bad:,} bad {'row' if bad == 1 else 'rows'}", one.bad_rows, bad)
        if one.duplicates.first:
            first = [f"{again} = {earlier}" for again, earlier in one.duplicates.first]
            yield from _listed(f"{name}: examples that were there before", first, one.duplicates.examples)
        if one.over_row_length is not None and one.over_row_length.trees:
            over = one.over_row_length
            heading = (
                f"{name}: {over.trees:,} longer than batch.row_length={over.limit}; each gets a longer row of its own"
            )
            yield from _listed(heading, over.first, over.trees)
    if report.overlap is not None:
        both = f"{report.overlap.prompts:,} prompts and {report.overlap.examples:,} whole examples"
        yield f"held out, of {report.overlap.size:,}: {both} are in the training set"
        if report.overlap.first:
            first = [f"{held_out} = {trained}" for held_out, trained in report.overlap.first]
            yield from _listed("held-out prompts that are trained on", first, report.overlap.prompts)
    if report.run is not None:
        run = report.run
        epochs = f"{run.epochs} epoch" + "s" * (run.epochs > 1)
        packed = "" if run.fill is None else f"; packed rows are {run.fill:.1%} full"
        yield (
            f"{run.steps:,} steps in {epochs}, {run.examples_a_step:,} examples and {run.tokens_a_step:,.0f} "
            f"{report.unit} a step{packed}"
        )


def histograms(
    contents: Mapping[str, Contents],
    path: Path,
    *,
    unit: str,
    prompt_limit: int | None = None,
    row_length: int | None = None,
) -> None:
    """A picture of the lengths of prompts, responses and whole examples, a line for each data set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        ("Prompts", {n: c.prompt_length for n, c in contents.items()}, prompt_limit, "data.max_prompt_length"),
        ("Responses", {n: c.response_length for n, c in contents.items()}, None, ""),
        ("Whole examples", {n: _whole(c) for n, c in contents.items()}, row_length, "batch.row_length"),
    ]
    # The prompt of a document is one token, which is no figure to draw.
    panels = [panel for panel in panels if any(len(v) and v.max() > 1 for v in panel[1].values())]
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, lengths, limit, key) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        longest = max(int(np.percentile(v, 99.5)) for v in lengths.values() if len(v))
        edges = np.unique(np.linspace(0, max(longest, 2) + 1, BINS + 1).astype(int))
        for (name, values), colour, style in zip(
            lengths.items(), COLOURS * 9, ("-", "--", "-.", ":") * 9, strict=False
        ):
            if len(values):
                share, _ = np.histogram(np.minimum(values, edges[-1] - 1), edges)
                label = f"{name} ({len(values):,})"
                axes.stairs(100 * share / len(values), edges, color=colour, linestyle=style, linewidth=1.4, label=label)
        if limit is not None and limit <= edges[-1]:
            axes.axvline(limit, color="black", linewidth=0.8, linestyle=(0, (1, 2)), label=f"{key} = {limit}")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(f"length, {unit} (the last bin holds the longest 0.5 %)", fontsize=9)
        axes.set_ylabel("share, %", fontsize=9)
        axes.set_xlim(0, edges[-1])
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _whole(contents: Contents) -> np.ndarray:
    lengths = contents.prompt_length.astype(np.int64)
    np.add.at(lengths, contents.tree, contents.response_length)
    return lengths


def _figures(one: SetReport, unit: str) -> Iterator[tuple[str, str]]:
    if one.counts is not None:
        yield from _fates(one.counts)
    yield "examples on this side", f"{one.examples:,}"
    if any(source.weight != 1 for source in one.sources):
        yield "examples an epoch", f"{sum(source.an_epoch for source in one.sources):,.0f}"
    yield unit, f"{one.tokens:,}"
    yield "of which targets", f"{one.targets:,}"
    yield "examples twice", f"{one.duplicates.examples:,}"
    if one.kind != "text":
        yield "prompts again", f"{one.duplicates.prompts:,}"
    if one.kind == "ranking":
        yield "prompts", f"{one.prompts:,}"
        yield "responses twice in a ranking", f"{one.duplicates.responses:,}"
        yield "responses a ranking", ", ".join(f"{k}: {n:,}" for k, n in one.answers.items())
        yield "comparisons", f"{one.comparisons:,}"
        yield "of which ties", f"{one.tied or 0:.1%}"
        yield "rankings of ties alone", f"{one.all_tied:,}"
        if one.over_row_length is not None and one.tree is not None:
            yield f"longest (a packed row: {one.over_row_length.limit:,})", f"{one.tree.max:,}"
    if one.wanted is not None:
        yield "wanted answers", f"{one.wanted:.1%}"
    for over, label in (
        (one.over_row_length, "longer than a packed row"),
        (one.over_max_length, "longer than max_length"),
    ):
        if over is not None:
            yield f"{label} ({over.limit:,})", f"{over.trees:,}"


def _fates(counts: Counts) -> Iterator[tuple[str, str]]:
    """What became of the rows."""
    yield "rows", f"{counts.rows:,}"
    yield "kept", f"{counts.kept:,}"
    for reason, number in counts.bad.items():
        yield f"bad: {reason}", f"{number:,}"
    for name, label in (
        ("dropped_long_prompt", "dropped: long prompt"),
        ("dropped_long_response", "dropped: long response"),
        ("dropped_no_target", "dropped: nothing to learn"),
        ("dropped_by_template", "dropped by the data template"),
        ("dropped_all_tied", "dropped: all answers tie"),
        ("prompt_truncated", "prompts shortened"),
        ("response_truncated", "responses cut"),
    ):
        if number := getattr(counts, name):
            yield label, f"{number:,}"


def _cells(spread: Spread) -> list[str]:
    whole = (spread.p50, spread.p90, spread.p95, spread.p99, spread.max)
    return [f"{spread.mean:,.1f}", *(f"{value:,}" for value in whole)]


def _sources_table(report: Report) -> Table:
    from rich.table import Table

    table = Table(title="Sources", title_justify="left")
    for heading in ("", "source", "weight", "rows", "examples", report.unit, "an epoch"):
        table.add_column(heading, justify="left" if heading in ("", "source") else "right")
    for name, one in report.sets.items():
        for source in one.sources:
            figures = (source.counts.rows, source.examples, source.tokens)
            cells = [f"{figure:,}" for figure in figures]
            table.add_row(name, source.name, f"{source.weight:g}", *cells, f"{source.an_epoch:,.0f}")
    return table


def _listed(heading: str, items: list[str] | tuple[str, ...], number: int) -> Iterator[str]:
    yield f"{heading}:"
    yield from (f"  {item}" for item in items)
    if number > len(items):
        yield f"  and {number - len(items):,} more"
