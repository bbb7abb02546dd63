"""`rlhf report`: one HTML page that tells what lies in a folder of runs. No torch, no network; runs are only read."""

from __future__ import annotations

from pathlib import Path

import rich.table
from rich.console import Console
from rich.markup import escape

from rlhf_pipeline import runtime
from rlhf_pipeline.config.stages import ReportConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import disk_errors, write_text
from rlhf_pipeline.report.collect import collect
from rlhf_pipeline.report.models import overview
from rlhf_pipeline.report.page import render
from rlhf_pipeline.report.parts import Table

SHOWN = ("gold score", "beats", "KL", "tokens/s", "minutes")


def main(config: ReportConfig) -> None:
    """Write the page, and say where it is.

    Raises:
        UserError: for a folder without anything to tell of, a damaged file in it, or a page that cannot be written.
    """
    if not runtime.is_main():
        return
    folder = Path(str(config.folder))
    output = folder / "report.html" if config.output is None else Path(config.output)
    found = collect(folder)
    if output.is_dir() or not output.parent.is_dir():
        what = "is a folder" if output.is_dir() else f"there is no folder {output.parent}"
        raise UserError(f"output={output}: {what}; name the file that is to be written")
    page = render(found, title=config.title, most_samples=config.samples)
    with disk_errors("the report", output, kept="The runs are as they were."):
        write_text(output, page)
    console = Console(highlight=False)
    if (models := overview(found)) is not None:
        console.print(_for_terminals(models))
    counted = f"{len(found.stages)} training runs, {len(found.evaluations)} evaluations"
    console.print(f"{output} ({counted})", markup=False, soft_wrap=True)


def _for_terminals(models: Table) -> rich.table.Table:
    """The columns by which a recipe is judged, as far as they are there."""
    shown = [0, *(i for i, head in enumerate(models.head) if head.startswith(SHOWN))]
    made = rich.table.Table(title=models.title)
    for i in shown:
        made.add_column(escape(models.head[i]), justify="left" if i == 0 else "right")
    for row in models.rows:
        cells = (row[i] for i in shown)
        made.add_row(*("" if cell is None else escape(f"{cell.text} {cell.note}".strip()) for cell in cells))
    return made
